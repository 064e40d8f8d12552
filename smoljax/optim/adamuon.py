"""AdaMuon: the sign of the momentum, orthogonalised, and divided entry by entry by its running RMS.

B matrices of one piece of a leaf, I inputs, O outputs
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from smoljax.optim.decay import add_decayed_weights
from smoljax.optim.hyperparameters import check_float_dtype, check_number
from smoljax.optim.matrices import (
    Specs,
    check_matrices,
    frobenius_norm,
    specs_by_path,
    to_matrices,
    tree_of_matrices,
)
from smoljax.optim.muon import accumulate
from smoljax.optim.orthogonalize import orthogonalizer
from smoljax.optim.partition import by_path

UPDATE_RMS = 0.2  # AdamW's, so that its learning rate and weight decay carry over.


class AdaMuonState(NamedTuple):
    """State of scale_by_adamuon.

    Attributes:
      momentum: tree of the parameters' shapes, the moving average of the gradient.
      second_moment: float32 tree of the parameters' shapes, the moving average of O^2.
    """

    momentum: optax.Updates
    second_moment: optax.Updates


def adamuon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    specs: Specs = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: object | None = None,
    cautious: bool = False,
    beta: float = 0.95,
    nesterov: bool = False,
    coefficients: str | tuple = "polar_express",
    steps: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    momentum_dtype: jax.typing.DTypeLike | None = None,
    eps: float = 1e-8,
    mesh: Mesh | None = None,
    mesh_axis: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformation:
    """AdaMuon (arXiv 2507.11005) with decoupled weight decay, for a tree that holds nothing but matrices.

    Args:
      learning_rate: a number or a schedule; AdamW's fits.
      specs: as in scale_by_adamuon, like all that follow but the next three.
      weight_decay: as in add_decayed_weights, and weight_decay_mask and cautious.

    Raises:
      SmoljaxError: as scale_by_adamuon.
    """
    return optax.chain(
        scale_by_adamuon(
            specs,
            beta=beta,
            nesterov=nesterov,
            coefficients=coefficients,
            steps=steps,
            dtype=dtype,
            momentum_dtype=momentum_dtype,
            eps=eps,
            mesh=mesh,
            mesh_axis=mesh_axis,
        ),
        add_decayed_weights(weight_decay, weight_decay_mask, cautious=cautious),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_adamuon(
    specs: Specs = None,
    *,
    beta: float = 0.95,
    nesterov: bool = False,
    coefficients: str | tuple = "polar_express",
    steps: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    momentum_dtype: jax.typing.DTypeLike | None = None,
    eps: float = 1e-8,
    mesh: Mesh | None = None,
    mesh_axis: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformation:
    """Replaces the gradient of each matrix by AdaMuon's direction, with an update RMS of 0.2 (arXiv 2507.11005).

    m <- beta * m + (1 - beta) * g; O = Newton-Schulz(sign(m)); v <- beta * v + (1 - beta) * O^2; then
    O / (sqrt(v) + eps), times 0.2 * sqrt(d_in * d_out) over its Frobenius norm. That last factor takes away the
    bias of a v that starts at 0. State: two arrays as large as the parameters, as Adam's.

    The authors' code (github.com/Chongjie-Si/AdaMuon, gpt2/models/optimizers/adamuon.py) has the same equations with
    nesterov on and coefficients "keller", and adds eps to the norm too. Its Megatron version sums gradients instead of
    averaging them, which no sign shows.

    Args:
      specs: as in scale_by_muon.
      beta: decay of momentum and second moment.
      nesterov: whether the sign is that of beta * m + (1 - beta) * g; the paper has it of m.
      coefficients: as in scale_by_muon, and steps, dtype, momentum_dtype, mesh and mesh_axis.
      eps: added to sqrt(v).

    Raises:
      SmoljaxError: as scale_by_muon.
    """
    check_number("beta", beta, at_least=0, below=1)
    check_number("eps", eps, at_least=0)
    check_float_dtype("momentum_dtype", momentum_dtype)
    orthogonalize = orthogonalizer(
        coefficients=coefficients, steps=steps, dtype=dtype, mesh=mesh, mesh_axis=mesh_axis
    )

    def init(params: optax.Params) -> AdaMuonState:
        check_matrices(params, specs_by_path(specs, params))

        def zeros(dtype):
            return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=dtype), params)

        return AdaMuonState(zeros(momentum_dtype or jnp.float32), zeros(jnp.float32))

    def update(
        updates: optax.Updates, state: AdaMuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AdaMuonState]:
        del params
        spec = specs_by_path(specs, updates)
        momentum, direction = accumulate(
            state.momentum, updates, beta=beta, nesterov=nesterov, momentum="ema"
        )
        pieces = orthogonalize(jax.tree.map(jnp.sign, direction), spec)
        moments, adapted = {}, {}
        for path, moment in by_path(state.second_moment).items():
            orthogonal = [piece.matrices for piece in pieces[path]]
            moments[path] = [
                beta * v + (1 - beta) * jnp.square(o)
                for o, v in zip(orthogonal, to_matrices(moment, spec[path]))
            ]
            adapted[path] = [
                _with_update_rms(o / (jnp.sqrt(v) + eps)) for o, v in zip(orthogonal, moments[path])
            ]
        return tree_of_matrices(adapted, updates, spec), AdaMuonState(
            momentum=jax.tree.map(lambda m: m.astype(momentum_dtype or jnp.float32), momentum),
            second_moment=tree_of_matrices(moments, state.second_moment, spec),
        )

    return optax.GradientTransformation(init, update)


def _with_update_rms(x_BIO: jax.Array) -> jax.Array:
    """Each matrix scaled to that RMS; a zero matrix stays zero."""
    norm_B11 = frobenius_norm(x_BIO)
    size = x_BIO.shape[1] * x_BIO.shape[2]
    return x_BIO * (UPDATE_RMS * size**0.5 / jnp.where(norm_B11 == 0, 1, norm_B11))

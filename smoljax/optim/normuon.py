"""NorMuon: Muon whose output neurons get updates of like size.

B matrices of one piece of a leaf, I inputs, O output neurons
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from smoljax.optim.decay import add_decayed_weights
from smoljax.optim.hyperparameters import check_number
from smoljax.optim.matrices import (
    Specs,
    check_matrices,
    frobenius_norm,
    from_statistics,
    matrix_shapes,
    specs_by_path,
    to_matrices,
    to_statistics,
    tree_of_leaves,
    tree_of_matrices,
)
from smoljax.optim.muon import scale_by_muon
from smoljax.optim.partition import by_path


class NeuronState(NamedTuple):
    """State of normalize_neurons.

    Attributes:
      second_moment: tree of the parameters with a float32 number for each output neuron: the axes of the leaf, its input
        axes of size 1 (see matrices.from_statistics).
    """

    second_moment: optax.Updates


def normuon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    specs: Specs = None,
    b2: float = 0.95,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: object | None = None,
    cautious: bool = False,
    beta: float = 0.95,
    nesterov: bool = True,
    momentum: str = "ema",
    coefficients: str | tuple = "polar_express",
    steps: int | None = None,
    scale: str = "rms",
    dtype: jax.typing.DTypeLike | None = None,
    momentum_dtype: jax.typing.DTypeLike | None = None,
    eps: float = 1e-7,
    mesh: Mesh | None = None,
    mesh_axis: str | tuple[str, ...] | None = None,
    metrics: bool = False,
) -> optax.GradientTransformation:
    """NorMuon (arXiv 2510.05491) with decoupled weight decay, for a tree that holds nothing but matrices.

    Args:
      learning_rate: a number or a schedule.
      specs: as in muon, like all that follow but b2.
      b2: decay of the second moment of each neuron.

    Raises:
      SmoljaxError: as muon.
    """
    return optax.chain(
        scale_by_muon(
            specs,
            beta=beta,
            nesterov=nesterov,
            momentum=momentum,
            coefficients=coefficients,
            steps=steps,
            scale=scale,
            dtype=dtype,
            momentum_dtype=momentum_dtype,
            eps=eps,
            mesh=mesh,
            mesh_axis=mesh_axis,
            metrics=metrics,
        ),
        normalize_neurons(specs, b2=b2),
        add_decayed_weights(weight_decay, weight_decay_mask, cautious=cautious),
        optax.scale_by_learning_rate(learning_rate),
    )


def normalize_neurons(
    specs: Specs = None, *, b2: float = 0.95, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Divides the update of each output neuron by its running RMS; every matrix keeps its norm (arXiv 2510.05491).

    v <- b2 * v + (1 - b2) * mean over the inputs of O^2; then O / (sqrt(v) + eps), rescaled to the Frobenius norm of O.
    It follows scale_by_muon: the factor by shape is the same for all neurons of a matrix, so that it may stand
    before or behind this link, and so is the bias of a v that starts at 0, which needs no correction.

    The state has the axes of the leaf in their order, input axes of size 1. So a kernel that is sharded along its
    layers, heads or outputs has its second moments on the same devices, and no number of it is ever gathered.

    Args:
      specs: as in scale_by_muon.
      b2: decay of the second moment.
      eps: added to its square root.

    Raises:
      SmoljaxError: at once for a number out of range; in init for a leaf that holds no matrix or no real float.
    """
    check_number("b2", b2, at_least=0, below=1)
    check_number("eps", eps, at_least=0)

    def init(params: optax.Params) -> NeuronState:
        spec = specs_by_path(specs, params)
        check_matrices(params, spec)
        moments = {}
        for path, leaf in by_path(params).items():
            zeros = [
                jnp.zeros((count, 1, d_out), jnp.float32)
                for count, _, d_out in matrix_shapes(path, leaf.shape, spec[path])
            ]
            moments[path] = from_statistics(zeros, leaf.shape, spec[path], per="neuron")
        return NeuronState(second_moment=tree_of_leaves(moments, params))

    def update(
        updates: optax.Updates, state: NeuronState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, NeuronState]:
        del params
        spec = specs_by_path(specs, updates)
        moments, normalized = by_path(state.second_moment), {}
        for path, leaf in by_path(updates).items():
            layout = leaf.shape, spec[path]
            pieces = to_matrices(leaf.astype(jnp.float32), spec[path])
            squares = [
                b2 * v + (1 - b2) * jnp.mean(jnp.square(o), axis=1, keepdims=True)
                for o, v in zip(pieces, to_statistics(moments[path], *layout, per="neuron"))
            ]
            moments[path] = from_statistics(squares, *layout, per="neuron")
            normalized[path] = [
                with_norm_of(o / (jnp.sqrt(v) + eps), o) for o, v in zip(pieces, squares)
            ]
        updates = tree_of_matrices(normalized, updates, spec)
        return updates, NeuronState(second_moment=tree_of_leaves(moments, state.second_moment))

    return optax.GradientTransformation(init, update)


def with_norm_of(x_BIO: jax.Array, like_BIO: jax.Array) -> jax.Array:
    """Each matrix of x with the Frobenius norm of its fellow; a zero matrix stays zero."""
    norm_B11, wanted_B11 = frobenius_norm(x_BIO), frobenius_norm(like_BIO)
    return x_BIO * (wanted_B11 / jnp.where(norm_B11 == 0, 1, norm_B11))

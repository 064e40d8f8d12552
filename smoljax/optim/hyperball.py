"""Hyperball: every matrix keeps the norm that it was initialised with, and the learning rate is an angle.

B matrices of one piece of a leaf, I inputs, O outputs
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from smoljax.errors import SmoljaxError
from smoljax.optim.hyperparameters import check_float_dtype, check_number
from smoljax.optim.matrices import (
    Specs,
    check_matrices,
    frobenius_norm,
    from_statistics,
    specs_by_path,
    to_matrices,
    to_statistics,
    tree_of_leaves,
    tree_of_matrices,
)
from smoljax.optim.muon import scale_by_muon
from smoljax.optim.partition import by_path


class HyperballState(NamedTuple):
    """State of hyperball.

    Attributes:
      count: int32 scalar, updates so far.
      radius: tree of the parameters with a float32 number for each matrix, its Frobenius norm at the start: the axes of
        the leaf, those of its matrices of size 1 (see matrices.from_statistics).
    """

    count: jax.Array
    radius: optax.Params


def muonh(
    learning_rate: optax.ScalarOrSchedule,
    *,
    specs: Specs = None,
    beta: float = 0.95,
    nesterov: bool = True,
    momentum: str = "ema",
    coefficients: str | tuple = "polar_express",
    steps: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    momentum_dtype: jax.typing.DTypeLike | None = None,
    eps: float = 1e-7,
    mesh: Mesh | None = None,
    mesh_axis: str | tuple[str, ...] | None = None,
    metrics: bool = False,
) -> optax.GradientTransformation:
    """MuonH: hyperball with Muon's direction, for a tree that holds nothing but matrices (arXiv 2606.16899).

    It has no scale by shape and no weight decay: hyperball takes the direction alone and holds the norm.

    Args:
      learning_rate: as in hyperball.
      specs: as in scale_by_muon, like all that follow.

    Raises:
      SmoljaxError: as scale_by_muon and hyperball.
    """
    direction = scale_by_muon(
        specs,
        beta=beta,
        nesterov=nesterov,
        momentum=momentum,
        coefficients=coefficients,
        steps=steps,
        dtype=dtype,
        momentum_dtype=momentum_dtype,
        eps=eps,
        mesh=mesh,
        mesh_axis=mesh_axis,
        metrics=metrics,
    )
    return optax.chain(direction, hyperball(learning_rate, specs))


def adamh(
    learning_rate: optax.ScalarOrSchedule,
    *,
    specs: Specs = None,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    momentum_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
    """AdamH: hyperball with Adam's direction, for a tree that holds nothing but matrices (arXiv 2606.16899).

    Args:
      learning_rate: as in hyperball, and specs.
      b1: as in optax.scale_by_adam, and b2 and eps.
      momentum_dtype: dtype of the first moment; None: the parameters' dtype.

    Raises:
      SmoljaxError: as hyperball, and at once for a number out of range.
    """
    check_number("b1", b1, at_least=0, below=1)
    check_number("b2", b2, at_least=0, below=1)
    check_float_dtype("momentum_dtype", momentum_dtype)
    direction = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=momentum_dtype)
    return optax.chain(direction, hyperball(learning_rate, specs))


def hyperball(
    learning_rate: optax.ScalarOrSchedule, specs: Specs = None
) -> optax.GradientTransformation:
    """Turns a direction u into a step on the sphere of the initial norm R = |W_0| of each matrix (arXiv 2606.16899).

    W' = R * normalize(W - learning_rate * R * u / |u|), all norms Frobenius norms. The last link of a chain: it
    takes the place of weight decay and learning rate, and returns W' - W.

    This is the equation of the authors' post (Wen et al., Hyperball Optimization, part 1, December 2025). Their code
    (github.com/marin-community/marin, levanter's optim/muonh.py and adamh.py) holds the norm that W has at the moment, whose
    rounding adds up; and beside MuonH a head is AdamH's there, and AdamW's in `smoljax.optim.build`.

    A matrix whose u is zero stays as it is, to the bit. The norm of W cannot be held at 0: a zero matrix is refused in init,
    where its values can be seen. Inside jit they cannot; there such a matrix becomes NaN in its first update.

    Args:
      learning_rate: tangent of the angle of a step that is at right angles to W; a number or a schedule. Below 1: at 1, a
        direction along W leads to the origin.
      specs: as in scale_by_muon.

    Raises:
      SmoljaxError: at once for a rate out of range; in init for a leaf that holds no matrix or no real float, or a matrix of
        norm 0; in update, when it gets no parameters.
    """
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate, at_least=0, below=1)

    def init(params: optax.Params) -> HyperballState:
        spec = specs_by_path(specs, params)
        check_matrices(params, spec)
        radius = {}
        for path, leaf in by_path(params).items():
            norms = [frobenius_norm(w_BIO) for w_BIO in to_matrices(leaf, spec[path])]
            _check_radius(path, norms)
            radius[path] = from_statistics(norms, leaf.shape, spec[path], per="matrix")
        return HyperballState(jnp.zeros([], jnp.int32), tree_of_leaves(radius, params))

    def update(
        updates: optax.Updates, state: HyperballState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, HyperballState]:
        if params is None:
            raise SmoljaxError(
                "hyperball needs the parameters: call update(updates, state, params)"
            )
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        spec = specs_by_path(specs, updates)
        weights, radius, steps = by_path(params), by_path(state.radius), {}
        for path, leaf in by_path(updates).items():
            pieces = zip(
                to_matrices(weights[path].astype(jnp.float32), spec[path]),
                to_matrices(leaf.astype(jnp.float32), spec[path]),
                to_statistics(radius[path], leaf.shape, spec[path], per="matrix"),
            )
            steps[path] = [_step(w, u, radius_B11, rate) for w, u, radius_B11 in pieces]
        state = HyperballState(optax.safe_increment(state.count), state.radius)
        return tree_of_matrices(steps, updates, spec), state

    return optax.GradientTransformation(init, update)


def _step(
    w_BIO: jax.Array, u_BIO: jax.Array, radius_B11: jax.Array, rate: float | jax.Array
) -> jax.Array:
    """W' - W of each matrix."""
    norm_B11 = frobenius_norm(u_BIO)
    is_zero_B11 = norm_B11 == 0
    target_BIO = w_BIO - rate * radius_B11 * (u_BIO / jnp.where(is_zero_B11, 1, norm_B11))
    target_BIO = radius_B11 * (target_BIO / frobenius_norm(target_BIO))
    return jnp.where(is_zero_B11, 0, target_BIO - w_BIO)


def _check_radius(path: str, norms: list[jax.Array]) -> None:
    """Raises a SmoljaxError for a matrix of norm 0, where the values are known."""
    zeros = sum(int(jnp.sum(norm == 0)) for norm in norms if not isinstance(norm, jax.core.Tracer))
    if zeros:
        count = sum(len(norm) for norm in norms)
        raise SmoljaxError(
            f"parameter {path} has {zeros} of {count} matrices that are zero, whose norm Hyperball cannot hold: "
            "initialise them with random numbers, or give the parameter to another optimizer"
        )

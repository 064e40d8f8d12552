"""Muon: momentum whose matrices are orthogonalised and scaled by their shape."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from smoljax.errors import SmoljaxError
from smoljax.optim.decay import add_decayed_weights
from smoljax.optim.hyperparameters import check_float_dtype, check_number
from smoljax.optim.matrices import Specs, check_matrices, specs_by_path, tree_of_matrices
from smoljax.optim.orthogonalize import Orthogonal, orthogonalizer
from smoljax.optim.partition import by_path

# Factor on the orthogonal matrix of a kernel with d_in inputs and d_out outputs.
SCALES = {
    # Unit RMS-to-RMS operator norm (arXiv 2310.17813): the learning rate carries over to other widths.
    "spectral": lambda d_in, d_out: math.sqrt(d_out / d_in),
    # Update RMS 0.2 as AdamW's (Moonlight, arXiv 2502.16982): AdamW's learning rate and weight decay carry over.
    "rms": lambda d_in, d_out: 0.2 * math.sqrt(max(d_in, d_out)),
    # github.com/KellerJordan/Muon.
    "keller": lambda d_in, d_out: math.sqrt(max(1.0, d_out / d_in)),
}

MOMENTA = ("ema", "heavy_ball")


class MuonMetrics(NamedTuple):
    """What the last update did to one leaf.

    Attributes:
      orthogonality_error: float32 scalar, RMS of sigma^2 - 1 over the singular values of all its orthogonalised matrices.
      momentum_cosine: float32 scalar, cosine of the angle between its momentum, this gradient included, and the gradient.
    """

    orthogonality_error: jax.Array
    momentum_cosine: jax.Array


class MuonState(NamedTuple):
    """State of scale_by_muon.

    Attributes:
      count: int32 scalar, updates so far.
      momentum: tree of the parameters' shapes, the moving average (or sum) of the gradient.
      metrics: MuonMetrics of each leaf, by its path; None unless asked for.
    """

    count: jax.Array
    momentum: optax.Updates
    metrics: dict[str, MuonMetrics] | None = None


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    specs: Specs = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: object | None = None,
    cautious: bool = False,
    beta: float = 0.95,
    nesterov: bool = True,
    momentum: str = "ema",
    bias_correction: bool = False,
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
    """Muon with decoupled weight decay, for a tree that holds nothing but matrices.

    W <- W * (1 - learning_rate * weight_decay) - learning_rate * scale * O. The decay uses the learning rate as given,
    not multiplied by the scale (arXiv 2502.16982). Embedding, head, norms and biases are not Muon's: see
    `smoljax.optim.build`, or put this into optax.partition.

    Args:
      learning_rate: a number or a schedule.
      specs: as in scale_by_muon, like all that follow but the next three.
      weight_decay: as in add_decayed_weights, a number or a schedule.
      weight_decay_mask: as in add_decayed_weights.
      cautious: as in add_decayed_weights.

    Raises:
      SmoljaxError: as scale_by_muon.
    """
    return optax.chain(
        scale_by_muon(
            specs,
            beta=beta,
            nesterov=nesterov,
            momentum=momentum,
            bias_correction=bias_correction,
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
        add_decayed_weights(weight_decay, weight_decay_mask, cautious=cautious),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_muon(
    specs: Specs = None,
    *,
    beta: float = 0.95,
    nesterov: bool = True,
    momentum: str = "ema",
    bias_correction: bool = False,
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
    """Replaces the gradient of each matrix by scale * orthogonalised momentum (github.com/KellerJordan/Muon).

    "ema": m <- beta * m + (1 - beta) * g, and the iteration runs on beta * m + (1 - beta) * g with Nesterov, else on m.
    "heavy_ball" (Moonlight, arXiv 2502.16982): m <- beta * m + g, and it runs on beta * m + g, else on m. The updates
    are the same, as Newton-Schulz removes the common factor; the momentum is 1 / (1 - beta) times as large.
    Matrices of one shape, whatever leaf they are in and whichever way round, are stacked into one batched iteration.

    Args:
      specs: tree with a MatrixSpec for each leaf, or a function from the parameters to one. None: the last two
        axes of every leaf are input and output, and the axes before count matrices.
      beta: momentum.
      nesterov: whether to look one gradient ahead.
      momentum: "ema" or "heavy_ball".
      bias_correction: weigh momentum and gradient as optax.contrib.muon does (Dozat's correction, which
        differs from the plain rule in the first steps when nesterov is on); for "ema" alone.
      coefficients: as in newton_schulz.
      steps: steps of newton_schulz.
      scale: "rms" (0.2 * sqrt(max(d_in, d_out))), "spectral" (sqrt(d_out / d_in)) or "keller" (sqrt(max(1, d_out / d_in))),
        with the sizes of each matrix: where a head is a matrix of its own, the head's.
      dtype: dtype of the products; None: bfloat16 on accelerators, float32 on a CPU (the mesh's devices tell, or JAX's default).
      momentum_dtype: dtype of the state; None: float32.
      eps: as in newton_schulz.
      mesh: with mesh_axis: the stack of matrices is split over that axis, so that every matrix lies whole on a device and
        the iteration needs no communication. Each matrix is resharded once on the way in and once on the way out.
      mesh_axis: name, or names, of the mesh axes to split over; all axes of the mesh share the work best. Name first
        the axes that the parameters are split over, and last those that hold copies of them.
      metrics: whether the state holds MuonMetrics of every leaf.

    Raises:
      SmoljaxError: at once for an unknown option or a number out of range; in init for a leaf that holds no matrix or no real float.
    """
    for field, value, choices in (("scale", scale, SCALES), ("momentum", momentum, MOMENTA)):
        if value not in choices:
            raise SmoljaxError(f"{field} is {value!r}: choose one of {', '.join(choices)}")
    if bias_correction and momentum != "ema":
        raise SmoljaxError(f"bias_correction is for momentum 'ema', and momentum is {momentum!r}")
    check_number("beta", beta, at_least=0, below=1)
    check_float_dtype("momentum_dtype", momentum_dtype)
    orthogonalize = orthogonalizer(
        coefficients=coefficients,
        steps=steps,
        dtype=dtype,
        eps=eps,
        mesh=mesh,
        mesh_axis=mesh_axis,
        measure=_squared_error if metrics else None,
    )

    def init(params: optax.Params) -> MuonState:
        check_matrices(params, specs_by_path(specs, params))
        zero = MuonMetrics(jnp.zeros([], jnp.float32), jnp.zeros([], jnp.float32))
        return MuonState(
            count=jnp.zeros([], jnp.int32),
            momentum=jax.tree.map(
                lambda leaf: jnp.zeros_like(leaf, dtype=momentum_dtype or jnp.float32), params
            ),
            metrics=dict.fromkeys(by_path(params), zero) if metrics else None,
        )

    def update(
        updates: optax.Updates, state: MuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MuonState]:
        del params
        spec = specs_by_path(specs, updates)
        count = optax.safe_increment(state.count)
        new_momentum, direction = accumulate(
            state.momentum,
            updates,
            beta=beta,
            nesterov=nesterov,
            momentum=momentum,
            count=count if bias_correction else None,
        )
        pieces = orthogonalize(direction, spec)
        scaled = {
            path: [o.matrices * SCALES[scale](*o.matrices.shape[1:]) for o in pieces[path]]
            for path in pieces
        }
        return tree_of_matrices(scaled, updates, spec), MuonState(
            count=count,
            momentum=jax.tree.map(lambda m: m.astype(momentum_dtype or jnp.float32), new_momentum),
            metrics=_metrics(pieces, new_momentum, updates) if metrics else None,
        )

    return optax.GradientTransformation(init, update)


def accumulate(
    state: optax.Updates,
    gradient: optax.Updates,
    *,
    beta: float,
    nesterov: bool,
    momentum: str,
    count: jax.Array | None = None,
) -> tuple[optax.Updates, optax.Updates]:
    """The new momentum, and the direction that it gives, both in float32; see scale_by_muon.

    Args:
      state: the momentum before.
      gradient: the gradient now.
      count: number of this update, for the bias correction; None for no correction.
    """
    share = 1 - beta if momentum == "ema" else 1.0
    gradient = jax.tree.map(lambda g: g.astype(jnp.float32), gradient)
    new = jax.tree.map(lambda m, g: beta * m.astype(jnp.float32) + share * g, state, gradient)
    on_momentum, on_gradient = (beta, share) if nesterov else (1.0, 0.0)
    if count is not None:
        on_momentum /= 1 - beta ** (count + 1 if nesterov else count)
        on_gradient /= 1 - beta**count
    return new, jax.tree.map(lambda m, g: on_momentum * m + on_gradient * g, new, gradient)


def _squared_error(o_BMN: jax.Array) -> jax.Array:
    """Sum of (sigma^2 - 1)^2 over the singular values of each matrix: the squared norm of O O^T - I."""
    a_BMM = jnp.einsum("...mn,...kn->...mk", o_BMN, o_BMN, precision=jax.lax.Precision.HIGHEST)
    eye_BMM = jnp.broadcast_to(jnp.eye(a_BMM.shape[-1], dtype=a_BMM.dtype), a_BMM.shape)
    return jnp.sum(jnp.square(a_BMM - eye_BMM), axis=(-2, -1))


def _metrics(
    pieces: dict[str, list[Orthogonal]], momentum: optax.Updates, gradient: optax.Updates
) -> dict[str, MuonMetrics]:
    momentum, gradient = by_path(momentum), by_path(gradient)
    metrics = {}
    for path in pieces:
        values = sum(len(o.matrices) * min(o.matrices.shape[1:]) for o in pieces[path])
        error = jnp.sqrt(sum(jnp.sum(o.measures) for o in pieces[path]) / values)
        m, g = momentum[path], gradient[path].astype(jnp.float32)
        norms = jnp.sqrt(jnp.sum(m * m)) * jnp.sqrt(jnp.sum(g * g))
        cosine = jnp.sum(m * g) / jnp.where(norms == 0, 1, norms)
        metrics[path] = MuonMetrics(orthogonality_error=error, momentum_cosine=cosine)
    return metrics

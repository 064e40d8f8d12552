"""Muon: momentum whose matrices are orthogonalised, grouped by shape into batched products.

B stacked matrices, M rows, N columns with M <= N
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from smoljax.errors import SmoljaxError
from smoljax.optim.matrices import (
    Specs,
    from_matrices,
    matrix_shapes,
    specs_by_path,
    to_matrices,
)
from smoljax.optim.newton_schulz import coefficient_rows, newton_schulz
from smoljax.optim.partition import MatrixSpec, by_path, check_float

# Factor on the orthogonal matrix of a kernel with d_in inputs and d_out outputs.
SCALES = {
    # Unit RMS-to-RMS operator norm (arXiv 2310.17813): the learning rate carries over to other widths.
    "spectral": lambda d_in, d_out: math.sqrt(d_out / d_in),
    # Update RMS 0.2 as AdamW's (Moonlight, arXiv 2502.16982): AdamW's learning rate and weight decay carry over.
    "rms": lambda d_in, d_out: 0.2 * math.sqrt(max(d_in, d_out)),
    # github.com/KellerJordan/Muon.
    "keller": lambda d_in, d_out: math.sqrt(max(1.0, d_out / d_in)),
}


class MuonState(NamedTuple):
    """State of scale_by_muon.

    Attributes:
      count: int32 scalar, updates so far.
      momentum: tree of the parameters' shapes, the moving average of the gradient.
    """

    count: jax.Array
    momentum: optax.Updates


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    specs: Specs = None,
    weight_decay: float = 0.0,
    weight_decay_mask: object | None = None,
    beta: float = 0.95,
    nesterov: bool = True,
    bias_correction: bool = False,
    coefficients: str | tuple = "polar_express",
    steps: int | None = None,
    scale: str = "rms",
    dtype: jax.typing.DTypeLike | None = None,
    momentum_dtype: jax.typing.DTypeLike | None = None,
    eps: float = 1e-7,
    mesh: Mesh | None = None,
    mesh_axis: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformation:
    """Muon with decoupled weight decay, for a tree that holds nothing but matrices.

    W <- W * (1 - learning_rate * weight_decay) - learning_rate * scale * O. The decay uses the learning rate as given,
    not multiplied by the scale (arXiv 2502.16982). Embedding, head, norms and biases are not Muon's: see
    `smoljax.optim.build`, or put this into optax.partition.

    Args:
      learning_rate: a number or a schedule.
      specs: as in scale_by_muon, like all that follow but the next two.
      weight_decay: strength of the decay.
      weight_decay_mask: as in optax.add_decayed_weights.

    Raises:
      SmoljaxError: as scale_by_muon.
    """
    return optax.chain(
        scale_by_muon(
            specs,
            beta=beta,
            nesterov=nesterov,
            bias_correction=bias_correction,
            coefficients=coefficients,
            steps=steps,
            scale=scale,
            dtype=dtype,
            momentum_dtype=momentum_dtype,
            eps=eps,
            mesh=mesh,
            mesh_axis=mesh_axis,
        ),
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_muon(
    specs: Specs = None,
    *,
    beta: float = 0.95,
    nesterov: bool = True,
    bias_correction: bool = False,
    coefficients: str | tuple = "polar_express",
    steps: int | None = None,
    scale: str = "rms",
    dtype: jax.typing.DTypeLike | None = None,
    momentum_dtype: jax.typing.DTypeLike | None = None,
    eps: float = 1e-7,
    mesh: Mesh | None = None,
    mesh_axis: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformation:
    """Replaces the gradient of each matrix by scale * orthogonalised momentum (github.com/KellerJordan/Muon).

    m <- beta * m + (1 - beta) * g, and the iteration runs on beta * m + (1 - beta) * g with Nesterov, else on m.
    (The heavy-ball form m <- beta * m + g gives the same updates: Newton-Schulz removes the common factor.)
    Matrices of one shape, whatever leaf they are in and whichever way round, are stacked into one batched iteration.

    Args:
      specs: tree with a MatrixSpec for each leaf, or a function from the parameters to one. None: the last two
        axes of every leaf are input and output, and the axes before count matrices.
      beta: momentum.
      nesterov: whether to look one gradient ahead.
      bias_correction: weigh momentum and gradient as optax.contrib.muon does (Dozat's correction, which
        differs from the plain rule in the first steps when nesterov is on).
      coefficients: as in newton_schulz.
      steps: steps of newton_schulz.
      scale: "rms" (0.2 * sqrt(max(d_in, d_out))), "spectral" (sqrt(d_out / d_in)) or "keller" (sqrt(max(1, d_out / d_in))).
      dtype: dtype of the products; None: bfloat16 on accelerators, float32 on a CPU (the mesh's devices tell, or JAX's default).
      momentum_dtype: dtype of the state; None: float32.
      eps: as in newton_schulz.
      mesh: with mesh_axis: the stack of matrices is split over that axis, so that every matrix lies whole on a device and
        the iteration needs no communication. Each matrix is resharded once on the way in and once on the way out.
      mesh_axis: name, or names, of the mesh axes to split over; all axes of the mesh share the work best.

    Raises:
      SmoljaxError: at once for an unknown option; in init for a leaf that holds no matrix or no real float.
    """
    if scale not in SCALES:
        raise SmoljaxError(f"scale is {scale!r}: choose one of {', '.join(SCALES)}")
    coefficient_rows(coefficients, steps)
    stack_sharding = _stack_sharding(mesh, mesh_axis)
    on_cpu = _platform(mesh) == "cpu"
    dtype = dtype or (jnp.float32 if on_cpu else jnp.bfloat16)
    place = _placement(stack_sharding, one_by_one=on_cpu)

    def init(params: optax.Params) -> MuonState:
        spec = specs_by_path(specs, params)
        for path, leaf in by_path(params).items():
            check_float(path, leaf)
            matrix_shapes(path, leaf.shape, spec[path])
        momentum = jax.tree.map(
            lambda leaf: jnp.zeros_like(leaf, dtype=momentum_dtype or jnp.float32), params
        )
        return MuonState(count=jnp.zeros([], jnp.int32), momentum=momentum)

    def update(
        updates: optax.Updates, state: MuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MuonState]:
        del params
        count = optax.safe_increment(state.count)
        average = jax.tree.map(
            lambda m, g: beta * m.astype(jnp.float32) + (1 - beta) * g.astype(jnp.float32),
            state.momentum,
            updates,
        )
        on_average, on_gradient = _momentum_weights(beta, count, nesterov, bias_correction)
        direction = jax.tree.map(
            lambda m, g: on_average * m + on_gradient * g.astype(jnp.float32), average, updates
        )
        orthogonal = _orthogonalize(
            direction,
            specs_by_path(specs, updates),
            scale=SCALES[scale],
            place=place,
            coefficients=coefficients,
            steps=steps,
            dtype=dtype,
            eps=eps,
        )
        orthogonal = jax.tree.map(lambda o, g: o.astype(g.dtype), orthogonal, updates)
        momentum = jax.tree.map(lambda m: m.astype(momentum_dtype or jnp.float32), average)
        return orthogonal, MuonState(count=count, momentum=momentum)

    return optax.GradientTransformation(init, update)


def _momentum_weights(
    beta: float, count: jax.Array, nesterov: bool, bias_correction: bool
) -> tuple[float | jax.Array, float | jax.Array]:
    """What the average and the gradient weigh in the matrix that is orthogonalised; count is that of this update."""
    if not bias_correction:
        return (beta, 1 - beta) if nesterov else (1.0, 0.0)
    if not nesterov:
        return 1 / (1 - beta**count), 0.0
    return beta / (1 - beta ** (count + 1)), (1 - beta) / (1 - beta**count)


def _orthogonalize(
    direction: optax.Updates,
    specs: dict[str, MatrixSpec],
    *,
    scale: Callable[[int, int], float],
    place: Callable[[Callable], Callable],
    **options,
) -> optax.Updates:
    """Orthogonalises every matrix in the tree, all those of one shape in one call."""
    leaves = by_path(direction)
    matrices = {path: list(to_matrices(leaf, specs[path])) for path, leaf in leaves.items()}
    groups: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for path, pieces in matrices.items():
        for index, piece in enumerate(pieces):
            groups.setdefault(tuple(sorted(piece.shape[1:])), []).append((path, index))
    iterate = place(lambda x_BMN: newton_schulz(x_BMN, **options))
    for (rows, _), members in groups.items():
        pieces = [matrices[path][index] for path, index in members]
        stacks = [piece if piece.shape[1] == rows else piece.mT for piece in pieces]
        x_BMN = stacks[0] if len(stacks) == 1 else jnp.concatenate(stacks)
        o_BMN = iterate(x_BMN)
        start = 0
        for (path, index), piece in zip(members, pieces):
            o_piece = o_BMN[start : start + len(piece)] * scale(*piece.shape[1:])
            matrices[path][index] = o_piece if piece.shape[1] == rows else o_piece.mT
            start += len(piece)
    results = [
        from_matrices(matrices[path], leaf.shape, specs[path]) for path, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(direction), results)


def _placement(
    stack_sharding: tuple[NamedSharding, int] | None, *, one_by_one: bool
) -> Callable[[Callable], Callable]:
    """How a function of a stack [B, M, N] runs: split over a mesh axis, matrix by matrix, or all at once."""

    def place(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
        if stack_sharding is None:
            # On a CPU a single matrix and its Gram matrix stay in the cache: a tenth faster than a batch.
            return (lambda x_BMN: jax.lax.map(function, x_BMN)) if one_by_one else function
        sharding, parts = stack_sharding

        def split(x_BMN: jax.Array) -> jax.Array:
            size = len(x_BMN)
            # Zero matrices fill the last devices' share; they stay zero and are cut off again.
            x_BMN = jnp.pad(x_BMN, ((0, -size % parts), (0, 0), (0, 0)))
            o_BMN = function(jax.lax.with_sharding_constraint(x_BMN, sharding))
            return jax.lax.with_sharding_constraint(o_BMN, sharding)[:size]

        return split

    return place


def _platform(mesh: Mesh | None) -> str:
    """Where the update will run: on the mesh's devices, or on the default ones."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def _stack_sharding(
    mesh: Mesh | None, mesh_axis: str | tuple[str, ...] | None
) -> tuple[NamedSharding, int] | None:
    """The sharding of a stack [B, M, N] and the number of parts that it makes; None where nothing is split."""
    if mesh is None or mesh_axis is None:
        if mesh is not None or mesh_axis is not None:
            raise SmoljaxError("give mesh and mesh_axis together, or neither")
        return None
    names = (mesh_axis,) if isinstance(mesh_axis, str) else tuple(mesh_axis)
    for name in names:
        if name not in mesh.shape:
            raise SmoljaxError(
                f"mesh_axis {name!r} is not an axis of the mesh: it has {', '.join(mesh.axis_names)}"
            )
        if name not in mesh.auto_axes:
            raise SmoljaxError(
                f"mesh_axis {name!r} is an explicit axis: make the mesh with axis_types AxisType.Auto"
            )
    parts = math.prod(mesh.shape[name] for name in names)
    if parts == 1:
        return None
    return NamedSharding(mesh, PartitionSpec(names, None, None)), parts

"""All matrices of a tree, orthogonalised in one batched Newton-Schulz iteration for each shape.

B stacked matrices, M rows, N columns with M <= N
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from smoljax.errors import SmoljaxError
from smoljax.optim.hyperparameters import check_float_dtype, check_number
from smoljax.optim.matrices import to_matrices
from smoljax.optim.newton_schulz import coefficient_rows, newton_schulz
from smoljax.optim.partition import MatrixSpec, by_path


class Orthogonal(NamedTuple):
    """The matrices of one split piece of a leaf.

    Attributes:
      matrices: float32 [B, d_in, d_out], with singular values of about 1.
      measures: what `measure` says of each matrix, [B]; None without it.
    """

    matrices: jax.Array
    measures: jax.Array | None


def orthogonalizer(
    *,
    coefficients: str | tuple,
    steps: int | None,
    dtype: jax.typing.DTypeLike | None,
    mesh: Mesh | None,
    mesh_axis: str | tuple[str, ...] | None,
    eps: float = 1e-7,
    measure: Callable[[jax.Array], jax.Array] | None = None,
) -> Callable[[optax.Updates, dict[str, MatrixSpec]], dict[str, list[Orthogonal]]]:
    """A function from a tree of float32 leaves and its specs to the orthogonalised pieces of every leaf, by path.

    Matrices of one shape, whatever leaf they are in and whichever way round, are stacked into one iteration.

    Args:
      coefficients: as in newton_schulz, and steps and eps.
      dtype: as in scale_by_muon, and mesh and mesh_axis.
      measure: function from orthogonalised matrices [..., M, N] to a number for each, [...].

    Raises:
      SmoljaxError: at once for unknown options.
    """
    coefficient_rows(coefficients, steps)
    check_number("eps", eps, at_least=0)
    check_float_dtype("dtype", dtype)
    on_cpu = _platform(mesh) == "cpu"
    options = dict(coefficients=coefficients, steps=steps, eps=eps)
    options["dtype"] = dtype or (jnp.float32 if on_cpu else jnp.bfloat16)

    def iterate(x_BMN: jax.Array) -> Orthogonal:
        o_BMN = newton_schulz(x_BMN, **options)
        return Orthogonal(o_BMN, None if measure is None else measure(o_BMN))

    if mesh is None and on_cpu:
        # A single matrix and its Gram matrix stay in the cache: a tenth faster than a batch.
        iterate = functools.partial(jax.lax.map, iterate)
    iterate = split_stack(iterate, mesh, mesh_axis)

    def orthogonalize(
        tree: optax.Updates, specs: dict[str, MatrixSpec]
    ) -> dict[str, list[Orthogonal]]:
        matrices = {path: to_matrices(leaf, specs[path]) for path, leaf in by_path(tree).items()}
        groups: dict[tuple[int, int], list[tuple[str, int]]] = {}
        for path, pieces in matrices.items():
            for index, piece in enumerate(pieces):
                groups.setdefault(tuple(sorted(piece.shape[1:])), []).append((path, index))
        results = {path: [None] * len(pieces) for path, pieces in matrices.items()}
        for (rows, _), members in groups.items():
            pieces = [matrices[path][index] for path, index in members]
            turned = [
                _is_turned(rows, piece, specs[path]) for piece, (path, _) in zip(pieces, members)
            ]
            stacks = [piece.mT if turn else piece for piece, turn in zip(pieces, turned)]
            done = iterate(stacks[0] if len(stacks) == 1 else jnp.concatenate(stacks))
            start = 0
            for (path, index), piece, turn in zip(members, pieces, turned):
                part = _part(done, start, start + len(piece))
                results[path][index] = part._replace(matrices=part.matrices.mT) if turn else part
                start += len(piece)
        return results

    return orthogonalize


def _is_turned(rows: int, piece: jax.Array, spec: MatrixSpec) -> bool:
    """Whether a piece [B, d_in, d_out] goes into its stack as its transpose.

    A square one does that comes from several axes, as attention's output from heads: so its model width stands first, as in
    query, and a mesh cuts both the same way. Stacked otherwise, one would be sent to other devices first.
    """
    if piece.shape[1] != piece.shape[2]:
        return piece.shape[1] != rows
    return len(spec.inputs) > len(spec.outputs)


def split_stack(
    function: Callable[[jax.Array], object],
    mesh: Mesh | None,
    mesh_axis: str | tuple[str, ...] | None,
) -> Callable[[jax.Array], object]:
    """A function of a stack of matrices [B, M, N], each by itself, run with the stack split over mesh axes.

    Args:
      function: returns a tree of arrays [B, ...]; matrices of zeros, which fill up the last share, do it no harm.
      mesh: as in scale_by_muon, and mesh_axis.

    Raises:
      SmoljaxError: at once for a mesh without an axis, or an axis that the mesh does not have or is not Auto.
    """
    stages, parts = _stages(mesh, mesh_axis)
    if not stages:
        return function

    def back(y: jax.Array) -> jax.Array:
        if y.ndim == 3:
            for stage in reversed(stages):
                y = jax.lax.with_sharding_constraint(y, stage)
        return y

    def split(x_BMN: jax.Array) -> object:
        size = len(x_BMN)
        x_BMN = jnp.pad(x_BMN, ((0, -size % parts), (0, 0), (0, 0)))
        for stage in stages[1:]:
            x_BMN = jax.lax.with_sharding_constraint(x_BMN, stage)
        return _part(jax.tree.map(back, function(x_BMN)), 0, size)

    return split


def _part(done: object, start: int, stop: int) -> object:
    """Some of the matrices of a stack."""
    return jax.tree.map(lambda x: x[start:stop], done)


def _platform(mesh: Mesh | None) -> str:
    """Where the update will run: on the mesh's devices, or on the default ones."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def _stages(
    mesh: Mesh | None, mesh_axis: str | tuple[str, ...] | None
) -> tuple[list[NamedSharding], int]:
    """A stack [B, M, N] split over no axis, the first axis, the first two, ..., and the number of parts at the end.

    One axis after the other: each change is one all-to-all of what a device holds (or a slice of it, where the leaf was
    not split over that axis). Asked for all at once, XLA copies whole leaves to every device.
    """
    if mesh is None or mesh_axis is None:
        if mesh is not None or mesh_axis is not None:
            raise SmoljaxError("give mesh and mesh_axis together, or neither")
        return [], 1
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
    names = tuple(name for name in names if mesh.shape[name] > 1)
    if not names:
        return [], 1
    free = PartitionSpec.UNCONSTRAINED
    specs = [PartitionSpec(names[:count] or None, free, free) for count in range(len(names))]
    specs.append(PartitionSpec(names, None, None))
    parts = math.prod(mesh.shape[name] for name in names)
    return [NamedSharding(mesh, spec) for spec in specs], parts

"""The one table from logical axis names to mesh axes, and the shardings that follow from it.

B batch, S sequence
"""

import contextlib
import math
from collections.abc import Iterator

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from smoljax.errors import SmoljaxError

BATCH = ("data", "fsdp")

# Parameters: the width of the residual stream is split over fsdp, everything that is private to a
# head, a feed-forward unit or a vocabulary entry over tensor. Layers are scanned, so never split.
RULES = (
    ("layers", None),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("mlp", "tensor"),
    ("activation_batch", BATCH),
    ("activation_sequence", "context"),
    ("activation_embed", None),
    ("activation_heads", "tensor"),
    ("activation_kv_heads", "tensor"),
    ("activation_mlp", "tensor"),
    ("activation_vocab", "tensor"),
)


@contextlib.contextmanager
def active(mesh: Mesh) -> Iterator[None]:
    """Inside, the model's logical axis names mean the axes of `mesh`."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def param_shardings(mesh: Mesh, logical_axes: dict, shapes: dict) -> dict:
    """A NamedSharding for each parameter.

    Args:
      mesh: the device mesh.
      logical_axes: tree of tuples of logical axis names, as the model declares them.
      shapes: the same tree with arrays or ShapeDtypeStructs.

    Raises:
      SmoljaxError: an axis of a parameter does not divide its mesh axis.
    """

    def sharding(path, axes, leaf):
        spec = nn.logical_to_mesh_axes(axes, RULES)
        for size, name, mesh_axes in zip(leaf.shape, axes, spec):
            parts = _size(mesh, mesh_axes)
            if size % parts:
                raise SmoljaxError(
                    f"parameter {jax.tree_util.keystr(path)} has axis {name!r} of size {size}, which does not "
                    f"divide over the {parts} devices of mesh axis {mesh_axes!r}: "
                    f"set config.mesh.{mesh_axes} to a divisor of {size}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(
        sharding, logical_axes, shapes, is_leaf=lambda node: isinstance(node, tuple)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a [B, S] array: rows over data and fsdp, columns over context."""
    return NamedSharding(mesh, PartitionSpec(BATCH, "context"))


def local_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of a [B, S] batch that this process must load.

    Raises:
      SmoljaxError: the batch does not divide over the mesh.
    """
    parts = _size(mesh, BATCH)
    if batch_size % parts:
        raise SmoljaxError(
            f"config.data.batch_size is {batch_size}, which does not divide over the {parts} devices of mesh axes "
            f"data and fsdp: make it a multiple of {parts}"
        )
    context = _size(mesh, "context")
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size, context))
    starts_stops = [index[0].indices(batch_size)[:2] for index in places.values()]
    return slice(min(start for start, _ in starts_stops), max(stop for _, stop in starts_stops))


def check_sequence(mesh: Mesh, seq_len: int) -> None:
    """Raises a SmoljaxError when rows of this length do not divide over the mesh: each device along context has two chunks of
    them (smoljax.kernels.attention.ring_order).
    """
    context = _size(mesh, "context")
    if context > 1 and seq_len % (2 * context):
        raise SmoljaxError(
            f"config.data.seq_len is {seq_len}, which does not divide into two chunks for each of the {context} devices of "
            f"mesh axis context: make it a multiple of {2 * context}"
        )


def put_batch(
    batch: dict[str, np.ndarray], mesh: Mesh, *, rows: slice, batch_size: int
) -> dict[str, jax.Array]:
    """Makes global [B, S] arrays from this process's rows of them.

    Args:
      batch: arrays [rows, S] on the host.
      mesh: the device mesh.
      rows: which rows of the global batch these are (see local_rows).
      batch_size: B.

    Raises:
      SmoljaxError: S does not divide over the mesh.
    """
    sharding = batch_sharding(mesh)

    def put(name, local):
        sequence = local.shape[1]
        check_sequence(mesh, sequence)

        def part(index):
            start, stop, _ = index[0].indices(batch_size)
            return local[start - rows.start : stop - rows.start, index[1]]

        return jax.make_array_from_callback((batch_size, sequence), sharding, part)

    return {name: put(name, local) for name, local in batch.items()}


def _size(mesh: Mesh, axes: str | tuple | None) -> int:
    if axes is None:
        return 1
    names = (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[name] for name in names)

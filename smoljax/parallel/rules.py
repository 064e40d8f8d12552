"""The one table from logical axis names to mesh axes, and the shardings that follow from it.

B batch, S sequence
"""

import contextlib
import math
from collections.abc import Iterable, Iterator

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from smoljax.errors import SmoljaxError
from smoljax.parallel.mesh import divisors

BATCH = ("data", "fsdp")

# Parameters: the width of the residual stream is split over fsdp (or another axis, see param_spec), everything that is private
# to a head, a feed-forward unit or a vocabulary entry over tensor. Layers are scanned, so never split.
# Activations: inside a block a device has the whole sequence (of its part of context) and its heads or units of tensor; between
# blocks, where every unit is the same to all, it has a part of the sequence instead (arXiv:2205.05198, section 4.2.2).
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
    ("activation_residual", ("context", "tensor")),
    ("activation_embed", None),
    ("activation_heads", "tensor"),
    ("activation_kv_heads", "tensor"),
    ("activation_mlp", "tensor"),
    ("activation_vocab", "tensor"),
)
_PLACES = dict(RULES)


@contextlib.contextmanager
def active(mesh: Mesh) -> Iterator[None]:
    """Inside, the model's logical axis names mean the axes of `mesh`."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def is_active() -> bool:
    """Whether this is inside `active`, with a mesh of several devices."""
    return bool(nn.get_logical_axis_rules()) and jax.sharding.get_abstract_mesh().size > 1


def param_shardings(mesh: Mesh, logical_axes: dict, shapes: dict) -> dict:
    """A NamedSharding for each parameter.

    Args:
      mesh: the device mesh.
      logical_axes: tree of tuples of logical axis names, as the model declares them.
      shapes: the same tree with arrays or ShapeDtypeStructs.

    Raises:
      SmoljaxError: tensor does not divide an axis that it splits; the message lists what divides all of them.
    """
    is_axes = dict(is_leaf=lambda node: isinstance(node, tuple))
    legal = _divisors_of_tensor(jax.tree.leaves(logical_axes, **is_axes), jax.tree.leaves(shapes))

    def sharding(path, axes, leaf):
        for size, name in zip(leaf.shape, axes):
            if _PLACES[name] == "tensor" and size % mesh.shape["tensor"]:
                raise SmoljaxError(
                    f"parameter {jax.tree_util.keystr(path)} has axis {name!r} of size {size}, which does not divide over the "
                    f"{mesh.shape['tensor']} devices of mesh axis tensor: set config.mesh.tensor to one of {_listed(legal)}"
                )
        return NamedSharding(mesh, param_spec(mesh, axes, leaf.shape))

    return jax.tree_util.tree_map_with_path(sharding, logical_axes, shapes, **is_axes)


def param_spec(
    mesh: Mesh | AbstractMesh, axes: tuple[str, ...], shape: tuple[int, ...]
) -> PartitionSpec:
    """The mesh axes of each axis of one parameter: those of RULES, but for fsdp, which may take another.

    Where fsdp does not divide the axis of its rule, it splits the first other axis, layers left out, that it does divide (beside tensor,
    where that splits the axis too). A parameter without such an axis is whole on every device of fsdp.

    Args:
      mesh: the device mesh.
      axes: the parameter's logical axis names.
      shape: its sizes.
    """
    places = [_PLACES[name] for name in axes]
    parts = [
        size // mesh.shape["tensor"] if p == "tensor" else size for size, p in zip(shape, places)
    ]
    free = [i for i, name in enumerate(axes) if name != "layers"]
    free.sort(key=lambda i: places[i] != "fsdp")
    if "fsdp" not in places:
        return PartitionSpec(*places)
    places[places.index("fsdp")] = None
    for i in free:
        if parts[i] % mesh.shape["fsdp"] == 0:
            places[i] = "fsdp" if places[i] is None else (places[i], "fsdp")
            break
    return PartitionSpec(*places)


def activation_spec(*names: str) -> PartitionSpec:
    """The mesh axes of an activation, by the names that RULES have behind "activation_"."""
    return PartitionSpec(*(_PLACES[f"activation_{name}"] for name in names))


def residual(seq_len: int) -> str:
    """The name of the residual stream's sequence axis on the active mesh: "residual" where tensor divides it, else "sequence".

    In training it does (check_batch); a prompt, or a token that is decoded, stays whole on every device of tensor.
    """
    if not is_active():
        return "sequence"
    parts = _size(jax.sharding.get_abstract_mesh(), _PLACES["activation_residual"])
    return "sequence" if seq_len % parts else "residual"


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a [B, S] array: rows over data and fsdp, columns over context."""
    return NamedSharding(mesh, activation_spec("batch", "sequence"))


def check_batch(
    mesh: Mesh | AbstractMesh, *, batch_size: int, micro_batches: int, seq_len: int
) -> None:
    """Raises a SmoljaxError, with what would do, where a batch [batch_size, seq_len] does not divide over the mesh."""
    parts = _size(mesh, BATCH) * micro_batches
    if batch_size % parts:
        pieces = f" in {micro_batches} micro-batches" if micro_batches > 1 else ""
        raise SmoljaxError(
            f"config.data.batch_size is {batch_size}, which does not divide over the {_size(mesh, BATCH)} devices of mesh axes "
            f"data and fsdp{pieces}: make it a multiple of {parts}, or data x fsdp one of "
            f"{_listed(n for n in divisors(batch_size) if batch_size % (n * micro_batches) == 0)}"
        )
    check_sequence(mesh, seq_len)


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


def check_sequence(mesh: Mesh | AbstractMesh, seq_len: int) -> None:
    """Raises a SmoljaxError when rows of this length do not divide over the mesh: each device along context has two chunks of
    them (smoljax.kernels.attention.ring_order), and between blocks tensor splits what context leaves.
    """
    context, tensor = mesh.shape["context"], mesh.shape["tensor"]
    parts = math.lcm(2 * context if context > 1 else 1, context * tensor)
    if seq_len % parts:
        chunks = f"into two chunks for each of the {context} devices of mesh axis context"
        raise SmoljaxError(
            f"config.data.seq_len is {seq_len}, which does not divide {chunks if context > 1 else ''}"
            f"{' and ' if context > 1 and tensor > 1 else ''}"
            f"{f'over the {tensor} devices of mesh axis tensor' if tensor > 1 else ''}: make it a multiple of {parts}"
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


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _divisors_of_tensor(axes_of_params: list[tuple[str, ...]], params: list) -> list[int]:
    """The counts of devices that divide every axis which tensor splits."""
    sizes = [
        size
        for axes, leaf in zip(axes_of_params, params, strict=True)
        for size, name in zip(leaf.shape, axes)
        if _PLACES[name] == "tensor"
    ]
    return divisors(math.gcd(*sizes))

"""Looking tokens up in a table that a mesh splits, with every exchange written out where the mesh has several axes.

Left to the compiler, the gradient of the whole table is then summed over all devices that have tokens, between slices too. Here
what goes from slice to slice is the part of it that a device keeps. Over one axis the compiler does better: it adds the
gradient of a tied head first, and exchanges their sum.

B batch, S sequence, V vocabulary, D model width
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from smoljax.parallel.rules import activation_spec, is_active, param_spec, residual


def look_up(table_VD: jax.Array, tokens_BS: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rows of the table as the residual stream, [B, S, D] in `dtype`; the gradient is summed in the table's own dtype.

    Each device gathers, in `dtype`, what fsdp splits of the rows that tensor gives it, looks its tokens up in these, and gets
    from the other devices of tensor what they found for its part of the sequence.

    Args:
      table_VD: placed as param_spec says.
      tokens_BS: token ids below V.
      dtype: of the result.
    """
    split = [axis for axis, size in jax.sharding.get_abstract_mesh().shape.items() if size > 1]
    if not is_active() or (len(split) == 1 and "tensor" not in split):
        # In whole rows: in rows split over fsdp a device would look up the tokens of all devices, in pieces of a few numbers,
        # which a TPU stores 16 times as wide.
        rows_VD = nn.with_logical_constraint(table_VD, ("vocab", None))
        return rows_VD[tokens_BS].astype(dtype)
    return _look_up(jnp.dtype(dtype), table_VD, tokens_BS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _look_up(dtype, table_VD, tokens_BS):
    table, tokens, stream = _specs(table_VD, tokens_BS)

    def local(part_VD, tokens_BS):
        rows_VD = part_VD.astype(dtype)
        if (axis := _axis_of("fsdp", table)) is not None:
            rows_VD = jax.lax.all_gather(rows_VD, "fsdp", axis=axis, tiled=True)
        row_BS = _own_rows(tokens_BS, len(rows_VD))
        x_BSD = rows_VD.at[row_BS].get(mode="fill", fill_value=0)
        if _axis_of("tensor", stream) is None:
            return jax.lax.psum(x_BSD, "tensor")
        return jax.lax.psum_scatter(x_BSD, "tensor", scatter_dimension=1, tiled=True)

    return jax.shard_map(local, in_specs=(table, tokens), out_specs=stream)(table_VD, tokens_BS)


def _look_up_forward(dtype, table_VD, tokens_BS):
    return _look_up(dtype, table_VD, tokens_BS), (table_VD, tokens_BS)


def _look_up_backward(dtype, saved, dx_BSD):
    table_VD, tokens_BS = saved
    table, tokens, stream = _specs(table_VD, tokens_BS)
    axis = _axis_of("fsdp", table)

    def local(part_VD, tokens_BS, dx_BSD):
        if _axis_of("tensor", stream) is not None:
            dx_BSD = jax.lax.all_gather(dx_BSD, "tensor", axis=1, tiled=True)
        shape = list(part_VD.shape)
        if axis is not None:
            shape[axis] *= jax.lax.axis_size("fsdp")
        row_BS = _own_rows(tokens_BS, shape[0])
        sums_VD = jnp.zeros(shape, part_VD.dtype)
        sums_VD = sums_VD.at[row_BS].add(dx_BSD.astype(part_VD.dtype), mode="drop")
        if axis is None:
            return jax.lax.psum(sums_VD, ("data", "fsdp", "context"))
        sums_VD = jax.lax.psum_scatter(sums_VD, "fsdp", scatter_dimension=axis, tiled=True)
        return jax.lax.psum(sums_VD, ("data", "context"))

    specs = (table, tokens, stream)
    gradient = jax.shard_map(local, in_specs=specs, out_specs=table)
    return gradient(table_VD, tokens_BS, dx_BSD), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


def _specs(
    table_VD: jax.Array, tokens_BS: jax.Array
) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """Of the table, the tokens and the residual stream."""
    mesh = jax.sharding.get_abstract_mesh()
    return (
        param_spec(mesh, ("vocab", "embed"), table_VD.shape),
        activation_spec("batch", "sequence"),
        activation_spec("batch", residual(tokens_BS.shape[1]), "embed"),
    )


def _axis_of(name: str, spec: PartitionSpec) -> int | None:
    """The axis of an array that a mesh axis splits."""
    for axis, names in enumerate(spec):
        if name == names or (isinstance(names, tuple) and name in names):
            return axis
    return None


def _own_rows(tokens_BS: jax.Array, num_rows: int) -> jax.Array:
    """Where this device has the rows of these tokens; num_rows, which is beyond them, where it has not."""
    row_BS = tokens_BS - jax.lax.axis_index("tensor") * num_rows
    return jnp.where((row_BS >= 0) & (row_BS < num_rows), row_BS, num_rows)

"""Zig-zag order of columns: with 2n chunks of a sequence over n devices, device c holds chunks c and 2n - 1 - c.

Causal attention of a ring then costs every device the same at every step, where in the order of the sequence the last device
would compute all the time and the first once (Llama 3, arXiv:2407.21783, section 3.3.2).

B batch, S sequence
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from smoljax.kernels.attention.mesh import SEQUENCE_AXIS, sequence_parts


def to_zigzag(x_BS: jax.Array) -> jax.Array:
    """From the order of the sequence to zig-zag, any array [B, S, ...] whose columns the active mesh splits.

    Each device sends two chunks and gets two; nothing is gathered. Without a mesh, or with one device along `context`, both
    orders are the same.
    """
    return _exchange(x_BS, _spread)


def to_sequence(x_BS: jax.Array) -> jax.Array:
    """Back to the order of the sequence: the inverse of `to_zigzag`."""
    return _exchange(x_BS, _restore)


def _exchange(x_BS, local):
    n = sequence_parts()
    if n == 1:
        return x_BS
    columns = PartitionSpec(None, SEQUENCE_AXIS)
    local = functools.partial(local, n=n)
    return jax.shard_map(local, in_specs=columns, out_specs=columns, axis_names={SEQUENCE_AXIS})(
        x_BS
    )


def _spread(x_BS, n):
    even, odd = jnp.split(x_BS, 2, axis=1)  # Chunks 2c and 2c + 1.
    even, odd = _send(even, _homes(0, n)), _send(odd, _homes(1, n))
    low_is_even = jax.lax.axis_index(SEQUENCE_AXIS) % 2 == 0
    low, high = jnp.where(low_is_even, even, odd), jnp.where(low_is_even, odd, even)
    return jnp.concatenate([low, high], axis=1)


def _restore(x_BS, n):
    low, high = jnp.split(x_BS, 2, axis=1)
    low_is_even = jax.lax.axis_index(SEQUENCE_AXIS) % 2 == 0
    even, odd = jnp.where(low_is_even, low, high), jnp.where(low_is_even, high, low)
    even = _send(even, [(home, c) for c, home in _homes(0, n)])
    odd = _send(odd, [(home, c) for c, home in _homes(1, n)])
    return jnp.concatenate([even, odd], axis=1)


def _homes(parity, n):
    """(c, the device that holds chunk 2c + parity in zig-zag order) for each device c: every device is named once."""
    chunks = range(parity, 2 * n, 2)
    return [(c, chunk if chunk < n else 2 * n - 1 - chunk) for c, chunk in enumerate(chunks)]


def _send(x_BS, pairs):
    return jax.lax.ppermute(x_BS, SEQUENCE_AXIS, pairs)

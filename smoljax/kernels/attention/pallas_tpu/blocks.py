"""Which blocks of queries meet which blocks of keys, and what is masked inside a pair of them.

B batch, S sequence, I blocks of queries, J blocks of keys, Q queries of a block, T keys of a block
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e30  # Finite, so that a row that has seen nothing yet never makes NaN.
FILL = np.iinfo(np.int32).min  # Segment of the positions that fill up the last block.

# (queries, keys) of a block per generation and pass. All stay within the default 16 MiB of scoped VMEM at head width 256
# in f32, and the compiler's refusal shows ahead of time (tests/kernels/attention/test_pallas_tpu.py).
_SIZES = {
    "v5e": {"forward": (512, 512), "backward": (512, 512)},
    "v5p": {"forward": (512, 512), "backward": (512, 512)},
    "v6e": {"forward": (512, 512), "backward": (512, 512)},
}
_KINDS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p"}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """What is static about the mask.

    Attributes:
      causal: a query sees keys up to its own position.
      window: a query sees keys less than this many positions away; None is no limit.
      queries: positions of a block of queries.
      keys: positions of a block of keys.
    """

    causal: bool
    window: int | None
    queries: int
    keys: int

    def reachable(self, length: int) -> np.ndarray:
        """Which pairs of blocks hold a pair of positions that causality and window allow: bool [I, J]."""
        first_I1 = np.arange(0, length, self.queries)[:, None]
        first_1J = np.arange(0, length, self.keys)[None, :]
        last_I1, last_1J = first_I1 + self.queries - 1, first_1J + self.keys - 1
        reachable_IJ = np.ones((first_I1.size, first_1J.size), bool)
        if self.causal:
            reachable_IJ &= first_1J <= last_I1
        if self.window is not None:
            reachable_IJ &= first_I1 - last_1J < self.window
            reachable_IJ &= first_1J - last_I1 < self.window
        return reachable_IJ

    def allowed(self, first_query, first_key, q_ids_1Q, k_ids_T1) -> jax.Array:
        """Which key (first axis) each query (second axis) sees: bool [T, Q]; None for identifiers is one document."""
        shape = (self.keys, self.queries)
        key_TQ = first_key + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        query_TQ = first_query + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        allowed_TQ = None
        if self.causal:
            allowed_TQ = key_TQ <= query_TQ
        if self.window is not None:
            near_TQ = jnp.abs(query_TQ - key_TQ) < self.window
            allowed_TQ = near_TQ if allowed_TQ is None else allowed_TQ & near_TQ
        if q_ids_1Q is not None:
            same_TQ = k_ids_T1 == q_ids_1Q
            allowed_TQ = same_TQ if allowed_TQ is None else allowed_TQ & same_TQ
        return jnp.ones(shape, bool) if allowed_TQ is None else allowed_TQ


def sizes(length: int, generation: str, direction: str) -> tuple[int, int]:
    """(queries, keys) of a block; shorter sequences take one block of a multiple of 128."""
    whole = -(-length // 128) * 128
    return tuple(min(size, whole) for size in _SIZES[generation][direction])


def generation(device_kind: str | None) -> str:
    """The row of the table for JAX's name of a device; v5e's where it is unknown or there is none."""
    if device_kind and device_kind.startswith("TPU v6"):
        return "v6e"
    return _KINDS.get(device_kind, "v5e")


def ranges(
    pairs: Pairs, length: int, segment_ids_BS: jax.Array | None, batch: int
) -> tuple[jax.Array, jax.Array, int, jax.Array, jax.Array, int]:
    """First and last partner block of every block, by causality, window and the documents in it.

    Blocks of documents whose ranges of identifiers do not meet are outside. What lies between the first and the last
    partner is computed and masked, whatever it holds, so any layout of identifiers is exact.

    Returns:
      Keys' first and last block of each block of queries, int32 [B, I], and the most that any can have; queries' first
      and last block of each block of keys, int32 [B, J], and the most.
    """
    reachable_IJ = pairs.reachable(length)
    met_BIJ = jnp.broadcast_to(jnp.asarray(reachable_IJ), (batch, *reachable_IJ.shape))
    if segment_ids_BS is not None:
        by_query = segment_ids_BS.reshape(batch, -1, pairs.queries)
        by_key = segment_ids_BS.reshape(batch, -1, pairs.keys)
        low_BI1, high_BI1 = by_query.min(-1)[:, :, None], by_query.max(-1)[:, :, None]
        low_B1J, high_B1J = by_key.min(-1)[:, None, :], by_key.max(-1)[:, None, :]
        met_BIJ = met_BIJ & (low_BI1 <= high_B1J) & (low_B1J <= high_BI1)
    return (
        *_ends(met_BIJ, 2),
        int(reachable_IJ.sum(1).max()),
        *_ends(met_BIJ, 1),
        int(reachable_IJ.sum(0).max()),
    )


def _ends(met_BIJ, axis):
    # Every position sees itself, so no row is without a partner.
    last = met_BIJ.shape[axis] - 1 - jnp.argmax(jnp.flip(met_BIJ, axis), axis)
    return jnp.argmax(met_BIJ, axis).astype(jnp.int32), last.astype(jnp.int32)

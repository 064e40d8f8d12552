"""Which blocks of queries meet which blocks of keys, in what order, and what is masked inside a pair of them.

B batch, S queries, T keys, I blocks of queries, J blocks of keys, Q queries of a block, C keys of a block, P steps of a list
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e30  # Finite, so that no difference of two of them makes NaN.
FILL = np.iinfo(np.int32).min  # Segment of the positions that fill up the last block.
LANES = 128
VMEM = 15 * 2**20  # Bytes that a kernel may take by the estimate in `heads`; v5e scopes 16 MiB.

# (queries, keys) of a block per generation and pass, by the bundles of instructions that the compiler schedules for the scores
# of 512 by 512 positions in a block without a mask, head width 128 (benchmarks/attention_tpu.py says what they mean), with two heads at a time. Forward:
# v5e 1289 and v6e 797; in blocks of 512 by 1024 v6e 759. Backward: v5e 2293 and 2330, v6e 1155 and 1116, and in blocks of 1024 by
# 512 v6e 1135. A causal sequence of 4096 computes 1/8 more than it needs in blocks of 512 by 512 and 3/16 more in blocks of
# 512 by 1024, which is as much as they win; documents are shorter still. Blocks of 256 by 512 took v6e a quarter more.
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

    def seen(self, lengths: tuple[int, int], shift) -> tuple:
        """Which pairs of blocks hold a pair of positions that causality and window allow, and which hold no other.

        Args:
          lengths: queries and keys, multiples of a block.
          shift: position of the first query less that of the first key; an int gives NumPy arrays.

        Returns:
          Two bool [I, J].
        """
        first_I1 = np.arange(0, lengths[0], self.queries)[:, None] + shift
        first_1J = np.arange(0, lengths[1], self.keys)[None, :]
        last_I1, last_1J = first_I1 + self.queries - 1, first_1J + self.keys - 1
        some_IJ = whole_IJ = np.ones((first_I1.size, first_1J.size), bool)
        if self.causal:
            some_IJ, whole_IJ = first_1J <= last_I1, last_1J <= first_I1
        if self.window is not None:
            near = self.window
            some_IJ = some_IJ & (first_I1 - last_1J < near) & (first_1J - last_I1 < near)
            whole_IJ = whole_IJ & (last_I1 - first_1J < near) & (last_1J - first_I1 < near)
        return some_IJ, whole_IJ

    def allowed(self, distance, q_ids_1Q=None, k_ids_1C=None) -> jax.Array | None:
        """Which key (first axis) each query (second axis) sees: bool [C, Q].

        Args:
          distance: position of the block's first query less that of its first key.
          q_ids_1Q, k_ids_1C: segments; None is one document.

        Returns None where all are seen.
        """
        shape = (self.keys, self.queries)
        allowed_CQ = None
        if self.causal or self.window is not None:
            key_CQ = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            query_CQ = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + distance
        if self.causal:
            allowed_CQ = key_CQ <= query_CQ
        if self.window is not None:
            near_CQ = query_CQ - key_CQ < self.window
            if not self.causal:
                near_CQ &= key_CQ - query_CQ < self.window
            allowed_CQ = near_CQ if allowed_CQ is None else allowed_CQ & near_CQ
        if q_ids_1Q is not None:
            # To sublanes in registers: a column of identifiers in HBM would be stored 128 times as wide.
            ids_CL = jnp.broadcast_to(k_ids_1C, (LANES, self.keys)).T
            same_CQ = jnp.tile(ids_CL, (1, self.queries // LANES)) == q_ids_1Q
            allowed_CQ = same_CQ if allowed_CQ is None else allowed_CQ & same_CQ
        return allowed_CQ


class Steps(NamedTuple):
    """The pairs of blocks that a kernel visits, one grid step each, for every row of the batch.

    Attributes:
      list: int32 [B * P]; each is a block of queries, a block of keys and what to do there (`step`).
      most: P, an int.
      pairs: how many of them can be computed, an int: what a kernel is estimated by.
      count: steps of the longest row's list, an int, or int32 where segments or shift decide; the rest do nothing.
    """

    list: jax.Array | np.ndarray
    most: int
    pairs: int
    count: jax.Array | int


# What to do at a step, as bits.
COMPUTE = 1  # The pair holds a pair of positions that may see each other.
WHOLE = 2  # The pair holds no other.
FIRST = 4  # First step of its block of queries (or keys, where keys come first).
LAST = 8
FLUSH = 16  # All pairs are done, and a block of keys is written.
_BITS, _KEY_BITS = 5, 13


def step(entry) -> tuple:
    """(block of queries, block of keys, what to do) of an entry of a list."""
    return (
        entry >> (_BITS + _KEY_BITS),
        (entry >> _BITS) & (2**_KEY_BITS - 1),
        entry & (2**_BITS - 1),
    )


class Schedule(NamedTuple):
    """Which pairs of blocks meet: `some` hold a pair of positions that see each other, `whole` hold no other.

    Both bool [B, I, J], NumPy where nothing is traced; `pairs` is how many of `some` there can be in a row, an int.
    """

    some: jax.Array | np.ndarray
    whole: jax.Array | np.ndarray
    pairs: int

    def by_queries(self, *, flush: bool = False) -> Steps:
        """Keys of the first block of queries, then of the next; with `flush`, all blocks of keys once more at the end."""
        return _steps(self.some, self.whole, self.pairs, swapped=False, flush=flush)

    def by_keys(self) -> Steps:
        """Queries of the first block of keys, then of the next."""
        swap = (0, 2, 1)
        return _steps(
            self.some.transpose(swap), self.whole.transpose(swap), self.pairs, swapped=True
        )


def schedule(pairs: Pairs, lengths, shift, ids, batch: int) -> Schedule:
    """Pairs of blocks that meet by causality, window and documents.

    Pairs of blocks whose ranges of identifiers do not meet are left out; whatever else they hold is masked, so any layout
    of identifiers is exact.

    Args:
      pairs: mask and sizes of blocks.
      lengths: queries and keys, multiples of a block.
      shift: position of the first query less that of the first key, an int or int32.
      ids: segments of queries [B, S] and of keys [B, T], or None.
      batch: B.
    """
    some_IJ, whole_IJ = pairs.seen(lengths, shift)
    I, J = some_IJ.shape
    most = int(some_IJ.sum()) if isinstance(shift, int) else I * J
    if pairs.window is not None:
        reach = pairs.queries + (1 if pairs.causal else 2) * (pairs.window - 1)
        most = min(most, I * (-(-(reach - 1) // pairs.keys) + 1))
    if ids is None:
        xp = np if isinstance(shift, int) else jnp
        some_BIJ, whole_BIJ = (xp.broadcast_to(x, (batch, I, J)) for x in (some_IJ, whole_IJ))
        return Schedule(some_BIJ, whole_BIJ, most)
    by_query, by_key = (
        x.reshape(batch, -1, size) for x, size in zip(ids, (pairs.queries, pairs.keys))
    )
    low_BI1, high_BI1 = by_query.min(-1)[:, :, None], by_query.max(-1)[:, :, None]
    low_B1J, high_B1J = by_key.min(-1)[:, None, :], by_key.max(-1)[:, None, :]
    some_BIJ = some_IJ[None] & (low_BI1 <= high_B1J) & (low_B1J <= high_BI1)
    one_BIJ = (low_BI1 == high_B1J) & (low_B1J == high_BI1)
    return Schedule(some_BIJ, whole_IJ[None] & one_BIJ, most)


def _steps(some_BIJ, whole_BIJ, pairs, *, swapped, flush=False) -> Steps:
    """The list of steps; a block of the first kind without a partner gets one step, in which it is written."""
    xp = np if isinstance(some_BIJ, np.ndarray) else jnp
    B, I, J = some_BIJ.shape
    idle_BI1 = ~some_BIJ.any(2, keepdims=True)
    listed_BX = (some_BIJ | (idle_BI1 & (np.arange(J) == 0)[None, None])).reshape(B, I * J)
    count_B1 = listed_BX.sum(1, keepdims=True)
    most = int(count_B1.max()) if xp is np else min(pairs + I, I * J)
    index_1P = np.arange(most)[None]
    place_BP = xp.argsort(~listed_BX, axis=1, stable=True)[:, :most]
    final_B1 = xp.take_along_axis(place_BP, count_B1 - 1, axis=1)
    place_BP = xp.where(index_1P < count_B1, place_BP, final_B1)
    major_BP, minor_BP = place_BP // J, place_BP % J
    edge_BP = xp.concatenate([xp.ones((B, 1), bool), major_BP[:, 1:] != major_BP[:, :-1]], axis=1)
    last_BP = xp.concatenate([edge_BP[:, 1:], xp.zeros((B, 1), bool)], axis=1)
    last_BP |= index_1P == count_B1 - 1
    flat = (x.reshape(B, I * J) for x in (some_BIJ, whole_BIJ))
    some_BP, whole_BP = (xp.take_along_axis(x, place_BP, axis=1) for x in flat)
    flags_BP = COMPUTE * some_BP + WHOLE * whole_BP + FIRST * edge_BP + LAST * last_BP
    flags_BP = xp.where(index_1P < count_B1, flags_BP, 0)
    if flush:
        wide = ((0, 0), (0, J))
        over_BP = np.arange(most + J)[None] - count_B1
        major_BP, minor_BP = (xp.pad(x, wide, mode="edge") for x in (major_BP, minor_BP))
        minor_BP = xp.where(over_BP < 0, minor_BP, xp.clip(over_BP, 0, J - 1))
        # The rest of a shorter row's list writes its last block again: no other may come after it.
        flags_BP = xp.where(over_BP < 0, xp.pad(flags_BP, wide), FLUSH)
        count_B1, most = count_B1 + J, most + J
    queries_BP, keys_BP = (minor_BP, major_BP) if swapped else (major_BP, minor_BP)
    entries_BP = (queries_BP << (_BITS + _KEY_BITS)) | (keys_BP << _BITS) | flags_BP
    count = int(count_B1.max()) if xp is np else count_B1.max()
    return Steps(entries_BP.astype(np.int32).reshape(-1), most, pairs, count)


def sizes(lengths: tuple[int, int], generation: str, direction: str) -> tuple[int, int]:
    """(queries, keys) of a block; what is shorter takes one block of a multiple of 128."""
    return tuple(
        min(size, -(-length // LANES) * LANES)
        for size, length in zip(_SIZES[generation][direction], lengths)
    )


def heads(
    group: int, pairs: Pairs, head_dim: int, itemsize: int, *, blocks: int, accumulated: int = 0
) -> int:
    """Query heads of a step, at most 4, for a group of them that share a key-value head; 0 where not even one fits.

    Args:
      group: how many share it.
      pairs: sizes of blocks.
      head_dim: H.
      itemsize: bytes of an element.
      blocks: blocks of queries, read or written, that a step holds.
      accumulated: bytes of sums that are kept throughout.
    """

    def bytes_of(heads):
        # Two buffers of each block and one f32 sum; the same of keys and values; scores and what is made of them, which is
        # four times as much where the MXU gets f32 factors in parts (measured: 16032 KiB at head width 256).
        per_query = heads * head_dim * (2 * blocks * itemsize + 4)
        per_key = head_dim * 8 * itemsize
        per_pair = 10 if itemsize == 2 else 40
        return (
            per_query * pairs.queries + per_key * pairs.keys + per_pair * pairs.queries * pairs.keys
        )

    fitting = [size for size in (4, 3, 2, 1) if bytes_of(size) + accumulated <= VMEM]
    return max((size for size in fitting if group % size == 0), default=0)


def generation(device_kind: str | None) -> str:
    """The row of the table for JAX's name of a device; v5e's where it is unknown or there is none."""
    if device_kind and device_kind.startswith("TPU v6"):
        return "v6e"
    return _KINDS.get(device_kind, "v5e")

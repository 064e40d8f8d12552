"""Which keys a tile of queries meets and which queries a tile of keys, and what is masked where they meet.

B batch, S sequence, X tiles of a program, Y blocks that it loops over, M rows of a warpgroup, C columns of a block
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e30  # Finite, so that a row that has seen nothing yet never makes NaN.
FILL = np.iinfo(np.int32).min  # Segment of the positions that fill up the last tile.
_MIXED = (FILL + 1, FILL + 2)  # A tile and a block of several documents each: equal to nothing.

LOG2_E = math.log2(math.e)
ROWS = 64  # Of a warpgroup: the height of Hopper's matrix instruction.
WARPGROUPS = 2  # That compute, beside one that loads.
TILE = WARPGROUPS * ROWS


class Block(NamedTuple):
    """Positions of a block that a program loops over, and how many blocks are in shared memory at once beside its tile."""

    columns: int
    stages: int


# By pass and head width up to the key. Shared memory is 227 KiB, and at 64 columns or more the second product can read it.
_BLOCKS = {
    64: {"forward": Block(128, 2), "backward": Block(64, 2)},
    128: {"forward": Block(128, 2), "backward": Block(64, 2)},
    256: {"forward": Block(64, 2), "backward": Block(64, 1)},
}


@dataclasses.dataclass(frozen=True)
class Mask:
    """What is static about the scores.

    Attributes:
      causal: a query sees keys up to its own position.
      window: a query sees keys less than this many positions away; None is no limit.
      scale: factor on the products.
      logit_cap: scores are cap * tanh(score / cap); None leaves them as they are.
    """

    causal: bool
    window: int | None
    scale: float
    logit_cap: float | None

    def scores(self, products: jax.Array) -> jax.Array:
        """Scores before the cap, in units of log 2."""
        return products * (self.scale * LOG2_E)

    def bend(self, scores: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Scores after the cap, MASKED ones as they are, and their derivative by those before it where that is not 1."""
        if self.logit_cap is None:
            return scores, None
        tanh = jnp.tanh(scores * (1 / (LOG2_E * self.logit_cap)))
        capped = jnp.where(scores > MASKED / 2, tanh * (LOG2_E * self.logit_cap), MASKED)
        return capped, 1.0 - tanh * tanh

    def allowed(self, firsts, ids, shape, *, query_axis: int) -> jax.Array:
        """Which pairs see each other, bool of `shape`.

        Args:
          firsts: first position of the rows and of the columns.
          ids: their segments, int32 [M] and [C], or None for one document.
          shape: (M, C).
          query_axis: 0 where rows are queries, 1 where columns are.
        """
        position = [
            first + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            for axis, first in enumerate(firsts)
        ]
        query, key = position[query_axis], position[1 - query_axis]
        allowed = None
        if self.causal:
            allowed = key <= query
        if self.window is not None:
            near = query - key < self.window
            if not self.causal:
                near &= key - query < self.window
            allowed = near if allowed is None else allowed & near
        if ids is not None:
            row, column = (
                jax.lax.broadcast_in_dim(x, shape, (axis,)) for axis, x in enumerate(ids)
            )
            same = row == column
            allowed = same if allowed is None else allowed & same
        return allowed

    def cuts(self, firsts, one, shape, *, query_axis: int):
        """Whether some of the pairs do not see each other; `one`: the documents of rows and columns if `documents`."""
        lasts = [first + length - 1 for first, length in zip(firsts, shape)]
        (query, key), (last_query, last_key) = (
            (x[query_axis], x[1 - query_axis]) for x in (firsts, lasts)
        )
        cut = False
        if self.causal:
            cut = last_key > query
        if self.window is not None:
            cut |= last_query - key >= self.window
            if not self.causal:
                cut |= last_key - query >= self.window
        return cut if one is None else cut | (one[0] != one[1])


class Spans(NamedTuple):
    """Blocks that each tile loops over.

    Attributes:
      ends: first block and how many, int32 [B, X, 2]. What lies between is computed and masked whatever it holds, so any
        layout of identifiers is exact.
      documents: None for one document, or the one document of every tile and block, int32 [B, X] and [B, Y]; where there are
        several, a number that is no document's.
    """

    ends: jax.Array
    documents: tuple[jax.Array, jax.Array] | None


def block(head_dim: int, direction: str) -> Block:
    """The row of the table."""
    return next(row[direction] for width, row in _BLOCKS.items() if head_dim <= width)


def spans(mask: Mask, size: int, length: int, ids_BS, batch: int, *, query_axis: int) -> Spans:
    """Blocks of `size` that the tiles of a sequence meet by causality, window and documents.

    Blocks whose ranges of identifiers do not meet the tile's are outside.
    """
    first_X1 = np.arange(0, length, TILE)[:, None]
    first_1Y = np.arange(0, length, size)[None, :]
    starts, stops = (first_X1, first_1Y), (first_X1 + TILE - 1, first_1Y + size - 1)
    (query, key), (last_query, last_key) = (
        (x[query_axis], x[1 - query_axis]) for x in (starts, stops)
    )
    met_XY = np.ones((first_X1.size, first_1Y.size), bool)
    if mask.causal:
        met_XY &= key <= last_query
    if mask.window is not None:
        met_XY &= (query - last_key < mask.window) & (key - last_query < mask.window)
    met_BXY = jnp.broadcast_to(met_XY, (batch, *met_XY.shape))
    documents = None
    if ids_BS is not None:
        lows, highs, documents = [], [], []
        for side, mixed in zip((TILE, size), _MIXED):
            by_part = ids_BS.reshape(batch, -1, side)
            low, high = by_part.min(-1), by_part.max(-1)
            lows.append(low)
            highs.append(high)
            documents.append(jnp.where(low == high, low, mixed))
        documents = tuple(documents)
        met_BXY &= lows[0][:, :, None] <= highs[1][:, None, :]
        met_BXY &= lows[1][:, None, :] <= highs[0][:, :, None]
    # Every position sees itself, so no tile is without a block.
    first_BX = jnp.argmax(met_BXY, axis=2)
    count_BX = met_BXY.shape[2] - jnp.argmax(jnp.flip(met_BXY, 2), axis=2) - first_BX
    return Spans(jnp.stack([first_BX, count_BX], axis=-1).astype(jnp.int32), documents)

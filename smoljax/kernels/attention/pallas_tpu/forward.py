"""The forward kernel: output, log-sum-exp and largest score in one pass over the keys.

Everything is kept with positions on the lanes ([.., H, S]): a head width of 64 then fills its tiles, in VMEM and in HBM,
and maxima and sums of a query run over sublanes. One step takes some of the query heads that share a key-value head, so
keys, values and mask are loaded and computed once for them.

B batch, S queries, T keys, N query heads, K key-value heads, G query heads of a step, H head width, Q queries of a block,
C keys of a block, L lanes
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from smoljax.kernels.attention.pallas_tpu.blocks import (
    COMPUTE,
    FILL,
    FIRST,
    LANES,
    LAST,
    MASKED,
    WHOLE,
    Pairs,
    Steps,
    heads,
    step,
)

# Axes that are summed over; the MXU takes bf16 as it is, and f32 in as many passes as keep its digits.
COLUMNS = (((0,), (0,)), ((), ()))  # [H, C], [H, Q] -> [C, Q]
ROWS = (((1,), (0,)), ((), ()))  # [H, C], [C, Q] -> [H, Q]
BOTH_LAST = (((1,), (1,)), ((), ()))  # [H, Q], [C, Q] -> [H, C]
LOG2_E = math.log2(math.e)  # The unit of a TPU computes powers of 2.


def product(a, b, axes):
    """A matrix product with f32 sums, and all digits of f32 factors."""
    precision = "highest" if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores as powers of 2, and with a cap as cap * tanh(scores / cap).

    `raw` are in the unit of which the largest is kept: the score, or without a cap log2(e) times it, which saves a
    product.

    Attributes:
      scale: factor on q k^T.
      logit_cap: None is no cap.
    """

    scale: float
    logit_cap: float | None

    @property
    def unit(self) -> float:
        return LOG2_E if self.logit_cap is None else 1.0

    def raw(self, q_HQ, k_HC) -> jax.Array:
        return (self.unit * self.scale) * product(k_HC, q_HQ, COLUMNS)

    def powers(self, raw) -> jax.Array:
        return raw if self.logit_cap is None else (LOG2_E * self.logit_cap) * self.bent(raw)

    def bent(self, raw) -> jax.Array:
        return jnp.tanh(raw / self.logit_cap)


def run(
    q_BNHS,
    k_BKHT,
    v_BKHT,
    ids,
    steps: Steps,
    shift_1,
    *,
    pairs: Pairs,
    scores: Scores,
    dtype,
):
    """Calls the kernel.

    Args:
      q_BNHS: queries; k_BKHT, v_BKHT: keys and values of the same dtype.
      ids: int32 segments of queries [B, S] and of keys [B, T], or None for one document.
      steps: pairs of blocks, queries first.
      shift_1: int32, position of the first query less that of the first key.
      pairs: the mask and the sizes of blocks, which divide S and T.
      scores: how they are made.
      dtype: of the output.

    Returns:
      The output [B, N, H, S], log-sum-exp f32 [B, N, 1, S] (MASKED for a query that sees nothing, and its output is 0),
      largest scores f32 [B, N, 1, L] spread over lanes.
    """
    B, N, H, S = q_BNHS.shape
    group = N // k_BKHT.shape[1]
    Q, C = pairs.queries, pairs.keys
    G = max(heads(group, pairs, H, q_BNHS.dtype.itemsize, blocks=2), 1)

    def queries(b, n, s, entries, shift):
        return step(entries[b * steps.most + s])[0]

    def keys(b, n, s, entries, shift):
        return step(entries[b * steps.most + s])[1]

    def by_query(b, n, s, *refs):
        return b, n, 0, queries(b, n, s, *refs)

    def by_key(b, n, s, *refs):
        return b, n * G // group, 0, keys(b, n, s, *refs)

    in_specs = [
        pl.BlockSpec((None, G, H, Q), by_query),
        pl.BlockSpec((None, None, H, C), by_key),
        pl.BlockSpec((None, None, H, C), by_key),
    ]
    inputs = [q_BNHS, k_BKHT, v_BKHT]
    if ids is not None:
        in_specs.append(pl.BlockSpec((None, 1, Q), lambda b, *at: (b, 0, queries(b, *at))))
        in_specs.append(pl.BlockSpec((None, 1, C), lambda b, *at: (b, 0, keys(b, *at))))
        inputs += [x[:, None] for x in ids]
    computed = B * N * steps.pairs * Q * C
    return pl.pallas_call(
        functools.partial(
            _kernel, pairs=pairs, documents=ids is not None, most=steps.most, scores=scores
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, N // G, steps.count),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((None, G, H, Q), by_query),
                pl.BlockSpec((None, G, 1, Q), by_query),
                pl.BlockSpec((None, G, 1, LANES), lambda b, n, *_: (b, n, 0, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((G, 1, Q), jnp.float32),
                pltpu.VMEM((G, 1, Q), jnp.float32),
                pltpu.VMEM((G, H, Q), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, N, H, S), dtype),
            jax.ShapeDtypeStruct((B, N, 1, S), jnp.float32),
            jax.ShapeDtypeStruct((B, N, 1, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * computed * H,
            transcendentals=computed,
            bytes_accessed=q_BNHS.dtype.itemsize * (2 * q_BNHS.size + 2 * computed * H // (G * Q))
            + 4 * B * N * S,
        ),
        name="attention_forward",
    )(steps.list, shift_1, *inputs)


def _kernel(entries, shift, q_GHQ, k_HC, v_HC, *rest, pairs, documents, most, scores):
    ids = rest[:2] if documents else ()
    out_GHQ, lse_G1Q, largest_G1L, max_G1Q, sum_G1Q, acc_GHQ = rest[len(ids) :]
    s = pl.program_id(2)
    i, j, todo = step(entries[pl.program_id(0) * most + s])

    @pl.when(s == 0)
    def _():
        largest_G1L[...] = jnp.full_like(largest_G1L, -jnp.inf)

    @pl.when(todo & FIRST != 0)
    def _():
        # Above what is masked, so that its weights are 0 before a query has seen anything.
        max_G1Q[...] = jnp.full_like(max_G1Q, MASKED / 2)
        sum_G1Q[...] = jnp.zeros_like(sum_G1Q)
        acc_GHQ[...] = jnp.zeros_like(acc_GHQ)

    def add(some, allowed_CQ):
        # Reads before writes, for all heads: the compiler moves no read over a write, and took 7 (v5e) to 15 percent (v6e)
        # more bundles head by head.
        before = [(max_G1Q[g], sum_G1Q[g]) for g in some]
        raw = [scores.raw(q_GHQ[g], k_HC[...]) for g in some]
        after = [_softmax(raw_CQ, *x, allowed_CQ, scores) for raw_CQ, x in zip(raw, before)]
        updates = [product(v_HC[...], x[3].astype(v_HC.dtype), ROWS) for x in after]
        for g, (max_1Q, sum_1Q, shrink_1Q, _), update_HQ in zip(some, after, updates):
            max_G1Q[g], sum_G1Q[g] = max_1Q, sum_1Q
            acc_GHQ[g] = shrink_1Q * acc_GHQ[g] + update_HQ

    distance = shift[0] + i * pairs.queries - j * pairs.keys
    for_heads(add, todo, distance, ids, pairs=pairs, count=q_GHQ.shape[0])

    @pl.when(todo & LAST != 0)
    def _():
        real_1Q = None
        if ids:
            real_1Q = (ids[0][...] != 0) & (ids[0][...] != FILL)
        for g in range(q_GHQ.shape[0]):
            sum_1Q, max_1Q = sum_G1Q[g], max_G1Q[g]
            some_1Q = sum_1Q > 0
            out_GHQ[g] = (acc_GHQ[g] / jnp.where(some_1Q, sum_1Q, 1.0)).astype(out_GHQ.dtype)
            lse_1Q = scores.powers(max_1Q) / LOG2_E + jnp.log(sum_1Q)
            lse_G1Q[g] = jnp.where(some_1Q, lse_1Q, MASKED)
            counts_1Q = some_1Q if real_1Q is None else some_1Q & real_1Q
            largest_1Q = jnp.where(counts_1Q, max_1Q / scores.unit, -jnp.inf)
            for start in range(0, pairs.queries, LANES):
                largest_G1L[g] = jnp.maximum(largest_G1L[g], largest_1Q[:, start : start + LANES])


def _softmax(raw_CQ, max_1Q, sum_1Q, allowed_CQ, scores):
    """The largest score and the sum so far, what earlier sums shrink by, and the weights, of one head."""
    if allowed_CQ is not None:
        raw_CQ = jnp.where(allowed_CQ, raw_CQ, MASKED)
    new_1Q = jnp.maximum(max_1Q, jnp.max(raw_CQ, axis=0, keepdims=True))
    powers_CQ, old_power_1Q, power_1Q = (scores.powers(x) for x in (raw_CQ, max_1Q, new_1Q))
    if allowed_CQ is not None and scores.logit_cap is not None:
        powers_CQ = jnp.where(allowed_CQ, powers_CQ, MASKED)
    weights_CQ = jnp.exp2(powers_CQ - power_1Q)
    shrink_1Q = jnp.exp2(old_power_1Q - power_1Q)
    sum_1Q = shrink_1Q * sum_1Q + jnp.sum(weights_CQ, axis=0, keepdims=True)
    return new_1Q, sum_1Q, shrink_1Q, weights_CQ


def for_heads(add, todo, distance, ids, *, pairs: Pairs, count: int):
    """Calls `add(heads, mask)` where a step says so, with None as the mask of a pair of blocks that needs none.

    It gets all `count` heads at once, so that the MXU has one's products to do during another's softmax and a mask is made once:
    by two of four, at head width 128, v5e took 1290 bundles forward and 1522 with a mask, now 1292 and 1340; v6e 796 and 1006, now 687 and 876.
    """

    @pl.when(todo & (COMPUTE | WHOLE) == COMPUTE | WHOLE)
    def _():
        add(range(count), None)

    @pl.when(todo & (COMPUTE | WHOLE) == COMPUTE)
    def _():
        add(range(count), pairs.allowed(distance, *(x[...] for x in ids)))

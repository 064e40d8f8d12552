"""The forward kernel: output, log-sum-exp and largest score in one pass over the keys.

Everything is kept with positions on the lanes ([.., H, S]): a head width of 64 then fills its tiles, in VMEM and in HBM,
and maxima and sums of a query run over sublanes.

B batch, S sequence, N query heads, K key-value heads, H head width, Q queries of a block, T keys of a block, L lanes
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from smoljax.kernels.attention.pallas_tpu.blocks import FILL, MASKED, Pairs

LANES = 128
# Axes that are summed over; the MXU takes bf16 as it is, and f32 in as many passes as keep its digits.
COLUMNS = (((0,), (0,)), ((), ()))  # [H, T], [H, Q] -> [T, Q]
ROWS = (((1,), (0,)), ((), ()))  # [H, T], [T, Q] -> [H, Q]
BOTH_LAST = (((1,), (1,)), ((), ()))  # [H, Q], [T, Q] -> [H, T]


def product(a, b, axes):
    """A matrix product with f32 sums, and all digits of f32 factors."""
    precision = "highest" if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def run(q_BNHS, k_BKHS, v_BKHS, segment_ids_BS, key_blocks, *, pairs: Pairs, scale: float):
    """Calls the kernel.

    Args:
      q_BNHS: queries; k_BKHS, v_BKHS: keys and values of the same dtype.
      segment_ids_BS: int32, or None for one document.
      key_blocks: first and last block of keys of each block of queries, int32 [B, I], and the most of any.
      pairs: the mask and the sizes of blocks, which divide S.
      scale: factor on the scores.

    Returns:
      The output [B, N, H, S] in q's dtype, log-sum-exp f32 [B, N, 1, S], largest scores f32 [B, N, 1, L] spread over lanes.
    """
    B, N, H, S = q_BNHS.shape
    K = k_BKHS.shape[1]
    first_BI, last_BI, most = key_blocks
    Q, T = pairs.queries, pairs.keys

    def key_block(b, i, j, first, last):
        return jnp.minimum(first[b, i] + j, last[b, i])

    def by_query(b, n, i, j, first, last):
        return b, n, 0, i

    def by_key(b, n, i, j, first, last):
        return b, n // (N // K), 0, key_block(b, i, j, first, last)

    in_specs = [
        pl.BlockSpec((None, None, H, Q), by_query),
        pl.BlockSpec((None, None, H, T), by_key),
        pl.BlockSpec((None, None, H, T), by_key),
    ]
    inputs = [q_BNHS, k_BKHS, v_BKHS]
    if segment_ids_BS is not None:
        in_specs.append(pl.BlockSpec((None, 1, Q), lambda b, n, i, j, *_: (b, 0, i)))
        in_specs.append(
            pl.BlockSpec(
                (None, T, 1),
                lambda b, n, i, j, first, last: (b, key_block(b, i, j, first, last), 0),
            )
        )
        inputs += [segment_ids_BS[:, None, :], segment_ids_BS[:, :, None]]
    scores = B * N * int(pairs.reachable(S).sum()) * Q * T
    bytes_per = q_BNHS.dtype.itemsize
    return pl.pallas_call(
        functools.partial(
            _kernel, pairs=pairs, scale=scale, documents=segment_ids_BS is not None, most=most
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, N, S // Q, most),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((None, None, H, Q), by_query),
                pl.BlockSpec((None, None, 1, Q), by_query),
                pl.BlockSpec((None, None, 1, LANES), lambda b, n, i, j, *_: (b, n, 0, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((1, Q), jnp.float32),
                pltpu.VMEM((1, Q), jnp.float32),
                pltpu.VMEM((H, Q), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, N, H, S), q_BNHS.dtype),
            jax.ShapeDtypeStruct((B, N, 1, S), jnp.float32),
            jax.ShapeDtypeStruct((B, N, 1, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * scores * H,
            transcendentals=scores,
            bytes_accessed=bytes_per * (2 * q_BNHS.size + 2 * scores * H // Q) + 4 * B * N * S,
        ),
        name="attention_forward",
    )(first_BI, last_BI, *inputs)


def _kernel(first, last, q_HQ, k_HT, v_HT, *rest, pairs, scale, documents, most):
    ids_1Q, ids_T1 = rest[:2] if documents else (None, None)
    out_HQ, lse_1Q, largest_1L, max_1Q, sum_1Q, acc_HQ = rest[2 if documents else 0 :]
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    block = first[b, i] + j

    @pl.when(j == 0)
    def _():
        max_1Q[...] = jnp.full_like(max_1Q, MASKED)
        sum_1Q[...] = jnp.zeros_like(sum_1Q)
        acc_HQ[...] = jnp.zeros_like(acc_HQ)

    @pl.when((i == 0) & (j == 0))
    def _():
        largest_1L[...] = jnp.full_like(largest_1L, -jnp.inf)

    @pl.when(block <= last[b, i])
    def _():
        scores_TQ = scale * product(k_HT[...], q_HQ[...], COLUMNS)
        allowed_TQ = pairs.allowed(
            i * pairs.queries,
            block * pairs.keys,
            ids_1Q[...] if documents else None,
            ids_T1[...] if documents else None,
        )
        scores_TQ = jnp.where(allowed_TQ, scores_TQ, MASKED)
        old_1Q = max_1Q[...]
        new_1Q = jnp.maximum(old_1Q, jnp.max(scores_TQ, axis=0, keepdims=True))
        # A query that has seen nothing has the maximum MASKED, and exp(0) of what it may not see must not count.
        weights_TQ = jnp.where(allowed_TQ, jnp.exp(scores_TQ - new_1Q), 0.0)
        shrink_1Q = jnp.exp(old_1Q - new_1Q)
        max_1Q[...] = new_1Q
        sum_1Q[...] = shrink_1Q * sum_1Q[...] + jnp.sum(weights_TQ, axis=0, keepdims=True)
        update_HQ = product(v_HT[...], weights_TQ.astype(v_HT.dtype), ROWS)
        acc_HQ[...] = shrink_1Q * acc_HQ[...] + update_HQ

    @pl.when(j == most - 1)
    def _():
        out_HQ[...] = (acc_HQ[...] / sum_1Q[...]).astype(out_HQ.dtype)
        lse_1Q[...] = max_1Q[...] + jnp.log(sum_1Q[...])
        real_1Q = max_1Q[...]
        if documents:
            real_1Q = jnp.where((ids_1Q[...] != 0) & (ids_1Q[...] != FILL), real_1Q, -jnp.inf)
        for start in range(0, pairs.queries, LANES):
            largest_1L[...] = jnp.maximum(largest_1L[...], real_1Q[:, start : start + LANES])

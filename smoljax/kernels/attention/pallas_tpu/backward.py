"""The two backward kernels: one per block of queries for dq, one per block of keys for dk and dv.

Probabilities are computed again from the log-sum-exp (Dao et al. 2022, arXiv 2205.14135, section 3.1). Two kernels do seven
products where one would do five, and hold no partial dq in HBM.

B batch, S sequence, N query heads, K key-value heads, G query heads per key-value head, H head width, Q queries of a block,
T keys of a block
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from smoljax.kernels.attention.pallas_tpu.blocks import Pairs
from smoljax.kernels.attention.pallas_tpu.forward import BOTH_LAST, COLUMNS, ROWS, product


def queries(arrays, segment_ids_BS, key_blocks, *, pairs: Pairs, scale: float) -> jax.Array:
    """dq, [B, N, H, S] in q's dtype.

    Args:
      arrays: q, k, v and the output's gradient [B, heads, H, S]; log-sum-exp and the sum of output times gradient over H,
        f32 [B, N, 1, S].
      segment_ids_BS: int32, or None for one document.
      key_blocks: first and last block of keys of each block of queries, int32 [B, I], and the most of any.
      pairs: the mask and the sizes of blocks.
      scale: factor on the scores.
    """
    q_BNHS, k_BKHS = arrays[:2]
    B, N, H, S = q_BNHS.shape
    group = N // k_BKHS.shape[1]
    *ends, most = key_blocks

    def places(b, n, i, j, first, last):
        return b, n, i, jnp.minimum(first[b, i] + j, last[b, i])

    in_specs, inputs = _inputs(arrays, segment_ids_BS, places, pairs, group)
    return pl.pallas_call(
        functools.partial(
            _queries_kernel, pairs=pairs, scale=scale, documents=segment_ids_BS is not None
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, N, S // pairs.queries, most),
            in_specs=in_specs,
            out_specs=pl.BlockSpec(
                (None, None, H, pairs.queries), lambda b, n, i, j, *_: (b, n, 0, i)
            ),
            scratch_shapes=[pltpu.VMEM((H, pairs.queries), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(q_BNHS.shape, q_BNHS.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(q_BNHS, pairs, products=3),
        name="attention_backward_queries",
    )(*ends, *inputs)


def keys_and_values(
    arrays, segment_ids_BS, query_blocks, *, pairs: Pairs, scale: float
) -> tuple[jax.Array, jax.Array]:
    """dk and dv, [B, K, H, S] in k's dtype, summed over the query heads of a group; arguments as in `queries`.

    `query_blocks` are the first and last block of queries of each block of keys, int32 [B, J], and the most of any.
    """
    q_BNHS, k_BKHS = arrays[:2]
    B, N, H, S = q_BNHS.shape
    K = k_BKHS.shape[1]
    group = N // K
    *ends, most = query_blocks

    def places(b, k, j, g, i, first, last):
        return b, k * group + g, jnp.minimum(first[b, j] + i, last[b, j]), j

    in_specs, inputs = _inputs(arrays, segment_ids_BS, places, pairs, group)
    out_spec = pl.BlockSpec((None, None, H, pairs.keys), lambda b, k, j, g, i, *_: (b, k, 0, j))
    return pl.pallas_call(
        functools.partial(
            _keys_kernel, pairs=pairs, scale=scale, documents=segment_ids_BS is not None
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K, S // pairs.keys, group, most),
            in_specs=in_specs,
            out_specs=[out_spec, out_spec],
            scratch_shapes=[pltpu.VMEM((H, pairs.keys), jnp.float32)] * 2,
        ),
        out_shape=[jax.ShapeDtypeStruct(k_BKHS.shape, k_BKHS.dtype)] * 2,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=_cost(q_BNHS, pairs, products=4),
        name="attention_backward_keys",
    )(*ends, *inputs)


def _inputs(arrays, segment_ids_BS, places, pairs, group):
    """Arrays and where their blocks lie; `places` gives row, query head, block of queries, block of keys."""
    H = arrays[0].shape[2]

    def by_query(*at):
        b, n, i, _ = places(*at)
        return b, n, 0, i

    def by_key(*at):
        b, n, _, j = places(*at)
        return b, n // group, 0, j

    query = pl.BlockSpec((None, None, H, pairs.queries), by_query)
    key = pl.BlockSpec((None, None, H, pairs.keys), by_key)
    row = pl.BlockSpec((None, None, 1, pairs.queries), by_query)
    in_specs, inputs = [query, key, key, query, row, row], list(arrays)
    if segment_ids_BS is not None:

        def ids_by_query(*at):
            b, _, i, _ = places(*at)
            return b, 0, i

        def ids_by_key(*at):
            b, _, _, j = places(*at)
            return b, j, 0

        in_specs.append(pl.BlockSpec((None, 1, pairs.queries), ids_by_query))
        in_specs.append(pl.BlockSpec((None, pairs.keys, 1), ids_by_key))
        inputs += [segment_ids_BS[:, None, :], segment_ids_BS[:, :, None]]
    return in_specs, inputs


def _cost(q_BNHS, pairs, products):
    B, N, H, S = q_BNHS.shape
    scores = B * N * int(pairs.reachable(S).sum()) * pairs.queries * pairs.keys
    moved = 3 * q_BNHS.size + 2 * scores * H // pairs.queries
    return pl.CostEstimate(
        flops=2 * products * scores * H,
        transcendentals=scores,
        bytes_accessed=q_BNHS.dtype.itemsize * moved + 8 * B * N * S,
    )


def _weights(refs, i, j, *, pairs, scale, documents):
    """Probabilities and the gradient of the scores before their factor, f32 [T, Q]."""
    q_HQ, k_HT, v_HT, dout_HQ, lse_1Q, drop_1Q, *ids = refs
    scores_TQ = scale * product(k_HT[...], q_HQ[...], COLUMNS)
    ids_1Q, ids_T1 = (ids[0][...], ids[1][...]) if documents else (None, None)
    allowed_TQ = pairs.allowed(i * pairs.queries, j * pairs.keys, ids_1Q, ids_T1)
    weights_TQ = jnp.where(allowed_TQ, jnp.exp(scores_TQ - lse_1Q[...]), 0.0)
    dweights_TQ = product(v_HT[...], dout_HQ[...], COLUMNS)
    return weights_TQ, weights_TQ * (dweights_TQ - drop_1Q[...])


def _queries_kernel(first, last, *refs, pairs, scale, documents):
    *inputs, dq_HQ, acc_HQ = refs
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    block = first[b, i] + j

    @pl.when(j == 0)
    def _():
        acc_HQ[...] = jnp.zeros_like(acc_HQ)

    @pl.when(block <= last[b, i])
    def _():
        k_HT = inputs[1]
        _, dscores_TQ = _weights(inputs, i, block, pairs=pairs, scale=scale, documents=documents)
        acc_HQ[...] += product(k_HT[...], dscores_TQ.astype(k_HT.dtype), ROWS)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        dq_HQ[...] = (scale * acc_HQ[...]).astype(dq_HQ.dtype)


def _keys_kernel(first, last, *refs, pairs, scale, documents):
    *inputs, dk_HT, dv_HT, dk_acc_HT, dv_acc_HT = refs
    b, j, g, i = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.program_id(4)
    block = first[b, j] + i

    @pl.when((g == 0) & (i == 0))
    def _():
        dk_acc_HT[...] = jnp.zeros_like(dk_acc_HT)
        dv_acc_HT[...] = jnp.zeros_like(dv_acc_HT)

    @pl.when(block <= last[b, j])
    def _():
        q_HQ, dout_HQ = inputs[0], inputs[3]
        weights_TQ, dscores_TQ = _weights(
            inputs, block, j, pairs=pairs, scale=scale, documents=documents
        )
        dv_acc_HT[...] += product(dout_HQ[...], weights_TQ.astype(dout_HQ.dtype), BOTH_LAST)
        dk_acc_HT[...] += product(q_HQ[...], dscores_TQ.astype(q_HQ.dtype), BOTH_LAST)

    @pl.when((g == pl.num_programs(3) - 1) & (i == pl.num_programs(4) - 1))
    def _():
        dk_HT[...] = (scale * dk_acc_HT[...]).astype(dk_HT.dtype)
        dv_HT[...] = dv_acc_HT[...].astype(dv_HT.dtype)

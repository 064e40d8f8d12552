"""The backward kernels: one that does five products, or two that do seven where it would not fit.

Probabilities are computed again from the log-sum-exp (Dao et al. 2022, arXiv 2205.14135, section 3.1). The one kernel goes
through the blocks of queries and keeps dk and dv of all keys of a head in VMEM, f32, until it has seen them all. Where those
do not fit, one kernel goes through the blocks of queries for dq and another through those of keys for dk and
dv. None holds a partial gradient in HBM.

B batch, S queries, T keys, N query heads, K key-value heads, G query heads of a step, H head width, Q queries of a block,
C keys of a block
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from smoljax.kernels.attention.pallas_tpu.blocks import (
    FIRST,
    FLUSH,
    LAST,
    Pairs,
    Schedule,
    Steps,
    heads,
    step,
)
from smoljax.kernels.attention.pallas_tpu.forward import (
    BOTH_LAST,
    COLUMNS,
    LOG2_E,
    ROWS,
    Scores,
    for_heads,
    product,
)


def run(arrays, ids, schedule: Schedule, shift_1, *, pairs: Pairs, scores: Scores, dtype):
    """dq [B, N, H, S], dk and dv [B, K, H, T], the last two summed over the query heads of a group.

    Args:
      arrays: q, k, v and the output's gradient [B, heads, H, positions] of one dtype; log-sum-exp and the sum of output
        times gradient over H, f32 [B, N, 1, S].
      ids: int32 segments of queries [B, S] and of keys [B, T], or None for one document.
      schedule: pairs of blocks that meet.
      shift_1: int32, position of the first query less that of the first key.
      pairs: the mask and the sizes of blocks, which divide S and T.
      scores: how they are made.
      dtype: of the gradients.
    """
    q_BNHS, k_BKHT = arrays[:2]
    _, K, H, T = k_BKHT.shape
    fit = functools.partial(heads, q_BNHS.shape[1] // K, pairs, H, q_BNHS.dtype.itemsize, blocks=3)
    call = functools.partial(_call, arrays, ids, shift_1, pairs=pairs, scores=scores, dtype=dtype)
    together = fit(accumulated=2 * 4 * H * T)
    if together:
        return call(schedule.by_queries(flush=True), _all_kernel, G=together, products=5)
    apart = max(fit(), 1)
    (dq,) = call(schedule.by_queries(), _queries_kernel, G=apart, products=3)
    return dq, *call(schedule.by_keys(), _keys_kernel, G=apart, products=4)


def _call(arrays, ids, shift_1, steps: Steps, kernel, *, pairs, scores, dtype, G, products):
    q_BNHS, k_BKHT = arrays[:2]
    (B, N, H, S), (_, K, _, T) = q_BNHS.shape, k_BKHT.shape
    Q, C = pairs.queries, pairs.keys
    parts = N // K // G
    keys_first = kernel is _keys_kernel

    def places(b, k, *at):
        """Row, query heads, blocks of queries and keys, and what to do, of a step."""
        (s, g) = at[:2] if keys_first else at[1::-1]
        i, j, todo = step(at[2][b * steps.most + s])
        return k * parts + g, i, j, todo, g

    def by_query(b, k, *at):
        n, i, *_ = places(b, k, *at)
        return b, n, 0, i

    def by_key(b, k, *at):
        return b, k, 0, places(b, k, *at)[2]

    def when_flushed(b, k, *at):
        _, _, j, todo, g = places(b, k, *at)
        return b, k, 0, jnp.where((todo & FLUSH != 0) & (g == parts - 1), j, 0)

    query, row = (pl.BlockSpec((None, G, size, Q), by_query) for size in (H, 1))
    key = pl.BlockSpec((None, None, H, C), by_key)
    in_specs, inputs = [query, key, key, query, row, row], list(arrays)
    if ids is not None:
        in_specs.append(pl.BlockSpec((None, 1, Q), lambda b, *at: (b, 0, places(b, *at)[1])))
        in_specs.append(pl.BlockSpec((None, 1, C), lambda b, *at: (b, 0, places(b, *at)[2])))
        inputs += [x[:, None] for x in ids]
    dq_shape, dk_shape = (jax.ShapeDtypeStruct(x.shape, dtype) for x in (q_BNHS, k_BKHT))
    dq_acc = pltpu.VMEM((G, H, Q), jnp.float32)
    if keys_first:
        out_specs, out_shape = [key, key], [dk_shape, dk_shape]
        scratch_shapes = [pltpu.VMEM((H, C), jnp.float32)] * 2
    elif kernel is _queries_kernel:
        out_specs, out_shape, scratch_shapes = [query], [dq_shape], [dq_acc]
    else:
        flushed = pl.BlockSpec((None, None, H, C), when_flushed)
        out_specs, out_shape = [query, flushed, flushed], [dq_shape, dk_shape, dk_shape]
        scratch_shapes = [dq_acc] + [pltpu.VMEM((H, T), jnp.float32)] * 2
    computed = B * N * steps.pairs * Q * C
    moved = 3 * q_BNHS.size + 2 * computed * H // (G * Q)
    return pl.pallas_call(
        functools.partial(kernel, pairs=pairs, scores=scores, most=steps.most),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K, steps.count, parts) if keys_first else (B, K, parts, steps.count),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch_shapes,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * computed * H,
            transcendentals=computed,
            bytes_accessed=q_BNHS.dtype.itemsize * moved + 8 * B * N * S,
        ),
        name={
            _all_kernel: "attention_backward",
            _queries_kernel: "attention_backward_queries",
            _keys_kernel: "attention_backward_keys",
        }[kernel],
    )(steps.list, shift_1, *inputs)


def _weights(inputs, g, allowed_CQ, scores):
    """Probabilities of head g and the gradient of the scores before their factor, [C, Q] in the dtype of products."""
    q_GHQ, k_HC, v_HC, dout_GHQ, lse_G1Q, drop_G1Q = inputs[:6]
    raw_CQ = scores.raw(q_GHQ[g], k_HC[...])
    weights_CQ = jnp.exp2(scores.powers(raw_CQ) - LOG2_E * lse_G1Q[g])
    if allowed_CQ is not None:
        weights_CQ = jnp.where(allowed_CQ, weights_CQ, 0.0)
    dweights_CQ = product(v_HC[...], dout_GHQ[g], COLUMNS)
    dscores_CQ = weights_CQ * (dweights_CQ - drop_G1Q[g])
    if scores.logit_cap is not None:
        dscores_CQ *= 1.0 - jnp.square(scores.bent(raw_CQ))
    return weights_CQ.astype(k_HC.dtype), dscores_CQ.astype(k_HC.dtype)


def _all_kernel(entries, shift, *refs, pairs, scores, most):
    *inputs, dq_GHQ, dk_HC, dv_HC, dq_acc_GHQ, dk_acc_HT, dv_acc_HT = refs
    q_GHQ, k_HC, _, dout_GHQ = inputs[:4]
    part, s = pl.program_id(2), pl.program_id(3)
    i, j, todo = step(entries[pl.program_id(0) * most + s])
    at = pl.ds(pl.multiple_of(j * pairs.keys, pairs.keys), pairs.keys)

    @pl.when((part == 0) & (s == 0))
    def _():
        dk_acc_HT[...] = jnp.zeros_like(dk_acc_HT)
        dv_acc_HT[...] = jnp.zeros_like(dv_acc_HT)

    @pl.when(todo & FIRST != 0)
    def _():
        dq_acc_GHQ[...] = jnp.zeros_like(dq_acc_GHQ)

    def add(some, allowed_CQ):
        for g in some:
            weights_CQ, dscores_CQ = _weights(inputs, g, allowed_CQ, scores)
            dv_acc_HT[:, at] += product(dout_GHQ[g], weights_CQ, BOTH_LAST)
            dk_acc_HT[:, at] += product(q_GHQ[g], dscores_CQ, BOTH_LAST)
            dq_acc_GHQ[g] += product(k_HC[...], dscores_CQ, ROWS)

    distance = shift[0] + i * pairs.queries - j * pairs.keys
    for_heads(add, todo, distance, inputs[6:], pairs=pairs, count=q_GHQ.shape[0])

    @pl.when(todo & LAST != 0)
    def _():
        dq_GHQ[...] = (scores.scale * dq_acc_GHQ[...]).astype(dq_GHQ.dtype)

    @pl.when((todo & FLUSH != 0) & (part == pl.num_programs(2) - 1))
    def _():
        dk_HC[...] = (scores.scale * dk_acc_HT[:, at]).astype(dk_HC.dtype)
        dv_HC[...] = dv_acc_HT[:, at].astype(dv_HC.dtype)


def _queries_kernel(entries, shift, *refs, pairs, scores, most):
    *inputs, dq_GHQ, acc_GHQ = refs
    k_HC = inputs[1]
    i, j, todo = step(entries[pl.program_id(0) * most + pl.program_id(3)])

    @pl.when(todo & FIRST != 0)
    def _():
        acc_GHQ[...] = jnp.zeros_like(acc_GHQ)

    def add(some, allowed_CQ):
        for g in some:
            _, dscores_CQ = _weights(inputs, g, allowed_CQ, scores)
            acc_GHQ[g] += product(k_HC[...], dscores_CQ, ROWS)

    distance = shift[0] + i * pairs.queries - j * pairs.keys
    for_heads(add, todo, distance, inputs[6:], pairs=pairs, count=acc_GHQ.shape[0])

    @pl.when(todo & LAST != 0)
    def _():
        dq_GHQ[...] = (scores.scale * acc_GHQ[...]).astype(dq_GHQ.dtype)


def _keys_kernel(entries, shift, *refs, pairs, scores, most):
    *inputs, dk_HC, dv_HC, dk_acc_HC, dv_acc_HC = refs
    q_GHQ, dout_GHQ = inputs[0], inputs[3]
    part = pl.program_id(3)
    i, j, todo = step(entries[pl.program_id(0) * most + pl.program_id(2)])

    @pl.when((todo & FIRST != 0) & (part == 0))
    def _():
        dk_acc_HC[...] = jnp.zeros_like(dk_acc_HC)
        dv_acc_HC[...] = jnp.zeros_like(dv_acc_HC)

    def add(some, allowed_CQ):
        for g in some:
            weights_CQ, dscores_CQ = _weights(inputs, g, allowed_CQ, scores)
            dv_acc_HC[...] += product(dout_GHQ[g], weights_CQ, BOTH_LAST)
            dk_acc_HC[...] += product(q_GHQ[g], dscores_CQ, BOTH_LAST)

    distance = shift[0] + i * pairs.queries - j * pairs.keys
    for_heads(add, todo, distance, inputs[6:], pairs=pairs, count=q_GHQ.shape[0])

    @pl.when((todo & LAST != 0) & (part == pl.num_programs(3) - 1))
    def _():
        dk_HC[...] = (scores.scale * dk_acc_HC[...]).astype(dk_HC.dtype)
        dv_HC[...] = dv_acc_HC[...].astype(dv_HC.dtype)

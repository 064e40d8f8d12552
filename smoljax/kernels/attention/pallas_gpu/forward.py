"""The forward kernel: output, log-sum-exp and largest score of each query in one pass over the keys.

B batch, S sequence, N query heads, K key-value heads, H head width, M queries of a warpgroup, C keys of a block
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from smoljax.kernels.attention.pallas_gpu.blocks import (
    LOG2_E,
    MASKED,
    ROWS,
    TILE,
    WARPGROUPS,
    Mask,
    block,
)

# Layouts of registers and shared memory are the compiler's to find; it is this way of writing that JAX can also interpret.
PARAMETERS = plgpu.CompilerParams(
    approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
)
_LOADER_REGISTERS = 40  # Of a thread of the warpgroup that loads; the others get what it leaves.
# Columns of the output that are summed at once: a new sum stands beside the old one in registers. By ptxas for sm_90a with
# identifiers, bytes spilled: head width 128 in one piece 112, in halves 124; 256 in halves 1068, in quarters 244.
_WIDEST_SUM = {128: 128, 256: 64}


def run(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, spans, *, mask: Mask):
    """Calls the kernel.

    Args:
      q_BSNH: queries; S a multiple of a tile. k_BSKH, v_BSKH: keys and values of the same dtype.
      segment_ids_BS: int32, or None for one document.
      spans: blocks of keys of every tile of queries.
      mask: what is static about the scores.

    Returns:
      The output [B, S, N, H] in q's dtype; log-sum-exp, and largest score before the cap, of every query, f32 [B, N, S].
    """
    B, S, N, H = q_BSNH.shape
    per_query = jax.ShapeDtypeStruct((B, N, S), jnp.float32)
    return plgpu.kernel(
        functools.partial(_kernel, mask=mask, size=block(H, "forward")),
        out_type=(jax.ShapeDtypeStruct(q_BSNH.shape, q_BSNH.dtype), per_query, per_query),
        grid=(N, S // TILE, B),
        grid_names=("head", "tile", "row"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=dict(
            q_smem=plgpu.SMEM((WARPGROUPS, ROWS, H), q_BSNH.dtype),
            row_smem=plgpu.SMEM((WARPGROUPS, 2, ROWS), jnp.float32),
            ids_smem=plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32),
            arrived=plgpu.Barrier(
                num_arrivals=1 if segment_ids_BS is None else 2, num_barriers=WARPGROUPS
            ),
        ),
        compiler_params=PARAMETERS,
        kernel_name="attention_forward",
    )(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, spans)


def product(a, b) -> jax.Array:
    """a [M, X] in registers or shared memory times b [X, C] in shared memory, f32."""

    def multiply(sums):
        plgpu.wgmma(sums, a, b)
        return sums[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def transposed(smem):
    """The same [X, M] of an [M, X] in shared memory; nothing moves."""
    return plgpu.transpose_ref(smem, (1, 0))


def along(x_M, shape, axis: int) -> jax.Array:
    """A vector spread over the other axis of `shape`."""
    return jax.lax.broadcast_in_dim(x_M, shape, (axis,))


def masked(scores, mask: Mask, firsts, one, ids, *, query_axis: int) -> jax.Array:
    """Scores with MASKED where a pair may not see; a block in which all may is left as it is, and its ids are not read.

    Args:
      scores: f32 [M, C].
      mask: what is static about them.
      firsts: first position of the rows and of the columns.
      one: the one document of rows and of columns (`Spans.documents`), or None.
      ids: segments of rows and columns in shared memory, or None.
      query_axis: 0 where rows are queries, 1 where columns are.
    """
    cut = mask.cuts(firsts, one, scores.shape, query_axis=query_axis)
    if cut is False:
        return scores

    def apply(scores):
        of = None if ids is None else [x[...] for x in ids]
        allowed = mask.allowed(firsts, of, scores.shape, query_axis=query_axis)
        return jnp.where(allowed, scores, MASKED)

    return jax.lax.cond(cut, apply, lambda scores: scores, scores)


def one_document(documents, row, tile, block):
    """The documents of a tile and of a block, or None for one document throughout."""
    return None if documents is None else (documents[0][row, tile], documents[1][row, block])


def pipeline(step, compute, grid, in_specs, *, stages):
    """A loop over blocks that one warpgroup loads while the others take `step` with what `compute` starts and ends."""
    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=grid,
        in_specs=in_specs,
        max_concurrent_steps=stages,
        num_compute_wgs=WARPGROUPS,
        wg_axis="warpgroup",
        memory_registers=_LOADER_REGISTERS,
        manual_consumed_barriers=True,
        compute_context=compute,
    )


def _kernel(
    q_BSNH, k_BSKH, v_BSKH, ids_BS, spans, out_BSNH, lse_BNS, max_BNS, *, mask, size, **scratch
):
    n, tile, b = (jax.lax.axis_index(name) for name in ("head", "tile", "row"))
    warpgroup = jax.lax.axis_index("warpgroup")
    head = n // (q_BSNH.shape[2] // k_BSKH.shape[2])
    H, C = q_BSNH.shape[3], size.columns
    widest = next(width for up_to, width in _WIDEST_SUM.items() if up_to >= H)
    parts = [slice(at, min(at + widest, H)) for at in range(0, H, widest)]
    first_block, num_blocks = spans.ends[b, tile, 0], spans.ends[b, tile, 1]
    first_query = tile * TILE + warpgroup * ROWS
    rows = pl.ds(first_query, ROWS)

    def compute(loop):
        q_smem, row_smem, ids_smem, arrived = (
            scratch[name].at[warpgroup] for name in ("q_smem", "row_smem", "ids_smem", "arrived")
        )
        plgpu.copy_gmem_to_smem(q_BSNH.at[b, rows, n], q_smem, arrived)
        if ids_BS is not None:
            plgpu.copy_gmem_to_smem(ids_BS.at[b, rows], ids_smem, arrived)
        plgpu.barrier_wait(arrived)
        sums = tuple(jnp.zeros((ROWS, part.stop - part.start), jnp.float32) for part in parts)
        lowest_M = jnp.full((ROWS,), MASKED, jnp.float32)
        largest_M = None if mask.logit_cap is None else lowest_M  # Without a cap it is the maximum.
        start = (lowest_M, largest_M, jnp.zeros((ROWS,), jnp.float32), sums)
        max_M, largest_M, sum_M, sums = loop(start)
        for part, sum_MX in zip(parts, sums):
            out_MX = sum_MX / along(sum_M, sum_MX.shape, 0)
            q_smem.at[:, part][...] = out_MX.astype(q_smem.dtype)
        row_smem.at[0][...] = max_M * (1 / LOG2_E) + jnp.log(sum_M)
        row_smem.at[1][...] = (max_M if largest_M is None else largest_M) * (1 / LOG2_E)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, out_BSNH.at[b, rows, n])
        plgpu.copy_smem_to_gmem(row_smem.at[0], lse_BNS.at[b, n, rows])
        plgpu.copy_smem_to_gmem(row_smem.at[1], max_BNS.at[b, n, rows])
        plgpu.wait_smem_to_gmem(0)

    def step(index, k_smem, v_smem, k_ids_smem, k_free, v_free, ids_free, carry):
        at = first_block + index[0]
        old_M, largest_M, sum_M, sums = carry
        q_smem, q_ids_smem = (scratch[name].at[warpgroup] for name in ("q_smem", "ids_smem"))
        scores_MC = mask.scores(product(q_smem, transposed(k_smem)))
        plgpu.barrier_arrive(k_free)
        scores_MC = masked(
            scores_MC,
            mask,
            (first_query, at * C),
            one_document(spans.documents, b, tile, at),
            None if ids_BS is None else (q_ids_smem, k_ids_smem),
            query_axis=0,
        )
        if ids_BS is not None:
            plgpu.barrier_arrive(ids_free)
        if largest_M is not None:
            largest_M = jnp.maximum(largest_M, scores_MC.max(axis=1))
        scores_MC, _ = mask.bend(scores_MC)
        # What a row has summed before it saw anything it may see is multiplied by exp(MASKED - maximum) = 0 later.
        new_M = jnp.maximum(old_M, scores_MC.max(axis=1))
        weights_MC = jnp.exp2(scores_MC - along(new_M, scores_MC.shape, 0))
        shrink_M = jnp.exp2(old_M - new_M)
        sum_M = shrink_M * sum_M + weights_MC.sum(axis=1)
        weights_MC = weights_MC.astype(v_smem.dtype)
        sums = tuple(
            along(shrink_M, x.shape, 0) * x + product(weights_MC, v_smem.at[:, part])
            for part, x in zip(parts, sums)
        )
        plgpu.barrier_arrive(v_free)
        return new_M, largest_M, sum_M, sums

    keys = plgpu.BlockSpec((C, H), lambda j: (first_block + j, 0))
    ids = None if ids_BS is None else plgpu.BlockSpec((C,), lambda j: (first_block + j,))
    pipeline(step, compute, (num_blocks,), [keys, keys, ids], stages=size.stages)(
        k_BSKH.at[b, :, head],
        v_BSKH.at[b, :, head],
        None if ids_BS is None else ids_BS.at[b],
    )

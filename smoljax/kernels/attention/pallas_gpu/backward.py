"""The two backward kernels: one per tile of queries for dq, one per tile of keys for dk and dv.

Probabilities are computed again from the log-sum-exp (Dao et al. 2022, arXiv 2205.14135, section 3.1). Two kernels do seven
products where one would do five, and need no sums of dq across programs, whose order would change from run to run.

B batch, S sequence, N query heads, K key-value heads, H head width, M rows of a warpgroup, C columns of a block
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from smoljax.kernels.attention.pallas_gpu.blocks import (
    ROWS,
    TILE,
    WARPGROUPS,
    Mask,
    block,
)
from smoljax.kernels.attention.pallas_gpu.forward import (
    PARAMETERS,
    along,
    masked,
    one_document,
    pipeline,
    product,
    transposed,
)


def queries(arrays, segment_ids_BS, spans, *, mask: Mask) -> jax.Array:
    """dq, [B, S, N, H] in q's dtype.

    Args:
      arrays: q, k, v and the output's gradient [B, S, heads, H]; log-sum-exp in units of log 2 and the sum of output times
        gradient over H, f32 [B, N, S].
      segment_ids_BS: int32, or None for one document.
      spans: blocks of keys of every tile of queries.
      mask: what is static about the scores.
    """
    q_BSNH = arrays[0]
    B, S, N, H = q_BSNH.shape
    tile = plgpu.SMEM((WARPGROUPS, ROWS, H), q_BSNH.dtype)
    return plgpu.kernel(
        functools.partial(_queries_kernel, mask=mask, size=block(H, "backward")),
        out_type=jax.ShapeDtypeStruct(q_BSNH.shape, q_BSNH.dtype),
        grid=(N, S // TILE, B),
        grid_names=("head", "tile", "row"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=dict(
            q_smem=tile,
            dout_smem=tile,
            row_smem=plgpu.SMEM((WARPGROUPS, 2, ROWS), jnp.float32),
            ids_smem=plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32),
            arrived=plgpu.Barrier(
                num_arrivals=4 if segment_ids_BS is None else 5, num_barriers=WARPGROUPS
            ),
        ),
        compiler_params=PARAMETERS,
        kernel_name="attention_backward_queries",
    )(*arrays, segment_ids_BS, spans)


def keys_and_values(arrays, segment_ids_BS, spans, *, mask: Mask) -> tuple[jax.Array, jax.Array]:
    """dk and dv, [B, S, K, H] in k's dtype, summed over the query heads of a group; arguments as in `queries`.

    `spans` are the blocks of queries of every tile of keys.
    """
    k_BSKH = arrays[1]
    B, S, K, H = k_BSKH.shape
    tile = plgpu.SMEM((WARPGROUPS, ROWS, H), k_BSKH.dtype)
    return plgpu.kernel(
        functools.partial(_keys_kernel, mask=mask, size=block(H, "backward")),
        out_type=(jax.ShapeDtypeStruct(k_BSKH.shape, k_BSKH.dtype),) * 2,
        grid=(K, S // TILE, B),
        grid_names=("head", "tile", "row"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=dict(
            k_smem=tile,
            v_smem=tile,
            ids_smem=plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32),
            arrived=plgpu.Barrier(
                num_arrivals=2 if segment_ids_BS is None else 3, num_barriers=WARPGROUPS
            ),
        ),
        compiler_params=PARAMETERS,
        kernel_name="attention_backward_keys",
    )(*arrays, segment_ids_BS, spans)


def _queries_kernel(
    q_BSNH,
    k_BSKH,
    v_BSKH,
    dout_BSNH,
    lse_BNS,
    drop_BNS,
    ids_BS,
    spans,
    dq_BSNH,
    *,
    mask,
    size,
    **scratch,
):
    n, tile, b = (jax.lax.axis_index(name) for name in ("head", "tile", "row"))
    warpgroup = jax.lax.axis_index("warpgroup")
    head = n // (q_BSNH.shape[2] // k_BSKH.shape[2])
    H, C = q_BSNH.shape[3], size.columns
    first_block, num_blocks = spans.ends[b, tile, 0], spans.ends[b, tile, 1]
    first_query = tile * TILE + warpgroup * ROWS
    rows = pl.ds(first_query, ROWS)
    own = {name: refs.at[warpgroup] for name, refs in scratch.items()}

    def compute(loop):
        loads = [
            (q_BSNH.at[b, rows, n], own["q_smem"]),
            (dout_BSNH.at[b, rows, n], own["dout_smem"]),
            (lse_BNS.at[b, n, rows], own["row_smem"].at[0]),
            (drop_BNS.at[b, n, rows], own["row_smem"].at[1]),
        ]
        if ids_BS is not None:
            loads.append((ids_BS.at[b, rows], own["ids_smem"]))
        for source, target in loads:
            plgpu.copy_gmem_to_smem(source, target, own["arrived"])
        plgpu.barrier_wait(own["arrived"])

        def add_up(dq_MH):
            loop(dq_MH)
            return dq_MH[...]

        dq_MH = pl.run_scoped(add_up, plgpu.ACC((ROWS, H), jnp.float32))
        own["q_smem"][...] = (dq_MH * mask.scale).astype(q_BSNH.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own["q_smem"], dq_BSNH.at[b, rows, n])
        plgpu.wait_smem_to_gmem(0)

    def step(index, k_smem, v_smem, k_ids_smem, k_free, v_free, ids_free, dq_MH):
        at = first_block + index[0]
        scores_MC = mask.scores(product(own["q_smem"], transposed(k_smem)))
        scores_MC = masked(
            scores_MC,
            mask,
            (first_query, at * C),
            one_document(spans.documents, b, tile, at),
            None if ids_BS is None else (own["ids_smem"], k_ids_smem),
            query_axis=0,
        )
        scores_MC, slope_MC = mask.bend(scores_MC)
        if ids_BS is not None:
            plgpu.barrier_arrive(ids_free)
        lse_M, drop_M = own["row_smem"].at[0][...], own["row_smem"].at[1][...]
        weights_MC = jnp.exp2(scores_MC - along(lse_M, scores_MC.shape, 0))
        dweights_MC = product(own["dout_smem"], transposed(v_smem))
        plgpu.barrier_arrive(v_free)
        dscores_MC = weights_MC * (dweights_MC - along(drop_M, scores_MC.shape, 0))
        if slope_MC is not None:
            dscores_MC *= slope_MC
        plgpu.wgmma(dq_MH, dscores_MC.astype(k_smem.dtype), k_smem)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(k_free)
        return dq_MH

    keys = plgpu.BlockSpec((C, H), lambda j: (first_block + j, 0))
    ids = None if ids_BS is None else plgpu.BlockSpec((C,), lambda j: (first_block + j,))
    pipeline(step, compute, (num_blocks,), [keys, keys, ids], stages=size.stages)(
        k_BSKH.at[b, :, head],
        v_BSKH.at[b, :, head],
        None if ids_BS is None else ids_BS.at[b],
    )


def _keys_kernel(
    q_BSNH,
    k_BSKH,
    v_BSKH,
    dout_BSNH,
    lse_BNS,
    drop_BNS,
    ids_BS,
    spans,
    dk_BSKH,
    dv_BSKH,
    *,
    mask,
    size,
    **scratch,
):
    head, tile, b = (jax.lax.axis_index(name) for name in ("head", "tile", "row"))
    warpgroup = jax.lax.axis_index("warpgroup")
    group = q_BSNH.shape[2] // k_BSKH.shape[2]
    H, C = q_BSNH.shape[3], size.columns
    first_block, num_blocks = spans.ends[b, tile, 0], spans.ends[b, tile, 1]
    first_key = tile * TILE + warpgroup * ROWS
    rows = pl.ds(first_key, ROWS)
    own = {name: refs.at[warpgroup] for name, refs in scratch.items()}

    def compute(loop):
        loads = [
            (k_BSKH.at[b, rows, head], own["k_smem"]),
            (v_BSKH.at[b, rows, head], own["v_smem"]),
        ]
        if ids_BS is not None:
            loads.append((ids_BS.at[b, rows], own["ids_smem"]))
        for source, target in loads:
            plgpu.copy_gmem_to_smem(source, target, own["arrived"])
        plgpu.barrier_wait(own["arrived"])

        def add_up(dk_MH, dv_MH):
            loop((dk_MH, dv_MH))
            return dk_MH[...], dv_MH[...]

        sums = plgpu.ACC((ROWS, H), jnp.float32)
        dk_MH, dv_MH = pl.run_scoped(add_up, sums, sums)
        own["k_smem"][...] = (dk_MH * mask.scale).astype(k_BSKH.dtype)
        own["v_smem"][...] = dv_MH.astype(v_BSKH.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own["k_smem"], dk_BSKH.at[b, rows, head])
        plgpu.copy_smem_to_gmem(own["v_smem"], dv_BSKH.at[b, rows, head])
        plgpu.wait_smem_to_gmem(0)

    def step(
        index,
        q_smem,
        dout_smem,
        lse_smem,
        drop_smem,
        q_ids_smem,
        q_free,
        dout_free,
        lse_free,
        drop_free,
        ids_free,
        carry,
    ):
        dk_MH, dv_MH = carry
        at = first_block + index[1]
        scores_MC = mask.scores(product(own["k_smem"], transposed(q_smem)))
        scores_MC = masked(
            scores_MC,
            mask,
            (first_key, at * C),
            one_document(spans.documents, b, tile, at),
            None if ids_BS is None else (own["ids_smem"], q_ids_smem),
            query_axis=1,
        )
        scores_MC, slope_MC = mask.bend(scores_MC)
        if ids_BS is not None:
            plgpu.barrier_arrive(ids_free)
        weights_MC = jnp.exp2(scores_MC - along(lse_smem[...], scores_MC.shape, 1))
        plgpu.barrier_arrive(lse_free)
        plgpu.wgmma(dv_MH, weights_MC.astype(dout_smem.dtype), dout_smem)
        dweights_MC = product(own["v_smem"], transposed(dout_smem))
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(dout_free)
        dscores_MC = weights_MC * (dweights_MC - along(drop_smem[...], scores_MC.shape, 1))
        plgpu.barrier_arrive(drop_free)
        if slope_MC is not None:
            dscores_MC *= slope_MC
        plgpu.wgmma(dk_MH, dscores_MC.astype(q_smem.dtype), q_smem)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(q_free)
        return dk_MH, dv_MH

    def per_query(g, i):
        return head * group + g, first_block + i

    arrays = plgpu.BlockSpec((C, None, H), lambda g, i: (first_block + i, head * group + g, 0))
    rows_of = plgpu.BlockSpec((None, C), per_query)
    ids = None if ids_BS is None else plgpu.BlockSpec((C,), lambda g, i: (first_block + i,))
    in_specs = [arrays, arrays, rows_of, rows_of, ids]
    pipeline(step, compute, (group, num_blocks), in_specs, stages=size.stages)(
        q_BSNH.at[b],
        dout_BSNH.at[b],
        lse_BNS.at[b],
        drop_BNS.at[b],
        None if ids_BS is None else ids_BS.at[b],
    )

"""Flash attention for Hopper GPUs: the kernels, their gradient, and how a mesh splits them.

B batch, S sequence, N query heads, K key-value heads, H head width
"""

import functools

import jax
import jax.numpy as jnp
from jax._src.lib import cuda_versions
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from smoljax.kernels.attention.drop import drop
from smoljax.kernels.attention.mesh import split_axes, splits_sequence
from smoljax.kernels.attention.pallas_gpu import backward, blocks, forward
from smoljax.kernels.attention.request import Request

WIDEST_HEAD = 256
_HEAD_STEP = (
    16  # What a matrix instruction sums over at a time; other head widths are filled up with zeros.
)

# From 12.8 until 12.9.1, says JAX of its own causal kernel (jax/experimental/pallas/ops/gpu/attention_mgpu.py, jax 0.10.2), in the
# numbers that it compares with: the runtime of every 12.9 says 12090.
_MISCOMPILES = (12080, 12091)


def attend(
    q_BSNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool,
    segment_ids: jax.Array | None,
    window: int | None,
    scale: float,
    logit_cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """softmax(q k^T * scale) v over the allowed pairs (Dao 2023, arXiv 2307.08691), sums in f32.

    On an active mesh each device takes its rows of the batch and its heads. A remat policy that saves the names
    "attention_output" and "attention_logsum" spares the second run of the forward kernel.

    Returns:
      The output [B, S, N, H] in the dtype of q, and the largest allowed score of each head before the cap, f32 [N],
      padding left out, through which no gradient flows.

    Raises:
      SmoljaxError: batch or heads do not divide over the mesh.
    """
    cap = None if logit_cap is None else float(logit_cap)
    local = functools.partial(_local, mask=blocks.Mask(causal, window, float(scale), cap))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and not mesh.manual_axes:
        batch, heads = split_axes(q_BSNH, k_BSKH)
        spec = PartitionSpec(batch, None, heads, None)
        local = jax.shard_map(
            local,
            in_specs=(spec, spec, spec, None if segment_ids is None else PartitionSpec(batch)),
            out_specs=(spec, PartitionSpec(batch, heads)),
            check_vma=False,
        )
    output_BSNH, max_BN = local(q_BSNH, k_BSKH, v_BSKH, segment_ids)
    return output_BSNH, jnp.max(max_BN, axis=0)


def refusal(request: Request) -> str | None:
    """Why this backend cannot do what is asked, or None when it can."""
    if request.platform != "gpu":
        return f"it needs a GPU, and the platform is {request.platform}"
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")
    if (
        str(capability).split(".")[0] != "9"
    ):  # Absent where programs are compiled for a GPU that is elsewhere.
        return f"it is written for Hopper (compute capability 9.x), and this GPU has {capability}"
    version = _cuda_version()
    if version and _MISCOMPILES[0] <= version < _MISCOMPILES[1]:
        return (
            f"the assembler of CUDA {version // 1000}.{version % 1000 // 10} miscompiles causal masks: "
            'use CUDA 13, as by `pip install "jax[cuda13]"`'
        )
    if request.dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 or float16, and the queries are {request.dtype}"
    if request.head_dim > WIDEST_HEAD:
        return f"it takes head widths up to {WIDEST_HEAD}, and this one is {request.head_dim}"
    return splits_sequence()


def _cuda_version() -> int | None:
    """That of the CUDA runtime (12080 is 12.8) where JAX runs on a GPU; None where programs are compiled for one elsewhere."""
    if jax.default_backend() != "gpu" or cuda_versions is None:
        return None
    return cuda_versions.cuda_runtime_get_version()


def _local(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, *, mask):
    S, H = q_BSNH.shape[1], q_BSNH.shape[3]
    fill, widen = -S % blocks.TILE, -H % _HEAD_STEP
    padding = ((0, 0), (0, fill), (0, 0), (0, widen))
    q, k, v = (jnp.pad(x, padding) for x in (q_BSNH, k_BSKH, v_BSKH))
    ids = segment_ids_BS
    if fill and ids is None:
        ids = jnp.ones(q_BSNH.shape[:2], jnp.int32)
    if ids is not None:
        ids = ids.astype(jnp.int32)
        ids = jnp.pad(ids, ((0, 0), (0, fill)), constant_values=blocks.FILL)
    output, max_BNS = _attend(q, k, v, ids, mask)
    if ids is not None:
        real_BS = (ids != 0) & (ids != blocks.FILL)
        max_BNS = jnp.where(real_BS[:, None], max_BNS, -jnp.inf)
    return output[:, :S, :, :H], jnp.max(max_BNS, axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, mask):
    return _forward(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, mask)[0]


def _forward(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, mask):
    spans = _spans(q_BSNH, segment_ids_BS, mask, "forward", query_axis=0)
    output_BSNH, lse_BNS, max_BNS = forward.run(
        q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, spans, mask=mask
    )
    output_BSNH = checkpoint_name(output_BSNH, "attention_output")
    lse_BNS = checkpoint_name(lse_BNS, "attention_logsum")
    return (output_BSNH, max_BNS), (q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, output_BSNH, lse_BNS)


def _backward(mask, saved, cotangents):
    q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, output_BSNH, lse_BNS = saved
    dout_BSNH = cotangents[0]
    rows = (lse_BNS * blocks.LOG2_E, drop(output_BSNH, dout_BSNH))
    arrays = (q_BSNH, k_BSKH, v_BSKH, dout_BSNH, *rows)
    by_queries, by_keys = (
        _spans(q_BSNH, segment_ids_BS, mask, "backward", query_axis=axis) for axis in (0, 1)
    )
    dq = backward.queries(arrays, segment_ids_BS, by_queries, mask=mask)
    dk, dv = backward.keys_and_values(arrays, segment_ids_BS, by_keys, mask=mask)
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def _spans(q_BSNH, segment_ids_BS, mask, direction, *, query_axis):
    B, S, _, H = q_BSNH.shape
    size = blocks.block(H, direction).columns
    return blocks.spans(mask, size, S, segment_ids_BS, B, query_axis=query_axis)

"""Flash attention for TPUs: the kernels, their gradient, and how a mesh splits them.

B batch, S sequence, N query heads, K key-value heads, H head width
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from smoljax.kernels.attention.drop import drop
from smoljax.kernels.attention.mesh import split_axes, splits_sequence
from smoljax.kernels.attention.pallas_tpu import blocks, chunks
from smoljax.kernels.attention.request import Request


class Mask(NamedTuple):
    """What is static about a call."""

    causal: bool
    window: int | None
    scale: float
    generation: str
    logit_cap: float | None


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
    """softmax(q k^T * scale) v over the allowed pairs (Dao 2023, arXiv 2307.08691), sums in f32; with a cap of
    cap * tanh(q k^T * scale / cap).

    On an active mesh each device takes its rows of the batch and its heads. A remat policy that saves the names
    "attention_output" and "attention_logsum" spares the second run of the forward kernel.

    Returns:
      The output [B, S, N, H] in the dtype of q, and the largest allowed score of each head before the cap, f32
      [N], padding left out, through which no gradient flows.

    Raises:
      SmoljaxError: batch or heads do not divide over the mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    local = functools.partial(
        _local,
        causal=causal,
        window=window,
        scale=float(scale),
        generation=blocks.generation(_device_kind(mesh)),
        logit_cap=logit_cap,
    )
    if mesh.size > 1 and not mesh.manual_axes:
        batch, heads = split_axes(q_BSNH, k_BSKH)
        spec = PartitionSpec(batch, None, heads, None)
        ids_spec = None if segment_ids is None else PartitionSpec(batch, None)
        local = jax.shard_map(
            local,
            in_specs=(spec, spec, spec, ids_spec),
            out_specs=(spec, PartitionSpec(batch, heads)),
            check_vma=False,
        )
    output_BSNH, max_BN = local(q_BSNH, k_BSKH, v_BSKH, segment_ids)
    return output_BSNH, jnp.max(max_BN, axis=0)


def refusal(request: Request) -> str | None:
    """Why this backend cannot do what is asked, or None when it can."""
    if request.platform != "tpu":
        return f"it needs a TPU, and the platform is {request.platform}"
    if request.dtype not in ("bfloat16", "float32"):
        return f"it takes bfloat16 or float32, and the queries are {request.dtype}"
    return splits_sequence()


def _device_kind(mesh) -> str | None:
    device = getattr(mesh, "abstract_device", None)
    if device is not None:
        return device.device_kind
    return jax.devices()[0].device_kind if jax.default_backend() == "tpu" else None


def _local(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, **mask):
    return _attend(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, Mask(**mask))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, mask):
    return _forward(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, mask)[0]


def _forward(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, mask):
    output_BSNH, lse_BNS, max_BN = chunks.chunk_forward(
        q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, segment_ids_BS, shift=0, **mask._asdict()
    )
    output_BSNH = checkpoint_name(output_BSNH, "attention_output")
    lse_BNS = checkpoint_name(lse_BNS, "attention_logsum")
    saved = (q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, output_BSNH, lse_BNS)
    return (output_BSNH, max_BN), saved


def _backward(mask, saved, cotangents):
    q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, output_BSNH, lse_BNS = saved
    dout_BSNH = cotangents[0]
    drop_BNS = drop(output_BSNH, dout_BSNH)
    gradients = chunks.chunk_backward(
        *(q_BSNH, k_BSKH, v_BSKH, dout_BSNH, lse_BNS, drop_BNS),
        *(segment_ids_BS, segment_ids_BS),
        shift=0,
        **mask._asdict(),
    )
    return *gradients, None


_attend.defvjp(_forward, _backward)

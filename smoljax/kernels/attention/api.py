"""One call for attention: picks a backend from an explicit list per platform, or refuses the one named.

B batch, S sequence, N query heads, K key-value heads, H head width
"""

import logging

import jax
from jax.ad_checkpoint import checkpoint_name

from smoljax.errors import SmoljaxError
from smoljax.kernels.attention import (
    cpu,
    cudnn,
    pallas_gpu,
    pallas_tpu,
    reference,
    ring,
    ring_order,
    tokamax,
    xla,
)

BACKENDS = {
    "cpu": cpu.attend,
    "cudnn": cudnn.attend,
    "pallas_gpu": pallas_gpu.attend,
    "pallas_tpu": pallas_tpu.attend,
    "xla": xla.attend,
    "reference": reference.attend,
    "ring": ring.attend,
    "tokamax": tokamax.attend,
}
FALLBACKS = {
    "cpu": ("ring", "cpu", "xla"),
    "gpu": ("ring", "cudnn", "pallas_gpu", "xla"),
    "tpu": ("ring", "pallas_tpu", "xla"),
}
NAME_THEIR_RESIDUALS = (
    "ring",
    "pallas_gpu",
    "pallas_tpu",
)  # A second name on the same output would save it twice.

CAPPED = (
    "cpu",
    "pallas_gpu",
    "pallas_tpu",
    "ring",
    "xla",
    "reference",
    "tokamax",
)  # These bend scores to a logit_cap.

_log = logging.getLogger(__name__)


def attention(
    q_BSNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    return_max_logits: bool = False,
    zigzag: bool = False,
    logit_cap: float | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Grouped-query attention over one sequence: softmax(cap(q k^T * scale)) v.

    Args:
      q_BSNH: queries, f32 or bf16. Query head n reads key-value head n // (N / K).
      k_BSKH: keys, same dtype.
      v_BSKH: values, same dtype.
      causal: a query sees keys up to its own position only.
      segment_ids: int32 [B, S]; a query sees keys of its own id only. Padding (0) thus sees padding alone, its
        output is finite, and the loss mask must leave it out.
      window: a query sees only keys less than this many positions away; None is no limit.
      scale: factor on the scores; None is H ** -0.5.
      implementation: a name in BACKENDS, or None for the first of the platform's FALLBACKS that can do it.
      return_max_logits: also return the largest allowed score (scaled, signed) of each head over the batch, f32 [N]:
        what QK-clip needs. Padding rows do not count; with nothing but padding it is -inf. No gradient flows
        through it, and on a mesh it is the maximum over all devices. Scores before the cap: weights are to be clipped by
        what they give, which the cap would hide.
      zigzag: all arrays, and the output, have their columns in zig-zag order (ring_order.py): only where `takes_zigzag` says
        so. False is the order of the sequence; "ring" then reorders at every call.
      logit_cap: bends the scores to cap * tanh(scores / cap), as Gemma 2 does (arXiv 2408.00118, section 2); None leaves
        them alone. Backends that cannot (CAPPED can) are passed over.

    Remat policies know the output by the name "attention_output", and what else the backward pass of "pallas_gpu",
    "pallas_tpu" and "ring" needs by "attention_logsum".

    Returns:
      The output [B, S, N, H] in the dtype of q, alone or with the maxima.

    Raises:
      SmoljaxError: shapes do not agree, or no backend (or not the named one) can do what is asked.
    """
    _check(q_BSNH, k_BSKH, v_BSKH, segment_ids, window, logit_cap)
    seq_len = q_BSNH.shape[1]
    backend = _choose(
        implementation,
        platform=_platform(),
        causal=causal,
        seq_len=seq_len,
        capped=logit_cap is not None,
        dtype=str(q_BSNH.dtype),
        head_dim=q_BSNH.shape[-1],
        segment_ids=segment_ids is not None,
        max_logits=return_max_logits,
    )
    if zigzag and backend != "ring":
        raise SmoljaxError(
            f"attention got zigzag=True, and the implementation here is {backend!r}, which takes the order of the sequence: ask "
            "takes_zigzag first"
        )
    reorders = backend == "ring" and not zigzag
    if reorders:
        q_BSNH, k_BSKH, v_BSKH, segment_ids = jax.tree.map(
            ring_order.to_zigzag, (q_BSNH, k_BSKH, v_BSKH, segment_ids)
        )
    output_BSNH, max_logits_N = BACKENDS[backend](
        q_BSNH,
        k_BSKH,
        v_BSKH,
        causal=causal,
        segment_ids=segment_ids,
        window=window,
        scale=q_BSNH.shape[-1] ** -0.5 if scale is None else scale,
        **({} if logit_cap is None else {"logit_cap": float(logit_cap)}),
    )
    if backend not in NAME_THEIR_RESIDUALS:
        output_BSNH = checkpoint_name(output_BSNH, "attention_output")
    if reorders:
        output_BSNH = ring_order.to_sequence(output_BSNH)
    if return_max_logits:
        return output_BSNH, jax.lax.stop_gradient(max_logits_N)
    return output_BSNH


def takes_zigzag(implementation: str | None, *, seq_len: int, causal: bool = True) -> bool:
    """Whether, on the active mesh, `attention` of this implementation works in zig-zag order, so that it costs nothing there.

    Who has many calls to make (a model) reorders its columns once before all of them, and once after.
    """
    return implementation in (None, "ring") and not ring.refusal(causal=causal, seq_len=seq_len)


def _platform() -> str:
    """The platform that will run: that of the active mesh, which need not be this host's, or this process's own."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None or device.platform is None:
        return jax.default_backend()
    return device.platform


def _choose(
    implementation: str | None,
    *,
    platform: str,
    causal: bool = True,
    seq_len: int = 1,
    capped: bool = False,
    **asked,
) -> str:
    if implementation is not None:
        if implementation not in BACKENDS:
            raise SmoljaxError(
                f"attention implementation {implementation!r} is unknown: "
                f"use one of {', '.join(BACKENDS)}, or None"
            )
        reason = _cap_refusal(implementation, capped) or _refusal(
            implementation, platform, asked, causal, seq_len
        )
        if reason:
            raise SmoljaxError(
                f"attention implementation {implementation!r} cannot be used here: {reason}; "
                "set it to None, and the platform's list decides"
            )
        return implementation
    for name in FALLBACKS.get(platform, ("xla",)):
        reason = _cap_refusal(name, capped) or _refusal(name, platform, asked, causal, seq_len)
        if reason is None:
            return name
        _log.info("attention: %s is passed over: %s", name, reason)
    raise SmoljaxError(f"no attention implementation of platform {platform!r} can do {asked}")


def _cap_refusal(name: str, capped: bool) -> str | None:
    return "it has no cap on the scores" if capped and name not in CAPPED else None


def _refusal(name: str, platform: str, asked: dict, causal: bool, seq_len: int) -> str | None:
    if name == "ring":
        return ring.refusal(causal=causal, seq_len=seq_len)
    if name == "cpu":
        return cpu.refusal()
    if name == "pallas_tpu":
        return pallas_tpu.refusal(platform, asked["dtype"])
    if name == "pallas_gpu":
        return pallas_gpu.refusal(platform, asked["dtype"], asked["head_dim"])
    if name == "tokamax":
        return tokamax.refusal(max_logits=asked["max_logits"])
    return cudnn.refusal(platform, **asked) if name == "cudnn" else None


def _check(q_BSNH, k_BSKH, v_BSKH, segment_ids, window, logit_cap) -> None:
    if q_BSNH.ndim != 4 or k_BSKH.ndim != 4:
        raise SmoljaxError(
            f"attention takes q [B, S, N, H] and k, v [B, S, K, H], and got q {q_BSNH.shape}, k {k_BSKH.shape}"
        )
    B, S, N, H = q_BSNH.shape
    K = k_BSKH.shape[2]
    if k_BSKH.shape != (B, S, K, H) or v_BSKH.shape != k_BSKH.shape or N % K:
        raise SmoljaxError(
            f"attention got q {q_BSNH.shape}, k {k_BSKH.shape}, v {v_BSKH.shape}: k and v must be "
            f"[{B}, {S}, K, {H}] with K dividing {N}"
        )
    if segment_ids is not None and segment_ids.shape != (B, S):
        raise SmoljaxError(
            f"attention got segment_ids of shape {segment_ids.shape}: expected {(B, S)}"
        )
    if window is not None and window < 1:
        raise SmoljaxError(f"attention got window={window}: use None or at least 1")
    if logit_cap is not None and not logit_cap > 0:
        raise SmoljaxError(f"attention got logit_cap={logit_cap}: use None or more than 0")

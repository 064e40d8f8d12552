"""One call for attention: picks a backend from an explicit list per platform, or refuses the one named.

B batch, S sequence, N query heads, K key-value heads, H head width
"""

import importlib
import logging
from types import ModuleType

import jax
from jax.ad_checkpoint import checkpoint_name

from smoljax.errors import SmoljaxError
from smoljax.kernels.attention import mesh, ring_order
from smoljax.kernels.attention.request import Request
from smoljax.kernels.platform import platform

# Modules of this folder with `attend` and `refusal`, imported when it is their turn: Pallas takes its time.
BACKENDS = ("cpu", "cudnn", "pallas_gpu", "pallas_tpu", "reference", "ring", "tokamax", "xla")
FALLBACKS = {
    "cpu": ("cpu", "ring", "xla"),
    "gpu": ("ring", "cudnn", "pallas_gpu", "xla"),
    "tpu": ("pallas_tpu", "ring", "xla"),
}
# A second name on the same output would save it twice.
NAME_THEIR_RESIDUALS = ("ring", "pallas_gpu", "pallas_tpu")

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
        them alone.

    Remat policies know the output by the name "attention_output", and what else the backward pass of "pallas_gpu",
    "pallas_tpu" and "ring" needs by "attention_logsum".

    Returns:
      The output [B, S, N, H] in the dtype of q, alone or with the maxima.

    Raises:
      SmoljaxError: shapes do not agree, or no backend (or not the named one) can do what is asked.
    """
    _check(q_BSNH, k_BSKH, v_BSKH, segment_ids, window, logit_cap)
    request = Request(
        platform=platform(),
        dtype=str(q_BSNH.dtype),
        head_dim=q_BSNH.shape[-1],
        seq_len=q_BSNH.shape[1],
        causal=causal,
        documents=segment_ids is not None,
        capped=logit_cap is not None,
        max_logits=return_max_logits,
    )
    backend = choose(implementation, request)
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
    output_BSNH, max_logits_N = _module(backend).attend(
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
    # Of a ring nothing else decides.
    request = Request(platform(), dtype="", head_dim=0, seq_len=seq_len, causal=causal)
    return (
        mesh.sequence_parts() > 1
        and implementation in (None, "ring")
        and _module("ring").refusal(request) is None
    )


def choose(implementation: str | None, request: Request) -> str:
    """The backend that a call takes; a reason is logged for each that is passed over.

    Raises:
      SmoljaxError: the one named is unknown or refuses.
    """
    if implementation is not None:
        if implementation not in BACKENDS:
            raise SmoljaxError(
                f"attention implementation {implementation!r} is unknown: "
                f"use one of {', '.join(BACKENDS)}, or None"
            )
        if reason := _module(implementation).refusal(request):
            raise SmoljaxError(
                f"attention implementation {implementation!r} cannot be used here: {reason}; "
                "set it to None, and the platform's list decides"
            )
        return implementation
    *names, last = FALLBACKS.get(request.platform, ("xla",))
    for name in names:
        reason = _module(name).refusal(request)
        if reason is None:
            return name
        _log.info("attention: %s is passed over: %s", name, reason)
    return last  # XLA's, which refuses nothing.


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


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

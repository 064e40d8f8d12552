"""cuDNN's flash attention through JAX: fast on a GPU, and blind to segments.

`jax.nn.dot_product_attention` (jax 0.10.2) gives it one length for a row, and no documents inside. Its offsets of packed
sequences stand in JAX's private module alone, for lists of documents whose greatest number is fixed, and not any layout of
identifiers; so rows of several documents go to pallas_gpu.

B batch, S sequence, N query heads, K key-value heads, H head width
"""

import jax

from smoljax.kernels.attention.request import Request


def attend(
    q_BSNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool,
    segment_ids: None,
    window: int | None,
    scale: float,
) -> tuple[jax.Array, None]:
    """softmax(q k^T * scale) v; returns the output [B, S, N, H] and no maxima."""
    del segment_ids
    output_BSNH = jax.nn.dot_product_attention(
        q_BSNH,
        k_BSKH,
        v_BSKH,
        scale=scale,
        is_causal=causal,
        local_window_size=None if window is None else (window - 1, 0 if causal else window - 1),
        implementation="cudnn",
    )
    return output_BSNH, None


def refusal(request: Request) -> str | None:
    """Why this backend cannot do what is asked, or None when it can."""
    if request.platform != "gpu":
        return f"it needs a GPU, and the platform is {request.platform}"
    if request.documents:
        return "it cannot honour segment ids"
    if request.capped:
        return "it has no cap on the scores"
    if request.max_logits:
        return "it does not return maximum logits"
    if request.dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 or float16, and the queries are {request.dtype}"
    if request.head_dim % 8 or request.head_dim > 128:
        return f"it takes head widths that are multiples of 8 up to 128, and this one is {request.head_dim}"
    return None

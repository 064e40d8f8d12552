"""Attention as its definition says it, in float32: what every backend is compared with.

B batch, S queries, T keys, N query heads, K key-value heads, G query heads per key-value head, H head width
"""

import jax
import jax.numpy as jnp

from smoljax.kernels.attention.request import Request


def attend(
    q_BSNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    causal: bool,
    segment_ids: jax.Array | None,
    window: int | None,
    scale: float,
    logit_cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """softmax(cap * tanh(q k^T * scale / cap)) v over the allowed pairs; without a cap, softmax(q k^T * scale) v.

    Returns:
      The output [B, S, N, H] in the dtype of q, and the largest allowed score of each head before the cap, f32 [N],
      padding (segment 0) left out.
    """
    B, S, N, H = q_BSNH.shape
    K = k_BTKH.shape[2]
    q_BSKGH = q_BSNH.astype(jnp.float32).reshape(B, S, K, N // K, H)
    scores_BKGST = scale * jnp.einsum(
        "bskgh,btkh->bkgst", q_BSKGH, k_BTKH.astype(jnp.float32), precision="highest"
    )
    allowed_BST = allowed_pairs(S, causal=causal, segment_ids=segment_ids, window=window)
    scores_BKGST = jnp.where(allowed_BST[:, None, None], scores_BKGST, -jnp.inf)
    capped_BKGST = scores_BKGST
    if logit_cap is not None:
        capped_BKGST = jnp.where(
            allowed_BST[:, None, None], logit_cap * jnp.tanh(scores_BKGST / logit_cap), -jnp.inf
        )
    weights_BKGST = jax.nn.softmax(capped_BKGST, axis=-1)
    output_BSKGH = jnp.einsum(
        "bkgst,btkh->bskgh", weights_BKGST, v_BTKH.astype(jnp.float32), precision="highest"
    )
    if segment_ids is not None:
        real_BS = segment_ids != 0
        scores_BKGST = jnp.where(real_BS[:, None, None, :, None], scores_BKGST, -jnp.inf)
    max_logits_N = jnp.max(scores_BKGST, axis=(0, 3, 4)).reshape(N)
    return output_BSKGH.reshape(B, S, N, H).astype(q_BSNH.dtype), max_logits_N


def allowed_pairs(
    length: int, *, causal: bool, segment_ids: jax.Array | None, window: int | None
) -> jax.Array:
    """Which query (second axis) may see which key (third axis): bool [B or 1, S, S]."""
    query_S1 = jnp.arange(length)[:, None]
    key_1S = jnp.arange(length)[None, :]
    allowed_SS = jnp.ones((length, length), bool)
    if causal:
        allowed_SS &= query_S1 >= key_1S
    if window is not None:
        allowed_SS &= jnp.abs(query_S1 - key_1S) < window
    if segment_ids is None:
        return allowed_SS[None]
    return allowed_SS[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])


def refusal(request: Request) -> None:
    """It can do whatever is asked."""
    del request

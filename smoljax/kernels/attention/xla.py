"""Attention in blocks of queries, each against the keys it can reach: XLA leaves out most of the masked half.

B batch, S sequence, Q queries of a block, T keys of a block, N query heads, K key-value heads,
G query heads per key-value head, H head width
"""

import jax
import jax.numpy as jnp

from smoljax.kernels.attention.request import Request

# Four blocks do 5/8 of the full square. More blocks skip more and cost more small matmuls; four was the best of
# 2, 4 and 8 for 256 tokens on a CPU. From 4096 tokens on the block stays at 1024, which bounds the scores held.
_BLOCKS = 4
_LARGEST_BLOCK = 1024
MASKED = -1e30  # Finite, so that masked scores have gradients of exactly 0 and never NaN.


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
    """softmax(q k^T * scale) v over the allowed pairs, the softmax in f32; `soft_cap` bends the scores first.

    Returns:
      The output [B, S, N, H] in the dtype of q, and the largest allowed score of each head before the cap, f32 [N],
      padding left out.
    """
    B, S, N, H = q_BSNH.shape
    K = k_BSKH.shape[2]
    q_BKGSH = jnp.moveaxis((q_BSNH * scale).reshape(B, S, K, N // K, H), 1, 3)
    k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    outputs, maxima = [], []
    for start, stop, first, last in blocks(S, causal=causal, window=window):
        allowed_BQT = allowed(
            (start, stop), (first, last), causal=causal, segment_ids=segment_ids, window=window
        )
        output_BKGQH, max_BKGQ = _block(
            q_BKGSH[:, :, :, start:stop],
            k_BKSH[:, :, first:last],
            v_BKSH[:, :, first:last],
            allowed_BQT,
            logit_cap,
        )
        outputs.append(output_BKGQH)
        maxima.append(max_of_heads(max_BKGQ, segment_ids, (start, stop)))
    output_BSKGH = jnp.moveaxis(jnp.concatenate(outputs, axis=3), 3, 1)
    max_logits_N = jnp.max(jnp.stack(maxima), axis=(0, 1))
    return output_BSKGH.reshape(B, S, N, H), max_logits_N


def _block(q_BKGQH, k_BKTH, v_BKTH, allowed_BQT, logit_cap):
    scores_BKGQT = jnp.einsum(
        "bkgqh,bkth->bkgqt", q_BKGQH, k_BKTH, preferred_element_type=jnp.float32
    )
    scores_BKGQT = jnp.where(allowed_BQT[:, None, None], scores_BKGQT, MASKED)
    max_BKGQ1 = jax.lax.stop_gradient(jnp.max(scores_BKGQT, axis=-1, keepdims=True))
    weights_BKGQT = jnp.exp(
        soft_cap(scores_BKGQT, logit_cap, allowed_BQT[:, None, None])
        - soft_cap(max_BKGQ1, logit_cap)
    )
    sum_BKGQ1 = jnp.sum(weights_BKGQT, axis=-1, keepdims=True)
    output_BKGQH = jnp.einsum(
        "bkgqt,bkth->bkgqh",
        weights_BKGQT.astype(v_BKTH.dtype),
        v_BKTH,
        preferred_element_type=jnp.float32,
    )
    # Dividing the output and not the weights saves a pass over the scores, and keeps fewer of them for the gradient.
    output_BKGQH = (output_BKGQH / sum_BKGQ1).astype(q_BKGQH.dtype)
    return output_BKGQH, max_BKGQ1[..., 0]


def soft_cap(
    scores: jax.Array, logit_cap: float | None, allowed: jax.Array | None = None
) -> jax.Array:
    """cap * tanh(scores / cap) (Gemma 2, arXiv 2408.00118, section 2), masked scores as far down as they were.

    It does not change the order of scores, so the largest before it is the largest after it.
    """
    if logit_cap is None:
        return scores
    capped = logit_cap * jnp.tanh(scores / logit_cap)
    return capped if allowed is None else jnp.where(allowed, capped, MASKED)


def max_of_heads(
    max_BKGQ: jax.Array, segment_ids: jax.Array | None, queries: tuple[int, int]
) -> jax.Array:
    """The largest of the maxima of a block's queries, for each row and head, [B, N]; -inf where all are padding.

    Padding sees padding, and nothing keeps its scores, which no loss meets, below those of real tokens.
    """
    if segment_ids is not None:
        real_BQ = segment_ids[:, slice(*queries)] != 0
        max_BKGQ = jnp.where(real_BQ[:, None, None], max_BKGQ, -jnp.inf)
    return jnp.max(max_BKGQ, axis=3).reshape(max_BKGQ.shape[0], -1)


def blocks(length: int, *, causal: bool, window: int | None):
    """(first query, end of queries, first key, end of keys) of each block."""
    size = min(-(-length // _BLOCKS), _LARGEST_BLOCK)
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = 0 if window is None else max(0, start - window + 1)
        last = stop if causal else length
        if not causal and window is not None:
            last = min(length, stop + window - 1)
        yield start, stop, first, last


def allowed(
    queries: tuple[int, int],
    keys: tuple[int, int],
    *,
    causal: bool,
    segment_ids: jax.Array | None,
    window: int | None,
) -> jax.Array:
    """Which query of a block may see which of its keys: bool [B or 1, Q, T]."""
    query_Q1 = jnp.arange(*queries)[:, None]
    key_1T = jnp.arange(*keys)[None, :]
    allowed_QT = jnp.ones((queries[1] - queries[0], keys[1] - keys[0]), bool)
    if causal:
        allowed_QT &= query_Q1 >= key_1T
    if window is not None:
        allowed_QT &= jnp.abs(query_Q1 - key_1T) < window
    if segment_ids is None:
        return allowed_QT[None]
    same_BQT = segment_ids[:, slice(*queries), None] == segment_ids[:, None, slice(*keys)]
    return allowed_QT[None] & same_BQT


def refusal(request: Request) -> None:
    """It can do whatever is asked."""
    del request

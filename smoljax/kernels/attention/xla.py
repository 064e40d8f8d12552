"""Attention in blocks of queries, each against the keys it can reach: XLA leaves out most of the masked half.

B batch, S sequence, Q queries of a block, T keys of a block, N query heads, K key-value heads,
G query heads per key-value head, H head width
"""

import jax
import jax.numpy as jnp

# Four blocks do 5/8 of the full square. More blocks skip more and cost more small matmuls; four was the best of
# 2, 4 and 8 for 256 tokens on a CPU. From 4096 tokens on the block stays at 1024, which bounds the scores held.
_BLOCKS = 4
_LARGEST_BLOCK = 1024
_MASKED = -1e30  # Finite, so that masked scores have gradients of exactly 0 and never NaN.


def attend(
    q_BSNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool,
    segment_ids: jax.Array | None,
    window: int | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """softmax(q k^T * scale) v over the allowed pairs, the softmax in f32.

    Returns:
      The output [B, S, N, H] in the dtype of q, and the largest allowed score of each head, f32 [N].
    """
    B, S, N, H = q_BSNH.shape
    K = k_BSKH.shape[2]
    q_BSKGH = (q_BSNH * scale).reshape(B, S, K, N // K, H)
    outputs, maxima = [], []
    for start, stop, first, last in _blocks(S, causal=causal, window=window):
        allowed = _allowed(
            (start, stop), (first, last), causal=causal, segment_ids=segment_ids, window=window
        )
        output_BQKGH, max_BKG = _block(
            q_BSKGH[:, start:stop], k_BSKH[:, first:last], v_BSKH[:, first:last], allowed
        )
        outputs.append(output_BQKGH)
        maxima.append(max_BKG)
    output_BSNH = jnp.concatenate(outputs, axis=1).reshape(B, S, N, H)
    return output_BSNH, jnp.max(jnp.stack(maxima), axis=(0, 1)).reshape(N)


def _block(q_BQKGH, k_BTKH, v_BTKH, allowed_BQT):
    scores_BKGQT = jnp.einsum(
        "bqkgh,btkh->bkgqt", q_BQKGH, k_BTKH, preferred_element_type=jnp.float32
    )
    scores_BKGQT = jnp.where(allowed_BQT[:, None, None], scores_BKGQT, _MASKED)
    max_BKGQ1 = jax.lax.stop_gradient(jnp.max(scores_BKGQT, axis=-1, keepdims=True))
    weights_BKGQT = jnp.exp(scores_BKGQT - max_BKGQ1)
    sum_BKGQ1 = jnp.sum(weights_BKGQT, axis=-1, keepdims=True)
    weights_BKGQT = (weights_BKGQT / sum_BKGQ1).astype(v_BTKH.dtype)
    output_BQKGH = jnp.einsum("bkgqt,btkh->bqkgh", weights_BKGQT, v_BTKH)
    return output_BQKGH, jnp.max(max_BKGQ1, axis=(3, 4))


def _blocks(length: int, *, causal: bool, window: int | None):
    """(first query, end of queries, first key, end of keys) of each block."""
    size = min(-(-length // _BLOCKS), _LARGEST_BLOCK)
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = 0 if window is None else max(0, start - window + 1)
        last = stop if causal else length
        if not causal and window is not None:
            last = min(length, stop + window - 1)
        yield start, stop, first, last


def _allowed(queries, keys, *, causal, segment_ids, window):
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

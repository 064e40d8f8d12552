"""One chunk of queries against one chunk of keys, forward and backward: what a step of the ring computes off TPUs, whose kernels
(pallas_tpu/chunks.py) do the same.

Results of several chunks of keys are joined by their log-sum-exp, and gradients add up, so these are the whole of attention
(Dao et al. 2022, arXiv:2205.14135, section 3.1).

B batch, Q queries, T keys, P queries of a block, N query heads, K key-value heads, G query heads per key-value head,
H head width
"""

import functools

import jax
import jax.numpy as jnp

from smoljax.kernels.attention.xla import MASKED, soft_cap

# Scores of a head that exist at once: 1024 queries to 4096 keys, 16 MiB in f32.
_SCORES = 1024 * 4096

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def chunk_forward(
    q_BQNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    query_ids_BQ: jax.Array | None,
    key_ids_BT: jax.Array | None,
    *,
    causal: bool,
    window: int | None,
    shift: jax.Array | int,
    scale: float,
    logit_cap: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention to these keys alone, the softmax in f32.

    Args:
      q_BQNH, k_BTKH, v_BTKH: f32 or bf16.
      query_ids_BQ, key_ids_BT: int32 document identifiers; both None is one document.
      causal: a query sees keys up to its own place in the sequence.
      window: a query sees keys less than this many places away; None is no limit.
      shift: place of the first query minus place of the first key, int32, may be traced.
      scale: factor on the scores.
      logit_cap: bends the scores to cap * tanh(scores / cap); None leaves them alone.

    Returns:
      The output f32 [B, Q, N, H], log-sum-exp f32 [B, N, Q], and the largest allowed score of each row and head before the
      cap, f32 [B, N],      of queries that are no padding. A query that sees none of these keys has output 0 and log-sum-exp -1e30, and a head none
      of whose queries sees one the largest score -inf.
    """

    def block(start):
        q_BPNH, ids_BP = _rows(start, size, q_BQNH, query_ids_BQ)
        scores_BKGPT = _scores(q_BPNH, k_BTKH, scale)
        allowed_BPT = mask(shift + start, size, ids_BP)
        scores_BKGPT = jnp.where(allowed_BPT[:, None, None], scores_BKGPT, MASKED)
        max_BKGP1 = jnp.max(scores_BKGPT, axis=-1, keepdims=True)
        capped_BKGP1 = soft_cap(max_BKGP1, logit_cap)
        weights_BKGPT = jnp.exp(soft_cap(scores_BKGPT, logit_cap) - capped_BKGP1)
        weights_BKGPT = jnp.where(allowed_BPT[:, None, None], weights_BKGPT, 0)
        sum_BKGP1 = jnp.sum(weights_BKGPT, axis=-1, keepdims=True)
        out_BKGPH = _einsum("bkgpt,btkh->bkgph", weights_BKGPT.astype(v_BTKH.dtype), v_BTKH)
        sees_BKGP1 = sum_BKGP1 > 0
        out_BKGPH = out_BKGPH / jnp.where(sees_BKGP1, sum_BKGP1, 1)
        lse_BKGP = jnp.where(sees_BKGP1, capped_BKGP1 + jnp.log(sum_BKGP1), MASKED)[..., 0]
        counts_BKGP = sees_BKGP1[..., 0]
        if ids_BP is not None:
            counts_BKGP &= (ids_BP != 0)[:, None, None]
        max_BKG = jnp.max(jnp.where(counts_BKGP, max_BKGP1[..., 0], -jnp.inf), axis=-1)
        return jnp.moveaxis(out_BKGPH, 3, 1), lse_BKGP, max_BKG

    B, Q, N, H = q_BQNH.shape
    size = _block_size(Q, k_BTKH.shape[1])
    mask = functools.partial(_allowed, key_ids_BT, k_BTKH.shape[1], causal=causal, window=window)
    out_IBPKGH, lse_IBKGP, max_IBKG = jax.lax.map(block, jnp.arange(0, Q, size))
    out_BQNH = jnp.moveaxis(out_IBPKGH, 0, 1).reshape(B, Q, N, H)
    lse_BNQ = jnp.moveaxis(lse_IBKGP, 0, 3).reshape(B, N, Q)
    return out_BQNH, lse_BNQ, jnp.max(max_IBKG, axis=0).reshape(B, N)


def chunk_backward(
    q_BQNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    dout_BQNH: jax.Array,
    lse_BNQ: jax.Array,
    drop_BNQ: jax.Array,
    query_ids_BQ: jax.Array | None,
    key_ids_BT: jax.Array | None,
    *,
    causal: bool,
    window: int | None,
    shift: jax.Array | int,
    scale: float,
    logit_cap: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these pairs add to the gradients dq, dk and dv: f32, in the shapes of q, k and v.

    Args:
      dout_BQNH: gradient of the output, in q's dtype.
      lse_BNQ: log-sum-exp over all keys of the sequence that a query sees, f32.
      drop_BNQ: sum over H of output times its gradient, f32 (arXiv:2205.14135, appendix B.2, equation 4).
      The others as in `chunk_forward`.
    """
    B, Q, N, H = q_BQNH.shape
    T, K = k_BTKH.shape[1:3]
    size = _block_size(Q, T)
    mask = functools.partial(_allowed, key_ids_BT, T, causal=causal, window=window)

    def block(so_far, start):
        dk_BTKH, dv_BTKH = so_far
        q_BPNH, ids_BP = _rows(start, size, q_BQNH, query_ids_BQ)
        dout_BPNH, _ = _rows(start, size, dout_BQNH, None)
        lse_BKGP, drop_BKGP = (
            jax.lax.dynamic_slice_in_dim(x, start, size, axis=2).reshape(B, K, N // K, size)
            for x in (lse_BNQ, drop_BNQ)
        )
        scores_BKGPT = soft_cap(_scores(q_BPNH, k_BTKH, scale), logit_cap)
        allowed_BPT = mask(shift + start, size, ids_BP)
        weights_BKGPT = jnp.where(
            allowed_BPT[:, None, None], jnp.exp(scores_BKGPT - lse_BKGP[..., None]), 0
        )
        dweights_BKGPT = _scores(dout_BPNH, v_BTKH, 1.0)
        dscores_BKGPT = weights_BKGPT * (dweights_BKGPT - drop_BKGP[..., None])
        if logit_cap is not None:
            dscores_BKGPT *= 1 - jnp.square(scores_BKGPT / logit_cap)
        dscores_BKGPT = dscores_BKGPT.astype(q_BQNH.dtype)
        weights_BKGPT = weights_BKGPT.astype(dout_BQNH.dtype)
        dq_BPKGH = scale * _einsum("bkgpt,btkh->bpkgh", dscores_BKGPT, k_BTKH)
        dk_BTKH += _einsum("bkgpt,bpkgh->btkh", dscores_BKGPT, _by_group(q_BPNH, K))
        dv_BTKH += _einsum("bkgpt,bpkgh->btkh", weights_BKGPT, _by_group(dout_BPNH, K))
        return (dk_BTKH, dv_BTKH), dq_BPKGH

    zero_BTKH = jnp.zeros(k_BTKH.shape, jnp.float32)
    (dk_BTKH, dv_BTKH), dq_IBPKGH = jax.lax.scan(
        block, (zero_BTKH, zero_BTKH), jnp.arange(0, Q, size)
    )
    return jnp.moveaxis(dq_IBPKGH, 0, 1).reshape(B, Q, N, H), scale * dk_BTKH, dv_BTKH


def _block_size(num_queries: int, num_keys: int) -> int:
    """Queries done at once: the largest divisor of them whose scores stay within the bound, 1 at least."""
    most = max(1, _SCORES // num_keys)
    return max(size for size in range(1, min(most, num_queries) + 1) if num_queries % size == 0)


def _rows(start, size, x_BQNH, ids_BQ):
    x_BPNH = jax.lax.dynamic_slice_in_dim(x_BQNH, start, size, axis=1)
    if ids_BQ is None:
        return x_BPNH, None
    return x_BPNH, jax.lax.dynamic_slice_in_dim(ids_BQ, start, size, axis=1)


def _allowed(key_ids_BT, num_keys, shift, num_queries, query_ids_BP, *, causal, window):
    """Which query may see which key: bool [B or 1, P, T]."""
    ahead_PT = shift + jnp.arange(num_queries)[:, None] - jnp.arange(num_keys)[None, :]
    allowed_PT = jnp.ones(ahead_PT.shape, bool)
    if causal:
        allowed_PT &= ahead_PT >= 0
    if window is not None:
        allowed_PT &= jnp.abs(ahead_PT) < window
    if query_ids_BP is None:
        return allowed_PT[None]
    return allowed_PT[None] & (query_ids_BP[:, :, None] == key_ids_BT[:, None, :])


def _scores(q_BPNH, k_BTKH, scale):
    return scale * _einsum("bpkgh,btkh->bkgpt", _by_group(q_BPNH, k_BTKH.shape[2]), k_BTKH)


def _by_group(x_BPNH, num_groups):
    B, P, N, H = x_BPNH.shape
    return x_BPNH.reshape(B, P, num_groups, N // num_groups, H)

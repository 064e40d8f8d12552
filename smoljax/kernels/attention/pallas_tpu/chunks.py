"""Attention of some queries over some keys, which need not be of the same part of the sequence, and its gradient.

Ordinary attention is one chunk; ring attention adds up several (`lse` says how to weigh them).

B batch, S queries, T keys, N query heads, K key-value heads, H head width
"""

import jax
import jax.numpy as jnp

from smoljax.kernels.attention.pallas_tpu import backward, blocks, forward


def chunk_forward(
    q_BSNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    query_ids_BS: jax.Array | None,
    key_ids_BT: jax.Array | None,
    *,
    causal: bool,
    window: int | None,
    shift: jax.Array | int,
    scale: float,
    generation: str,
    logit_cap: float | None = None,
    dtype=None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """softmax(q k^T * scale) v over the pairs that are allowed among these.

    Args:
      q_BSNH: queries, bf16 or f32; k_BTKH, v_BTKH: keys and values of the same dtype. Any S and T.
      query_ids_BS: int32 segments, and key_ids_BT those of the keys; both None for one document.
      causal: a query sees keys up to its own position of the sequence.
      window: a query sees only keys less than this many positions away; None is no limit.
      shift: position in the sequence of the first query less that of the first key, an int, or int32 where it is known at
        run time only. Blocks of keys that no query sees cost nothing either way.
      scale: factor on the scores.
      logit_cap: cap of cap * tanh(scores / cap); None is no cap.
      generation: a row of the table of block sizes (`blocks.generation`).
      dtype: of the output; None is that of q. Whoever adds chunks up wants f32.

    Returns:
      The output [B, S, N, H], the log-sum-exp of each query's scores, f32 [B, N, S], and each row's and head's largest
      score before the cap f32 [B, N], padding (segment 0) left out. A query that sees nothing has output 0 and log-sum-exp -1e30, which is
      finite and so far below any other that exp(lse - lse of all chunks) is exactly 0; a head none of whose queries sees
      anything has the largest score -inf. No gradient is defined.
    """
    S, T = q_BSNH.shape[1], k_BTKH.shape[1]
    sizes = blocks.sizes((S, T), generation, "forward")
    pairs, ids, fills, schedule = _layout(
        q_BSNH, k_BTKH, (query_ids_BS, key_ids_BT), sizes, causal, window, shift
    )
    output_BNHS, lse_BN1S, max_BN1L = forward.run(
        *(_to_lanes(x, fill) for x, fill in zip((q_BSNH, k_BTKH, v_BTKH), fills)),
        ids,
        schedule.by_queries(),
        jnp.asarray(shift, jnp.int32).reshape(1),
        pairs=pairs,
        scores=forward.Scores(scale, logit_cap),
        dtype=dtype or q_BSNH.dtype,
    )
    return _from_lanes(output_BNHS, S), lse_BN1S[:, :, 0, :S], jnp.max(max_BN1L, axis=(2, 3))


def chunk_backward(
    q_BSNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    dout_BSNH: jax.Array,
    lse_BNS: jax.Array,
    drop_BNS: jax.Array,
    query_ids_BS: jax.Array | None,
    key_ids_BT: jax.Array | None,
    *,
    causal: bool,
    window: int | None,
    shift: jax.Array | int,
    scale: float,
    generation: str,
    logit_cap: float | None = None,
    dtype=None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these pairs add to the gradients.

    Args:
      dout_BSNH: gradient of the output over all keys, in q's dtype.
      lse_BNS: log-sum-exp over all keys, f32: with one chunk that of `chunk_forward`, else of all of them.
      drop_BNS: `drop` of the output over all keys, f32.
      dtype: of the gradients; None is that of q. Whoever adds chunks up wants f32.
      others: as in `chunk_forward`.

    Returns:
      dq [B, S, N, H], dk and dv [B, T, K, H].
    """
    S, T = q_BSNH.shape[1], k_BTKH.shape[1]
    sizes = blocks.sizes((S, T), generation, "backward")
    pairs, ids, fills, schedule = _layout(
        q_BSNH, k_BTKH, (query_ids_BS, key_ids_BT), sizes, causal, window, shift
    )
    fills += fills[:1]
    rows = (jnp.pad(x, ((0, 0), (0, 0), (0, fills[0])))[:, :, None] for x in (lse_BNS, drop_BNS))
    arrays = (_to_lanes(x, fill) for x, fill in zip((q_BSNH, k_BTKH, v_BTKH, dout_BSNH), fills))
    dq, dk, dv = backward.run(
        (*arrays, *rows),
        ids,
        schedule,
        jnp.asarray(shift, jnp.int32).reshape(1),
        pairs=pairs,
        scores=forward.Scores(scale, logit_cap),
        dtype=dtype or q_BSNH.dtype,
    )
    return _from_lanes(dq, S), _from_lanes(dk, T), _from_lanes(dv, T)


def _layout(q_BSNH, k_BTKH, ids, sizes, causal, window, shift):
    """Pairs of blocks, identifiers filled up, how many positions fill up q, k and v, and which blocks meet."""
    B, lengths = q_BSNH.shape[0], (q_BSNH.shape[1], k_BTKH.shape[1])
    fills = tuple(-length % size for length, size in zip(lengths, sizes))
    if any(fills) and ids[0] is None:
        ids = tuple(jnp.ones((B, length), jnp.int32) for length in lengths)
    if ids[0] is not None:
        ids = tuple(
            jnp.pad(x.astype(jnp.int32), ((0, 0), (0, fill)), constant_values=blocks.FILL)
            for x, fill in zip(ids, fills)
        )
    else:
        ids = None
    pairs = blocks.Pairs(causal, window, *sizes)
    lengths = tuple(length + fill for length, fill in zip(lengths, fills))
    schedule = blocks.schedule(pairs, lengths, shift, ids, B)
    return pairs, ids, (fills[0], fills[1], fills[1]), schedule


def _to_lanes(x_BSNH, fill):
    return jnp.pad(jnp.moveaxis(x_BSNH, 1, 3), ((0, 0), (0, 0), (0, 0), (0, fill)))


def _from_lanes(x_BNHS, length):
    return jnp.moveaxis(x_BNHS[..., :length], 3, 1)

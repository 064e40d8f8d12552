"""Attention that stays in a CPU's cache: a few rows of the batch at a time, forward and backward.

B batch, C rows of a chunk, S sequence, Q queries of a block, T keys of a block, N query heads, K key-value heads,
G query heads per key-value head, R queries of a block in all heads of a group (G * Q), H head width
"""

import functools

import jax
import jax.numpy as jnp

from smoljax.kernels.attention import xla
from smoljax.kernels.attention.request import Request
from smoljax.kernels.cpu_matmul import transposed_copy

# Rows done at once: two rows of 256 tokens take 0.85 to 0.9 of the time per row of one, and four are no better; of 1024 tokens one row
# is faster than two. Without the chunks XLA runs the blocks of the whole batch in turns, and scores leave the cache.
_LARGEST_CHUNK = 2
_LONG_ROW = 512


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
    """softmax(q k^T * scale) v over the allowed pairs, the softmax and all sums in f32; `xla.soft_cap` bends the scores first.

    Products have operands in the dtype of q: in bfloat16 scaled queries, weights and the scores' gradients are rounded to it.

    The backward pass keeps q, k, v, the output and the logarithm of each softmax's sum, and computes the
    probabilities again (Dao et al. 2022, arXiv 2205.14135, section 3.1), so reverse mode and vmap work and
    forward mode (jax.jvp) does not.

    Returns:
      The output [B, S, N, H] in the dtype of q, and the largest allowed score of each head before the cap, f32 [N],
      padding left out, through which no gradient flows.
    """
    output_BSNH, max_BN = _attend(
        *(q_BSNH, k_BSKH, v_BSKH, segment_ids),
        causal=causal,
        window=window,
        scale=float(scale),
        logit_cap=logit_cap,
    )
    return output_BSNH, jnp.max(max_BN, axis=0)


def refusal(request: Request) -> str | None:
    """Why this backend cannot do what is asked, or None when it can."""
    del request  # Only the mesh decides.
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        return (
            f"its loop over the batch would gather it, and a mesh of {mesh.size} devices is active"
        )
    return None


@functools.partial(jax.custom_vjp, nondiff_argnames=("causal", "window", "scale", "logit_cap"))
def _attend(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, causal, window, scale, logit_cap):
    return _forward(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, causal, window, scale, logit_cap)[0]


def _forward(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, causal, window, scale, logit_cap):
    chunk = functools.partial(
        _forward_chunk, causal=causal, window=window, scale=scale, logit_cap=logit_cap
    )
    inputs = (q_BSNH, k_BSKH, v_BSKH)
    output_BSNH, max_BN, logsum_BKGS = _map_chunks(chunk, segment_ids_BS, inputs)
    output_BSNH = output_BSNH.astype(q_BSNH.dtype)
    return (output_BSNH, max_BN), (inputs, segment_ids_BS, output_BSNH, logsum_BKGS)


def _backward(causal, window, scale, logit_cap, saved, cotangents):
    inputs, segment_ids_BS, output_BSNH, logsum_BKGS = saved
    chunk = functools.partial(
        _backward_chunk, causal=causal, window=window, scale=scale, logit_cap=logit_cap
    )
    dout_BSNH = cotangents[0]
    # The sum over keys of weight times its gradient, from the output alone (the paper's appendix B.2, equation 4).
    drop_BSN = jnp.sum(dout_BSNH.astype(jnp.float32) * output_BSNH.astype(jnp.float32), axis=-1)
    drop_BKGS = _by_group(drop_BSN[..., None], logsum_BKGS.shape[1])[..., 0]
    gradients = _map_chunks(chunk, segment_ids_BS, (*inputs, logsum_BKGS, drop_BKGS, dout_BSNH))
    # Rounded here: in the loop, which writes them by position, it is done number by number.
    return (*(gradient.astype(x.dtype) for gradient, x in zip(gradients, inputs)), None)


_attend.defvjp(_forward, _backward)


def _map_chunks(function, segment_ids_BS, arrays):
    """Calls the function on chunks of rows, one after the other; arrays, and what it returns, begin with the batch."""
    B, S = arrays[0].shape[:2]
    C = _LARGEST_CHUNK if S <= _LONG_ROW and B % _LARGEST_CHUNK == 0 else 1
    # Identifiers go in twice and come out as their maximum, as XLA does not fuse a reduction into what reads it. The
    # mere slice of them it fuses into every score's mask, which took 2.5 times as long forward.
    ids_twice = None if segment_ids_BS is None else jnp.stack([segment_ids_BS] * 2, axis=-1)
    chunks = jax.tree.map(lambda x: x.reshape(B // C, C, *x.shape[1:]), (ids_twice, arrays))

    def one_chunk(chunk):
        ids_twice, arrays = chunk
        return function(None if ids_twice is None else jnp.max(ids_twice, axis=-1), *arrays)

    results = jax.lax.map(one_chunk, chunks)
    return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), results)


def _forward_chunk(segment_ids_CS, q_CSNH, k_CSKH, v_CSKH, *, causal, window, scale, logit_cap):
    C, S, N, H = q_CSNH.shape
    K = k_CSKH.shape[2]
    q_CKGSH = _scaled(_by_group(q_CSNH, K), scale)
    k_CKSH, v_CKSH = _by_group(k_CSKH, K)[:, :, 0], _by_group(v_CSKH, K)[:, :, 0]
    outputs, maxima, logsums = [], [], []
    for start, stop, first, last in xla.blocks(S, causal=causal, window=window):
        scores_CKGQT = _scores(q_CKGSH[:, :, :, start:stop], k_CKSH[:, :, first:last])
        allowed_CQT = xla.allowed(
            (start, stop), (first, last), causal=causal, segment_ids=segment_ids_CS, window=window
        )
        scores_CKGQT = jnp.where(allowed_CQT[:, None, None], scores_CKGQT, xla.MASKED)
        max_CKGQ1 = jnp.max(scores_CKGQT, axis=-1, keepdims=True)
        capped_CKGQT = xla.soft_cap(scores_CKGQT, logit_cap, allowed_CQT[:, None, None])
        top_CKGQ1 = xla.soft_cap(max_CKGQ1, logit_cap)
        weights_CKGQT = jnp.exp(capped_CKGQT - top_CKGQ1)
        sum_CKGQ1 = jnp.sum(weights_CKGQT, axis=-1, keepdims=True)
        output_CKRH = _weighted(weights_CKGQT, v_CKSH[:, :, first:last])
        outputs.append(output_CKRH.reshape(C, K, N // K, stop - start, H) / sum_CKGQ1)
        maxima.append(xla.max_of_heads(max_CKGQ1[..., 0], segment_ids_CS, (start, stop)))
        logsums.append((top_CKGQ1 + jnp.log(sum_CKGQ1))[..., 0])
    output_CKGSH = jnp.concatenate(outputs, axis=3)
    max_CN = functools.reduce(jnp.maximum, maxima)
    return _by_position(output_CKGSH), max_CN, jnp.concatenate(logsums, axis=3)


def _backward_chunk(
    segment_ids_CS,
    q_CSNH,
    k_CSKH,
    v_CSKH,
    logsum_CKGS,
    drop_CKGS,
    dout_CSNH,
    *,
    causal,
    window,
    scale,
    logit_cap,
):
    C, S, N, H = q_CSNH.shape
    K = k_CSKH.shape[2]
    q_CKGSH = _scaled(_by_group(q_CSNH, K), scale)
    k_CKSH, v_CKSH = _by_group(k_CSKH, K)[:, :, 0], _by_group(v_CSKH, K)[:, :, 0]
    dout_CKGSH = _by_group(dout_CSNH, K)
    dqs, dk_CKHS, dv_CKHS = [], 0.0, 0.0
    for start, stop, first, last in xla.blocks(S, causal=causal, window=window):
        q_CKGQH, dout_CKGQH = q_CKGSH[:, :, :, start:stop], dout_CKGSH[:, :, :, start:stop]
        k_CKTH, v_CKTH = k_CKSH[:, :, first:last], v_CKSH[:, :, first:last]
        allowed_CQT = xla.allowed(
            (start, stop), (first, last), causal=causal, segment_ids=segment_ids_CS, window=window
        )
        scores_CKGQT = jnp.where(allowed_CQT[:, None, None], _scores(q_CKGQH, k_CKTH), xla.MASKED)
        capped_CKGQT = xla.soft_cap(scores_CKGQT, logit_cap, allowed_CQT[:, None, None])
        weights_CKGQT = jnp.exp(capped_CKGQT - logsum_CKGS[:, :, :, start:stop, None])
        dweights_CKGQT = _scores(dout_CKGQH, v_CKTH)
        dscores_CKGQT = weights_CKGQT * (dweights_CKGQT - drop_CKGS[:, :, :, start:stop, None])
        if logit_cap is not None:
            dscores_CKGQT *= 1.0 - jnp.square(jnp.tanh(scores_CKGQT / logit_cap))
        dq_CKRH = _weighted(dscores_CKGQT, k_CKTH)
        dqs.append(dq_CKRH.reshape(C, K, N // K, stop - start, H))
        dk_CKHT = _summed_over_queries(q_CKGQH, dscores_CKGQT)
        dv_CKHT = _summed_over_queries(dout_CKGQH, weights_CKGQT)
        padding = ((0, 0), (0, 0), (0, 0), (first, S - last))
        dk_CKHS, dv_CKHS = dk_CKHS + jnp.pad(dk_CKHT, padding), dv_CKHS + jnp.pad(dv_CKHT, padding)
    dq_CKGSH = jnp.concatenate(dqs, axis=3) * scale
    return _by_position(dq_CKGSH), jnp.moveaxis(dk_CKHS, 3, 1), jnp.moveaxis(dv_CKHS, 3, 1)


def _scaled(x: jax.Array, scale: float) -> jax.Array:
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


def _scores(q_CKGQH, k_CKTH):
    C, K, G, Q, _ = q_CKGQH.shape
    return _product("ckrh,ckth->ckrt", _merge_heads(q_CKGQH), k_CKTH).reshape(C, K, G, Q, -1)


def _weighted(weights_CKGQT, v_CKTH):
    """Sums of the rows of v, f32 [C, K, R, H]."""
    return _product("ckrt,ckth->ckrh", _merge_heads(weights_CKGQT).astype(v_CKTH.dtype), v_CKTH)


def _summed_over_queries(x_CKGQH, weights_CKGQT):
    """Weighted sums of the rows of x for every key, f32, as [C, K, H, T]: so x is what has to be transposed, and not the weights."""
    x_CKHR = transposed_copy(_merge_heads(x_CKGQH))
    return _product("ckhr,ckrt->ckht", x_CKHR, _merge_heads(weights_CKGQT).astype(x_CKGQH.dtype))


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _merge_heads(x_CKGQX):
    C, K, G, Q, X = x_CKGQX.shape
    return x_CKGQX.reshape(C, K, G * Q, X)


def _by_group(x_CSNH, num_groups):
    C, S, N, H = x_CSNH.shape
    x_CSKGH = x_CSNH.reshape(C, S, num_groups, N // num_groups, H)
    return jnp.moveaxis(x_CSKGH, 1, 3)


def _by_position(x_CKGSH):
    C, K, G, S, H = x_CKGSH.shape
    return jnp.moveaxis(x_CKGSH, 3, 1).reshape(C, S, K * G, H)

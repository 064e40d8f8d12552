"""QK-clip on plain arrays: what it does to the logits, in float64 numpy from the weights it returns.

B rows, S sequence, D model width, N query heads, K key heads, W head width, L layers
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoljax.errors import SmoljaxError
from smoljax.optim.qk_clip import HeadKernel, QKClipSpec, clipped_heads, qk_clip

B, S, D, W = 3, 10, 12, 8
TAU = 5.0


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def logits(params, *, rope=True):
    """Causal logits [B, N, pairs] in float64, with rotary embedding on half of the width."""
    x = random(99, B, S, D).astype(np.float64)
    params = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    q = np.einsum("bsd,dnw->bnsw", x, params["query"]) + params["query_bias"][:, None]
    k = np.einsum("bsd,dkw->bksw", x, params["key"]) + params["key_bias"][:, None]
    if rope:
        q, k = rotated(q), rotated(k)
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    scores = np.einsum("bnsw,bntw->bnst", q, k) * W**-0.5
    return scores[:, :, *np.tril_indices(S)]


def rotated(x):
    angle = np.arange(S)[:, None] * 0.3 ** np.arange(x.shape[-1] // 2)
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def maxima(params):
    return logits(params).max(axis=(0, 2)).astype(np.float32)


def exploded(num_query, num_key, seed=0):
    """Query and key kernels and biases in which every third query head has grown, each by another factor."""
    growth = np.where(np.arange(num_query) % 3 == 0, 3.0 + np.arange(num_query), 0.5)
    growth = growth.astype(np.float32)
    return {
        "query": random(seed, D, num_query, W) * 0.3 * growth[:, None],
        "key": random(seed + 1, D, num_key, W) * 0.3,
        "query_bias": random(seed + 2, num_query, W) * growth[:, None],
        "key_bias": random(seed + 3, num_key, W),
    }


def spec(alpha=None):
    return QKClipSpec(("query", "query_bias"), ("key", "key_bias"), alpha=alpha)


CASES = [
    (6, 6, None),
    (6, 6, 0.2),
    (6, 2, None),  # Each query head on its own, the keys stay.
    (6, 2, 0.5),  # The key takes the smallest gamma of its group.
    (6, 1, 0.5),
    (6, 3, 0.0),
]


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize(("num_query", "num_key", "alpha"), CASES)
def test_every_head_ends_at_its_own_bound(num_query, num_key, alpha, rope):
    params = exploded(num_query, num_key)
    before = logits(params, rope=rope)
    old = before.max(axis=(0, 2))
    new = jax.jit(qk_clip, static_argnames="spec")(
        params, jnp.asarray(old, jnp.float32), tau=TAU, spec=spec(alpha)
    )
    after = logits(new, rope=rope)
    fired = old > TAU
    assert fired.any()
    assert not fired.all()
    np.testing.assert_allclose(after.max(axis=(0, 2)), np.minimum(old, TAU), rtol=1e-5)
    # All logits of a head shrink alike, and those of heads within tau stay.
    gamma = np.minimum(1, TAU / old)
    np.testing.assert_allclose(after, before * gamma[:, None], rtol=1e-5, atol=1e-5)


def test_the_common_copy_for_shared_keys_clips_too_much():
    """q by sqrt(gamma) and k by the square root of the group's smallest: what the two exact rules are there to avoid."""
    params = exploded(6, 2)
    before = logits(params)
    gamma = np.minimum(1, TAU / before.max(axis=(0, 2)))
    smallest = np.repeat(gamma.reshape(2, 3).min(axis=1), 3)
    root, root_of_group = np.sqrt(gamma)[:, None], np.sqrt(smallest.reshape(2, 3)[:, :1])
    factors = {"query": root, "key": root_of_group}
    after = logits({name: leaf * factors[name.split("_")[0]] for name, leaf in params.items()})
    within = gamma == 1
    ratio = after[:, within] / before[:, within]
    assert (ratio < 0.8).all()


def test_query_only_leaves_keys_and_unclipped_heads_their_bits():
    params = exploded(6, 2)
    old = maxima(params)
    new = qk_clip(params, jnp.asarray(old), tau=TAU, spec=spec())
    for name in ("key", "key_bias"):
        np.testing.assert_array_equal(new[name], params[name])
    within = old <= TAU
    for name in ("query", "query_bias"):
        np.testing.assert_array_equal(new[name][..., within, :], params[name][..., within, :])
        assert (new[name][..., ~within, :] != params[name][..., ~within, :]).all()


def test_keys_with_their_own_query_share_the_factor():
    params = exploded(6, 6)
    old = maxima(params)
    new = qk_clip(params, jnp.asarray(old), tau=TAU, spec=spec())
    root = np.sqrt(np.minimum(1, TAU / old))[:, None]
    for name, leaf in new.items():
        np.testing.assert_allclose(leaf, params[name] * root, rtol=1e-6)


def test_stacked_layers_are_one_multiply():
    layers = [exploded(6, 2, seed) for seed in (0, 10, 20)]
    stacked = {
        "model": {
            "attention": {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
        },
        "other": random(1, 4),
    }
    old = np.stack([maxima(layer) for layer in layers])
    names = QKClipSpec(
        (r"model/attention/query", r".*/query_bias"), (r".*/key", r"model/.*key_bias"), alpha=0.5
    )
    new = qk_clip(stacked, jnp.asarray(old), tau=TAU, spec=names)
    np.testing.assert_array_equal(new["other"], stacked["other"])
    for i, layer in enumerate(layers):
        alone = qk_clip(layer, jnp.asarray(old[i]), tau=TAU, spec=spec(0.5))
        for name, leaf in alone.items():
            np.testing.assert_array_equal(new["model"]["attention"][name][i], leaf)


def test_modules_of_their_own_go_by_a_mapping():
    params = {f"layers_{i}": {"attention": exploded(6, 2, 10 * i)} for i in range(3)}
    old = {f"layers_{i}/attention": maxima(exploded(6, 2, 10 * i)) for i in (0, 2)}
    new = qk_clip(params, old, tau=TAU, spec=spec(0.5))
    for i in range(3):
        layer = params[f"layers_{i}"]["attention"]
        if i == 1:  # Not in the mapping: it stays.
            expected = layer
        else:
            expected = qk_clip(layer, old[f"layers_{i}/attention"], tau=TAU, spec=spec(0.5))
        for name, leaf in expected.items():
            np.testing.assert_array_equal(new[f"layers_{i}"]["attention"][name], leaf)
    fired = np.concatenate(list(old.values())) > TAU
    assert float(clipped_heads(old, TAU)) == pytest.approx(fired.mean())


def mla_logits(params, *, num_heads, nope, rotary):
    """Logits of multi-head latent attention: a part without RoPE for each head, and a rotary key that all heads share."""
    x = random(98, S, D).astype(np.float64)
    q = np.einsum("sd,dnw->nsw", x, np.asarray(params["q_up"], np.float64))
    kv = np.einsum("sd,dnw->nsw", x, np.asarray(params["kv_up"], np.float64))
    shared = rotated(x @ np.asarray(params["k_rotary"], np.float64))
    scores = np.einsum("nsw,ntw->nst", q[..., :nope], kv[..., :nope])
    scores += np.einsum("nsw,tw->nst", rotated(q[..., nope:]), shared)
    return scores[:, *np.tril_indices(S)] * (nope + rotary) ** -0.5


def test_latent_attention_scales_parts_of_fused_kernels():
    num_heads, nope, rotary, value = 4, 6, 4, 5
    growth = np.array([9.0, 0.2, 0.8, 14.0])[:, None].astype(np.float32)
    params = {
        "q_up": random(0, D, num_heads, nope + rotary) * 0.3 * growth,
        "kv_up": random(1, D, num_heads, nope + value) * 0.3,
        "k_rotary": random(2, D, rotary),
    }
    sizes = dict(num_heads=num_heads, nope=nope, rotary=rotary)
    before = mla_logits(params, **sizes)
    old = before.max(axis=1)
    latent = QKClipSpec(
        query=HeadKernel("q_up", width_range=(0, nope)),
        key=HeadKernel("kv_up", width_range=(0, nope)),
        query_of_shared_key=HeadKernel("q_up", width_range=(nope, nope + rotary)),
    )
    new = qk_clip(params, jnp.asarray(old), tau=TAU, spec=latent)
    gamma = np.minimum(1, TAU / old)
    np.testing.assert_allclose(mla_logits(new, **sizes), before * gamma[:, None], rtol=1e-4)
    assert (gamma < 1).sum() == 2
    np.testing.assert_array_equal(new["k_rotary"], params["k_rotary"])
    np.testing.assert_array_equal(new["kv_up"][..., nope:], params["kv_up"][..., nope:])
    ratio = new["q_up"] / params["q_up"]
    np.testing.assert_allclose(ratio[0, :, 0], np.sqrt(gamma), rtol=1e-5)
    np.testing.assert_allclose(ratio[0, :, -1], gamma, rtol=1e-5)
    # Control: the same factor on both parts of the query leaves the rotary logits too large.
    plain = QKClipSpec("q_up", HeadKernel("kv_up", width_range=(0, nope)))
    wrong = qk_clip(params, jnp.asarray(old), tau=TAU, spec=plain)
    assert mla_logits(wrong, **sizes).max() > 1.2 * TAU


def test_flat_transposed_and_fused_kernels_equal_separate_ones():
    params = exploded(6, 2)
    old = jnp.asarray(maxima(params))
    query, key = (np.asarray(params[name]) for name in ("query", "key"))
    expected = qk_clip({"q": query, "k": key}, old, tau=TAU, spec=QKClipSpec("q", "k", alpha=0.5))

    flat = {"q": query.reshape(D, -1), "k": key.reshape(D, -1)}
    kernels = [HeadKernel(name, heads=-1, head_dim=W) for name in "qk"]
    new = qk_clip(flat, old, tau=TAU, spec=QKClipSpec(*kernels, alpha=0.5))
    np.testing.assert_array_equal(new["q"].reshape(D, 6, W), expected["q"])
    np.testing.assert_array_equal(new["k"].reshape(D, 2, W), expected["k"])

    turned = {"q": query.reshape(D, -1).T, "k": key.transpose(2, 1, 0)}  # [N * W, D], [W, K, D]
    kernels = [HeadKernel("q", heads=-2, head_dim=W), HeadKernel("k", width=-3)]
    new = qk_clip(turned, old, tau=TAU, spec=QKClipSpec(*kernels, alpha=0.5))
    np.testing.assert_array_equal(new["q"].T.reshape(D, 6, W), expected["q"])
    np.testing.assert_array_equal(new["k"].transpose(2, 1, 0), expected["k"])

    value = random(5, D, 2, W)
    fused = {"qkv": np.concatenate([query, key, value], axis=1)}
    kernels = [HeadKernel("qkv", head_range=bounds) for bounds in ((0, 6), (6, 8))]
    new = qk_clip(fused, old, tau=TAU, spec=QKClipSpec(*kernels, alpha=0.5))["qkv"]
    together = np.concatenate([expected["q"], expected["k"], value], axis=1)
    np.testing.assert_array_equal(new, together)

    kernels = [HeadKernel("qkv", heads=-1, head_dim=W, head_range=b) for b in ((0, 6), (6, 8))]
    fused = {"qkv": fused["qkv"].reshape(D, -1)}
    new = qk_clip(fused, old, tau=TAU, spec=QKClipSpec(*kernels, alpha=0.5))["qkv"]
    np.testing.assert_array_equal(new, together.reshape(D, -1))

    # Query, key and value of each head side by side, flat: [D, N * 3 W].
    parts = exploded(6, 6)
    old = jnp.asarray(maxima(parts))
    expected = qk_clip(parts, old, tau=TAU, spec=spec())
    value = random(6, D, 6, W)
    fused = {"qkv": np.concatenate([parts["query"], parts["key"], value], -1).reshape(D, -1)}
    options = dict(heads=-1, head_dim=3 * W)
    kernels = [HeadKernel("qkv", width_range=b, **options) for b in ((0, W), (W, 2 * W))]
    new = qk_clip(fused, old, tau=TAU, spec=QKClipSpec(*kernels))["qkv"]
    together = np.concatenate([expected["query"], expected["key"], value], -1)
    np.testing.assert_array_equal(new, together.reshape(D, -1))

    # Width before heads, and a part of it.
    turned = {"q": parts["query"].transpose(0, 2, 1), "k": parts["key"]}
    kernel = HeadKernel("q", heads=-1, width=-2, width_range=(0, 3))
    new = qk_clip(turned, old, tau=TAU, spec=QKClipSpec(kernel, "k"))["q"].transpose(0, 2, 1)
    np.testing.assert_array_equal(new[..., :3], expected["query"][..., :3])
    np.testing.assert_array_equal(new[..., 3:], parts["query"][..., 3:])


def test_bfloat16_stays_and_the_factor_is_taken_in_float32():
    params = {
        name: jnp.asarray(leaf, jnp.bfloat16 if "query" in name else jnp.float32)
        for name, leaf in exploded(6, 2).items()
    }
    old = maxima(params)
    new = qk_clip(params, jnp.asarray(old), tau=TAU, spec=spec())
    assert {name: leaf.dtype for name, leaf in new.items()} == {
        name: leaf.dtype for name, leaf in params.items()
    }
    gamma = np.minimum(1, TAU / old).astype(np.float32)[:, None]
    exact = np.asarray(params["query"], np.float32) * gamma
    np.testing.assert_array_equal(new["query"], exact.astype(jnp.bfloat16))
    within = old <= TAU
    np.testing.assert_array_equal(new["query"][:, within], params["query"][:, within])


def test_heads_without_a_finite_maximum_keep_their_weights():
    params = exploded(6, 6)
    old = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf, 50.0, -3.0, 0.0])
    new = qk_clip(params, old, tau=TAU, spec=spec())
    for name, leaf in new.items():
        kept = np.array([True, True, True, False, True, True])
        np.testing.assert_array_equal(leaf[..., kept, :], params[name][..., kept, :])
        np.testing.assert_allclose(leaf[..., 3, :], params[name][..., 3, :] * 0.1**0.5, rtol=1e-6)
    assert float(clipped_heads(old, TAU)) == pytest.approx(1 / 6)


def test_tau_may_be_traced_and_none_fires_at_or_below_it():
    params = exploded(6, 2)
    old = jnp.asarray([5.0, 4.0, 4.9, 5.0, 1.0, 2.0])
    clip = jax.jit(lambda tau: qk_clip(params, old, tau=tau, spec=spec(0.5)))
    for name, leaf in clip(5.0).items():
        np.testing.assert_array_equal(leaf, params[name])
    assert float(clipped_heads(old, 5.0)) == 0
    assert not np.array_equal(clip(2.5)["query"], params["query"])


def test_bad_input_is_named():
    params = exploded(6, 2)
    old = jnp.ones(6)

    def clip(spec, old=old, params=params, **options):
        return jax.eval_shape(lambda: qk_clip(params, old, spec=spec, **options))

    with pytest.raises(
        SmoljaxError, match=r"query of shape \(12, 6, 8\) has 6 heads.*\(4,\) says 4"
    ):
        clip(spec(), jnp.ones(4))
    with pytest.raises(
        SmoljaxError, match=r"key of shape \(12, 2, 8\).*\(3, 6\).*begin with \(3,\)"
    ):
        clip(spec(), jnp.ones((3, 6)))
    with pytest.raises(SmoljaxError, match=r"key of shape \(12, 4, 8\) has 4 key heads for the 6"):
        clip(spec(), params=params | {"key": random(0, D, 4, W)})
    with pytest.raises(SmoljaxError, match=r"key_bias of shape \(6, 8\) has 6 key heads"):
        clip(spec(), params=params | {"key_bias": random(0, 6, W)})
    with pytest.raises(SmoljaxError, match=r"'queries' fits no leaves.*query_bias"):
        clip(QKClipSpec("queries"))
    with pytest.raises(SmoljaxError, match=r"'query.*' fits 2 leaves.*They are query, query_bias"):
        clip(QKClipSpec("query.*"))
    with pytest.raises(SmoljaxError, match="no leaves below 'layer_7'"):
        clip(spec(), {"layer_7": old})
    with pytest.raises(SmoljaxError, match=r"neither a path nor a regular expression"):
        clip(QKClipSpec("que(ry"))
    for tau in (0.0, -1.0, float("nan")):
        with pytest.raises(SmoljaxError, match=f"tau={tau}: give a number above 0"):
            clip(spec(), tau=tau)
        with pytest.raises(SmoljaxError, match="tau="):
            clipped_heads(old, tau)
    with pytest.raises(SmoljaxError, match=r"alpha is 1\.5"):
        QKClipSpec("query", "key", alpha=1.5)
    with pytest.raises(SmoljaxError, match="key is empty"):
        QKClipSpec("query", alpha=0.5)
    with pytest.raises(SmoljaxError, match="query is empty"):
        QKClipSpec((), "key")
    with pytest.raises(SmoljaxError, match="count axes from the end"):
        HeadKernel("query", heads=1)
    with pytest.raises(SmoljaxError, match=r"head_range is \(3, 3\)"):
        HeadKernel("query", head_range=(3, 3))
    with pytest.raises(SmoljaxError, match=r"width_range \(4, 9\) of query.*ends after 8"):
        clip(QKClipSpec(HeadKernel("query", width_range=(4, 9))))
    with pytest.raises(SmoljaxError, match="is no multiple of head_dim 5"):
        clip(QKClipSpec(HeadKernel("query", heads=-1, head_dim=5)))
    with pytest.raises(SmoljaxError, match="share weights of query"):
        clip(QKClipSpec("query", "query", alpha=0.5))
    with pytest.raises(SmoljaxError, match="is int32"):
        clip(spec(), params=params | {"query": jnp.ones((D, 6, W), jnp.int32)})
    with pytest.raises(SmoljaxError, match=r"shape \(\)"):
        clip(spec(), jnp.float32(1))
    for call in (lambda: clip(spec(), {}), lambda: clipped_heads({})):
        with pytest.raises(SmoljaxError, match="no max_logits: give each attention module"):
            call()

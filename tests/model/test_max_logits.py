"""The largest attention logit of each head of each layer, and what QK-clip makes of it.

B batch, S sequence, N query heads, K key-value heads, H head width, L layers
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoljax.model import ModelConfig, hidden, hidden_and_max_logits, init
from smoljax.model.decoder import Decoder, attend_to_sequence
from smoljax.optim.qk_clip import QKClipSpec, qk_clip

# Layer 2 has no RoPE and layer 1 a window.
CONFIG = ModelConfig(
    vocab_size=96,
    num_layers=3,
    hidden_size=32,
    intermediate_size=48,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    nope_layers=(2,),
    sliding_window=5,
    windowed_layers=(1,),
    scan_layers=False,
    init_std=0.2,
)
SEGMENTS_BS = np.array([[1] * 9 + [2] * 8 + [0] * 3, [1] * 20], np.int32)
TAU = 20.0

run = jax.jit(hidden_and_max_logits, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return jax.jit(init, static_argnums=0)(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens_BS():
    return jax.random.randint(jax.random.key(1), (2, 20), 0, CONFIG.vocab_size)


def all_logits(config, params, tokens_BS):
    """The allowed logits of real tokens, float64 [L, N, pairs], from the queries and keys that the model makes."""

    def attend(q_BSNH, k_BSKH, v_BSKH, windowed):
        output_BSNH = attend_to_sequence(
            config, q_BSNH, k_BSKH, v_BSKH, windowed, segment_ids_BS=SEGMENTS_BS
        )
        return output_BSNH, (q_BSNH, k_BSKH)

    def queries_and_keys(params):
        positions_BS = jnp.arange(20)[None]
        return Decoder(config, attend).apply({"params": params}, tokens_BS, positions_BS)[1]

    q_LBSNH, k_LBSKH = (np.asarray(x, np.float64) for x in jax.jit(queries_and_keys)(params))
    k_LBSNH = np.repeat(k_LBSKH, q_LBSNH.shape[3] // k_LBSKH.shape[3], axis=3)
    scores = np.einsum("lbsnh,lbtnh->lnbst", q_LBSNH, k_LBSNH) * config.attention_scale
    apart = np.arange(20)[:, None] - np.arange(20)[None]
    real = (SEGMENTS_BS[:, :, None] == SEGMENTS_BS[:, None]) & (SEGMENTS_BS[:, :, None] > 0)
    allowed = np.stack(
        [
            real & (apart >= 0) & (apart < (config.window(layer) or 20))
            for layer in range(config.num_layers)
        ]
    )
    return np.where(allowed[:, None], scores, -np.inf).reshape(*scores.shape[:2], -1)


EXECUTIONS = [
    dict(attention="reference"),
    dict(attention="xla"),
    dict(attention="cpu"),
    dict(scan_layers=True),
    dict(scan_layers=True, remat="full"),
    dict(scan_layers=True, remat="save_attention", attention="xla"),
    dict(remat="dots"),
    dict(parametrization="mup", base_hidden_size=16, base_head_dim=2),  # Another scale of logits.
]


@pytest.mark.parametrize("changes", EXECUTIONS, ids=str)
def test_maxima_are_those_of_the_logits_in_float64(params, tokens_BS, changes):
    config = dataclasses.replace(CONFIG, **changes)
    hidden_BSD, max_LN = run(config, params, tokens_BS, SEGMENTS_BS)
    assert (max_LN.shape, max_LN.dtype) == ((3, 6), jnp.float32)
    np.testing.assert_allclose(max_LN, all_logits(config, params, tokens_BS).max(axis=2), rtol=2e-5)
    np.testing.assert_array_equal(
        hidden_BSD, jax.jit(hidden, static_argnums=0)(config, params, tokens_BS, SEGMENTS_BS)
    )


def test_bfloat16_maxima_are_float32_and_close(params, tokens_BS):
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    max_LN = run(config, params, tokens_BS, SEGMENTS_BS)[1]
    assert max_LN.dtype == jnp.float32
    exact_LN = run(CONFIG, params, tokens_BS, SEGMENTS_BS)[1]
    np.testing.assert_allclose(max_LN, exact_LN, rtol=0.05)


@pytest.mark.parametrize("changes", [{}, dict(attention="xla", scan_layers=True, remat="full")])
def test_no_gradient_flows_through_the_maxima(params, tokens_BS, changes):
    config = dataclasses.replace(CONFIG, **changes)

    def loss(params, weight):
        hidden_BSD, max_LN = hidden_and_max_logits(config, params, tokens_BS, SEGMENTS_BS)
        return jnp.sum(jnp.square(hidden_BSD)) + weight * jnp.sum(max_LN)

    gradient = jax.jit(jax.grad(loss))
    jax.tree.map(np.testing.assert_array_equal, gradient(params, 0.0), gradient(params, 9.0))


def exploded(config, tokens_BS, *, hear_attention):
    """Parameters whose query heads 1 and 4 have grown until their logits pass tau.

    Clipping a layer also changes what later layers read. Without `hear_attention` the attention writes nothing into the
    residual stream, so that every layer reads what it read before.
    """
    params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    attention = params["layers"]["attention"]
    growth = jnp.where(jnp.isin(jnp.arange(config.num_heads), jnp.array([1, 4])), 40.0, 0.5)
    attention["query"] = attention["query"] * growth[None, None, :, None]
    if not hear_attention:
        attention["output"] = jnp.zeros_like(attention["output"])
    return params


def spec(alpha=None):
    return QKClipSpec("layers/attention/query", "layers/attention/key", alpha=alpha)


@pytest.mark.parametrize(("num_kv_heads", "alpha"), [(6, None), (2, None), (2, 0.5), (1, 0.5)])
def test_clipping_bounds_every_head_and_leaves_the_others(tokens_BS, num_kv_heads, alpha):
    config = dataclasses.replace(CONFIG, num_kv_heads=num_kv_heads)
    params = exploded(config, tokens_BS, hear_attention=False)
    before = all_logits(config, params, tokens_BS)
    max_LN = run(config, params, tokens_BS, SEGMENTS_BS)[1]
    fired = np.asarray(max_LN) > TAU
    np.testing.assert_array_equal(fired, [[False, True, False, False, True, False]] * 3)
    clipped = qk_clip(params, max_LN, tau=TAU, spec=spec(alpha))
    after_LN = run(config, clipped, tokens_BS, SEGMENTS_BS)[1]
    assert (after_LN <= TAU * (1 + 1e-5)).all()
    np.testing.assert_allclose(after_LN[fired], TAU, rtol=1e-5)  # And not lower.
    after = all_logits(config, clipped, tokens_BS)
    allowed = np.isfinite(before)
    before, after = np.where(allowed, before, 0), np.where(allowed, after, 0)
    error_LN, size_LN = np.abs(after - before).max(axis=2), np.abs(before).max(axis=2)
    assert (error_LN < 1e-5 * size_LN)[~fired].all()


def test_the_common_copy_for_shared_keys_changes_heads_that_were_within(tokens_BS):
    """Control for the test above: sqrt(gamma) on each query, and on each key that of the smallest gamma of its group."""
    params = exploded(CONFIG, tokens_BS, hear_attention=False)
    max_LN = run(CONFIG, params, tokens_BS, SEGMENTS_BS)[1]
    gamma_LN = jnp.minimum(1, TAU / max_LN)
    smallest_LK = gamma_LN.reshape(3, 2, 3).min(axis=2)
    attention = dict(params["layers"]["attention"])
    attention["query"] = attention["query"] * jnp.sqrt(gamma_LN)[:, None, :, None]
    attention["key"] = attention["key"] * jnp.sqrt(smallest_LK)[:, None, :, None]
    copy = params | {"layers": params["layers"] | {"attention": attention}}
    after_LN = run(CONFIG, copy, tokens_BS, SEGMENTS_BS)[1]
    within = np.asarray(max_LN) <= TAU
    assert (np.asarray(after_LN)[within] < 0.8 * np.asarray(max_LN)[within]).all()


def test_layers_that_hear_each_other_are_all_within_after_one_step_for_each(tokens_BS):
    """The first layer is exact at once, and each next one when all before it stand still."""
    params = exploded(CONFIG, tokens_BS, hear_attention=True)
    maxima = functools.partial(run, CONFIG, tokens_BS=tokens_BS, segment_ids_BS=SEGMENTS_BS)
    for layer in range(CONFIG.num_layers):
        max_LN = maxima(params)[1]
        assert layer > 0 or (max_LN.max(axis=1) > TAU).all()
        params = qk_clip(params, max_LN, tau=TAU, spec=spec())
        assert (maxima(params)[1][: layer + 1] <= TAU * (1 + 1e-5)).all()

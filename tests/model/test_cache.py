"""The cache against the same model without one, for every kind of layer and every dtype of the cache.

B batch, S sequence, T cache slots, V vocabulary
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoljax.kernels.cpu_matmul import Turned
from smoljax.model import ModelConfig, forward, init
from smoljax.model.cache import (
    Stored,
    _attend_to_cache,
    _store,
    _turned,
    decode,
    prefill,
    prepare,
)

CONFIG = ModelConfig(
    vocab_size=64,
    num_layers=3,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    no_rope_layer_interval=3,  # Layers with RoPE and without.
    max_seq_len=128,
    init_std=0.3,
)
KINDS = {
    "rope in some layers": {},
    "rope everywhere": {"no_rope_layer_interval": 0},
    "rope nowhere": {"no_rope_layer_interval": 1},
    "listed layers without rope": {"nope_layers": (0, 1)},
    "untied": {"tie_embeddings": False},
    "one key-value head": {"num_kv_heads": 1},
    "a window in one layer": {"sliding_window": 4, "windowed_layers": (1,)},
    "a window everywhere": {"sliding_window": 3, "windowed_layers": (0, 1, 2)},
    "qk_norm, wide heads": {"qk_norm": True, "head_dim": 16},
    "yarn": {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 16}},
    "llama3": {"rope_scaling": {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 16}},
    "all of them": {
        "qk_norm": True,
        "sliding_window": 4,
        "windowed_layers": (2,),
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 16},
        "tie_embeddings": False,
    },
}
LENGTHS = [4, 9, 1]
SLOTS, STEPS = 24, 10

compiled_forward = jax.jit(forward, static_argnums=0)
compiled_prefill = jax.jit(prefill, static_argnums=0, static_argnames=("slots", "cache_dtype"))
compiled_decode = jax.jit(decode, static_argnums=0)


def cached_and_uncached(config, *, cache_dtype=None, cached_config=None):
    """Logits [B, steps, V] of one sequence per row with a cache (of `cached_config`) and without."""
    params = jax.jit(init, static_argnums=0)(config, jax.random.key(1))
    # Gains other than 1, or their place would not matter.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    params = tree.unflatten(
        leaf * jax.random.uniform(key, leaf.shape, minval=0.5, maxval=1.5)
        for key, leaf in zip(keys, leaves)
    )
    tokens_BS = jax.random.randint(jax.random.key(2), (3, 20), 0, config.vocab_size)
    whole_BSV = np.asarray(compiled_forward(config, params, tokens_BS))
    expected = np.stack(
        [row[length - 1 : length + STEPS] for row, length in zip(whole_BSV, LENGTHS)]
    )

    config = cached_config or config
    padded_BP = np.zeros((3, 12), np.int32)
    for b, length in enumerate(LENGTHS):
        padded_BP[b, 12 - length :] = tokens_BS[b, :length]
    first_B = 12 - jnp.asarray(LENGTHS)
    prepared = prepare(config, params)
    logits_BV, cache = compiled_prefill(
        config, prepared, padded_BP, first_B, slots=SLOTS, cache_dtype=cache_dtype
    )
    found = [logits_BV]
    for count in range(STEPS):
        token_B = jnp.stack([tokens_BS[b, length + count] for b, length in enumerate(LENGTHS)])
        logits_BV, cache = compiled_decode(config, prepared, cache, token_B, 12 + count, first_B)
        found.append(logits_BV)
    return np.stack(found, axis=1), expected, cache


@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_equal_uncached(kind):
    config = dataclasses.replace(CONFIG, **KINDS[kind])
    found, expected, _ = cached_and_uncached(config)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("rope in some layers", {"no_rope_layer_interval": 0}),
        ("a window in one layer", {"sliding_window": 5}),
        ("yarn", {"rope_scaling": None}),
        ("llama3", {"rope_scaling": None}),
    ],
)
def test_another_kind_of_layer_would_be_seen(kind, wrong):
    config = dataclasses.replace(CONFIG, **KINDS[kind])
    cached_config = dataclasses.replace(config, **wrong)
    found, expected, _ = cached_and_uncached(config, cached_config=cached_config)
    assert np.abs(found - expected).max() > 1e-2


@pytest.mark.parametrize(
    ("cache_dtype", "largest", "bytes_per_head"),
    [
        (None, 1e-4, 4 * 8),
        ("float32", 1e-4, 4 * 8),
        ("bfloat16", 0.01, 2 * 8),
        ("int8", 0.035, 8 + 4),
    ],
)
def test_a_rounded_cache_stays_close_and_is_as_small_as_it_should_be(
    cache_dtype, largest, bytes_per_head
):
    found, expected, cache = cached_and_uncached(CONFIG, cache_dtype=cache_dtype)
    # The prompt is read unrounded, whatever is stored.
    np.testing.assert_allclose(found[:, 0], expected[:, 0], atol=1e-4)
    # Root mean squares. A value's own rounding is 0.1% in bfloat16 and 0.35% in int8; three layers may make it ten times that.
    error = (found - expected).std() / expected.std()
    assert error < largest
    if cache_dtype in ("bfloat16", "int8"):
        assert error > 1e-4  # It is rounded.
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert num_bytes == CONFIG.num_layers * 2 * 3 * SLOTS * CONFIG.num_kv_heads * bytes_per_head


def test_int8_rounds_to_half_a_step_of_each_token_and_head():
    x_BKTH = jax.random.normal(jax.random.key(0), (2, 3, 5, 16)) * 7
    x_BKTH = x_BKTH.at[0, 1, 2].set(0)
    stored = _store(x_BKTH, "int8")
    assert stored.values.dtype == jnp.int8
    assert stored.scale.shape == (2, 3, 5)
    largest_BKT = np.abs(x_BKTH).max(axis=-1)
    np.testing.assert_allclose(stored.scale, largest_BKT / 127, rtol=1e-6)
    back_BKTH = np.asarray(stored.values, np.float32) * np.asarray(stored.scale)[..., None]
    assert (np.abs(back_BKTH - x_BKTH) <= largest_BKT[..., None] / 254 * 1.001).all()
    assert (np.abs(stored.values).max(axis=-1) == np.where(largest_BKT > 0, 127, 0)).all()


def test_attention_to_an_int8_cache_is_attention_to_what_it_stands_for():
    q_B1NH = jax.random.normal(jax.random.key(0), (2, 1, 4, 8))
    keys, values = (
        _store(jax.random.normal(jax.random.key(seed), (2, 2, 6, 8)), "int8") for seed in (1, 2)
    )
    plain_keys, plain_values = (Stored(x.values * x.scale[..., None], None) for x in (keys, values))
    visible_BT = jnp.arange(6)[None] < jnp.array([[6], [4]])
    np.testing.assert_allclose(
        _attend_to_cache(q_B1NH, _turned(keys, q_B1NH.dtype), values, visible_BT),
        _attend_to_cache(q_B1NH, _turned(plain_keys, q_B1NH.dtype), plain_values, visible_BT),
        atol=1e-5,
    )


def test_a_bfloat16_model_keeps_its_cache_in_bfloat16():
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    found, expected, cache = cached_and_uncached(config)
    assert cache[0][0].values.dtype == jnp.bfloat16
    np.testing.assert_allclose(found, expected, atol=0.25)


def test_large_matrices_of_bfloat16_are_turned_and_the_logits_no_further_from_float32(monkeypatch):
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    _, exact, _ = cached_and_uncached(CONFIG)

    def error():
        found, _, _ = cached_and_uncached(config)
        return np.sqrt(np.mean((found - exact) ** 2))

    as_they_are = error()
    monkeypatch.setattr("smoljax.model.cache._TURNED_FROM", 512)
    params = jax.jit(init, static_argnums=0)(config, jax.random.key(1))
    layer = prepare(config, params).layers[0]
    assert all(isinstance(w, Turned) for w in layer["mlp"].values())
    assert isinstance(layer["attention"]["output"], Turned)
    assert not isinstance(layer["mlp_norm"], Turned)
    assert error() < 1.1 * as_they_are

"""Generation with a cache against the same model without one.

B batch, S sequence, T cache slots, V vocabulary
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoljax.errors import SmoljaxError
from smoljax.model import ModelConfig, forward, generate, init, stream
from smoljax.model.cache import decode, prefill, prepare
from smoljax.model.generate import Sampling, sample

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
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]

compiled_forward = jax.jit(forward, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return jax.jit(init, static_argnums=0)(CONFIG, jax.random.key(0))


def logits_after(params, tokens):
    """Logits after the last of `tokens`, [V], without a cache; padded on the right so that it compiles once."""
    row_1S = np.zeros((1, 64), np.int32)
    row_1S[0, : len(tokens)] = tokens
    return np.asarray(compiled_forward(CONFIG, params, row_1S))[0, len(tokens) - 1]


@pytest.mark.parametrize("interval", [0, 1, 3])  # RoPE everywhere, nowhere, mixed.
@pytest.mark.parametrize("tied", [True, False])
def test_cached_logits_equal_uncached(interval, tied):
    config = dataclasses.replace(CONFIG, no_rope_layer_interval=interval, tie_embeddings=tied)
    params = jax.jit(init, static_argnums=0)(config, jax.random.key(1))
    tokens_BS = jax.random.randint(jax.random.key(2), (3, 20), 0, config.vocab_size)
    lengths = [4, 9, 1]
    expected_BSV = compiled_forward(config, params, tokens_BS)

    padded_BP = np.zeros((3, 12), np.int32)
    for b, length in enumerate(lengths):
        padded_BP[b, 12 - length :] = tokens_BS[b, :length]
    first_B = 12 - jnp.asarray(lengths)
    read = jax.jit(prefill, static_argnums=0, static_argnames="slots")
    logits_BV, cache = read(config, params, padded_BP, first_B, slots=24)
    step = jax.jit(decode, static_argnums=0)
    prepared = prepare(config, params)
    for count in range(10):
        for b, length in enumerate(lengths):
            want_V = expected_BSV[b, length + count - 1]
            np.testing.assert_allclose(logits_BV[b], want_V, atol=1e-4)
        token_B = jnp.stack([tokens_BS[b, length + count] for b, length in enumerate(lengths)])
        logits_BV, cache = step(config, prepared, cache, token_B, 12 + count, first_B)


def test_greedy_takes_the_most_likely_token_whatever_stands_beside(params):
    together = generate(CONFIG, params, PROMPTS, max_new_tokens=20)
    for prompt, new in zip(PROMPTS, together):
        assert len(new) == 20
        for count, token in enumerate(new):
            assert token == logits_after(params, prompt + new[:count]).argmax()
    assert generate(CONFIG, params, PROMPTS[2:], max_new_tokens=20) == together[2:]


def test_streamed_chunks_join_to_the_same(params):
    options = {"max_new_tokens": 10, "temperature": 1.0, "key": jax.random.key(3)}
    whole = generate(CONFIG, params, PROMPTS, **options)
    chunks = list(stream(CONFIG, params, PROMPTS, tokens_per_chunk=3, **options))
    assert [len(chunk[0]) for chunk in chunks] == [3, 3, 3, 1]
    joined = [[token for part in parts for token in part] for parts in zip(*chunks)]
    assert joined == whole


def test_a_stop_id_ends_its_row_only(params):
    free = generate(CONFIG, params, PROMPTS, max_new_tokens=20)
    stop = free[0][4]
    stopped = generate(CONFIG, params, PROMPTS, max_new_tokens=20, stop_ids=[stop])
    for new, expected in zip(stopped, free):
        end = expected.index(stop) + 1 if stop in expected else 20
        assert new == expected[:end]
    assert len(stopped[0]) < 20
    # Every first token a stop: one chunk, one token each.
    firsts = [new[0] for new in free]
    chunks = list(stream(CONFIG, params, PROMPTS, max_new_tokens=20, stop_ids=firsts))
    assert chunks == [[[token] for token in firsts]]


def test_seeds_decide(params):
    options = {"max_new_tokens": 20, "temperature": 1.0}
    one = generate(CONFIG, params, PROMPTS, key=jax.random.key(0), **options)
    assert one == generate(CONFIG, params, PROMPTS, key=jax.random.key(0), **options)
    assert one != generate(CONFIG, params, PROMPTS, key=jax.random.key(1), **options)
    same = generate(CONFIG, params, [PROMPTS[0]] * 2, key=jax.random.key(0), **options)
    assert same[0] != same[1]  # Rows draw apart.


def test_top_k_of_one_is_greedy(params):
    greedy = generate(CONFIG, params, PROMPTS, max_new_tokens=10)
    key = jax.random.key(0)
    options = {"max_new_tokens": 10, "temperature": 2.0, "key": key}
    assert generate(CONFIG, params, PROMPTS, top_k=1, **options) == greedy
    assert generate(CONFIG, params, PROMPTS, top_p=1e-6, **options) == greedy


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, [0.4, 0.3, 0.2, 0.1]),
        (2, 1.0, [0.4, 0.3]),
        (0, 0.65, [0.4, 0.3]),  # 0.4 is less than 0.65, so the token that crosses it stays.
        (0, 0.35, [0.4]),
        (3, 0.75, [0.4, 0.3]),  # 0.4 + 0.3 of the 0.9 that top-k left is 0.78.
    ],
)
def test_sampling_follows_the_distribution(top_k, top_p, kept):
    draws = 20_000
    logits_BV = jnp.tile(jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.3]])), (draws, 1)) * 0.5
    keys_B = jax.random.split(jax.random.key(0), draws)
    sampling = Sampling(
        jnp.float32(0.5), jnp.int32(top_k or 4), jnp.float32(top_p), jnp.zeros(0, jnp.int32)
    )
    counts = np.bincount(sample("filtered", logits_BV, keys_B, 0, sampling), minlength=4)
    expected = np.array([0.1, 0.4, 0.2, 0.3]) * np.isin([0.1, 0.4, 0.2, 0.3], kept)
    np.testing.assert_allclose(counts / draws, expected / expected.sum(), atol=0.015)
    assert (counts[expected == 0] == 0).all()


def test_one_program_serves_all_values_of_the_options(params):
    from smoljax.model.generate import _continue

    options = {"temperature": 1.0, "key": jax.random.key(0)}
    generate(CONFIG, params, [[1, 2]], max_new_tokens=5, top_k=3, **options)
    compiled = _continue._cache_size()
    generate(CONFIG, params, [[1, 2, 3]], max_new_tokens=9, top_k=5, top_p=0.5, **options)
    assert _continue._cache_size() == compiled


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 64]], {}, "prompt 0 holds token id 64, outside the model's vocabulary of 64"),
        ([[-1]], {}, "token id -1"),
        ([[1] * 125], {}, "prompt 0 has 125 tokens, and with 5 new ones exceeds.*max_seq_len=128"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"temperature": 1.0}, "key is None"),
        ([[1]], {"top_k": -1}, "top_k is -1"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
    ],
)
def test_errors_name_the_value(params, prompts, options, message):
    with pytest.raises(SmoljaxError, match=message):
        generate(CONFIG, params, prompts, **{"max_new_tokens": 5, **options})

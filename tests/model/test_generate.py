"""The generation loop against the same model asked token by token.

B batch, S sequence, V vocabulary
"""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smoljax import parallel
from smoljax.errors import SmoljaxError
from smoljax.model import ModelConfig, forward, generate, init, logical_axes, stream
from smoljax.model.cache import prefill, prepare
from smoljax.model.generate import _without_context

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


def test_a_row_draws_the_same_whatever_stands_beside_it(params):
    options = {"max_new_tokens": 20, "temperature": 1.0, "key": jax.random.key(0)}
    together = generate(CONFIG, params, PROMPTS, **options)
    other_rows = [PROMPTS[0], [3] * 40, [8, 8]]
    assert generate(CONFIG, params, PROMPTS[:1], **options) == together[:1]
    assert generate(CONFIG, params, other_rows, **options)[0] == together[0]


def test_prepared_parameters_serve_too(params):
    prepared = prepare(CONFIG, params)
    options = {"max_new_tokens": 5}
    assert generate(CONFIG, prepared, PROMPTS, **options) == generate(
        CONFIG, params, PROMPTS, **options
    )


@pytest.mark.parametrize("penalty", [1.5, 0.8])
def test_the_repetition_penalty_counts_prompt_and_new_tokens(params, penalty):
    together = generate(CONFIG, params, PROMPTS, max_new_tokens=20, repetition_penalty=penalty)
    assert together != generate(CONFIG, params, PROMPTS, max_new_tokens=20)
    for prompt, new in zip(PROMPTS, together):
        for count, token in enumerate(new):
            logits_V = logits_after(params, prompt + new[:count])
            seen = sorted({*prompt, *new[:count]})
            was = logits_V[seen]
            logits_V = logits_V.copy()
            logits_V[seen] = np.where(was < 0, was * penalty, was / penalty)
            assert token == logits_V.argmax()


@pytest.fixture(scope="module")
def trained():
    """A model that has learned to count by threes."""
    tokens_BS = jnp.asarray((np.arange(16)[:, None] + 3 * np.arange(33)) % CONFIG.vocab_size)
    optimizer = optax.adam(1e-2)

    def loss(params):
        logits_BSV = forward(CONFIG, params, tokens_BS[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits_BSV, tokens_BS[:, 1:]).mean()

    @jax.jit
    def fit(params):
        def step(_, carry):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 60, step, (params, optimizer.init(params)))[0]

    return fit(jax.jit(init, static_argnums=0)(CONFIG, jax.random.key(0)))


@pytest.mark.parametrize("cache_dtype", [None, "float32", "bfloat16", "int8"])
def test_a_rounded_cache_does_not_change_what_a_trained_model_writes(trained, cache_dtype):
    prompts = [[0, 3, 6, 9], [10, 13, 16, 19, 22, 25]]
    new = generate(CONFIG, trained, prompts, max_new_tokens=20, cache_dtype=cache_dtype)
    for prompt, row in zip(prompts, new):
        assert row == [(prompt[-1] + 3 * i) % CONFIG.vocab_size for i in range(1, 21)]


def on_meshes():
    """The texts of PROMPTS on one device and on meshes of 8, as a program of its own; prints them as JSON."""
    params = jax.jit(init, static_argnums=0)(CONFIG, jax.random.key(0))
    draw = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2, "key": jax.random.key(0)}
    options = [{}, draw | {"cache_dtype": "int8"}]
    found = [[generate(CONFIG, params, PROMPTS, max_new_tokens=10, **given) for given in options]]
    for sizes in ({"data": 1, "fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "context": 2}):
        mesh = parallel.make_mesh(parallel.MeshConfig(**sizes))
        shardings = parallel.param_shardings(mesh, logical_axes(CONFIG), params)
        placed = jax.device_put(params, shardings)
        with parallel.active(mesh):
            found.append(
                [generate(CONFIG, placed, PROMPTS, max_new_tokens=10, **given) for given in options]
            )
            tokens_BP, first_B = np.ones((8, 32), np.int32), np.zeros(8, np.int32)
            read = jax.jit(prefill, static_argnums=0, static_argnames="slots")
            with _without_context():
                _, cache = read(CONFIG, prepare(CONFIG, placed), tokens_BP, first_B, slots=64)
            rows, heads = sizes.get("data", 1) * sizes.get("fsdp", 1), sizes.get("tensor", 1)
            shard = cache[0][0].values.sharding.shard_shape((8, 2, 64, 8))
            assert shard == (8 // rows, 2 // heads, 64, 8), (sizes, shard)
    print(json.dumps(found))


def test_a_mesh_gives_the_text_of_one_device():
    result = subprocess.run(
        [sys.executable, "-c", "from tests.model.test_generate import on_meshes; on_meshes()"],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    one, *meshes = json.loads(result.stdout)
    assert len(meshes) == 2
    for mesh in meshes:
        assert mesh == one


def test_top_k_of_one_is_greedy(params):
    greedy = generate(CONFIG, params, PROMPTS, max_new_tokens=10)
    key = jax.random.key(0)
    options = {"max_new_tokens": 10, "temperature": 2.0, "key": key}
    assert generate(CONFIG, params, PROMPTS, top_k=1, **options) == greedy
    assert generate(CONFIG, params, PROMPTS, top_p=1e-6, **options) == greedy


def test_one_program_serves_all_values_of_the_options(params):
    from smoljax.model.generate import _continue

    options = {"temperature": 1.0, "key": jax.random.key(0)}
    first = {"top_k": 3, "repetition_penalty": 1.1}
    generate(CONFIG, params, [[1, 2]], max_new_tokens=5, **first, **options)
    compiled = _continue._cache_size()
    second = {"top_k": 5, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 0.7}
    generate(CONFIG, params, [[1, 2, 3]], max_new_tokens=9, **second, **options)
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
        ([[1]], {"top_k": 2.5}, "top_k is 2.5"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"top_p": 1.5}, "top_p is 1.5"),
        ([[1]], {"min_p": -0.1}, "min_p is -0.1"),
        ([[1]], {"min_p": 2}, "min_p is 2"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ([[1]], {"stop_ids": [64]}, "stop_ids holds 64"),
        ([[1]], {"cache_dtype": "int4"}, "cache_dtype is 'int4'.*float32, bfloat16, int8"),
    ],
)
def test_errors_name_the_value(params, prompts, options, message):
    with pytest.raises(SmoljaxError, match=message):
        generate(CONFIG, params, prompts, **{"max_new_tokens": 5, **options})

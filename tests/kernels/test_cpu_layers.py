"""A CPU's norm and feed-forward layer: values and gradients against float64, and in bfloat16 a whole training step of them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smoljax import losses
from smoljax.kernels import cpu_layers
from smoljax.model import ModelConfig, hidden, init, unembedding

EPS = 1e-5
T, D, F = 24, 16, 40


def norm(x_TD, gain_D):
    return x_TD / jnp.sqrt(jnp.mean(x_TD**2, axis=-1, keepdims=True) + EPS) * gain_D[None]


def feed_forward(x_TD, gate_DF, up_DF, down_FD):
    gate_TF = x_TD @ gate_DF
    return (gate_TF / (1 + jnp.exp(-gate_TF)) * (x_TD @ up_DF)) @ down_FD


CASES = {
    "norm": (lambda x, gain: cpu_layers.rms_norm(x, gain, EPS), norm, [(T, D), (D,)]),
    "feed_forward": (cpu_layers.swiglu, feed_forward, [(T, D), (D, F), (D, F), (F, D)]),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_float64(name, dtype, tolerance):
    """Within a few roundings of the dtype, relative to the largest value."""
    function, reference, shapes = CASES[name]
    rng = np.random.default_rng(0)
    # Numbers that the dtype holds, so that the reference starts from the same.
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    cotangent = jnp.asarray(rng.normal(size=(T, D)), dtype)
    value, gradients = jax.vjp(function, *arrays)
    got = (value, *gradients(cotangent))
    with jax.enable_x64(True):
        value, gradients = jax.vjp(reference, *(np.float64(x) for x in arrays))
        want = (value, *gradients(np.float64(cotangent)))
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        np.testing.assert_allclose(np.float64(g), w, atol=tolerance * np.abs(w).max(), rtol=0)


CONFIG = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_seq_len": 64,
}
B, S = 8, 64


def training(dtype):
    """A jitted step and its first arguments. A token's successor is fixed, so there is something to learn."""
    config = ModelConfig(**CONFIG, compute_dtype=dtype)
    optimizer = optax.adamw(3e-3)
    params = init(config, jax.random.key(0))

    def loss(params, window_BS):
        hidden_BSD = hidden(config, params, window_BS[:, :-1], jnp.ones((B, S), jnp.int32))
        head_DV = unembedding(config, params)
        mask_BS = jnp.ones((B, S), bool)
        total, count, _ = losses.cross_entropy(
            hidden_BSD, head_DV, window_BS[:, 1:], mask_BS, chunk_size=128
        )
        return total / count

    def step(params, state, window_BS):
        value, gradient = jax.value_and_grad(loss)(params, window_BS)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step), params, optimizer.init(params)


def windows(num_steps):
    """[num_steps, B, S + 1]: t -> 5 t + 1 modulo the vocabulary, one token in four replaced by chance."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(256, size=(num_steps, B, S + 1))
    for s in range(S):
        follows = rng.random((num_steps, B)) > 0.25
        tokens[..., s + 1] = np.where(follows, (5 * tokens[..., s] + 1) % 256, tokens[..., s + 1])
    return jnp.asarray(tokens, jnp.int32)


def test_a_step_in_bfloat16_multiplies_bfloat16():
    """XLA's slow way with a product of bfloat16 is to convert its operands to float32. Of the 3 times 7 products of each layer's
    matrices, those of attention and the 3 of the loss it does so with none; the norms' mean, a product by one column, is float32."""
    step, params, state = training("bfloat16")
    text = step.lower(params, state, windows(1)[0]).compile().as_text()
    types = dict(re.findall(r"%?([\w.\-]+) = (\w+)\[", text))
    shapes = dict(re.findall(r"%?([\w.\-]+) = \w+\[([\d,]*)\]", text))
    products = re.findall(r"= f32\[([\d,]*)\]\S* dot\(%?([\w.\-]+), %?([\w.\-]+)\)", text)
    in_float32 = [
        shapes[right]
        for _, left, right in products
        if (types[left], types[right]) != ("bf16", "bf16")
    ]
    assert len(products) - len(in_float32) >= 2 * 21 + 3
    assert all(shape.endswith(",1") for shape in in_float32)


def test_bfloat16_learns_as_float32_does():
    batches = windows(60)
    curves = {}
    for dtype in ("float32", "bfloat16"):
        step, params, state = training(dtype)
        curve = []
        for window_BS in batches:
            params, state, value = step(params, state, window_BS)
            curve.append(float(value))
        curves[dtype] = np.array(curve)
    assert curves["float32"][-1] < 0.75 * curves["float32"][0]
    np.testing.assert_allclose(curves["bfloat16"], curves["float32"], atol=0.01)

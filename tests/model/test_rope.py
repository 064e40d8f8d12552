"""Scaled rotary frequencies, against the papers' formulas computed one dimension at a time, and their limits."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from smoljax.model.rope import Llama3, Yarn, frequencies, rope_tables, rotate


def test_plain_frequencies():
    got = frequencies(head_dim=8, theta=10_000.0, scaling=None)
    np.testing.assert_allclose(got, [1, 0.1, 0.01, 0.001], rtol=1e-12)


def test_yarn_of_smollm3():
    """theta 5M, heads of 128, factor 2 over 65,536 tokens: the ramp runs from the dimension that turns 32 times
    (24.03, rounded down to 24) to the one that turns once (38.39, rounded up to 39)."""
    plain = frequencies(head_dim=128, theta=5e6, scaling=None)
    scaled = frequencies(head_dim=128, theta=5e6, scaling=Yarn(2.0, 65_536))
    turns = 65_536 * plain / (2 * math.pi)
    assert turns[24] > 32 > turns[25]
    assert turns[38] > 1 > turns[39]
    np.testing.assert_array_equal(scaled[:25], plain[:25])
    np.testing.assert_allclose(scaled[39:], plain[39:] / 2, rtol=1e-12)
    ramp = (30 - 24) / (39 - 24)
    np.testing.assert_allclose(scaled[30], plain[30] * (1 - ramp / 2), rtol=1e-12)


def test_yarn_amplitude():
    assert Yarn(2.0, 64).amplitude == pytest.approx(1.0693, abs=5e-5)  # The model card's factor.
    assert Yarn(4.0, 64, attention_factor=1.5).amplitude == 1.5
    cos, _ = rope_tables(
        jnp.zeros((1, 1), int), head_dim=4, theta=1e4, scaling=Yarn(2.0, 64), dtype=jnp.float32
    )
    np.testing.assert_allclose(cos, 0.1 * math.log(2) + 1, rtol=1e-6)


def test_llama3_bands():
    """Llama 3.1's own numbers: wavelengths under 2,048 kept, over 8,192 stretched by 8, between on a line."""
    scaling = Llama3(8.0, 8192)
    plain = frequencies(head_dim=128, theta=5e5, scaling=None)
    scaled = frequencies(head_dim=128, theta=5e5, scaling=scaling)
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 2048, wavelength > 8192
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-12)
    between = ~short & ~long
    assert between.sum() > 3
    smooth = (8192 / wavelength[between] - 1) / 3
    expected = (1 - smooth) * plain[between] / 8 + smooth * plain[between]
    np.testing.assert_allclose(scaled[between], expected, rtol=1e-12)


def test_turning_keeps_relative_positions():
    """q at 5 and k at 3 score as q at 105 and k at 103 (RoPE's defining property)."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(at_q, at_k):
        tables = [
            rope_tables(jnp.full((1, 1), at), head_dim=8, theta=1e4, dtype=jnp.float32)
            for at in (at_q, at_k)
        ]
        return float(jnp.sum(rotate(q, *tables[0]) * rotate(k, *tables[1])))

    assert score(5, 3) == pytest.approx(score(105, 103), abs=1e-5)
    assert score(5, 3) != pytest.approx(score(5, 4), abs=1e-2)

"""The backend of the tokamax library, where that is installed, and what is said where it is not."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoljax.errors import SmoljaxError
from smoljax.kernels import attention
from tests.kernels.attention.test_attention import arrays, exact


@pytest.mark.skipif(
    importlib.util.find_spec("tokamax") is None,
    reason='tokamax is not installed: pip install "smoljax[tokamax]"',
)
@pytest.mark.parametrize("causal", [True, False])
def test_agrees_with_float64(causal):
    q, k, v, dout = arrays(3, 1, 24, 4, 2, 8)
    segment_ids = np.array([[1] * 9 + [2] * 11 + [0] * 4], np.int32)
    options = dict(causal=causal, segment_ids=segment_ids, window=7, scale=0.3, logit_cap=0.8)

    @jax.jit
    def run(q, k, v, dout):
        out, pull = jax.vjp(
            lambda q, k, v: attention(q, k, v, **options, implementation="tokamax"), q, k, v
        )
        return out, *pull(dout)

    out, _, *gradients = exact(q, k, v, dout, **options)
    with jax.numpy_rank_promotion("allow"):  # Its code promotes ranks.
        results = run(q, k, v, dout)
    for got, want in zip(results, (out, *gradients)):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    x = jnp.ones((1, 4, 2, 8))
    with pytest.raises(SmoljaxError, match=r'pip install "smoljax\[tokamax\]"'):
        attention(x, x, x, implementation="tokamax")


def test_gives_no_maxima():
    x = jnp.ones((1, 4, 2, 8))
    with pytest.raises(SmoljaxError, match="'tokamax' cannot be used here"):
        attention(x, x, x, implementation="tokamax", return_max_logits=True)

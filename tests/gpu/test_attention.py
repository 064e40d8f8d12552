"""Attention on the GPU itself: what is chosen, and the kernels against float32 with exact products.

Everything in this folder is left out where JAX finds no GPU. Run it there with `JAX_PLATFORMS=cuda,cpu python -m pytest tests/gpu`.

B batch, S sequence, N query heads, K key-value heads, H head width
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoljax.kernels import attention
from smoljax.kernels.attention import api, pallas_gpu
from smoljax.kernels.attention.request import Request

pytestmark = pytest.mark.gpu
PACKED = Request("gpu", "bfloat16", head_dim=64, seq_len=1000, documents=True)
DOCUMENTS = [[1] * 300 + [2] * 13 + [3] * 500 + [0] * 187]


def needs_hopper():
    reason = pallas_gpu.refusal(PACKED)
    if reason:
        pytest.skip(reason)


def arrays(H, dtype, N=4, K=2, S=1000):
    keys = jax.random.split(jax.random.key(H), 4)
    return tuple(
        jax.random.normal(key, (1, S, n, H), jnp.float32).astype(dtype)
        for key, n in zip(keys, (N, K, K, N))
    )


def run(implementation, x, **options):
    """Output, maxima where there are some, dq, dk, dv, in float64."""

    @jax.jit
    def both(q, k, v, dout):
        def attend(q, k, v):
            return attention(q, k, v, implementation=implementation, **options)

        result, pull = jax.vjp(attend, q, k, v)
        if options.get("return_max_logits"):
            return *result, *pull((dout, jnp.zeros_like(result[1])))
        return result, *pull(dout)

    return [np.asarray(a.astype(jnp.float32), np.float64) for a in both(*x)]


def close(got, want, tolerance):
    for one, other in zip(got, want):
        assert np.isfinite(one).all()
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


@pytest.mark.parametrize("H", [64, 96, 128, 256])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"segment_ids": DOCUMENTS},
        {"segment_ids": DOCUMENTS, "window": 130, "logit_cap": 20.0},
        {"causal": False, "window": 200},
    ],
)
def test_pallas_gpu_agrees_with_the_reference(H, options):
    needs_hopper()
    x = arrays(H, jnp.bfloat16)
    options = options | {"return_max_logits": True}
    if "segment_ids" in options:
        options["segment_ids"] = jnp.asarray(options["segment_ids"], jnp.int32)
    exact = run("reference", [a.astype(jnp.float32) for a in x], **options)
    close(run("pallas_gpu", x, **options), exact, 0.01)  # A bf16 has 8 bits: 0.4% a rounding.


def test_changing_one_document_changes_nothing_in_any_other():
    needs_hopper()
    ids = jnp.asarray(DOCUMENTS, jnp.int32)
    inside = np.asarray(ids == 2)
    x = arrays(128, jnp.bfloat16)
    changed = [jnp.where(inside[..., None, None], 5.0 - 3.0 * a, a).astype(a.dtype) for a in x]
    before, after = (run("pallas_gpu", inputs, segment_ids=ids) for inputs in (x, changed))
    for old, new in zip(before, after):
        np.testing.assert_array_equal(old[~inside], new[~inside])
        assert (old[inside] != new[inside]).any()  # Control: the change was one.


def test_two_runs_give_the_same_bits():
    needs_hopper()
    x = arrays(64, jnp.bfloat16)
    for one, other in zip(run("pallas_gpu", x), run("pallas_gpu", x)):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("documents", [False, True])
def test_what_is_chosen_agrees_with_the_reference(dtype, documents):
    x = arrays(64, dtype)
    options = {"segment_ids": jnp.asarray(DOCUMENTS, jnp.int32)} if documents else {}
    exact = run("reference", [a.astype(jnp.float32) for a in x], **options)
    close(run(None, x, **options), exact, 0.01)  # XLA's products of f32 are TF32 on this GPU.


def test_the_choice_is_the_fastest_that_can():
    assert api.choose(None, dataclasses.replace(PACKED, documents=False)) == "cudnn"
    packed = api.choose(None, PACKED)
    hopper = pallas_gpu.refusal(PACKED) is None
    assert packed == ("pallas_gpu" if hopper else "xla")

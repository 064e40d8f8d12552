"""Every attention backend against the definition in float64 numpy, forward and gradients.

B batch, S sequence, N query heads, K key-value heads, H head width
"""

import dataclasses
import logging
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoljax.errors import SmoljaxError
from smoljax.kernels import attention
from smoljax.kernels.attention import api
from smoljax.kernels.attention.request import Request

BACKENDS = ("reference", "xla", "cpu")


def exact(q_BSNH, k_BSKH, v_BSKH, dout_BSNH, *, causal, segment_ids, window, scale, logit_cap=None):
    """Attention one head and one row at a time in float64: output, largest score per head, dq, dk, dv."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q_BSNH, k_BSKH, v_BSKH, dout_BSNH))
    B, S, N, _ = q.shape
    group = N // k.shape[2]
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    largest = np.full(N, -np.inf)
    for b in range(B):
        for n in range(N):
            kept = np.array(
                [
                    [
                        (t <= s or not causal)
                        and (window is None or abs(s - t) < window)
                        and (segment_ids is None or segment_ids[b, s] == segment_ids[b, t])
                        for t in range(S)
                    ]
                    for s in range(S)
                ]
            )
            keys, values = k[b, :, n // group], v[b, :, n // group]
            scores = np.where(kept, scale * q[b, :, n] @ keys.T, -np.inf)
            slope, capped = 1.0, scores
            if logit_cap is not None:
                bent = np.tanh(scores / logit_cap)
                slope, capped = 1.0 - bent**2, np.where(kept, logit_cap * bent, -np.inf)
            weights = np.exp(capped - capped.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[b, :, n] = weights @ values
            real = np.ones(S, bool) if segment_ids is None else segment_ids[b] != 0
            largest[n] = max(largest[n], scores[real].max(initial=-np.inf))
            dweights = dout[b, :, n] @ values.T
            dscores = weights * (dweights - (weights * dweights).sum(axis=1, keepdims=True))
            dscores *= slope
            dq[b, :, n] = scale * dscores @ keys
            dk[b, :, n // group] += scale * dscores.T @ q[b, :, n]
            dv[b, :, n // group] += weights.T @ dout[b, :, n]
    return out, largest, dq, dk, dv


def arrays(seed, B, S, N, K, H):
    rng = np.random.default_rng(seed)
    shapes = ((B, S, N, H), (B, S, K, H), (B, S, K, H), (B, S, N, H))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


@st.composite
def problems(draw):
    S, K = draw(st.integers(1, 13)), draw(st.sampled_from([1, 2]))
    shape = (draw(st.integers(1, 4)), S, K * draw(st.sampled_from([1, 3])), K, 4)
    layouts = st.lists(st.integers(0, 3), min_size=shape[0] * S, max_size=shape[0] * S)
    segment_ids = draw(st.none() | layouts)
    if segment_ids is not None:
        segment_ids = np.array(segment_ids, np.int32).reshape(shape[0], S)
    return {
        "seed": draw(st.integers(0, 2**31)),
        "shape": shape,
        "causal": draw(st.booleans()),
        "segment_ids": segment_ids,
        "window": draw(st.none() | st.integers(1, S + 1)),
        "scale": draw(st.sampled_from([None, 0.3])),
        "logit_cap": draw(st.sampled_from([None, 0.4])),
    }


@pytest.mark.parametrize("implementation", BACKENDS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(problem=problems())
def test_agrees_with_float64(implementation, problem):
    q, k, v, dout = arrays(problem["seed"], *problem["shape"])
    options = {name: value for name, value in problem.items() if name not in ("seed", "shape")}

    def run(q, k, v):
        out, largest = attention(
            q, k, v, **options, implementation=implementation, return_max_logits=True
        )
        return jnp.sum(out * dout), (out, largest)

    (_, (out, largest)), gradients = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(
        q, k, v
    )
    options["scale"] = options["scale"] or q.shape[-1] ** -0.5
    expected = exact(q, k, v, dout, **options)
    for got, want in zip((out, largest, *gradients), expected):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_changing_one_document_changes_nothing_in_any_other(implementation):
    segment_ids = jnp.asarray([[1] * 9 + [2] * 14 + [3] * 8 + [0] * 2, [1] * 20 + [2] * 13])
    q, k, v, dout = arrays(0, 2, 33, 4, 2, 8)
    inside = (jnp.arange(2)[:, None] == 0) & (segment_ids == 2)

    @jax.jit
    def run(q, k, v, dout):
        def f(q, k, v):
            return attention(q, k, v, segment_ids=segment_ids, implementation=implementation)

        out, pull = jax.vjp(f, q, k, v)
        return out, *pull(dout)

    # The document gets other content and another loss.
    changed = [jnp.where(inside[..., None, None], 5.0 - 3.0 * x, x) for x in (q, k, v, dout)]
    for before, after in zip(run(q, k, v, dout), run(*changed)):
        before, after = np.asarray(before), np.asarray(after)
        np.testing.assert_array_equal(before[~inside], after[~inside])
        assert (before[inside] != after[inside]).any()  # Control: the change was one.


@pytest.mark.parametrize("implementation", BACKENDS)
def test_without_segment_ids_documents_do_leak(implementation):
    q, k, v, _ = arrays(1, 1, 16, 2, 1, 8)

    def run(v):
        return attention(q, k, v, implementation=implementation)[:, 8:]

    assert not np.array_equal(run(v), run(v.at[:, :8].add(1.0)))


@pytest.mark.parametrize("implementation", BACKENDS)
def test_padding_is_finite_and_bfloat16_stays_bfloat16(implementation):
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in arrays(2, 2, 12, 4, 2, 8))
    segment_ids = jnp.asarray([[0] * 12, [1] * 5 + [0] * 7])

    def run(q):
        out = attention(q, k, v, segment_ids=segment_ids, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32)), out

    (_, out), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(q)
    assert out.dtype == gradient.dtype == jnp.bfloat16
    assert jnp.isfinite(out.astype(jnp.float32)).all()
    assert jnp.isfinite(gradient.astype(jnp.float32)).all()
    exact_out = attention(
        *(x.astype(jnp.float32) for x in (q, k, v)),
        segment_ids=segment_ids,
        implementation="reference",
    )
    np.testing.assert_allclose(out.astype(jnp.float32), exact_out, atol=0.03)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_maxima_are_of_real_tokens_of_their_own_document_in_the_window(implementation, window):
    segment_ids = np.array([[1] * 5 + [2] * 7 + [0] * 4, [1] * 16, [0] * 16])
    q, k, v, dout = arrays(7, 3, 16, 4, 2, 8)
    options = dict(causal=True, segment_ids=segment_ids, window=window, scale=0.3)
    run = jax.jit(
        lambda q, k: attention(
            q, k, v, **options, implementation=implementation, return_max_logits=True
        )[1]
    )
    largest = exact(q, k, v, dout, **options)[1]
    np.testing.assert_allclose(run(q, k), largest, rtol=1e-5)
    # Padding that would win by far, and a key that no query may see: before it, or far behind it, or elsewhere.
    padding = (segment_ids == 0)[..., None, None]
    np.testing.assert_array_equal(
        run(jnp.where(padding, 1e3, q), jnp.where(padding, 1e3, k)), run(q, k)
    )
    unseen = k.at[0, 11].set(1e3)  # The last real token of its row: only itself sees it.
    seen_by_itself = exact(q, unseen, v, dout, **options)[1]
    np.testing.assert_allclose(run(q, unseen), seen_by_itself, rtol=1e-5)
    assert not np.allclose(
        exact(q, unseen, v, dout, **options | {"causal": False})[1], seen_by_itself
    )

    only_padding = jax.jit(
        lambda q: attention(
            q,
            k,
            v,
            segment_ids=np.zeros((3, 16), np.int32),
            implementation=implementation,
            return_max_logits=True,
        )[1]
    )
    np.testing.assert_array_equal(only_padding(q), np.full(4, -np.inf))


def test_xla_leaves_out_the_masked_half():
    q, k, v, _ = arrays(3, 1, 256, 2, 2, 64)

    def flops(implementation):
        def run(q, k, v):
            return attention(q, k, v, implementation=implementation)

        return jax.jit(run).lower(q, k, v).compile().cost_analysis()["flops"]

    assert flops("xla") < 0.7 * flops("reference")


def test_a_backend_that_cannot_is_passed_over_with_a_reason(caplog):
    asked = Request("gpu", "bfloat16", head_dim=64, seq_len=256)
    packed = dataclasses.replace(asked, documents=True)
    capped = dataclasses.replace(asked, capped=True)
    assert api.choose(None, asked) == "cudnn"
    with caplog.at_level(logging.INFO):
        assert api.choose(None, packed) == "pallas_gpu"
        assert api.choose(None, dataclasses.replace(asked, max_logits=True)) == "pallas_gpu"
        assert api.choose(None, dataclasses.replace(packed, dtype="float32")) == "xla"
        assert api.choose(None, capped) == "pallas_gpu"
    for reason in (
        "ring is passed over: no mesh axis 'context' of more than one device",
        "cudnn is passed over: it cannot honour segment ids",
        "cudnn is passed over: it does not return maximum logits",
        "cudnn is passed over: it has no cap on the scores",
        "pallas_gpu is passed over: it takes bfloat16 or float16",
    ):
        assert reason in caplog.text


def test_a_cpu_loads_no_kernels_of_other_platforms():
    program = """
import sys
import jax.numpy as jnp
from smoljax.kernels import attention
x = jnp.ones((1, 8, 2, 4))
attention(x, x, x)
print(*sorted(name for name in sys.modules if "pallas" in name))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == ""


def test_cpu_gradients_are_the_same_under_scan_remat_and_vmap():
    q, k, v, dout = arrays(5, 6, 10, 4, 2, 8)
    segment_ids = jnp.asarray([[1] * 4 + [2] * 6, [1] * 7 + [0] * 3] * 3)

    def loss(q, k, v, dout, segment_ids, implementation):
        out, largest = attention(
            q,
            k,
            v,
            segment_ids=segment_ids,
            implementation=implementation,
            return_max_logits=True,
        )
        return jnp.sum(out * dout) + 7.0 * jnp.sum(largest)  # The maxima must add no gradient.

    def layers(q, k, v, implementation):
        @jax.checkpoint
        def layer(q, _):
            out = attention(q, k, v, segment_ids=segment_ids, implementation=implementation)
            return out, None

        return jnp.sum(jax.lax.scan(layer, q, None, length=3)[0] * dout)

    def mapped(q, k, v, implementation):
        def halves(x):
            return x.reshape(2, 3, *x.shape[1:])

        def one(*args):
            return loss(*args, implementation)

        return jnp.sum(jax.vmap(one)(*map(halves, (q, k, v, dout, segment_ids))))

    def plain(q, k, v, implementation):
        return loss(q, k, v, dout, segment_ids, implementation)

    for f in (plain, layers, mapped):
        got, want = (
            jax.jit(jax.grad(f, (0, 1, 2)), static_argnums=3)(q, k, v, implementation)
            for implementation in ("cpu", "reference")
        )
        for g, w in zip(got, want):
            np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 3, 4, 7])
def test_cpu_rows_do_not_depend_on_the_batch_they_are_in(rows):
    q, k, v, _ = arrays(6, 8, 9, 4, 2, 8)
    run = jax.jit(lambda *x: attention(*x, implementation="cpu"))
    np.testing.assert_allclose(
        run(q[:rows], k[:rows], v[:rows]), run(q, k, v)[:rows], rtol=1e-5, atol=1e-6
    )


ON_A_MESH = """
import logging, sys
import jax, jax.numpy as jnp
from smoljax.errors import SmoljaxError
from smoljax.kernels import attention

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
logging.getLogger("jax").setLevel(logging.WARNING)
x = jnp.ones((2, 4, 2, 8))
for size in (1, 2):
    mesh = jax.make_mesh((size,), ("data",), devices=jax.devices()[:size])
    print("devices", size, flush=True)
    with jax.set_mesh(mesh):
        jax.jit(lambda x: attention(x, x, x)).lower(x)
        try:
            attention(x, x, x, implementation="cpu")
        except SmoljaxError as error:
            print("refused:", error, flush=True)
"""


def test_cpu_is_passed_over_on_a_mesh_of_more_than_one_device():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    ended = subprocess.run(
        [sys.executable, "-c", ON_A_MESH], capture_output=True, text=True, env=environment
    )
    assert ended.returncode == 0, ended.stderr
    one, two = ended.stdout.split("devices 2")
    assert "cpu is passed over" not in one
    assert "refused" not in one
    reason = "its loop over the batch would gather it, and a mesh of 2 devices is active"
    assert f"attention: cpu is passed over: {reason}" in two
    assert f"refused: attention implementation 'cpu' cannot be used here: {reason}" in two


def test_errors_name_what_was_asked():
    q, k, v, _ = arrays(4, 1, 8, 4, 2, 8)
    with pytest.raises(
        SmoljaxError,
        match="'flash' is unknown: use one of cpu, cudnn, pallas_gpu, pallas_tpu, reference, ring",
    ):
        attention(q, k, v, implementation="flash")
    with pytest.raises(SmoljaxError, match="'cudnn' cannot be used here: it needs a GPU"):
        attention(q, k, v, implementation="cudnn")
    with pytest.raises(SmoljaxError, match=r"segment_ids of shape \(1, 7\): expected \(1, 8\)"):
        attention(q, k, v, segment_ids=jnp.ones((1, 7), jnp.int32))
    with pytest.raises(SmoljaxError, match="window=0"):
        attention(q, k, v, window=0)
    with pytest.raises(SmoljaxError, match="logit_cap=0"):
        attention(q, k, v, logit_cap=0)
    with pytest.raises(SmoljaxError, match="K dividing 4"):
        attention(q, jnp.zeros((1, 8, 3, 8)), jnp.zeros((1, 8, 3, 8)))
    with pytest.raises(SmoljaxError, match=r"q \[B, S, N, H\]"):
        attention(q[0], k[0], v[0])


def test_on_a_cpu_products_of_bfloat16_are_multiplied_as_bfloat16_and_summed_in_float32():
    """Against float64: as near as operands rounded to 8 bits allow. XLA would convert products' operands to float32, and be slower."""
    B, S, N, K, H = 2, 32, 4, 2, 8
    inputs = [x.astype(jnp.bfloat16) for x in arrays(5, B, S, N, K, H)]
    segment_ids = jnp.ones((B, S), jnp.int32)

    @jax.jit
    def gradients(q, k, v, dout):
        out, pullback = jax.vjp(
            lambda q, k, v: attention(q, k, v, segment_ids=segment_ids, implementation="cpu"),
            *(q, k, v),
        )
        return out, *pullback(dout)

    out, _, dq, dk, dv = exact(
        *inputs, causal=True, segment_ids=np.asarray(segment_ids), window=None, scale=H**-0.5
    )
    for got, want in zip(gradients(*inputs), (out, dq, dk, dv), strict=True):
        error = np.linalg.norm(np.float64(got) - want) / np.linalg.norm(want)
        assert error < 2**-7, error
    text = gradients.lower(*inputs).compile().as_text()
    products = [part for part in text.split("\n\n") if " dot(" in part]
    assert products
    for product in products:
        assert len(re.findall(r"%param\S* = bf16\[", product)) == 2, product

"""The Pallas GPU kernels, interpreted on a CPU with race detection, against float64; lowered for CUDA, and compiled where it is.

B batch, S sequence, N query heads, K key-value heads, H head width
"""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoljax.kernels.attention import pallas_gpu
from smoljax.kernels.attention.pallas_gpu import blocks
from smoljax.kernels.attention.request import Request
from tests.kernels.attention.mosaic_interpreter import interpreted
from tests.kernels.attention.test_attention import arrays, exact

SHAPE = (1, 256, 2, 1, 64)


@functools.cache
def program(causal=True, window=None, scale=0.1, logit_cap=None):
    def run(q, k, v, dout, segment_ids):
        def attend(q, k, v):
            return pallas_gpu.attend(
                q,
                k,
                v,
                causal=causal,
                segment_ids=segment_ids,
                window=window,
                scale=scale,
                logit_cap=logit_cap,
            )

        (out, largest), pull = jax.vjp(attend, q, k, v)
        return out, largest, *pull((dout, jnp.zeros_like(largest)))

    return jax.jit(run)


def run(q, k, v, dout, segment_ids, **options):
    """Output, maxima, dq, dk, dv."""
    with interpreted():
        return jax.block_until_ready(program(**options)(q, k, v, dout, segment_ids))


def check(x, segment_ids, *, rtol=2e-5, atol=2e-5, **options):
    expected = exact(
        *x,
        segment_ids=segment_ids,
        **{"causal": True, "window": None, "scale": 0.1} | options,
    )
    for got, want in zip(run(*x, segment_ids, **options), expected):
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=rtol, atol=atol)


@st.composite
def layouts(draw):
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    segment_ids = rng.integers(0, 4, (1, SHAPE[1])).astype(np.int32)
    if draw(st.booleans()):  # As packing lays them out; else any layout.
        segment_ids = np.sort(segment_ids)[:, ::-1].copy()
    return segment_ids


@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    segment_ids=layouts(),
    options=st.sampled_from([{}, {"window": 70}, {"causal": False, "window": 150}]),
)
def test_agrees_with_float64(seed, segment_ids, options):
    check(arrays(seed, *SHAPE), segment_ids, **options)


def test_sequences_and_head_widths_that_are_filled_up():
    check(arrays(3, 1, 130, 1, 1, 200), None)


def test_changing_one_document_changes_nothing_in_any_other():
    segment_ids = jnp.asarray([[1] * 90 + [2] * 80 + [3] * 70 + [0] * 16])
    x = arrays(0, *SHAPE)
    inside = np.asarray(segment_ids == 2)
    changed = [jnp.where(inside[..., None, None], 5.0 - 3.0 * a, a) for a in x]
    before, after = run(*x, segment_ids), run(*changed, segment_ids)
    for i in (0, 2, 3, 4):
        old, new = np.asarray(before[i]), np.asarray(after[i])
        np.testing.assert_array_equal(old[~inside], new[~inside])
        assert (old[inside] != new[inside]).any()  # Control: the change was one.
    one = jnp.ones_like(segment_ids)
    plain, leaked = (np.asarray(run(*inputs, one)[0]) for inputs in (x, changed))
    assert not np.array_equal(plain[~inside], leaked[~inside])


def test_padding_is_finite_and_does_not_count():
    q, k, v, dout = (x.astype(jnp.bfloat16) for x in arrays(1, 2, 128, 2, 1, 64))
    segment_ids = np.array([[0] * 128, [1] * 60 + [0] * 68], np.int32)
    padding = (segment_ids == 0)[..., None, None]
    loud = [jnp.where(padding, jnp.bfloat16(100), x) for x in (q, k)]
    results, louder = run(q, k, v, dout, segment_ids), run(*loud, v, dout, segment_ids)
    for x in (*results, *louder):
        assert np.isfinite(np.asarray(x, np.float32)).all()
    assert results[0].dtype == results[2].dtype == jnp.bfloat16
    np.testing.assert_array_equal(results[1], louder[1])
    expected = exact(q, k, v, dout, segment_ids=segment_ids, causal=True, window=None, scale=0.1)
    for got, want in zip(results, expected):
        np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=0.04, rtol=0.02)


def test_scores_are_bent_to_the_cap():
    segment_ids = np.array([[1] * 100 + [2] * 28], np.int32)
    check(arrays(4, 1, 128, 2, 1, 64), segment_ids, logit_cap=1.5)


def test_blocks_of_other_documents_are_outside_the_spans():
    mask = blocks.Mask(True, None, 1.0, None)
    ids = jnp.repeat(jnp.array([[1, 1, 2, 3]]), 128, axis=1)
    keys = blocks.spans(mask, 64, 512, ids, 1, query_axis=0)
    np.testing.assert_array_equal(keys.ends[0], [[0, 2], [0, 4], [4, 2], [6, 2]])
    queries = blocks.spans(mask, 64, 512, ids, 1, query_axis=1)
    np.testing.assert_array_equal(queries.ends[0], [[0, 4], [2, 2], [4, 2], [6, 2]])
    mixed = blocks.spans(mask, 64, 512, ids.at[0, 5].set(9), 1, query_axis=0)
    assert int(mixed.documents[0][0, 0]) != int(mixed.documents[1][0, 0])
    assert int(mixed.documents[0][0, 1]) == int(mixed.documents[1][0, 2]) == 1
    window = blocks.spans(blocks.Mask(True, 65, 1.0, None), 64, 512, None, 1, query_axis=0)
    assert int(window.ends[..., 1].max()) == 3


@pytest.mark.parametrize("head_dim", [64, 128])
def test_lowers_for_cuda(head_dim):
    q, k = (jax.ShapeDtypeStruct((2, 1024, n, head_dim), jnp.bfloat16) for n in (4, 2))
    ids = jax.ShapeDtypeStruct((2, 1024), jnp.int32)

    layer = jax.checkpoint(
        functools.partial(pallas_gpu.attend, causal=True, window=None, scale=0.1, logit_cap=None),
        policy=jax.checkpoint_policies.save_only_these_names(
            "attention_output", "attention_logsum"
        ),
    )

    def loss(q, k, v, ids):
        return jnp.sum(layer(q, k, v, segment_ids=ids)[0].astype(jnp.float32) ** 2)

    lowered = (
        jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, ids).lower(lowering_platforms=("cuda",))
    )
    # Forward once, dq once, dk and dv once.
    assert lowered.as_text().count("custom_call @mosaic_gpu_v2") == 3


@pytest.mark.parametrize(
    ("version", "refused"), [(12060, False), (12080, True), (12090, True), (13000, False)]
)
def test_refuses_an_assembler_that_miscompiles(monkeypatch, version, refused):
    monkeypatch.setattr(
        sys.modules[pallas_gpu.refusal.__module__], "_cuda_version", lambda: version
    )
    reason = pallas_gpu.refusal(Request("gpu", "bfloat16", 64, seq_len=256))
    assert ("jax[cuda13]" in (reason or "")) == refused


def test_refuses_what_it_cannot_do():
    assert "needs a GPU" in pallas_gpu.refusal(Request("cpu", "bfloat16", 64, seq_len=256))
    assert "queries are float32" in pallas_gpu.refusal(Request("gpu", "float32", 64, seq_len=256))
    assert "up to 256, and this one is 320" in pallas_gpu.refusal(
        Request("gpu", "bfloat16", 320, seq_len=256)
    )
    assert pallas_gpu.refusal(Request("gpu", "bfloat16", 256, seq_len=256)) is None


AHEAD_OF_TIME = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from smoljax.errors import SmoljaxError
from smoljax.kernels import attention

described = topologies.get_topology_desc(
    "", platform="cuda", target_config=open(sys.argv[1]).read(), topology="1x1x4"
)
axes = ("data", "fsdp", "tensor", "context")
mesh = Mesh(np.array(described.devices).reshape(1, 2, 2, 1), axes, axis_types=(AxisType.Auto,) * 4)
spec = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
for H in (64, 96, 128, 256):
    q = jax.ShapeDtypeStruct((2, 1024, 4, H), jnp.bfloat16, sharding=spec)
    k = jax.ShapeDtypeStruct((2, 1024, 2, H), jnp.bfloat16, sharding=spec)
    ids = jax.ShapeDtypeStruct((2, 1024), jnp.int32)

    def loss(q, k, v, ids):
        return jnp.sum(attention(q, k, v, segment_ids=ids).astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, ids).compile().as_text()
    print(H, text.count('custom_call_target="mosaic_gpu_v2"'), flush=True)
with jax.set_mesh(mesh):
    try:
        q = jax.ShapeDtypeStruct((2, 128, 3, 64), jnp.bfloat16)
        jax.eval_shape(lambda q: attention(q, q, q, implementation="pallas_gpu"), q)
    except SmoljaxError as error:
        print("refused:", error)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason='the compiler for GPUs is not installed: pip install "smoljax[gpu]"',
)
def test_compiles_for_an_h100_on_a_mesh():
    # Programs for other machines do not load from the compile cache.
    environment = os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "JAX_PLATFORMS": "cpu,cuda",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }
    ended = subprocess.run(
        [sys.executable, "-c", AHEAD_OF_TIME, str(Path(__file__).parent / "h100.pbtxt")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    *lines, refused = ended.stdout.splitlines()
    # Forward once, dq once, dk and dv once.
    assert lines == ["64 3", "96 3", "128 3", "256 3"]
    assert "key-value heads" in refused

"""The Pallas TPU kernels, interpreted on a CPU with race detection, against float64; compiled where libtpu is.

B batch, S sequence, N query heads, K key-value heads, H head width
"""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from smoljax.kernels.attention import pallas_tpu
from smoljax.kernels.attention.drop import drop
from smoljax.kernels.attention.mesh import BATCH_AXES, HEADS_AXIS, SEQUENCE_AXIS
from smoljax.kernels.attention.pallas_tpu import blocks, chunks
from smoljax.parallel.rules import RULES
from tests.kernels.attention.test_attention import arrays, exact

SMALL = {"forward": (128, 128), "backward": (128, 128)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setitem(blocks._SIZES, "v5e", SMALL)


def run(q, k, v, dout, **options):
    """Output, maxima, dq, dk, dv."""
    parameters = pltpu.InterpretParams(detect_races=True)
    with pltpu.force_tpu_interpret_mode(parameters):
        (out, largest), pull = jax.vjp(lambda *x: pallas_tpu.attend(*x, **options), q, k, v)
        results = (out, largest, *pull((dout, jnp.zeros_like(largest))))
    jax.block_until_ready(results)
    assert not interpreter.races.races_found
    return results


def check(problem, *, rtol=2e-5, atol=2e-5):
    q, k, v, dout = arrays(problem["seed"], *problem["shape"])
    options = {name: value for name, value in problem.items() if name not in ("seed", "shape")}
    expected = exact(q, k, v, dout, **options)
    for got, want in zip(run(q, k, v, dout, **options), expected):
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


@st.composite
def problems(draw):
    S, K = draw(st.sampled_from([1, 40, 128, 200, 256])), draw(st.sampled_from([1, 2]))
    segment_ids = None
    if draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        segment_ids = rng.integers(0, 4, (1, S)).astype(np.int32)
        if draw(st.booleans()):  # As packing lays them out; else any layout.
            segment_ids = np.sort(segment_ids)[:, ::-1]
    return {
        "seed": draw(st.integers(0, 2**31)),
        "shape": (1, S, K * draw(st.sampled_from([1, 2])), K, 64),
        "causal": draw(st.booleans()),
        "segment_ids": segment_ids,
        "window": draw(st.none() | st.integers(1, S + 1)),
        "scale": 0.1,
    }


@settings(max_examples=3, deadline=None, derandomize=True)
@given(problem=problems())
def test_agrees_with_float64(problem):
    check(problem)


@pytest.mark.parametrize("head_dim", [96, 128, 256])
def test_head_widths(head_dim):
    segment_ids = np.array([[1] * 50 + [2] * 28 + [3] * 30 + [0] * 12], np.int32)
    check(
        {
            "seed": 3,
            "shape": (1, 120, 2, 1, head_dim),
            "causal": True,
            "segment_ids": segment_ids,
            "window": 20,
            "scale": head_dim**-0.5,
            "logit_cap": 0.7 if head_dim == 256 else None,
        }
    )


def test_changing_one_document_changes_nothing_in_any_other():
    segment_ids = jnp.asarray([[1] * 90 + [2] * 80 + [3] * 70 + [0] * 16])
    x = arrays(0, 1, 256, 2, 1, 64)
    inside = np.asarray(segment_ids == 2)
    options = dict(causal=True, segment_ids=segment_ids, window=None, scale=0.125)
    changed = [jnp.where(inside[..., None, None], 5.0 - 3.0 * a, a) for a in x]
    before, after = run(*x, **options), run(*changed, **options)
    for i in (0, 2, 3, 4):
        old, new = np.asarray(before[i]), np.asarray(after[i])
        np.testing.assert_array_equal(old[~inside], new[~inside])
        assert (old[inside] != new[inside]).any()  # Control: the change was one.
    leaked = run(*changed, **options | {"segment_ids": None})
    plain = run(*x, **options | {"segment_ids": None})
    assert not np.array_equal(np.asarray(plain[0])[~inside], np.asarray(leaked[0])[~inside])


def test_padding_is_finite_and_does_not_count():
    q, k, v, dout = (x.astype(jnp.bfloat16) for x in arrays(1, 2, 128, 2, 1, 64))
    segment_ids = np.array([[0] * 128, [1] * 60 + [0] * 68], np.int32)
    options = dict(causal=True, segment_ids=segment_ids, window=None, scale=0.125)
    padding = (segment_ids == 0)[..., None, None]
    loud = [jnp.where(padding, jnp.bfloat16(100), x) for x in (q, k)]
    results, louder = run(q, k, v, dout, **options), run(*loud, v, dout, **options)
    for x in (*results, *louder):
        assert np.isfinite(np.asarray(x, np.float32)).all()
    assert results[0].dtype == results[2].dtype == jnp.bfloat16
    np.testing.assert_array_equal(results[1], louder[1])
    expected = exact(q, k, v, dout, **options)
    for got, want in zip(results, expected):
        np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=0.04, rtol=0.02)


def test_chunks_add_up_to_the_whole():
    """Two chunks of queries, each over two of keys, at shifts that are known when they run only."""
    segment_ids = np.array([[1] * 90 + [2] * 40 + [3] * 110 + [0] * 16], np.int32)
    q, k, v, dout = arrays(5, 1, 256, 2, 1, 64)
    options = dict(causal=True, window=150, scale=0.125)
    chunk = dict(generation="v5e", dtype=jnp.float32, **options)
    forward = jax.jit(lambda *x: chunks.chunk_forward(*x[:-1], shift=x[-1], **chunk))
    backward = jax.jit(lambda *x: chunks.chunk_backward(*x[:-1], shift=x[-1], **chunk))
    halves = (slice(0, 100), slice(100, 256))
    largest, out = [], np.zeros(q.shape)
    gradients = [np.zeros(x.shape) for x in (q, k, v)]
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        for mine in halves:
            places = [(np.int32(mine.start - other.start), other) for other in halves]
            ids = [(segment_ids[:, mine], segment_ids[:, other]) for _, other in places]
            parts = [
                forward(q[:, mine], k[:, other], v[:, other], *pair, shift)
                for pair, (shift, other) in zip(ids, places)
            ]
            lse_BNS = jnp.logaddexp(parts[0][1], parts[1][1])
            share = [np.moveaxis(np.exp(part[1] - lse_BNS), 1, 2)[..., None] for part in parts]
            out[:, mine] = sum(w * part[0] for w, part in zip(share, parts))
            largest += [part[2] for part in parts]
            if mine.start == 0:  # No query of it sees any key of the second chunk.
                for array, value in zip((*parts[1], share[1]), (0, blocks.MASKED, -np.inf, 0)):
                    assert (array == value).all()
            drops = drop(out[:, mine], dout[:, mine])
            for pair, (shift, other) in zip(ids, places):
                added = backward(
                    *(q[:, mine], k[:, other], v[:, other], dout[:, mine]),
                    *(lse_BNS, drops, *pair, shift),
                )
                for total, part, place in zip(gradients, added, (mine, other, other)):
                    total[:, place] += part
    assert not interpreter.races.races_found
    results = (out, np.max(largest, axis=(0, 1)), *gradients)
    expected = exact(q, k, v, dout, segment_ids=segment_ids, **options)
    for got, want in zip(results, expected):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_gradients_that_do_not_fit_take_two_kernels(monkeypatch):
    monkeypatch.setattr(blocks, "VMEM", 0)
    segment_ids = np.array([[1] * 150 + [2] * 70 + [3] * 36, [1] * 256], np.int32)
    check(
        {
            "seed": 4,
            "shape": (2, 256, 2, 1, 64),
            "causal": True,
            "segment_ids": segment_ids,
            "window": None,
            "scale": 0.1,
            "logit_cap": 0.5,
        }
    )


def visited(steps, what):
    """(block of queries, block of keys) of the steps of the only row at which `what` is done."""
    entries = [blocks.step(int(entry)) for entry in steps.list[: int(steps.count)]]
    return [(i, j) for i, j, todo in entries if todo & what == what]


def test_pairs_of_blocks_are_left_out_or_left_unmasked():
    pairs = blocks.Pairs(True, None, 128, 128)
    ids = jnp.repeat(jnp.array([[1, 1, 2, 3]]), 128, axis=1)
    schedule = blocks.schedule(pairs, (512, 512), 0, (ids, ids), 1)
    steps = schedule.by_queries()
    pairs_seen = [(0, 0), (1, 0), (1, 1), (2, 2), (3, 3)]
    assert visited(steps, blocks.COMPUTE) == pairs_seen
    assert visited(steps, blocks.WHOLE) == [(1, 0)]
    assert visited(steps, blocks.FIRST) == [(0, 0), (1, 0), (2, 2), (3, 3)]
    assert visited(steps, blocks.LAST) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    by_keys = sorted(pairs_seen, key=lambda pair: pair[::-1])
    assert visited(schedule.by_keys(), blocks.COMPUTE) == by_keys
    flushed = schedule.by_queries(flush=True)
    assert [j for _, j in visited(flushed, blocks.FLUSH)] == [0, 1, 2, 3]
    assert flushed.count == steps.count + 4 == 9
    # The grid itself is shorter, and nothing of it waits for the device.
    window = blocks.Pairs(True, 129, 128, 128)
    assert blocks.schedule(window, (512, 512), 0, None, 1).by_queries().count == 7


def test_blocks_at_a_shift():
    pairs = blocks.Pairs(True, None, 128, 128)
    for shift in (-512, -128, 0, 64, 512):
        traced = blocks.schedule(pairs, (256, 256), jnp.int32(shift), None, 1).by_queries()
        query, key = np.mgrid[:256, :256]
        seen = (key <= query + shift).reshape(2, 128, 2, 128)
        some = [tuple(pair) for pair in np.argwhere(seen.any((1, 3)))]
        assert visited(traced, blocks.COMPUTE) == some
        whole = [tuple(pair) for pair in np.argwhere(seen.all((1, 3)))]
        assert visited(traced, blocks.WHOLE) == whole
        assert {i for i, _ in visited(traced, blocks.LAST)} == {0, 1}  # All are written.


def test_axes_are_those_of_the_rules():
    table = dict(RULES)
    assert table["activation_batch"] == BATCH_AXES
    assert table["activation_heads"] == table["activation_kv_heads"] == HEADS_AXIS
    assert table["activation_sequence"] == SEQUENCE_AXIS


AHEAD_OF_TIME = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from smoljax.errors import SmoljaxError
from smoljax.kernels import attention

devices = topologies.get_topology_desc(sys.argv[1], platform="tpu").devices
axes = ("data", "fsdp", "tensor", "context")
mesh = Mesh(np.array(devices).reshape(1, 2, 2, 1), axes, axis_types=(AxisType.Auto,) * 4)
spec = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
for implementation in (None, "pallas_tpu"):
    for H, S in ((64, 1024), (96, 4096), (128, 32768), (256, 4096)):
        q = jax.ShapeDtypeStruct((2, S, 4, H), jnp.bfloat16, sharding=spec)
        k = jax.ShapeDtypeStruct((2, S, 2, H), jnp.bfloat16, sharding=spec)
        ids = jax.ShapeDtypeStruct((2, S), jnp.int32)

        def attend(q, k, v, ids):
            return attention(q, k, v, segment_ids=ids, implementation=implementation)

        layer = jax.checkpoint(
            attend,
            policy=jax.checkpoint_policies.save_only_these_names("attention_output", "attention_logsum"),
        )

        def loss(q, k, v, ids):
            return jnp.sum(layer(q, k, v, ids).astype(jnp.float32) ** 2)

        with jax.set_mesh(mesh):
            text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, ids).compile().as_text()
        print(H, text.count(" custom-call("), text.count("tpu_custom_call"), flush=True)
        if implementation is None:
            break
with jax.set_mesh(mesh):
    try:
        q = jax.ShapeDtypeStruct((2, 128, 3, 64), jnp.float32)
        jax.eval_shape(lambda q: attention(q, q, q, implementation="pallas_tpu"), q)
    except SmoljaxError as error:
        print("refused:", error)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='libtpu is not installed: pip install "smoljax[plan]"',
)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_ahead_of_time_on_a_mesh(topology):
    # Programs for other machines do not load from the compile cache.
    cache = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment = os.environ | cache | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", AHEAD_OF_TIME, topology],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    *lines, refused = ended.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["64", "64", "96", "128", "256"]
    # Forward once, and one backward, or two where 32768 keys do not fit beside it.
    assert [line.split()[2] for line in lines] == ["2", "2", "2", "3", "2"], ended.stdout
    assert "3 key-value heads" in refused

"""Ring attention on meshes of up to 8 devices; test_ring.py runs this file in a process that has so many.

B batch, S sequence, N query heads, K key-value heads, H head width
"""

import dataclasses
import functools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from smoljax import parallel
from smoljax.errors import SmoljaxError
from smoljax.kernels import attention
from smoljax.kernels.attention import api, ring
from smoljax.kernels.attention.pallas_tpu import blocks
from smoljax.model import ModelConfig, forward, hidden_and_max_logits, init
from smoljax.training import loss_sum
from tests.kernels.attention.test_attention import arrays, exact
from tests.training.tiny import packed_batch

MESHES = ((1, 1, 1, 2), (1, 2, 1, 2), (2, 1, 2, 2), (1, 1, 2, 4), (1, 1, 1, 8))
MODEL = ModelConfig(
    vocab_size=128,
    num_layers=2,
    hidden_size=16,
    intermediate_size=32,
    num_heads=4,
    num_kv_heads=2,
    nope_layers=(1,),
    max_seq_len=32,
    sliding_window=6,
    windowed_layers=(0,),
)


def mesh_of(shape):
    """A mesh of the axes data, fsdp, tensor, context."""
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, parallel.AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)


def run(mesh, q, k, v, dout, **options):
    """Output, maxima, dq, dk, dv."""

    def f(q, k, v):
        return attention(q, k, v, **options, return_max_logits=True)

    @jax.jit
    def pulled(q, k, v, dout):
        out, pull, largest = jax.vjp(f, q, k, v, has_aux=True)
        return out, largest, *pull(dout)

    with jax.set_mesh(mesh):
        return [np.asarray(x) for x in pulled(q, k, v, dout)]


def documents(rows):
    return np.array([[i for i, n in enumerate(row, 1) for _ in range(n)] for row in rows], np.int32)


@st.composite
def problems(draw):
    shape = draw(st.sampled_from(MESHES))
    B, K = math.prod(shape[:2]), shape[2] * draw(st.sampled_from([1, 2]))
    S = 2 * shape[3] * draw(st.integers(1, 4))
    segment_ids = None
    if draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        segment_ids = rng.integers(0, 4, (B, S)).astype(np.int32)
        if draw(st.booleans()):  # As packing lays them out; else any layout.
            segment_ids = np.sort(segment_ids)[:, ::-1]
    return {
        "mesh": shape,
        "seed": draw(st.integers(0, 2**31)),
        "shape": (B, S, K * draw(st.sampled_from([1, 3])), K, 4),
        "segment_ids": segment_ids,
        "window": draw(st.none() | st.integers(1, S)),
        "logit_cap": draw(st.sampled_from([None, 1.5])),
    }


@settings(max_examples=8, deadline=None, derandomize=True)
@given(problem=problems())
def test_agrees_with_float64(problem):
    x = arrays(problem["seed"], *problem["shape"])
    options = {name: problem[name] for name in ("segment_ids", "window", "logit_cap")}
    options |= {"causal": True, "scale": 0.3}
    got = run(mesh_of(problem["mesh"]), *x, **options, implementation="ring")
    for g, want in zip(got, exact(*x, **options), strict=True):
        np.testing.assert_allclose(g, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("window", [3, 9])
def test_windows_that_leave_steps_out(window):
    """Of the 7 steps of 8 devices with chunks of 4 columns: 1 and the last; those and one more each."""
    x = arrays(8, 1, 64, 2, 1, 4)
    options = dict(causal=True, segment_ids=None, window=window, scale=0.3)
    got = run(mesh_of((1, 1, 1, 8)), *x, **options)
    for g, want in zip(got, exact(*x, **options), strict=True):
        np.testing.assert_allclose(g, want, rtol=2e-5, atol=2e-5)


def test_changing_one_document_changes_nothing_in_any_other():
    """Documents that begin and end inside chunks, and one that reaches over most of them."""
    segment_ids = documents([(5, 19, 6, 2), (13, 3, 9, 7)])
    segment_ids[0, -2:] = 0
    x = arrays(0, 2, 32, 4, 2, 8)
    for row, document in ((0, 2), (1, 3)):
        inside = (np.arange(2)[:, None] == row) & (segment_ids == document)
        changed = [jnp.where(inside[..., None, None], 5.0 - 3.0 * a, a) for a in x]
        mesh = mesh_of((1, 1, 2, 4))
        before, after = (run(mesh, *a, segment_ids=segment_ids) for a in (x, changed))
        for i in (0, 2, 3, 4):
            np.testing.assert_array_equal(before[i][~inside], after[i][~inside])
            assert (before[i][inside] != after[i][inside]).any()  # Control: the change was one.


def test_identifiers_that_stay_at_home_leak(monkeypatch):
    """The control of the test above: keys that travel without their documents' identifiers give another result."""
    send = ring._send

    def without_identifiers(of, arrays, hop):
        if len(arrays) == 3:
            return (*send(of, arrays[:2], hop), arrays[2])
        return send(of, arrays, hop)

    monkeypatch.setattr(ring, "_send", without_identifiers)
    x = arrays(0, 2, 32, 4, 2, 8)
    options = dict(causal=True, segment_ids=documents([(5, 19, 8), (13, 3, 16)]), window=None)
    got = run(mesh_of((1, 1, 1, 4)), *x, **options)
    want = exact(*x, **options, scale=8**-0.5)
    for i in (0, 2, 3, 4):
        assert np.abs(got[i] - want[i]).max() > 0.1


def test_the_order_of_the_sequence_is_not_zigzag():
    x = arrays(1, 1, 16, 2, 1, 8)
    options = dict(causal=True, segment_ids=None, window=None)
    right = exact(*x, **options, scale=8**-0.5)
    mesh = mesh_of((1, 1, 1, 4))
    assert np.abs(run(mesh, *x, **options, zigzag=True)[0] - right[0]).max() > 0.1
    # Device c holds chunks c and 7 - c, of 2 columns each.
    order = np.array([2 * c + i for d in range(4) for c in (d, 7 - d) for i in range(2)])
    reordered = run(mesh, *(a[:, order] for a in x), **options, zigzag=True)
    for i in (0, 2, 3, 4):
        np.testing.assert_allclose(reordered[i], right[i][:, order], rtol=2e-5, atol=2e-5)


def test_padding_is_finite_and_bfloat16_stays_bfloat16():
    q, k, v, dout = (x.astype(jnp.bfloat16) for x in arrays(2, 2, 16, 4, 2, 8))
    segment_ids = np.array([[0] * 16, [1] * 9 + [0] * 7], np.int32)
    options = dict(causal=True, segment_ids=segment_ids, window=None, scale=0.3)
    got = run(mesh_of((1, 1, 1, 4)), q, k, v, dout, **options)
    assert {str(x.dtype) for x in (got[0], *got[2:])} == {"bfloat16"}
    for g, want in zip(got, exact(q, k, v, dout, **options), strict=True):
        np.testing.assert_allclose(g.astype(np.float64), want, atol=0.04, rtol=0.02)
    empty = np.zeros((2, 16), np.int32)
    largest = run(mesh_of((1, 1, 1, 4)), q, k, v, dout, segment_ids=empty)[1]
    np.testing.assert_array_equal(largest, np.full(4, -np.inf))


def test_the_kernels_of_a_tpu(monkeypatch):
    """Interpreted, on two devices."""
    sizes = dict.fromkeys(blocks._SIZES["v5e"], (128, 128))
    monkeypatch.setitem(blocks._SIZES, "v5e", sizes)
    tpu = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    chunks = ring._chunks(tpu)
    monkeypatch.setattr(ring, "_chunks", lambda device: chunks)
    x = arrays(6, 1, 512, 2, 1, 64)
    options = dict(causal=True, segment_ids=documents([(150, 75, 287)]), window=200, scale=0.1)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        got = run(mesh_of((1, 1, 1, 2)), *x, **options)
    for g, want in zip(got, exact(*x, **options), strict=True):
        np.testing.assert_allclose(g, want, rtol=2e-5, atol=2e-5)


def collectives(text):
    """Collectives in an optimised program, by kind, those of a device with itself left out."""
    lines = [line for line in text.splitlines() if "replica_groups={{0},{1}," not in line]
    return {
        kind: sum(bool(re.search(rf" {kind}(?:-start)?\(", line)) for line in lines)
        for kind in ("collective-permute", "all-gather", "all-to-all")
    }


def test_a_saved_round_is_not_run_again():
    q, k, _, _ = arrays(3, 1, 16, 4, 2, 8)

    def permutes(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        layer = jax.checkpoint(functools.partial(attention, zigzag=True), policy=policy)

        def loss(q, k, v):
            return jnp.sum(layer(q, k, v) ** 2)

        with jax.set_mesh(mesh_of((1, 1, 1, 4))):
            return str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, k)).count("ppermute[")

    # Two chunks each of keys and values, to the first step and in the loop, forward and backward; of their gradients in the loop,
    # to the last step, and home.
    assert permutes("attention_output", "attention_logsum") == 2 * (2 * 2 + 2 * 2 + 3 * 2)
    # Without one of the two, or both, a forward round is run again.
    assert min(permutes("attention_output"), permutes("attention_logsum")) > 28
    assert permutes() == 2 * (3 * 2 * 2 + 3 * 2)


@pytest.fixture(scope="module")
def model():
    """Parameters, a batch, and on one device its logits, maxima, loss and gradients."""
    params = init(MODEL, jax.random.key(0))
    batch = packed_batch(3, batch_size=2)
    batch["segment_ids"][1, -5:], batch["loss_mask"][1, -5:] = 0, False
    logits = forward(MODEL, params, batch["tokens"], batch["segment_ids"])
    _, largest = hidden_and_max_logits(MODEL, params, batch["tokens"], batch["segment_ids"])
    loss = functools.partial(loss_sum, MODEL, loss_chunk=16, z_loss=1e-3)
    value = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
    return params, batch, logits, largest, value


@pytest.mark.parametrize("shape", [(2, 1, 2, 2), (1, 2, 1, 4), (1, 1, 1, 8)])
def test_a_model_is_that_of_one_device(model, shape):
    """Layers with a window and without, with RoPE and without: logits in the order of the sequence, maxima, loss, gradients."""
    params, batch, logits, largest, ((total, sums), gradients) = model
    loss = functools.partial(loss_sum, MODEL, loss_chunk=16, z_loss=1e-3, return_max_logits=True)
    columns = np.broadcast_to(np.arange(32, dtype=np.int32), (2, 32))
    with parallel.active(mesh_of(shape)):
        run = jax.jit(functools.partial(forward, MODEL))
        for positions in (None, columns):
            got = run(params, batch["tokens"], batch["segment_ids"], positions)
            np.testing.assert_allclose(got, logits, atol=2e-6)
        value = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
    np.testing.assert_allclose(value[0][0], total, rtol=1e-6)
    np.testing.assert_allclose(value[0][1]["max_logits"], largest, rtol=1e-5)
    assert int(value[0][1]["num_targets"]) == int(sums["num_targets"])
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6),
        value[1],
        gradients,
    )


def test_keys_are_sent_and_never_gathered(model):
    """The whole gradient on a mesh of the context axis alone, whose parameters are whole everywhere: nothing is gathered."""
    params, batch, *_ = model
    plain = dataclasses.replace(MODEL, sliding_window=None, windowed_layers=())

    def of_gradient(config):
        loss = functools.partial(loss_sum, config, loss_chunk=64, z_loss=0.0)
        mesh = mesh_of((1, 1, 1, 8))
        with parallel.active(mesh):
            placed = jax.device_put(batch, parallel.batch_sharding(mesh))
            gradient = jax.jit(jax.grad(loss, has_aux=True))
            return collectives(gradient.lower(params, placed).compile().as_text())

    found = of_gradient(plain)
    assert found["all-gather"] == found["all-to-all"] == 0
    assert found["collective-permute"] > 0
    assert of_gradient(dataclasses.replace(plain, attention="xla"))["all-gather"] > 0


def test_what_cannot_be_is_refused():
    q, k, _, _ = arrays(4, 2, 20, 6, 3, 8)
    with jax.set_mesh(mesh_of((1, 1, 1, 4))):
        with pytest.raises(SmoljaxError, match=r"sequence of 20 .* 4 devices .* multiples of 8"):
            attention(q, k, k, implementation="ring")
        with pytest.raises(SmoljaxError, match="causal"):
            attention(q[:, :16], k[:, :16], k[:, :16], causal=False, implementation="ring")
        for options in ({}, {"implementation": "xla"}):
            with pytest.raises(SmoljaxError, match="'xla', which takes the order of the sequence"):
                attention(q, k, k, **options, zigzag=True)
        assert not api.takes_zigzag(None, seq_len=20)
        assert not api.takes_zigzag("xla", seq_len=16)
        assert api.takes_zigzag(None, seq_len=16)
        # Passed over, it is another's: exact all the same.
        odd = jax.jit(attention)(q, k, k)
    np.testing.assert_allclose(odd, attention(q, k, k, implementation="reference"), atol=2e-6)
    for shape, message in (
        ((1, 1, 2, 2), r"3 key-value heads, .* 2 devices of mesh axis 'tensor'"),
        ((4, 1, 1, 2), r"batch of 2, .* multiple of 4"),
    ):
        with jax.set_mesh(mesh_of(shape)), pytest.raises(SmoljaxError, match=message):
            attention(q, k, k)

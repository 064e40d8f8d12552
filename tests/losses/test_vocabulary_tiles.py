"""Cross-entropy over tiles of the vocabulary against closed forms in float64, alone and on meshes of 8 devices.

B batch, S sequence, D model width, V vocabulary
"""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoljax import parallel
from smoljax.losses import cross_entropy
from smoljax.losses.cross_entropy import TOKEN_AXES, _sums
from smoljax.losses.vocabulary_tiles import sums
from smoljax.parallel.rules import activation_spec
from smoljax.planning import hlo

B, S, D, V = 8, 12, 16, 50
Z_LOSS = 1e-2
MESHES = [
    {"data": 8},
    {"data": 1, "fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 1, "fsdp": 2, "tensor": 2, "context": 2},
]


def inputs(vocab_size=V):
    """Hidden states, output matrix, targets and a mask that leaves out three of ten."""
    rng = np.random.default_rng(0)
    return (
        rng.standard_normal((B, S, D), np.float32),
        rng.standard_normal((D, vocab_size), np.float32),
        rng.integers(0, vocab_size, (B, S), np.int32),
        rng.random((B, S)) < 0.7,
    )


def closed_form(hidden_BSD, head_DV, targets_BS, mask_BS, *, z_loss):
    """Nats with z-loss, the z-loss in it, and the gradient of the sum by hidden and head: float64 NumPy."""
    hidden_BSD, head_DV = hidden_BSD.astype(np.float64), head_DV.astype(np.float64)
    logits_BSV = hidden_BSD @ head_DV
    normaliser_BS1 = np.log(np.exp(logits_BSV).sum(-1, keepdims=True))
    is_target_BSV = targets_BS[..., None] == np.arange(head_DV.shape[1])
    z = z_loss * (normaliser_BS1**2)[mask_BS].sum()
    nats = (normaliser_BS1 - logits_BSV)[mask_BS][is_target_BSV[mask_BS]].sum() + z
    softmax_BSV = np.exp(logits_BSV - normaliser_BS1)
    dlogits_BSV = softmax_BSV * (1 + 2 * z_loss * normaliser_BS1) - is_target_BSV
    dlogits_BSV = dlogits_BSV * mask_BS[..., None]
    return nats, z, dlogits_BSV @ head_DV.T, np.einsum("bsd,bsv->dv", hidden_BSD, dlogits_BSV)


@pytest.mark.parametrize(
    "num_tiles", [1, 2, 7, 49, 64]
)  # 50 words: 7 and 49 do not divide, 64 are too many.
@pytest.mark.parametrize("z_loss", [0.0, Z_LOSS])
def test_sums_and_gradients_are_those_of_the_closed_form(num_tiles, z_loss):
    nats, z, dhidden_BSD, dhead_DV = closed_form(*inputs(), z_loss=z_loss)
    got, gradient = jax.vjp(
        lambda *two: sums(num_tiles, z_loss, *two, *inputs()[2:]), *inputs()[:2]
    )
    np.testing.assert_allclose(got, (nats, z), rtol=1e-6)
    # A cotangent other than 1; that of the z-loss, a metric, is ignored.
    dhidden, dhead = gradient((jnp.float32(3), jnp.float32(5)))
    np.testing.assert_allclose(dhidden, 3 * dhidden_BSD, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dhead, 3 * dhead_DV, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow():
    hidden_BSD, head_DV, targets_BS, mask_BS = inputs()
    hidden_BSD = hidden_BSD * 30
    assert (hidden_BSD @ head_DV).max() > 200  # exp(89) is beyond float32, exp(709) beyond float64.
    nats, *_ = closed_form(hidden_BSD, head_DV, targets_BS, mask_BS, z_loss=0.0)
    got = sums(7, 0.0, hidden_BSD, head_DV, targets_BS, mask_BS)
    np.testing.assert_allclose(got[0], nats, rtol=1e-6)


def test_masked_positions_and_their_targets_have_no_influence():
    hidden_BSD, head_DV, targets_BS, mask_BS = inputs()

    def gradient(targets_BS, mask_BS):
        def loss(*two):
            return sums(7, Z_LOSS, *two, targets_BS, mask_BS)[0]

        return jax.value_and_grad(loss, (0, 1))(hidden_BSD, head_DV)

    other_BS = np.where(mask_BS, targets_BS, (targets_BS + 1) % V)
    before, after = gradient(targets_BS, mask_BS), gradient(other_BS, mask_BS)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    # Control: the same change at counted positions is seen.
    other_BS = np.where(mask_BS, (targets_BS + 1) % V, targets_BS)
    assert gradient(other_BS, mask_BS)[0] != before[0]
    nothing = gradient(targets_BS, np.zeros((B, S), bool))
    assert not any(leaf.any() for leaf in jax.tree.leaves(nothing))


def test_bfloat16_hidden_states_keep_float32_sums():
    hidden_BSD, head_DV, *rest = inputs()
    low_BSD = jnp.asarray(hidden_BSD, jnp.bfloat16)
    rounded_DV = np.asarray(jnp.asarray(head_DV, jnp.bfloat16), np.float32)
    nats, _, dhidden_BSD, dhead_DV = closed_form(
        np.asarray(low_BSD, np.float32), rounded_DV, *rest, z_loss=0.0
    )
    got, (dhidden, dhead) = jax.value_and_grad(lambda *two: sums(7, 0.0, *two, *rest)[0], (0, 1))(
        low_BSD, head_DV
    )
    assert (got.dtype, dhidden.dtype, dhead.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(got, nats, rtol=1e-5)
    # The gradient of logits is rounded to 8 bits before the products; sums over 16 to 96 of those.
    for value, wanted in ((dhidden, dhidden_BSD), (dhead, dhead_DV)):
        error = np.linalg.norm(np.asarray(value, np.float64) - wanted) / np.linalg.norm(wanted)
        assert error < 2**-8


def test_memory_is_one_tile_of_logits():
    tokens, width, vocabulary, num_tiles = 1024, 32, 8192, 16
    shapes = (
        jax.ShapeDtypeStruct((4, tokens // 4, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((4, tokens // 4), jnp.int32),
        jax.ShapeDtypeStruct((4, tokens // 4), jnp.bool_),
    )

    def temporaries(num_tiles):
        gradient = jax.jit(jax.grad(lambda *args: sums(num_tiles, 0.0, *args)[0], (0, 1)))
        return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    all_logits = 4 * tokens * vocabulary
    rest = 4 * (3 * width * vocabulary + 4 * tokens * width)
    assert temporaries(num_tiles) < 3 * all_logits / num_tiles + rest
    assert temporaries(1) >= all_logits  # Control.


def test_the_axes_of_tokens_are_those_of_the_residual_stream():
    batch, sequence = activation_spec("batch", "residual")
    assert (*batch, *sequence) == TOKEN_AXES


def on_mesh(axes: dict, *, chunk_size: int) -> dict:
    """Loss, metrics and gradients of cross_entropy on a mesh, hidden states and head placed as training places them."""
    mesh = parallel.make_mesh(parallel.MeshConfig(**axes))
    batch = parallel.batch_sharding(mesh)
    arrays = inputs(vocab_size=V if axes.get("tensor", 1) == 1 else V - 2)
    head = parallel.param_shardings(mesh, {"head": ("embed", "vocab")}, {"head": arrays[1]})["head"]

    def loss(hidden_BSD, head_DV, targets_BS, mask_BS):
        nats, num_targets, metrics = cross_entropy(
            hidden_BSD, head_DV, targets_BS, mask_BS, chunk_size=chunk_size, z_loss=Z_LOSS
        )
        return nats, metrics | {"num_targets": num_targets}

    gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)
    compiled = jax.jit(
        gradient,
        in_shardings=(batch, head, batch, batch),
        out_shardings=((None, None), (batch, head)),
    )
    with parallel.active(mesh):
        (nats, aux), gradients = compiled(*arrays)
    return {
        "nats": float(nats),
        "aux": {name: float(value) for name, value in aux.items()},
        "gradients": [np.asarray(gradient).tolist() for gradient in gradients],
    }


def exchanged(*, tiles: bool) -> dict:
    """Bytes that a device gathers and reduces, over those of the head in f32, for a loss in 6 pieces on 8 devices."""
    mesh = parallel.make_mesh(parallel.MeshConfig(data=1, fsdp=8))
    batch, width, words, pieces = parallel.batch_sharding(mesh), 64, 768, 6
    head = parallel.param_shardings(
        mesh, {"head": ("embed", "vocab")}, {"head": np.zeros((width, words))}
    )["head"]
    shapes = (
        jax.ShapeDtypeStruct((8, pieces, width), jnp.float32, sharding=batch),
        jax.ShapeDtypeStruct((width, words), jnp.float32, sharding=head),
        jax.ShapeDtypeStruct((8, pieces), jnp.int32, sharding=batch),
        jax.ShapeDtypeStruct((8, pieces), jnp.bool_, sharding=batch),
    )

    def loss(hidden_BSD, head_DV, targets_BS, mask_BS):
        if tiles:
            return cross_entropy(hidden_BSD, head_DV, targets_BS, mask_BS, chunk_size=1)[0]
        chunks = (jnp.moveaxis(x[:, :, None], 1, 0) for x in (hidden_BSD, targets_BS, mask_BS))
        hidden_CBPD, targets_CBP, mask_CBP = chunks
        return _sums(0.0, hidden_CBPD, head_DV, targets_CBP, mask_CBP)[0]

    gradient = jax.jit(jax.grad(loss, (0, 1)), out_shardings=(batch, head))
    with parallel.active(mesh):
        program = hlo.read(gradient.lower(*shapes).compile().as_text())
    found = {}
    for one in program.collectives:
        found[one.kind] = found.get(one.kind, 0) + one.bytes_sent * one.trips
    return {kind: sent / (4 * width * words * 7 / 8) for kind, sent in found.items()}


@pytest.fixture(scope="module")
def report():
    """What 8 forced devices find, in a process of their own: the number of devices is fixed when JAX starts."""
    program = (
        "import json, sys\n"
        "from tests.losses.test_vocabulary_tiles import MESHES, exchanged, on_mesh\n"
        "print(json.dumps({'meshes': [[on_mesh(mesh, chunk_size=n) for n in (5, 100)] for mesh in MESHES],\n"
        "    'tiles': exchanged(tiles=True), 'chunks': exchanged(tiles=False)}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_mesh_gives_loss_and_gradients_of_the_closed_form(report):
    for mesh, found in zip(MESHES, report["meshes"], strict=True):
        arrays = inputs(vocab_size=V if mesh.get("tensor", 1) == 1 else V - 2)
        nats, z, *gradients = closed_form(*arrays, z_loss=Z_LOSS)
        for one in found:  # In tiles, and whole.
            np.testing.assert_allclose(one["nats"], nats, rtol=1e-6, err_msg=str(mesh))
            np.testing.assert_allclose(one["aux"]["z_loss"], z, rtol=1e-6)
            np.testing.assert_allclose(one["aux"]["cross_entropy"], nats - z, rtol=1e-6)
            assert one["aux"]["num_targets"] == arrays[3].sum()
            for got, wanted in zip(one["gradients"], gradients, strict=True):
                np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5, err_msg=str(mesh))


def test_the_head_is_gathered_twice_and_its_gradient_summed_once(report):
    # In heads: two passes gather each column once, and an all-reduce sends all of what it sums twice.
    assert report["tiles"] == {"all-gather": 2.0, "all-reduce": 2.0}
    # Control: in chunks of tokens the gradient of the whole head is summed for each of the six.
    assert report["chunks"]["all-reduce"] == 12.0

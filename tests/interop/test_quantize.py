"""Quantised models against float64 arithmetic in numpy, closed-form bounds, and training that expects rounding.

B batch, S sequence, D model width, N query heads, H head width, F feed-forward width, V vocabulary, L layers
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

pytest.importorskip("qwix")
pytest.importorskip("safetensors")

from smoljax import losses, model
from smoljax.errors import SmoljaxError
from smoljax.interop import quantize, quantized_files
from smoljax.interop.quantized_matrix import CONTRACTED, QuantizedMatrix, integer_einsum

CONFIG = model.ModelConfig(
    vocab_size=64,
    num_layers=2,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    num_kv_heads=1,
    no_rope_layer_interval=2,
    max_seq_len=64,
    init_std=0.2,
)
# A scale in f32 is off by up to 2**-24 of itself, 127.5 times of which is this share of half a step; twice, for the quotient.
ROUNDING = 2 * 255 * 2**-24
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: model.init(UNTIED, key))(jax.random.key(0))


@pytest.fixture(scope="module")
def tied(params):
    return {name: leaf for name, leaf in params.items() if name != "head"}


def logits_of(config: model.ModelConfig, params: dict, tokens_BS: jax.Array) -> jax.Array:
    return jax.jit(quantize.forward, static_argnums=0)(config, params, tokens_BS)


def matrices(params: dict) -> dict[str, object]:
    layers = params["layers"]
    tables = {name: params[name] for name in ("embedding", "head") if name in params}
    found = layers["attention"] | layers["mlp"] | tables
    return {name: w for name, w in found.items() if name in CONTRACTED}


def steps_of(matrix: QuantizedMatrix) -> np.ndarray:
    """The scale of every weight, float64."""
    scale = np.asarray(matrix.scale, np.float64)
    for axis, (n, s) in enumerate(zip(matrix.shape, scale.shape)):
        scale = np.repeat(scale, n // s, axis=axis)
    return scale


def reference_scale(w: np.ndarray, *, bits: int, contracted: tuple, group_size: int | None):
    """Largest |w| / (2**(bits - 1) - 1/2), in float64."""
    w = np.abs(np.asarray(w, np.float64))
    if group_size is None:
        return w.max(axis=contracted, keepdims=True) / (2 ** (bits - 1) - 0.5)
    axis = contracted[-1]
    groups = np.moveaxis(w, axis, -1).reshape(*np.moveaxis(w, axis, -1).shape[:-1], -1, group_size)
    return np.moveaxis(groups.max(axis=-1), -1, axis) / (2 ** (bits - 1) - 0.5)


@pytest.mark.parametrize(("scheme", "bits", "group_size"), [("int8", 8, None), ("int4", 4, 16)])
def test_no_weight_is_off_by_more_than_half_a_step(params, scheme, bits, group_size):
    quantized = quantize.quantize(UNTIED, params, scheme)
    for name, matrix in matrices(quantized).items():
        w = np.asarray(matrices(params)[name], np.float64)
        scale = steps_of(matrix)
        integers = np.asarray(matrix.qvalue).astype(np.float64)
        assert np.all(np.abs(w - integers * scale) <= scale / 2 * (1 + ROUNDING)), name
        assert integers.max() == 2 ** (bits - 1) - 1, name
        expected = reference_scale(w, bits=bits, contracted=CONTRACTED[name], group_size=group_size)
        # Per group they are rounded up to bfloat16, which has steps of at most 2**-7.
        slack = 1e-6 if group_size is None else 2**-6
        assert np.all(matrix.scale >= expected * (1 - 1e-6)), name
        assert np.all(matrix.scale <= expected * (1 + slack)), name


def test_a_scale_along_the_wrong_axis_breaks_the_bound(params):
    gate_LDF = params["layers"]["mlp"]["gate"].at[:, 0].multiply(8.0)
    right = quantize.quantize_matrix(gate_LDF, bits=8, contracted=(1,), group_size=None)
    wrong = quantize.quantize_matrix(gate_LDF, bits=8, contracted=(2,), group_size=None)
    bound = np.asarray(right[1]) / 2 * (1 + ROUNDING)
    for (qvalue, scale), within in ((right, True), (wrong, False)):
        error = np.abs(np.asarray(QuantizedMatrix(qvalue, scale).dequantize() - gate_LDF))
        assert np.all(error <= bound) == within


def test_bits_by_their_error(params):
    # Rounding noise of steps s is s / sqrt(12); 4 bits have steps 17 times as large.
    for scheme, expected in (("int8", 1 / 127.5), ("int4", 1 / 7.5)):
        quantized = quantize.quantize(UNTIED, params, scheme)
        for name, matrix in matrices(quantized).items():
            w = np.asarray(matrices(params)[name], np.float64)
            error = np.asarray(matrix.dequantize(), np.float64) - w
            largest = steps_of(matrix) / expected  # Of the group: |w| reaches it.
            noise = np.sqrt(np.mean(np.square(error / largest)))
            assert noise == pytest.approx(expected / np.sqrt(12), rel=0.1), name


def test_dequantised_parameters_give_the_same_logits(tied):
    tokens_BS = jax.random.randint(jax.random.key(1), (2, 12), 0, 64)
    for scheme in ("int8", "int4"):
        quantized = quantize.quantize(CONFIG, tied, scheme)
        expected = logits_of(CONFIG, quantize.dequantize(quantized), tokens_BS)
        np.testing.assert_allclose(logits_of(CONFIG, quantized, tokens_BS), expected, atol=1e-5)
        # The plain functions of the model take the tree as well.
        plain = jax.jit(model.forward, static_argnums=0)(CONFIG, quantized, tokens_BS)
        np.testing.assert_allclose(plain, expected, atol=1e-5)
        assert np.abs(expected - logits_of(CONFIG, tied, tokens_BS)).max() > 1e-3


@pytest.mark.parametrize(
    ("scheme", "compute_dtype", "tolerance"),
    # Sums in another order may round one activation of w8a8 apart.
    [("int4", "float32", 1e-4), ("int4", "bfloat16", 0.2), ("w8a8", "float32", 0.1)],
)
def test_layers_in_a_loop_or_apart(tied, scheme, compute_dtype, tolerance):
    tokens_BS = jax.random.randint(jax.random.key(1), (2, 12), 0, 64)
    quantized = quantize.quantize(CONFIG, tied, scheme)
    found = []
    for scan in (True, False):
        config = dataclasses.replace(CONFIG, scan_layers=scan, compute_dtype=compute_dtype)
        found.append(logits_of(config, quantized, tokens_BS))
        assert found[-1].dtype == jnp.float32
    np.testing.assert_allclose(*found, atol=tolerance)


def integer_product(x: np.ndarray, matrix: QuantizedMatrix, *, summed: int) -> np.ndarray:
    """x of `summed` last axes times the first of the matrix, in numpy: int32 sums, then both scales in float64."""
    x = x.reshape(*x.shape[: x.ndim - summed], -1)
    x_scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127.5)
    x_int = np.clip(np.rint(x / x_scale), -128, 127).astype(np.int32)
    w_int = np.asarray(matrix.qvalue).astype(np.int32).reshape(x.shape[-1], -1)
    w_scale = np.asarray(matrix.scale, np.float64).reshape(1, -1)
    return (x_int @ w_int) * x_scale * w_scale


@pytest.mark.parametrize(
    ("name", "spec", "summed"),
    [("query", "bsd,dnh->bsnh", 1), ("output", "bsnh,nhd->bsd", 2), ("down", "bsf,fd->bsd", 1)],
)
def test_w8a8_multiplies_integers(tied, name, spec, summed):
    quantized = quantize.quantize(CONFIG, tied, "w8a8")
    matrix = jax.tree.map(lambda leaf: leaf[0], matrices(quantized)[name])
    x = jax.random.normal(jax.random.key(2), (2, 5, *matrix.shape[:summed]))
    # The largest is positive, where 127.5 can only go to 127; -127.5 would be a tie of -127 and -128.
    x = x.at[(..., *(0,) * summed)].set(5.0)
    expected = integer_product(np.asarray(x), matrix, summed=summed)
    found = np.asarray(integer_einsum(spec, x, matrix)).reshape(expected.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    # And it is not what unrounded activations give.
    exact = np.asarray(jnp.einsum(spec, x, dataclasses.replace(matrix, activations=None)))
    assert np.abs(found - exact.reshape(expected.shape)).max() > 1e-4 * np.abs(expected).max()


def test_w8a8_rounds_activations_in_every_matmul_of_a_layer(tied):
    quantized = quantize.quantize(CONFIG, tied, "w8a8")
    tokens_BS = jax.random.randint(jax.random.key(1), (2, 12), 0, 64)
    config = dataclasses.replace(CONFIG, scan_layers=False)
    program = str(jax.make_jaxpr(lambda q: quantize.forward(config, q, tokens_BS))(quantized))
    assert program.count("preferred_element_type=int32") == 7  # Written once for all layers.
    with pytest.raises(SmoljaxError, match="integer_matmuls"):
        model.forward(CONFIG, quantized, tokens_BS)


def test_generation_agrees_with_dequantised_parameters(tied):
    prompts = [[1, 2, 3], [5, 6, 7, 8, 9]]
    for scheme in ("int8", "int4"):
        quantized = quantize.quantize(CONFIG, tied, scheme)
        plain = quantize.dequantize(quantized)
        expected = model.generate(CONFIG, plain, prompts, max_new_tokens=8)
        assert quantize.generate(CONFIG, quantized, prompts, max_new_tokens=8) == expected


def test_w8a8_generates_what_its_logits_say(tied):
    quantized = quantize.quantize(CONFIG, tied, "w8a8")
    (new,) = quantize.generate(CONFIG, quantized, [[1, 2, 3]], max_new_tokens=8)
    logits_SV = logits_of(CONFIG, quantized, jnp.array([[1, 2, 3, *new[:-1]]]))[0]
    chosen = logits_SV[jnp.arange(2, 10), jnp.array(new)]
    # The cache sums in another order, which may turn a tie of rounding; the choice is then as good.
    assert np.all(np.asarray(logits_SV[2:].max(axis=-1) - chosen) < 0.05)


@pytest.mark.parametrize("scheme", ["int8", "int4", "w8a8"])
@pytest.mark.parametrize("tie", [True, False])
def test_files_hold_the_model_bitwise(tmp_path, params, tied, scheme, tie):
    config = dataclasses.replace(
        CONFIG if tie else UNTIED,
        rope_scaling={"kind": "yarn", "factor": 2.0, "original_max_seq_len": 32},
        nope_layers=(0,),
    )
    quantized = quantize.quantize(config, tied if tie else params, scheme)
    quantize.save(tmp_path / "saved", config, quantized)
    loaded_config, loaded = quantize.load(tmp_path / "saved")
    assert loaded_config == config
    assert jax.tree.structure(loaded) == jax.tree.structure(quantized)
    for old, new in zip(jax.tree.leaves(quantized), jax.tree.leaves(loaded)):
        assert old.dtype == new.dtype
        assert np.array_equal(np.asarray(old), np.asarray(new))
    weights = sum(matrix.qvalue.size for matrix in matrices(quantized).values())
    scales = sum(matrix.scale.nbytes for matrix in matrices(quantized).values())
    gains = (2 * config.num_layers + 1) * config.hidden_size * 4
    expected = weights // (2 if scheme == "int4" else 1) + scales + gains
    header = 8192
    assert 0 < (tmp_path / "saved" / "model.safetensors").stat().st_size - expected < header


@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_two_int4_share_a_byte(length):
    integers = (np.arange(3 * length).reshape(3, length) % 16 - 8).astype(ml_dtypes.int4)
    packed = quantized_files.pack(integers)
    assert packed.dtype == np.uint8
    assert packed.shape == (3, (length + 1) // 2)
    assert np.array_equal(quantized_files.unpack(packed, length), integers)


def test_packing_order():
    # -1 is 0xF and 2 is 0x2; the first weight has the low half.
    assert quantized_files.pack(np.array([-1, 2], ml_dtypes.int4)).tolist() == [0x2F]


def test_unknown_scheme(tied):
    with pytest.raises(SmoljaxError, match="'int5' is unknown: choose one of int8, int4, w8a8"):
        quantize.quantize(CONFIG, tied, "int5")


def test_a_group_size_that_does_not_divide(tied):
    with pytest.raises(
        SmoljaxError, match=r"intermediate_size=48: set it to one of \[2, 4, 8, 16\]"
    ):
        quantize.quantize(CONFIG, tied, "int4", group_size=32)
    quantized = quantize.quantize(CONFIG, tied, "int4", group_size=8)
    assert quantized["layers"]["mlp"]["down"].scale.shape == (2, 6, 32)


def test_a_group_size_without_groups(tied):
    with pytest.raises(SmoljaxError, match="leave it None"):
        quantize.quantize(CONFIG, tied, "int8", group_size=16)


def test_sizes_that_no_group_fits(tied):
    config = dataclasses.replace(CONFIG, intermediate_size=49)
    with pytest.raises(SmoljaxError, match="intermediate_size=49: use int8"):
        quantize.quantize(config, tied, "int4")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(tied, value):
    broken = jax.tree.map(lambda leaf: leaf, tied)
    broken["layers"]["mlp"]["up"] = broken["layers"]["mlp"]["up"].at[1, 2, 3].set(value)
    with pytest.raises(SmoljaxError, match="parameter layers/mlp/up holds NaN or infinity"):
        quantize.quantize(CONFIG, broken, "int8")


def test_quantising_twice(tied):
    quantized = quantize.quantize(CONFIG, tied, "int8")
    with pytest.raises(SmoljaxError, match="is quantised already"):
        quantize.quantize(CONFIG, quantized, "int8")


def test_damaged_files(tmp_path, tied):
    path = tmp_path / "saved"
    with pytest.raises(SmoljaxError, match=r"config\.json does not exist"):
        quantize.load(path)
    with pytest.raises(SmoljaxError, match="no parameter is quantised"):
        quantize.save(path, CONFIG, tied)
    assert list(tmp_path.iterdir()) == []
    quantize.save(path, CONFIG, quantize.quantize(CONFIG, tied, "int4"))
    tensors, manifest = path / "model.safetensors", path / "config.json"
    data = tensors.read_bytes()
    for damaged in (data[:-100], data[:-1] + bytes([data[-1] ^ 1])):
        tensors.write_bytes(damaged)
        with pytest.raises(SmoljaxError, match=r"model\.safetensors is cut off or damaged"):
            quantize.load(path)
    tensors.write_bytes(data)
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(fields | {"format": "gptq"}))
    with pytest.raises(SmoljaxError, match="has format 'gptq', expected 'smoljax-quantized-1'"):
        quantize.load(path)
    manifest.write_text(json.dumps(fields | {"model": fields["model"] | {"vocab_size": 65}}))
    with pytest.raises(SmoljaxError, match=r"tensor embedding .* shape \(64, 32\), expected \(65,"):
        quantize.load(path)


def test_fake_quantised_parameters_compute_as_quantised_ones(tied):
    tokens_BS = jax.random.randint(jax.random.key(1), (2, 12), 0, 64)
    for scheme in quantize.SCHEMES:
        quantized = quantize.quantize(CONFIG, tied, scheme)
        fake = quantize.fake_quantized(CONFIG, tied, scheme)
        found = logits_of(CONFIG, fake, tokens_BS)
        expected = logits_of(CONFIG, quantized, tokens_BS)
        # Integer sums and float sums of the same values may round one activation of w8a8 apart.
        np.testing.assert_allclose(found, expected, atol=0.1 if scheme == "w8a8" else 1e-4)


def sequences(key, count: int) -> jax.Array:
    """Each next token is 5 t + 3 mod 64, but one in ten is anything: [count, 17]."""
    first, noise_key, jump_key = jax.random.split(key, 3)
    noise = jax.random.randint(noise_key, (16, count), 0, 64)
    jumps = jax.random.bernoulli(jump_key, 0.1, (16, count))

    def step(token, drawn):
        token = jnp.where(drawn[1], drawn[0], (5 * token + 3) % 64)
        return token, token

    start = jax.random.randint(first, (count,), 0, 64)
    return jnp.concatenate([start[None], jax.lax.scan(step, start, (noise, jumps))[1]]).T


def mean_loss(params: dict, tokens: jax.Array) -> jax.Array:
    total, count, _ = losses.cross_entropy(
        model.hidden(CONFIG, params, tokens[:, :-1]),
        model.unembedding(CONFIG, params),
        tokens[:, 1:],
        jnp.ones(tokens[:, 1:].shape, bool),
        chunk_size=512,
        z_loss=0.0,
    )
    return total / count


def train(params: dict, loss, *, steps: int, learning_rate: float, seed: int) -> tuple[dict, dict]:
    """Trained parameters and the last gradients."""
    optimizer = optax.adam(learning_rate)

    def step(carry, i):
        params, state, _ = carry
        tokens = sequences(jax.random.fold_in(jax.random.key(seed), i), 32)
        grads = jax.grad(loss)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state, grads), None

    @jax.jit
    def run(params):
        carry = (params, optimizer.init(params), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(step, carry, jnp.arange(steps))[0]

    params, _, grads = run(params)
    return params, grads


@pytest.fixture(scope="module")
def trained(tied):
    return train(tied, mean_loss, steps=300, learning_rate=3e-3, seed=1)[0]


@pytest.mark.parametrize("scheme", ["int4", "w8a8"])
def test_training_that_expects_quantisation(trained, scheme):
    def qat_loss(params, tokens):
        return mean_loss(quantize.fake_quantized(CONFIG, params, scheme), tokens)

    qat_loss = quantize.integer_matmuls(qat_loss)
    tokens = sequences(jax.random.key(99), 256)

    def quantised_loss(params):
        quantized = quantize.quantize(CONFIG, params, scheme)
        return float(quantize.integer_matmuls(jax.jit(mean_loss))(quantized, tokens))

    exact, after_training = float(mean_loss(trained, tokens)), quantised_loss(trained)
    tuned, grads = train(trained, qat_loss, steps=100, learning_rate=1e-3, seed=2)
    plain, _ = train(trained, mean_loss, steps=100, learning_rate=1e-3, seed=2)
    for leaf in jax.tree.leaves(grads):
        assert np.all(np.isfinite(leaf))
        assert np.any(leaf != 0)
    assert exact < 2.0  # It has learnt: ln 64 is 4.16.
    if scheme == "int4":
        assert after_training > exact + 0.005
        # Better than quantising after training, and than as many more steps without it.
        assert quantised_loss(tuned) < after_training
        assert quantised_loss(tuned) < quantised_loss(plain)
    else:
        assert quantised_loss(tuned) < after_training + 0.02


def test_w8a8_training_needs_its_wrapper(tied):
    fake = quantize.fake_quantized(CONFIG, tied, "w8a8")
    with pytest.raises(SmoljaxError, match="integer_matmuls"):
        model.forward(CONFIG, fake, jnp.zeros((1, 4), jnp.int32))

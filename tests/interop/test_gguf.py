"""GGUF files, read back with gguf-py's own reader: every field, every tensor, and what is refused.

D model width, N query heads, K key-value heads, H head width, F feed-forward width, V vocabulary, L layers
"""

import logging
import math
import subprocess
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoljax.errors import SmoljaxError
from smoljax.interop import gguf as smoljax_gguf
from smoljax.interop.hf_leaves import leaves, unflatten
from smoljax.model import ModelConfig
from smoljax.tokens import tokenizer as smoljax_tokenizer
from tests.conftest import with_small_files

gguf = pytest.importorskip("gguf", reason="gguf comes with the extra export")

L, D, F, V, N, K, H = 4, 64, 96, 512, 4, 2, 16


def model(**fields):
    sizes = dict(
        vocab_size=V,
        num_layers=L,
        hidden_size=D,
        intermediate_size=F,
        num_heads=N,
        num_kv_heads=K,
        max_seq_len=128,
    )
    return ModelConfig(**(sizes | fields))


SMOLLM3 = model()
LLAMA = model(no_rope_layer_interval=0, tie_embeddings=False, rope_theta=500_000.0)
QWEN3 = model(nope_layers=(), qk_norm=True, head_dim=32, norm_eps=1e-5)
FAMILIES = {"smollm3": SMOLLM3, "llama": LLAMA, "qwen3": QWEN3}
LLAMA3_SCALING = dict(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_seq_len=64,
)


def random_params(config, seed=0):
    """Every leaf random, the gains too: gains of 1 would hide where they went."""
    rng = np.random.default_rng(seed)
    return unflatten(
        {leaf.path: rng.normal(size=leaf.full_shape).astype(np.float32) for leaf in leaves(config)}
    )


def fields_of(reader):
    return {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }


def tensors_of(reader):
    """Dequantised to f32, in numpy's order of axes."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_tensor_comes_back_where_llama_cpp_looks_for_it(tmp_path, architecture):
    config = FAMILIES[architecture]
    params = random_params(config)
    smoljax_gguf.save(tmp_path / "m.gguf", config, params)
    tensors = tensors_of(gguf.GGUFReader(tmp_path / "m.gguf"))
    known = gguf.MODEL_TENSORS[gguf.MODEL_ARCH[architecture.upper()]]
    names = {gguf.TENSOR_NAMES[tensor] for tensor in known}
    per_layer = 11 if config.qk_norm else 9
    assert len(tensors) == per_layer * L + (2 if config.tie_embeddings else 3)
    np.testing.assert_array_equal(tensors["token_embd.weight"], params["embedding"])
    np.testing.assert_array_equal(tensors["output_norm.weight"], params["final_norm"])
    if not config.tie_embeddings:
        np.testing.assert_array_equal(tensors["output.weight"], params["head"].T)
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    for i in range(L):
        layer = {
            name.removeprefix(f"blk.{i}."): value
            for name, value in tensors.items()
            if name.startswith(f"blk.{i}.")
        }
        assert {f"blk.{{bid}}.{name.removesuffix('.weight')}" for name in layer} <= names
        expected = {
            "attn_norm": params["layers"]["attention_norm"][i],
            "ffn_norm": params["layers"]["mlp_norm"][i],
            "attn_v": attention["value"][i].reshape(D, -1).T,
            "attn_output": attention["output"][i].reshape(-1, D).T,
            "ffn_gate": mlp["gate"][i].T,
            "ffn_up": mlp["up"][i].T,
            "ffn_down": mlp["down"][i].T,
        }
        if config.qk_norm:
            expected["attn_q_norm"] = attention["query_norm"][i]
            expected["attn_k_norm"] = attention["key_norm"][i]
        for name, value in expected.items():
            np.testing.assert_array_equal(layer[f"{name}.weight"], value, err_msg=name)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_rows_of_query_and_key_are_pairs_of_neighbours_except_in_qwen3(tmp_path, architecture):
    config = FAMILIES[architecture]
    params = random_params(config)
    smoljax_gguf.save(tmp_path / "m.gguf", config, params)
    tensors = tensors_of(gguf.GGUFReader(tmp_path / "m.gguf"))
    width = config.head_dim
    for name, leaf, heads in (("attn_q", "query", N), ("attn_k", "key", K)):
        ours_LDNH = params["layers"]["attention"][leaf]
        for i in range(L):
            theirs = tensors[f"blk.{i}.{name}.weight"].reshape(heads, width, D)
            for n in range(heads):
                for j in range(width // 2):
                    # Row 2 j and its neighbour are turned by frequency j; in smoljax j and j + H / 2 are.
                    pair = (j, j + width // 2)
                    rows = pair if architecture == "qwen3" else (2 * j, 2 * j + 1)
                    for row, ours in zip(rows, pair):
                        np.testing.assert_array_equal(theirs[n, row], ours_LDNH[i, :, n, ours])


def test_fields_of_a_model(tmp_path):
    config = model(head_dim=32, max_seq_len=4096, norm_eps=1e-5, rope_theta=2e6)
    smoljax_gguf.save(tmp_path / "m.gguf", config, random_params(config), name="tiny")
    assert fields_of(gguf.GGUFReader(tmp_path / "m.gguf")) == {
        "general.architecture": "smollm3",
        "general.name": "tiny",
        "general.type": "model",
        "general.file_type": 0,
        "smollm3.vocab_size": V,
        "smollm3.context_length": 4096,
        "smollm3.embedding_length": D,
        "smollm3.block_count": L,
        "smollm3.feed_forward_length": F,
        "smollm3.attention.head_count": N,
        "smollm3.attention.head_count_kv": K,
        "smollm3.attention.key_length": 32,
        "smollm3.attention.value_length": 32,
        "smollm3.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "smollm3.rope.dimension_count": 32,
        "smollm3.rope.freq_base": 2e6,
        "tokenizer.ggml.model": "none",
    }


@pytest.mark.parametrize(("attention_factor", "expected"), [(None, 1.0), (1.0, 1 / 1.0693147)])
def test_yarn_fields(tmp_path, attention_factor, expected):
    scaling = dict(
        kind="yarn", factor=2.0, original_max_seq_len=64, attention_factor=attention_factor
    )
    config = model(rope_scaling=scaling)
    smoljax_gguf.save(tmp_path / "m.gguf", config, random_params(config))
    found = {
        key.removeprefix("smollm3.rope.scaling."): value
        for key, value in fields_of(gguf.GGUFReader(tmp_path / "m.gguf")).items()
        if "rope.scaling" in key
    }
    # llama.cpp multiplies by 0.1 ln(2) + 1 = 1.0693147 itself.
    assert found.pop("attn_factor") == pytest.approx(expected, rel=1e-6)
    assert found == {"type": "yarn", "factor": 2.0, "original_context_length": 64}


def test_llama3_scaling_is_a_tensor_of_factors(tmp_path):
    config = model(no_rope_layer_interval=0, rope_scaling=LLAMA3_SCALING)
    smoljax_gguf.save(tmp_path / "m.gguf", config, random_params(config))
    factors = tensors_of(gguf.GGUFReader(tmp_path / "m.gguf"))["rope_freqs.weight"]
    # As Llama 3.1's published code has it, wavelength by wavelength.
    expected = []
    for i in range(H // 2):
        wavelength = 2 * math.pi * 50_000.0 ** (2 * i / H)
        if wavelength < 64 / 4:
            expected.append(1.0)
        elif wavelength > 64 / 1:
            expected.append(8.0)
        else:
            smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
            expected.append(1 / ((1 - smooth) / 8 + smooth))
    np.testing.assert_allclose(factors, expected, rtol=1e-6)
    assert 1.0 in expected
    assert 8.0 in expected


@pytest.mark.parametrize(
    ("dtype", "file_type", "bits", "bound"),
    [("f16", 1, 16, 2**-11), ("q8_0", 7, 8.5, 0.5 / 127), ("q4_0", 2, 4.5, 1 / 8)],
)
def test_matrices_of_few_bits_are_within_their_step(tmp_path, dtype, file_type, bits, bound):
    params = random_params(LLAMA)
    smoljax_gguf.save(tmp_path / "full.gguf", LLAMA, params)
    smoljax_gguf.save(tmp_path / "few.gguf", LLAMA, params, dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "few.gguf")
    full, few = tensors_of(gguf.GGUFReader(tmp_path / "full.gguf")), tensors_of(reader)
    assert fields_of(reader)["general.file_type"] == file_type
    assert fields_of(reader).get("general.quantization_version") == (2 if dtype[0] == "q" else None)
    for tensor in reader.tensors:
        exact, found = full[tensor.name], few[tensor.name]
        if exact.ndim == 1:
            assert tensor.tensor_type.name == "F32"
            np.testing.assert_array_equal(found, exact)
            continue
        kind, step, size = dtype.upper(), bound, bits
        if dtype == "q4_0" and tensor.name == "output.weight":
            kind, step, size = "Q8_0", 0.5 / 127, 8.5
        assert tensor.tensor_type.name == kind
        assert tensor.n_bytes * 8 == exact.size * size
        largest = np.abs(exact.reshape(-1, 32)).max(-1, keepdims=True)
        error = np.abs(found - exact).reshape(-1, 32)
        # The scale of a block is an f16 itself: 11 bits.
        assert (error <= largest * (step + 2**-10)).all()
        assert error.max() > 0


def test_the_tied_embedding_of_q4_0_has_8_bits(tmp_path):
    smoljax_gguf.save(tmp_path / "m.gguf", SMOLLM3, random_params(SMOLLM3), dtype="q4_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down.weight"] == "Q4_0"


YARN = dict(kind="yarn", factor=2.0, original_max_seq_len=64)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (model(no_rope_layer_interval=2), r"no_rope_layer_interval is 2"),
        (model(no_rope_layer_interval=3), r"no_rope_layer_interval is 3"),
        (model(nope_layers=(0,)), r"nope_layers is \(0,\)"),
        (model(sliding_window=8, windowed_layers=(3,)), r"windowed_layers is \(3,\)"),
        (model(qk_norm=True), r"qk_norm is True"),
        (model(rope_scaling=LLAMA3_SCALING), r"rope_scaling.kind is 'llama3'"),
        (
            model(rope_scaling=LLAMA3_SCALING, nope_layers=(), qk_norm=True),
            r"rope_scaling.kind is 'llama3'",
        ),
        (model(rope_scaling=YARN | {"truncate": False}), r"rope_scaling.truncate is False"),
        (model(rope_scaling=YARN | {"beta_fast": 16.0}), r"rope_scaling.beta_fast is 16"),
        (model(rope_scaling=YARN | {"beta_slow": 2.0}), r"rope_scaling.beta_slow is 2"),
    ],
)
def test_models_that_llama_cpp_cannot_run_are_refused_by_field(tmp_path, config, message):
    with pytest.raises(SmoljaxError, match=message):
        smoljax_gguf.save(tmp_path / "m.gguf", config, random_params(config))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (model(nope_layers=(3,)), "smollm3"),
        (model(nope_layers=()), "llama"),
        (model(num_layers=3), "llama"),  # The fourth layer would be the first without RoPE.
        (model(num_layers=8, nope_layers=(3, 7)), "smollm3"),
    ],
)
def test_the_architecture_follows_what_the_layers_do(config, architecture):
    assert smoljax_gguf.choose_architecture(config) == architecture


def test_matrices_whose_rows_no_block_divides_are_f16_and_this_is_said(tmp_path, caplog):
    config = model(intermediate_size=90)
    with caplog.at_level(logging.WARNING, logger="smoljax"):
        smoljax_gguf.save(tmp_path / "m.gguf", config, random_params(config), dtype="q8_0")
    assert "layers/mlp/down has rows of 90 weights" in caplog.text
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert {kind for name, kind in kinds.items() if "ffn_down" in name} == {"F16"}
    assert kinds["blk.0.ffn_up.weight"] == kinds["blk.0.attn_output.weight"] == "Q8_0"


def test_a_width_that_no_block_divides_is_refused_only_where_quantised(tmp_path):
    config = model(hidden_size=48, head_dim=16)
    for dtype in ("q8_0", "q4_0"):
        with pytest.raises(SmoljaxError, match=r"model.hidden_size is 48"):
            smoljax_gguf.save(tmp_path / "m.gguf", config, random_params(config), dtype=dtype)
    assert not list(tmp_path.iterdir())
    smoljax_gguf.save(tmp_path / "m.gguf", config, random_params(config), dtype="f16")
    with pytest.raises(SmoljaxError, match="dtype is 'q3_k'"):
        smoljax_gguf.save(tmp_path / "m.gguf", config, random_params(config), dtype="q3_k")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_leaves_the_older_file(tmp_path, value):
    path = tmp_path / "m.gguf"
    params = random_params(SMOLLM3)
    smoljax_gguf.save(path, SMOLLM3, params)
    before = path.read_bytes()
    params["layers"]["mlp"]["down"][2, 5, 7] = value
    with pytest.raises(SmoljaxError, match="layers/mlp/down of layer 2 has a value that is not"):
        smoljax_gguf.save(path, SMOLLM3, params)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_weight_too_large_for_f16_is_refused(tmp_path):
    params = random_params(SMOLLM3)
    params["embedding"][7, 7] = 1e5
    with pytest.raises(SmoljaxError, match="embedding does not fit f16"):
        smoljax_gguf.save(tmp_path / "m.gguf", SMOLLM3, params, dtype="f16")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path):
    program = (
        "import jax, sys; from smoljax.interop import gguf; from smoljax.model import ModelConfig, init\n"
        "config = ModelConfig(512, 2, 64, 96, 4, 2)\n"
        "shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))\n"
        "params = jax.tree.map(lambda leaf: __import__('numpy').ones(leaf.shape, 'f4'), shapes)\n"
        "gguf.save(sys.argv[1], config, params)"
    )
    result = subprocess.run(
        with_small_files(["-c", program, str(tmp_path / "m.gguf")]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "SmoljaxError" in result.stderr
    assert "could not be written whole" in result.stderr
    assert not list(tmp_path.iterdir())


def test_parameters_of_another_model_are_refused(tmp_path):
    with pytest.raises(SmoljaxError, match="head"):
        smoljax_gguf.save(tmp_path / "m.gguf", SMOLLM3, random_params(LLAMA))
    params = random_params(SMOLLM3)
    del params["layers"]["mlp"]["gate"]
    with pytest.raises(SmoljaxError, match="params lack layers/mlp/gate"):
        smoljax_gguf.save(tmp_path / "m.gguf", SMOLLM3, params)
    with pytest.raises(SmoljaxError, match=r"params embedding has shape \[512, 64\]"):
        smoljax_gguf.save(tmp_path / "m.gguf", model(vocab_size=600), random_params(SMOLLM3))
    assert not list(tmp_path.iterdir())


def test_training_only_parameters_stay_behind_and_this_is_said(tmp_path, caplog):
    params = random_params(SMOLLM3)
    smoljax_gguf.save(tmp_path / "without.gguf", SMOLLM3, params)
    with caplog.at_level(logging.WARNING, logger="smoljax"):
        smoljax_gguf.save(tmp_path / "with.gguf", SMOLLM3, params | {"mtp": {"head": np.ones(3)}})
    assert "'mtp'" in caplog.text
    assert (tmp_path / "with.gguf").read_bytes() == (tmp_path / "without.gguf").read_bytes()


def test_jax_and_numpy_parameters_give_the_same_file(tmp_path):
    params = random_params(SMOLLM3)
    smoljax_gguf.save(tmp_path / "numpy.gguf", SMOLLM3, params)
    smoljax_gguf.save(tmp_path / "jax.gguf", SMOLLM3, jax.tree.map(jnp.asarray, params))
    assert (tmp_path / "jax.gguf").read_bytes() == (tmp_path / "numpy.gguf").read_bytes()


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_memory_is_that_of_one_tensor(tmp_path, dtype):
    config = model(num_layers=16, hidden_size=512, intermediate_size=1024)
    params = random_params(config)
    largest = max(math.prod(leaf.tensor_shape) * 4 for leaf in leaves(config))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    tracemalloc.start()
    smoljax_gguf.save(tmp_path / "m.gguf", config, params, dtype=dtype)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A copy in the order of the file, and what the quantiser needs for it.
    assert peak < 6 * largest < total / 3


def test_the_tokenizer_goes_in_and_unused_ids_are_filled(corpus, tmp_path):
    tokenizer = smoljax_tokenizer.load(corpus / "tokenizer")
    config = model(vocab_size=tokenizer.vocab_size + 3)
    smoljax_gguf.save(
        tmp_path / "m.gguf", config, random_params(config), tokenizer, chat_template="{{ x }}"
    )
    fields = fields_of(gguf.GGUFReader(tmp_path / "m.gguf"))
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.chat_template"] == "{{ x }}"
    assert fields["tokenizer.ggml.tokens"][:4] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert fields["tokenizer.ggml.tokens"][-3:] == ["[PAD512]", "[PAD513]", "[PAD514]"]
    assert fields["tokenizer.ggml.token_type"][-3:] == [5, 5, 5]
    assert len(fields["tokenizer.ggml.scores"]) == config.vocab_size
    assert fields["tokenizer.ggml.add_space_prefix"] is False
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.bos_token_id"] == 1
    small = model(vocab_size=500)
    with pytest.raises(SmoljaxError, match="512 tokens, the model's vocab_size is 500"):
        smoljax_gguf.save(tmp_path / "small.gguf", small, random_params(small), tokenizer)

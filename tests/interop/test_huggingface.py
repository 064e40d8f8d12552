"""Hugging Face folders, in and out; safetensors' own library writes and reads the other side.

L layers, D model width, N query heads, H head width
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from smoljax.errors import SmoljaxError
from smoljax.interop import huggingface, safetensors_files
from smoljax.model import ModelConfig, forward, init

safetensors = pytest.importorskip("safetensors.numpy", reason="needs the extra export")

GOLDEN = Path(__file__).parent / "golden"

MODEL = ModelConfig(
    vocab_size=64,
    num_layers=3,
    hidden_size=16,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    no_rope_layer_interval=3,
)
QWEN3 = dict(no_rope_layer_interval=0, qk_norm=True, tie_embeddings=False)
LAST = "model.layers.2.mlp.down_proj.weight"


def variant(**fields):
    return ModelConfig(
        **{name: getattr(MODEL, name) for name in MODEL.__dataclass_fields__} | fields
    )


def params_of(config):
    """Parameters without any symmetry, as numpy arrays: gains are no ones."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture
def folder(tmp_path):
    huggingface.save(tmp_path / "model", MODEL, params_of(MODEL))
    return tmp_path / "model"


def change(folder, edit):
    """Lets `edit` change the tensors of a folder, a dict of arrays."""
    file = folder / "model.safetensors"
    tensors = dict(safetensors.load_file(file))
    edit(tensors)
    safetensors.save_file(tensors, file, metadata={"format": "pt"})


def change_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def refused(folder):
    with pytest.raises(SmoljaxError) as error:
        huggingface.load(folder)
    return str(error.value)


@pytest.mark.parametrize("name", ["smollm3_tied", "qwen3_untied"])
def test_logits_of_a_transformers_checkpoint(name, tmp_path):
    golden = np.load(GOLDEN / f"{name}.npz")
    weights = {
        key.removeprefix("weight/"): golden[key].astype(np.float16) / 64
        for key in golden
        if key.startswith("weight/")
    }
    safetensors.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(str(golden["config_v4"]))
    config, params = huggingface.load(tmp_path)
    logits = forward(config, params, jnp.asarray(golden["tokens"]))
    np.testing.assert_allclose(logits, golden["logits"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": False}, QWEN3], ids=str)
def test_round_trip_is_bitwise(fields, tmp_path):
    config = variant(**fields)
    params = params_of(config)
    huggingface.save(tmp_path / "a", config, params)
    loaded, back = huggingface.load(tmp_path / "a")
    assert (loaded.num_params, loaded.qk_norm) == (config.num_params, config.qk_norm)
    assert_same(back, params)
    huggingface.save(tmp_path / "b", loaded, back)
    one, two = (safetensors.load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].tobytes() == two[name].tobytes()


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": False}, QWEN3], ids=str)
def test_multipliers_of_a_completep_model_are_folded_into_its_weights(fields, tmp_path):
    sizes = dict(base_hidden_size=4, base_num_layers=1, base_head_dim=2)
    config = variant(parametrization="completep", **sizes, **fields)
    factors = config.forward_multipliers
    assert (factors.residual, factors.readout, factors.attention) == (1 / 3, 1 / 4, 1 / 2)
    params = params_of(config)
    huggingface.save(tmp_path / "model", config, params)
    plain, folded = huggingface.load(tmp_path / "model")
    assert plain.forward_multipliers == variant().forward_multipliers
    tokens = np.arange(24).reshape(2, 12) % 64
    want = forward(config, params, tokens)
    np.testing.assert_allclose(forward(plain, folded, tokens), want, atol=1e-5)
    assert np.abs(forward(plain, params, tokens) - want).max() > 0.1  # Folding is no idle act.


def test_bfloat16_round_trip_is_bitwise(tmp_path):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params_of(MODEL))
    huggingface.save(tmp_path / "model", MODEL, params, dtype="bfloat16")
    stored = safetensors_files.open_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {"BF16"}
    _, wide = huggingface.load(tmp_path / "model")
    assert wide["embedding"].dtype == jnp.float32
    assert_same(wide, jax.tree.map(lambda x: x.astype(jnp.float32), params))
    _, narrow = huggingface.load(tmp_path / "model", dtype="bfloat16")
    assert narrow["embedding"].dtype == jnp.bfloat16
    assert_same(narrow, params)


@pytest.mark.parametrize(
    ("name", "dtype"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)]
)
def test_rounding_is_to_the_nearest(name, dtype, tmp_path):
    params = params_of(MODEL)
    huggingface.save(tmp_path / name, MODEL, params, dtype=name)
    _, back = huggingface.load(tmp_path / name)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), params)
    assert_same(back, rounded)


def test_names_shapes_and_metadata_are_those_of_transformers(tmp_path):
    params = params_of(MODEL)
    huggingface.save(tmp_path / "model", MODEL, params)
    with safetensors.safe_open(tmp_path / "model" / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = safetensors.load_file(tmp_path / "model" / "model.safetensors")
    assert len(tensors) == 2 + 9 * 3
    assert "lm_head.weight" not in tensors
    q_proj = tensors["model.layers.1.self_attn.q_proj.weight"]
    assert q_proj.shape == (32, 16)
    query_DNH = np.asarray(params["layers"]["attention"]["query"][1])
    np.testing.assert_array_equal(q_proj[8 * 3 + 5], query_DNH[:, 3, 5])
    o_proj = tensors["model.layers.2.self_attn.o_proj.weight"]
    output_NHD = np.asarray(params["layers"]["attention"]["output"][2])
    np.testing.assert_array_equal(o_proj[:, 8 * 3 + 5], output_NHD[3, 5])


def test_shards_and_their_index(tmp_path):
    params = params_of(MODEL)
    huggingface.save(tmp_path / "one", MODEL, params)
    huggingface.save(tmp_path / "many", MODEL, params, max_shard_bytes=8000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    assert not (tmp_path / "many" / "model.safetensors").exists()
    whole = safetensors.load_file(tmp_path / "one" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for file in files:
        tensors = safetensors.load_file(tmp_path / "many" / file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 8000
        assert all(index["weight_map"][name] == file for name in tensors)
    assert_same(huggingface.load(tmp_path / "many")[1], params)

    (tmp_path / "many" / files[1]).unlink()
    assert f"names the shard '{files[1]}'" in refused(tmp_path / "many")


def test_load_puts_each_part_on_its_device(tmp_path):
    """Over two devices, along every axis, the width of a head included."""
    program = f"""
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from smoljax.interop import huggingface
config, whole = huggingface.load({str(tmp_path / "model")!r})
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
for axis in range(4):
    def sharding(leaf):
        spec = [None] * leaf.ndim
        if axis < leaf.ndim and leaf.shape[axis] % 2 == 0:
            spec[axis] = "a"
        return NamedSharding(mesh, PartitionSpec(*spec))
    shardings = jax.tree.map(sharding, whole)
    _, parts = huggingface.load({str(tmp_path / "model")!r}, shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    assert jax.tree.map(lambda leaf: leaf.sharding, parts) == shardings
"""
    huggingface.save(tmp_path / "model", variant(**QWEN3), params_of(variant(**QWEN3)))
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_save_takes_sharded_parameters(tmp_path, folder):
    mesh = jax.make_mesh((1,), ("a",))
    place = NamedSharding(mesh, PartitionSpec())
    params = jax.tree.map(lambda x: jax.device_put(x, place), params_of(MODEL))
    huggingface.save(tmp_path / "again", MODEL, params)
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (folder / "model.safetensors").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_the_parameters_and_one_leaf(tmp_path):
    """Peak memory of a load beyond the parameters themselves, in a fresh process, for a file of 160 MB."""
    config = ModelConfig(
        vocab_size=8192,
        num_layers=6,
        hidden_size=1024,
        intermediate_size=1024,
        num_heads=8,
        num_kv_heads=2,
    )
    params = params_of(config)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert size > 4 * largest
    program = f"""
import re, sys
import jax
from smoljax.interop import huggingface
def peak():  # getrusage would give the peak of the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
if sys.argv[1] == "load":
    jax.device_put(0.0).block_until_ready()
    before = peak()
    _, params = huggingface.load({str(tmp_path / "model")!r})
else:
    _, params = huggingface.load({str(tmp_path / "model")!r})
    config = huggingface.load_config({str(tmp_path / "model")!r})
    jax.numpy.stack([leaf.ravel()[0] for leaf in jax.tree.leaves(params)]).block_until_ready()
    before = peak()
    huggingface.save({str(tmp_path / "again")!r}, config, params)
print(peak() - before)
"""
    huggingface.save(tmp_path / "model", config, params)

    def growth(what):
        result = subprocess.run(
            [sys.executable, "-c", program, what], capture_output=True, text=True, check=True
        )
        return int(result.stdout)

    assert 0.9 * size < growth("load") < size + largest
    assert growth("save") < largest


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_file_that_is_cut_off(folder, kept):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:kept])
    message = refused(folder)
    assert str(file) in message
    assert "cut off" in message or "not a safetensors file" in message
    if kept == -1:
        assert LAST in message or "model.norm.weight" in message


def test_a_damaged_header(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[20:24] = b"\xff\xff\xff\xff"
    file.write_bytes(data)
    assert "damaged header" in refused(folder)


def test_a_header_with_any_byte_changed_is_read_or_refused(folder):
    """Never another kind of exception, and never other numbers under a right name unnoticed by their count."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(0)
    refusals = 0
    for _ in range(300):
        changed = bytearray(data)
        changed[rng.integers(end)] = rng.integers(256)
        file.write_bytes(changed)
        try:
            huggingface.load(folder)
        except SmoljaxError:
            refusals += 1
    assert refusals > 150


def test_a_wrong_shape_a_missing_and_an_extra_tensor(folder):
    def edit(tensors):
        tensors[LAST] = tensors[LAST].T.copy()

    change(folder, edit)
    message = refused(folder)
    assert f"tensor {LAST}" in message
    assert "shape [24, 16], config.json says [16, 24]" in message
    change(folder, lambda tensors: tensors.pop(LAST))
    assert f"tensor {LAST} [16, 24] is missing (1 of 29 are)" in refused(folder)
    change(folder, lambda tensors: tensors.update({LAST: np.zeros((16, 24), np.float32)}))
    huggingface.load(folder)
    bias = "model.layers.0.self_attn.q_proj.bias"
    change(folder, lambda tensors: tensors.update({bias: np.zeros(32, np.float32)}))
    assert f"tensor {bias}" in refused(folder)
    change_config(folder, num_hidden_layers=4, no_rope_layers=[1] * 4, layer_types=None)
    assert "model.layers.3" in refused(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(folder, value):
    def edit(tensors):
        tensors[LAST][15, 23] = value

    change(folder, edit)
    message = refused(folder)
    assert f"tensor {LAST} of {folder / 'model.safetensors'} holds NaN or infinite" in message


def test_other_dtypes_are_refused_by_name(folder):
    change(folder, lambda tensors: tensors.update({LAST: tensors[LAST].astype(np.int8)}))
    assert f"tensor {LAST} of" in refused(folder)
    assert "has dtype I8" in refused(folder)


def test_a_tied_checkpoint_may_repeat_its_embedding(folder):
    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    def differ(tensors):
        tensors["lm_head.weight"][63, 15] += 1

    change(folder, repeat)
    huggingface.load(folder)
    change(folder, differ)
    assert "lm_head.weight" in refused(folder)
    assert "tie_word_embeddings" in refused(folder)


def test_constants_of_old_files_are_passed_over(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(folder, lambda tensors: tensors.update({name: np.zeros(4, np.float32)}))
    huggingface.load(folder)


def test_a_folder_that_is_no_checkpoint(tmp_path, folder):
    assert "config.json does not exist" in refused(tmp_path)
    (folder / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor" in refused(folder)
    change_config(folder, model_type="mistral")
    assert f"{folder / 'config.json'}: model_type is 'mistral'" in refused(folder)
    (folder / "config.json").write_text("[1]")
    assert "expected a JSON object" in refused(folder)
    (folder / "config.json").write_text("{")
    assert "is not JSON" in refused(folder)


def test_unknown_fields_are_reported(folder, caplog):
    change_config(folder, logit_softcap=30.0)
    with caplog.at_level(logging.WARNING, "smoljax"):
        huggingface.load(folder)
    assert "logit_softcap" in caplog.text


def test_training_only_heads_are_left_out_and_named(tmp_path, caplog):
    params = params_of(MODEL)
    with caplog.at_level(logging.WARNING, "smoljax"):
        huggingface.save(tmp_path / "model", MODEL, params | {"mtp": {"kernel": jnp.ones((2, 2))}})
    assert "mtp" in caplog.text
    assert_same(huggingface.load(tmp_path / "model")[1], params)


def spoil(path, edit):
    def spoiled():
        params = params_of(MODEL)
        node = params
        for key in path[:-1]:
            node = node[key]
        edit(node, path[-1])
        return params

    return spoiled


def with_value(value):
    def edit(node, key):
        node[key][-1, -1, -1] = value

    return edit


def transposed(node, key):
    node[key] = node[key].swapaxes(1, 2)


def as_integers(node, key):
    node[key] = node[key].astype(np.int8)


def as_list(node, key):
    node[key] = node[key].tolist()


def removed(node, key):
    del node[key]


def added(node, key):
    node[key] = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("params", "dtype", "words"),
    [
        (spoil(("layers", "mlp", "down"), with_value(np.nan)), "float32", f"{LAST}) holds NaN"),
        (
            spoil(("layers", "mlp", "down"), with_value(1e6)),
            "float16",
            "beyond the range of float16",
        ),
        (
            spoil(("layers", "mlp", "up"), transposed),
            "float32",
            "layers/mlp/up has shape [3, 24, 16]",
        ),
        (spoil(("final_norm",), removed), "float32", "params lack final_norm [16]"),
        (spoil(("layers", "mlp", "bias"), added), "float32", "params have layers/mlp/bias"),
        (spoil(("layers", "mlp", "up"), as_integers), "float32", "layers/mlp/up has dtype int8"),
        (spoil(("layers", "mlp", "up"), as_list), "float32", "layers/mlp/up is a list"),
    ],
)
def test_a_failed_save_leaves_nothing(params, dtype, words, tmp_path):
    with pytest.raises(SmoljaxError) as error:
        huggingface.save(tmp_path / "model", MODEL, params(), dtype=dtype)
    assert words in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_older_folder(folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(SmoljaxError, match="holds NaN"):
        huggingface.save(folder, MODEL, spoil(("layers", "mlp", "down"), with_value(np.nan))())
    assert (folder / "model.safetensors").read_bytes() == before
    assert list(folder.parent.iterdir()) == [folder]


def test_what_is_no_model_folder_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("keep")
    for place in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(SmoljaxError, match="exists and is no Hugging Face folder"):
            huggingface.save(place, MODEL, params_of(MODEL))
    assert (tmp_path / "notes.txt").read_text() == "keep"


def test_neither_torch_nor_transformers_is_imported(folder):
    program = (
        f"import sys; from smoljax.interop import huggingface; huggingface.load({str(folder)!r}); "
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

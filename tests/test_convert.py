"""The verb convert: a run's model out, a Hugging Face folder in, and training goes on from it."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from smoljax import convert
from smoljax.command_line import load_config
from smoljax.errors import SmoljaxError
from smoljax.interop import chat_template, huggingface
from smoljax.model import ModelConfig, init
from smoljax.tokens import tokenizer as tokenizers
from smoljax.training import Run
from smoljax.training.metrics import read_metrics
from smoljax.training.state import make_state
from tests.conftest import with_small_files

CONFIG = "tests/tiny_config.py"


def call(verb, workdir, *arguments):
    return subprocess.run(
        [
            *(sys.executable, "-m", f"smoljax.{verb}"),
            *(f"--config={CONFIG}", f"--workdir={workdir}", *arguments),
        ],
        capture_output=True,
        text=True,
        check=False,
    )


def convert_here(workdir, config=None, **options):
    given = {"to": "", "output": "", "from": "", "dtype": ""} | options
    return convert.main(config or load_config(CONFIG), workdir, **given)


def tiny_model(**fields):
    return ModelConfig(**load_config(CONFIG)["model"] | fields)


def random_params(config):
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return jax.tree.map(
        lambda leaf: (0.05 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes
    )


@pytest.fixture
def folder(tmp_path):
    config = tiny_model()
    huggingface.save(tmp_path / "hf", config, random_params(config))
    return tmp_path / "hf"


@pytest.fixture
def trained(corpus, tmp_path):
    """A run with a tokenizer and a checkpoint, without the training."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "tokenizer").symlink_to(corpus / "tokenizer")
    run = Run(load_config(CONFIG), workdir)
    checkpoints = run.checkpoints()
    checkpoints.save(7, make_state(run.model, run.optimizer, seed=0, shardings=run.shardings))
    checkpoints.close()
    return run


def test_a_folder_comes_in_is_trained_on_and_goes_out(corpus, tmp_path, folder):
    workdir = tmp_path / "run"
    workdir.mkdir()
    for part in ("shards", "tokenizer"):
        (workdir / part).symlink_to(corpus / part)
    result = call("convert", workdir, "--to=orbax", f"--from={folder}")
    assert result.returncode == 0, result.stderr
    assert f"{folder} is step 0 of {workdir}" in result.stderr

    run = Run(load_config(CONFIG), workdir)
    step, params = run.restore_params()
    assert step == 0
    jax.tree.map(np.testing.assert_array_equal, params, huggingface.load(folder)[1])
    convert_here(workdir, to="huggingface", output=str(tmp_path / "same"))
    same = (tmp_path / "same" / "model.safetensors").read_bytes()
    assert same == (folder / "model.safetensors").read_bytes()

    shorter = ("--config.training.num_steps=3", "--config.optimizer.warmup_steps=1")
    result = call("train", workdir, *shorter)
    assert result.returncode == 0, result.stderr
    assert "resuming from step 0" in result.stderr
    rows = [row for row in read_metrics(workdir / "train") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    # The norm before any update: that of the model that came in, and not of a fresh one.
    norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(params)))
    assert rows[0]["param_norm"] == pytest.approx(norm, rel=0.02)


def test_a_run_goes_out_with_its_tokenizer(trained, tmp_path, capsys):
    convert_here(trained.workdir, to="huggingface", output=str(tmp_path / "out"), dtype="bfloat16")
    assert "step 7 of" in capsys.readouterr().err
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files
    assert "chat_template.jinja" not in files  # This tokenizer has no tokens for turns.
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["eos_token_id"], values["dtype"]) == (trained.tokenizer.eos_id, "bfloat16")
    # And from that folder to another, tokenizer included.
    convert_here(
        trained.workdir,
        to="huggingface",
        output=str(tmp_path / "again"),
        dtype="bfloat16",
        **{"from": str(tmp_path / "out")},
    )
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        one, two = (tmp_path / place / name for place in ("out", "again"))
        assert one.read_bytes() == two.read_bytes()


def test_a_tokenizer_with_the_tokens_of_turns_brings_the_chat_template(tmp_path):
    turns = ("<|im_start|>", "<|im_end|>")
    texts = [path.read_text() for path in sorted(Path("smoljax").glob("*.py"))]
    tokenizer = tokenizers.train(texts, tmp_path / "t", vocab_size=512, special_tokens=turns)
    config = tiny_model()
    huggingface.save(tmp_path / "hf", config, random_params(config), tokenizer=tokenizer)
    source = {"from": str(tmp_path / "hf")}
    convert_here(tmp_path / "run", to="huggingface", output=str(tmp_path / "chat"), **source)
    template = (tmp_path / "chat" / "chat_template.jinja").read_text()
    assert template == chat_template.TEMPLATE
    generation = json.loads((tmp_path / "chat" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.special_id("<|im_end|>"), tokenizer.eos_id]
    # A folder that has a template keeps its own.
    (tmp_path / "chat" / "chat_template.jinja").write_text("{{ messages }}")
    source = {"from": str(tmp_path / "chat")}
    convert_here(tmp_path / "run", to="huggingface", output=str(tmp_path / "own"), **source)
    assert (tmp_path / "own" / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("dtype", ["", "q8_0"])
def test_a_run_goes_out_as_gguf(trained, tmp_path, dtype):
    pytest.importorskip("gguf", reason="needs the extra export")
    file = tmp_path / "model.gguf"
    convert_here(trained.workdir, to="gguf", output=str(file), dtype=dtype)
    assert file.read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(("scheme", "tolerance"), [("int8", 0.01), ("int4", 0.15)])
def test_a_folder_goes_out_quantised(tmp_path, folder, scheme, tolerance):
    pytest.importorskip("qwix", reason="needs the extra export")
    from smoljax.interop import quantize

    out = tmp_path / scheme
    convert_here(tmp_path / "run", to=scheme, output=str(out), **{"from": str(folder)})
    config, quantized = quantize.load(out)
    assert config == huggingface.load_config(folder)
    rounded, exact = quantize.dequantize(quantized), huggingface.load(folder)[1]
    error = jax.tree.map(
        lambda a, b: np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)), rounded, exact
    )
    assert 0 < max(jax.tree.leaves(error)) < tolerance
    assert (out / "model.safetensors").stat().st_size < 4 * config.num_params / 2


@pytest.mark.parametrize("target", ["huggingface", "gguf"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, folder, target):
    out = tmp_path / "out"
    out.mkdir()
    arguments = [
        *("-m", "smoljax.convert", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}"),
        *(f"--to={target}", f"--from={folder}", f"--output={out / 'model'}"),
    ]
    result = subprocess.run(
        with_small_files(arguments), capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    message = result.stderr.splitlines()[-1]
    assert message.startswith("error: ")
    assert f"{out / 'model'} c" in message  # ... cannot or could not be written
    assert list(out.iterdir()) == []


def test_a_folder_of_another_model_says_what_to_set(tmp_path):
    config = tiny_model(
        num_layers=3,
        nope_layers=(0,),
        rope_scaling={"kind": "yarn", "factor": 2.0, "original_max_seq_len": 32},
    )
    huggingface.save(tmp_path / "hf", config, random_params(config))
    with pytest.raises(SmoljaxError) as error:
        convert_here(tmp_path / "run", to="orbax", **{"from": str(tmp_path / "hf")})
    message = str(error.value)
    assert "config.model.num_layers is 4, set it to 3" in message
    assert "config.model.nope_layers is None, set it to (0,)" in message
    assert "config.model.rope_scaling is None, set it to {'kind': 'yarn', 'factor': 2.0" in message
    assert f"--to=config --from={tmp_path / 'hf'}" in message
    assert not (tmp_path / "run" / "train").exists()


def test_nope_layers_match_an_interval_that_means_them(tmp_path, folder):
    """How the model is run, and how its NoPE layers are written, is the config's own choice."""
    config = load_config(CONFIG)
    config["model"] |= {"nope_layers": (3,), "compute_dtype": "bfloat16", "max_seq_len": 48}
    convert_here(tmp_path / "run", config, to="orbax", **{"from": str(folder)})
    assert Run(config, tmp_path / "run").restore_params()[0] == 0
    with pytest.raises(SmoljaxError, match="has a checkpoint of step 0"):
        convert_here(tmp_path / "run", config, to="orbax", **{"from": str(folder)})


def test_the_printed_section_is_the_model(tmp_path, folder, capsys):
    convert_here(tmp_path / "run", to="config", **{"from": str(folder)})
    section = capsys.readouterr().out
    from ml_collections import ConfigDict

    config = ConfigDict()
    exec(section, {"config": config, "ConfigDict": ConfigDict})
    assert ModelConfig(**config.model.to_dict()) == huggingface.load_config(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "--to=: set it to one of huggingface, gguf, int8, int4, w8a8, orbax, config"),
        ({"to": "onnx"}, "--to=onnx"),
        ({"to": "huggingface"}, "needs --output=PATH"),
        ({"to": "huggingface", "output": "tests"}, "--output=tests exists"),
        ({"to": "huggingface", "output": "x", "dtype": "q8_0"}, "--dtype=q8_0: with --to=hugg"),
        ({"to": "gguf", "output": "x", "dtype": "bfloat16"}, "it is f32, f16, q8_0, q4_0"),
        ({"to": "orbax"}, "--to=orbax needs --from=HF_FOLDER"),
        ({"to": "orbax", "from": "x", "output": "y"}, "takes no --output"),
        ({"to": "config", "from": "nowhere"}, "nowhere/config.json does not exist"),
        ({"to": "huggingface", "output": "x"}, "no checkpoint in"),
    ],
)
def test_wrong_options_say_what_to_do(options, words, tmp_path):
    with pytest.raises(SmoljaxError) as error:
        convert_here(tmp_path / "run", **options)
    assert words in str(error.value)


def test_help_explains():
    result = subprocess.run(
        [sys.executable, "-m", "smoljax.convert", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "python -m smoljax.convert --config=" in result.stdout
    assert "--from=" in result.stdout

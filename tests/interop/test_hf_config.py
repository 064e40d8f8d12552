"""config.json of SmolLM3, Llama and Qwen3. Expected values are what transformers 5.23 makes of the same fields."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from smoljax.errors import SmoljaxError
from smoljax.interop import hf_config
from smoljax.model import ModelConfig
from smoljax.model.rope import Llama3, Yarn

GOLDEN = Path(__file__).parent / "golden"
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
SMOLLM3 = {"model_type": "smollm3", **SIZES, "num_key_value_heads": 2, "rope_theta": 5e4}
LLAMA = {"model_type": "llama", **SIZES}
QWEN3 = {"model_type": "qwen3", **SIZES, "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
OURS = dict(
    vocab_size=256,
    num_layers=4,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
)


def model(values):
    return hf_config.to_config(values)[0]


def nope(config):
    return [layer for layer in range(config.num_layers) if not config.uses_rope(layer)]


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_files_of_transformers_4_and_5_are_the_same_model(path):
    golden = np.load(path)
    v5, v4 = (json.loads(str(golden[f"config_{version}"])) for version in ("v5", "v4"))
    assert "rope_parameters" in v5
    assert "rope_parameters" not in v4
    assert hf_config.to_config(v5) == hf_config.to_config(v4)
    assert hf_config.to_config(v5)[1] == ()


def test_fields_left_out_have_the_values_of_their_family():
    smollm3 = model({"model_type": "smollm3", **SIZES})
    assert (smollm3.rope_theta, smollm3.num_kv_heads, smollm3.tie_embeddings) == (2e6, 4, True)
    assert nope(smollm3) == [3]
    llama = model(LLAMA)
    assert (llama.rope_theta, llama.num_kv_heads, llama.tie_embeddings) == (1e4, 4, False)
    assert (llama.head_dim, llama.max_seq_len) == (16, 2048)
    qwen3 = model(QWEN3)
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.tie_embeddings) == (128, True, False)


def test_one_in_no_rope_layers_means_that_rope_is_applied():
    config = model(SMOLLM3 | {"no_rope_layers": [1, 1, 1, 0]})
    assert nope(config) == [3]
    assert config.no_rope_layer_interval == 4
    assert nope(model(SMOLLM3 | {"no_rope_layers": [0, 1, 1, 0]})) == [0, 3]
    assert nope(model(SMOLLM3 | {"no_rope_layers": [1, 1, 1, 1]})) == []
    # The list rules over the interval.
    assert nope(model(SMOLLM3 | {"no_rope_layers": [1, 0] * 2, "no_rope_layer_interval": 4})) == [
        1,
        3,
    ]


def test_sliding_windows():
    on = {"use_sliding_window": True, "sliding_window": 8}
    windowed = model(SMOLLM3 | on | {"no_rope_layer_interval": 2})
    assert (windowed.sliding_window, windowed.windowed_layers) == (8, (1, 3))  # The NoPE layers.
    assert model(SMOLLM3 | {"sliding_window": 8}).windowed_layers == ()
    assert model(QWEN3 | on | {"max_window_layers": 3}).windowed_layers == (3,)
    assert model(QWEN3 | on).windowed_layers == ()  # max_window_layers is 28.
    kinds = ["sliding_attention", "full_attention"] * 2
    assert model(SMOLLM3 | on | {"layer_types": kinds}).windowed_layers == (0, 2)


@pytest.mark.parametrize(
    ("section", "scaling"),
    [
        (YARN, Yarn(4.0, 32)),
        (
            YARN | {"beta_fast": 6, "beta_slow": 0.5, "attention_factor": 1.3, "truncate": False},
            Yarn(4.0, 32, 6.0, 0.5, 1.3, False),
        ),
        (
            YARN | {"mscale": 2.0, "mscale_all_dim": 1.0},
            Yarn(
                4.0,
                32,
                attention_factor=(0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1),
            ),
        ),
        (YARN | {"mscale": 2.0}, Yarn(4.0, 32)),  # One alone does nothing.
        (YARN | {"factor": None}, Yarn(1024.0, 32)),  # 32768 / 32
        (LLAMA3, Llama3(8.0, 64, 1.0, 4.0)),
        ({"type": "yarn", "factor": 4.0}, Yarn(4.0, 32768)),  # As old files write it.
        ({"rope_type": "default"}, None),
        (None, None),
    ],
)
def test_rope_scaling(section, scaling):
    old = model(SMOLLM3 | {"rope_scaling": section})
    assert (old.rope_theta, old.rope_scaling) == (5e4, scaling)
    new = {key: value for key, value in SMOLLM3.items() if key != "rope_theta"}
    new = model(new | {"rope_parameters": (section or {}) | {"rope_theta": 5e4}})
    assert new == old


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2', expected one of smollm3, llama, qwen3"),
        ({}, "model_type is None"),
        ({"model_type": ["llama"]}, "model_type is ['llama']"),
        (LLAMA | {"hidden_size": None}, "hidden_size is None"),
        (LLAMA | {"num_hidden_layers": "4"}, "num_hidden_layers is '4'"),
        (LLAMA | {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected"),
        (LLAMA | {"attention_bias": True}, "attention_bias is True"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias is True"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (LLAMA | {"pretraining_tp": 2}, "pretraining_tp is 2"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config is"),
        (LLAMA | {"rope_scaling": {"type": "dynamic"}}, "rope_scaling.rope_type is 'dynamic'"),
        (LLAMA | {"rope_scaling": {"type": "llama3"}}, "rope_scaling.factor is None"),
        (
            LLAMA | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor is 0.5",
        ),
        (
            QWEN3 | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rope_parameters.full_attention",
        ),
        (
            LLAMA | {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            "rope_theta 10000.0 and rope_parameters.rope_theta 500000.0 disagree",
        ),
        (LLAMA | {"rope_parameters": [1]}, "rope_parameters is [1], expected an object"),
        (LLAMA | {"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type is ['yarn']"),
        (LLAMA | {"rope_theta": "big"}, "rope_theta is 'big'"),
        (LLAMA | {"rope_theta": [1e4]}, "rope_theta is [10000.0]"),
        (LLAMA | {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        (LLAMA | {"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
        (
            LLAMA | {"rope_scaling": YARN | {"beta_fast": "fast"}},
            "rope_scaling.beta_fast is 'fast'",
        ),
        (
            LLAMA | {"rope_scaling": YARN | {"original_max_position_embeddings": "64"}},
            "original_max_position_embeddings is '64'",
        ),
        (LLAMA | {"rope_scaling": YARN, "rope_parameters": {"rope_theta": 1e4}}, "two spellings"),
        (LLAMA | {"rope_scaling": None, "rope_parameters": YARN}, "two spellings"),
        (SMOLLM3 | {"no_rope_layers": [1, 1, 1]}, "no_rope_layers is [1, 1, 1], expected 4"),
        (SMOLLM3 | {"no_rope_layers": [[1], 1, 1, 0]}, "no_rope_layers is [[1], 1, 1, 0]"),
        (SMOLLM3 | {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        (SMOLLM3 | {"layer_types": ["full_attention"]}, "layer_types is"),
        (SMOLLM3 | {"layer_types": 4}, "layer_types is 4"),
        (SMOLLM3 | {"layer_types": [[], "", "", ""]}, "layer_types is [[], '', '', '']"),
        (QWEN3 | {"use_sliding_window": "false"}, "use_sliding_window is 'false'"),
        (
            SMOLLM3 | {"layer_types": ["sliding_attention"] * 4, "sliding_window": 8},
            "use_sliding_window is None",
        ),
    ],
)
def test_what_the_decoder_cannot_follow_is_refused_by_name(values, words):
    with pytest.raises(SmoljaxError) as error:
        hf_config.to_config(values)
    assert words in str(error.value)


def test_unknown_fields_are_named():
    values = LLAMA | {
        "sliding_window": 8,
        "rope_scaling": YARN | {"new": 1},
        "attention_dropout": 0.1,
        "logit_cap": 30.0,
        "torch_dtype": "bfloat16",
        "eos_token_id": [2, 3],
    }
    assert set(hf_config.to_config(values)[1]) == {
        "sliding_window",
        "rope_scaling.new",
        "attention_dropout",
        "logit_cap",
    }


@pytest.mark.parametrize(
    ("fields", "family"),
    [
        ({}, "smollm3"),
        ({"no_rope_layer_interval": 2, "tie_embeddings": False, "rope_scaling": YARN}, "smollm3"),
        ({"nope_layers": (0, 3), "rope_scaling": LLAMA3}, "smollm3"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 1.5, "high_freq_factor": 6.0}}, "smollm3"),
        (
            {
                "rope_scaling": YARN
                | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.2, "truncate": False}
            },
            "smollm3",
        ),
        ({"sliding_window": 8, "windowed_layers": (3,)}, "smollm3"),
        # transformers follows an explicit layer_types in layers with RoPE, too.
        ({"sliding_window": 8, "windowed_layers": (0, 3), "head_dim": 32}, "smollm3"),
        ({"no_rope_layer_interval": 0, "sliding_window": 8, "windowed_layers": (0,)}, "smollm3"),
        ({"no_rope_layer_interval": 0, "rope_scaling": LLAMA3, "norm_eps": 1e-5}, "llama"),
        ({"no_rope_layer_interval": 0, "head_dim": 8, "tie_embeddings": False}, "llama"),
        ({"no_rope_layer_interval": 0, "hidden_size": 66, "head_dim": 16}, "smollm3"),
        ({"no_rope_layer_interval": 0, "qk_norm": True, "rope_scaling": YARN}, "qwen3"),
        (
            {
                "no_rope_layer_interval": 0,
                "qk_norm": True,
                "sliding_window": 8,
                "windowed_layers": (1, 3),
            },
            "qwen3",
        ),
    ],
)
def test_what_is_written_comes_back_in_either_spelling(fields, family):
    if section := fields.get("rope_scaling"):
        fields = fields | {"rope_scaling": model(LLAMA | {"rope_scaling": section}).rope_scaling}
    config = ModelConfig(**OURS | fields)
    values = json.loads(json.dumps(hf_config.from_config(config)))
    assert values["model_type"] == family
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 5e4
    assert hf_config.to_config(values) == (config, ())
    for spelling in (("rope_parameters",), ("rope_theta", "rope_scaling")):
        half = {key: value for key, value in values.items() if key not in spelling}
        assert hf_config.to_config(half) == (config, ())


def test_scaling_is_written_for_both_versions_of_transformers():
    config = ModelConfig(**OURS, rope_scaling=Yarn(2.0, 64, truncate=False))
    values = hf_config.from_config(config)
    section = {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    }
    assert values["rope_scaling"] == section
    assert values["rope_parameters"] == section | {"rope_theta": 5e4}
    plain = hf_config.from_config(ModelConfig(**OURS))
    assert plain["rope_scaling"] is None
    assert plain["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e4}
    assert plain["no_rope_layers"] == [1, 1, 1, 0]


def test_ids_without_a_tokenizer_are_null():
    """transformers' default pad id of SmolLM3, 128004, lies outside this vocabulary and would not load."""
    values = hf_config.from_config(ModelConfig(**OURS))
    assert values["pad_token_id"] is None
    assert values["bos_token_id"] is None


def test_what_no_family_expresses_is_refused_by_name():
    with pytest.raises(SmoljaxError, match=r"model\.qk_norm and layers without RoPE"):
        hf_config.from_config(ModelConfig(**OURS, qk_norm=True))
    with pytest.raises(SmoljaxError, match="dtype is 'int8'"):
        hf_config.from_config(ModelConfig(**OURS), dtype="int8")

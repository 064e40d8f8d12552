"""Hugging Face's config.json to ModelConfig and back, for SmolLM3, Llama and Qwen3.

Follows transformers 5.23 (models/{smollm3,llama,qwen3}/configuration_*.py and modeling_rope_utils.py), and writes the
RoPE settings in both spellings: `rope_parameters` (version 5) and `rope_theta` with `rope_scaling` (version 4).
"""

import math
from collections.abc import Mapping

from smoljax.errors import SmoljaxError
from smoljax.interop import hf_rope
from smoljax.model import ModelConfig


def _words(text: str) -> set[str]:
    return set(text.split())


ARCHITECTURES = {
    "smollm3": "SmolLM3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
DTYPES = ("float32", "bfloat16", "float16")

# What a family's configuration class fills in for a field that config.json leaves out.
_DEFAULTS = {
    "smollm3": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "llama": {
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "qwen3": {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}
_DEFAULT_THETA = {"smollm3": 2_000_000.0, "llama": 10_000.0, "qwen3": 10_000.0}

# What is more is a damaged file; each layer is looked at before any tensor is.
_MOST_LAYERS = 10_000

# A field that is read -> values that mean what this decoder does; anything else is another model.
_ONLY = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, 1.0, None),
    "quantization_config": (None,),
    "per_layer_config": (None, {}),
    "is_encoder_decoder": (False, None),
}
_READ = _words(
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim max_position_embeddings original_max_position_embeddings tie_word_embeddings rms_norm_eps "
    "initializer_range rope_theta rope_scaling rope_parameters"
)
_READ_BY_FAMILY = {
    "smollm3": _words(
        "no_rope_layers no_rope_layer_interval use_sliding_window sliding_window layer_types"
    ),
    "llama": set(),
    "qwen3": _words("use_sliding_window sliding_window max_window_layers layer_types"),
}
# Nothing of the network: how it is run or was saved, and token ids, which come with the tokenizer.
_IMMATERIAL = _words(
    "architectures use_cache transformers_version torch_dtype dtype _name_or_path name_or_path bos_token_id eos_token_id "
    "pad_token_id attn_implementation _attn_implementation_autoset output_attentions output_hidden_states return_dict "
    "chunk_size_feed_forward id2label label2id problem_type"
)


def to_config(values: Mapping) -> tuple[ModelConfig, tuple[str, ...]]:
    """The model that a config.json describes, and the names of its fields that are not understood.

    Raises:
      SmoljaxError: another family, a missing size, a field whose value this decoder cannot follow, or two spellings
        of the RoPE settings that disagree; the message names the field.
    """
    family = values.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise SmoljaxError(
            f"config.json: model_type is {family!r}, expected one of {', '.join(ARCHITECTURES)}; other families are not read"
        )
    for field, allowed in _ONLY.items():
        if field in values and values[field] not in allowed:
            raise SmoljaxError(
                f"config.json: {field} is {values[field]!r}, which this decoder does not have; it reads models with "
                f"{field} {allowed[0]!r}"
            )
    given = _DEFAULTS[family] | dict(values)
    num_layers = _size(given, "num_hidden_layers", most=_MOST_LAYERS)
    num_heads = _size(given, "num_attention_heads")
    max_seq_len = _size(given, "max_position_embeddings")
    theta, scaling, unknown_rope = hf_rope.read(given, default_theta=_DEFAULT_THETA[family])
    rope_layers = _rope_layers(given, num_layers) if family == "smollm3" else [True] * num_layers
    window, windowed = _windows(given, family, rope_layers)
    interval, nope_layers = _as_interval(rope_layers, given.get("no_rope_layer_interval"))
    model = ModelConfig(
        vocab_size=_size(given, "vocab_size"),
        num_layers=num_layers,
        hidden_size=_size(given, "hidden_size"),
        intermediate_size=_size(given, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_heads
        if given["num_key_value_heads"] is None
        else _size(given, "num_key_value_heads"),
        head_dim=given.get("head_dim"),
        rope_theta=theta,
        rope_scaling=scaling,
        no_rope_layer_interval=interval,
        nope_layers=nope_layers,
        sliding_window=window,
        windowed_layers=windowed,
        qk_norm=family == "qwen3",
        max_seq_len=max_seq_len,
        tie_embeddings=_flag(given, "tie_word_embeddings"),
        norm_eps=_number(given, "rms_norm_eps", 1e-6),
        init_std=_number(given, "initializer_range", 0.02),
    )
    known = _READ | _READ_BY_FAMILY[family] | _IMMATERIAL | set(_ONLY)
    unknown = [name for name in values if name not in known]
    if not values.get("attention_dropout"):
        unknown = [name for name in unknown if name != "attention_dropout"]
    return model, (*unknown, *unknown_rope)


def from_config(
    config: ModelConfig, *, dtype: str = "float32", tokenizer: object | None = None
) -> dict:
    """The config.json of a model, as a dict.

    The family is the plainest that computes the same: Llama without NoPE layers, windows and QK-norm, Qwen3 with
    QK-norm, SmolLM3 otherwise.

    Args:
      config: the model.
      dtype: of the tensors beside it: "float32", "bfloat16" or "float16".
      tokenizer: gives bos_id, eos_id and pad_id; without one they are null.

    Raises:
      SmoljaxError: no family can express the model; the message names the field.
    """
    if dtype not in DTYPES:
        raise SmoljaxError(f"dtype is {dtype!r}: set it to one of {', '.join(DTYPES)}")
    family = family_of(config)
    values = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": float(config.init_std),
        "rms_norm_eps": float(config.norm_eps),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        # Null, not left out: the family's own default ids lie outside a small vocabulary.
        "bos_token_id": getattr(tokenizer, "bos_id", None),
        "eos_token_id": getattr(tokenizer, "eos_id", None),
        "pad_token_id": getattr(tokenizer, "pad_id", None),
        "dtype": dtype,
        "torch_dtype": dtype,
        **hf_rope.write(config.rope_theta, config.rope_scaling),
    }
    if family != "qwen3":
        values["mlp_bias"] = False
    if family == "smollm3":
        values |= _nope_fields(config)
    if family != "llama":
        values |= _window_fields(config)
    if family == "qwen3":
        values["max_window_layers"] = min(config.windowed_layers, default=config.num_layers)
    return values


def family_of(config: ModelConfig) -> str:
    """The model_type under which a model is written.

    Raises:
      SmoljaxError: no family can express it; the message names the field.
    """
    nope = [layer for layer in range(config.num_layers) if not config.uses_rope(layer)]
    if config.qk_norm:
        if nope:
            raise SmoljaxError(
                f"no Hugging Face family has both model.qk_norm and layers without RoPE (here {nope}): "
                "set model.qk_norm to False, or model.no_rope_layer_interval to 0"
            )
        return "qwen3"
    # LlamaConfig refuses a width that the heads do not divide; SmolLM3Config does not look.
    if nope or config.windowed_layers or config.hidden_size % config.num_heads:
        return "smollm3"
    return "llama"


def _rope_layers(given: Mapping, num_layers: int) -> list[bool]:
    """Per layer whether RoPE is applied. The name `no_rope_layers` is inverted: 1 means that it is."""
    flags = given.get("no_rope_layers")
    if flags is None:
        interval = given.get("no_rope_layer_interval", 4)
        if not isinstance(interval, int) or interval < 1:
            raise SmoljaxError(
                f"config.json: no_rope_layer_interval is {interval!r}, expected a whole number of at least 1"
            )
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if (
        not isinstance(flags, list | tuple)
        or len(flags) < num_layers
        or any(flag not in (0, 1) for flag in flags)
    ):
        raise SmoljaxError(
            f"config.json: no_rope_layers is {flags!r}, expected {num_layers} flags, 1 where RoPE is applied and 0 where not"
        )
    return [bool(flag) for flag in flags[:num_layers]]


def _as_interval(
    rope_layers: list[bool], preferred: int | None
) -> tuple[int, tuple[int, ...] | None]:
    """(no_rope_layer_interval, None) where an interval says it, else (the default, the layers without RoPE)."""
    if all(rope_layers):
        return 0, None
    L = len(rope_layers)
    for interval in (preferred, *range(1, L + 1)):
        if interval and rope_layers == [(layer + 1) % interval != 0 for layer in range(L)]:
            return interval, None
    unused = ModelConfig.no_rope_layer_interval
    return unused, tuple(layer for layer in range(L) if not rope_layers[layer])


def _windows(
    given: Mapping, family: str, rope_layers: list[bool]
) -> tuple[int | None, tuple[int, ...]]:
    """(sliding_window, the layers that have it)."""
    if family == "llama":
        return None, ()
    L = len(rope_layers)
    window = given.get("sliding_window") if _flag(given, "use_sliding_window") else None
    kinds = given.get("layer_types")
    if kinds is None:
        if window is None:
            return None, ()
        if family == "smollm3":
            windowed = [layer for layer in range(L) if not rope_layers[layer]]
        else:
            windowed = list(range(L))[_size(given, "max_window_layers", least=0) :]
    else:
        if (
            not isinstance(kinds, list | tuple)
            or len(kinds) != L
            or any(kind not in ("full_attention", "sliding_attention") for kind in kinds)
        ):
            raise SmoljaxError(
                f"config.json: layer_types is {kinds!r}, expected {L} of full_attention and sliding_attention"
            )
        windowed = [layer for layer in range(L) if kinds[layer] == "sliding_attention"]
        if windowed and window is None:
            raise SmoljaxError(
                f"config.json: layer_types has sliding_attention in layers {windowed}, but use_sliding_window is "
                f"{given.get('use_sliding_window')!r} and sliding_window {given.get('sliding_window')!r}: make them agree"
            )
    return (_size(given, "sliding_window"), tuple(windowed)) if windowed else (None, ())


def _nope_fields(config: ModelConfig) -> dict:
    flags = [config.uses_rope(layer) for layer in range(config.num_layers)]
    interval, _ = _as_interval(flags, config.no_rope_layer_interval)
    return {
        "no_rope_layers": [int(flag) for flag in flags],
        # The list rules; an interval beyond the last layer says "RoPE everywhere" to who reads this alone.
        "no_rope_layer_interval": interval or config.num_layers + 1,
    }


def _window_fields(config: ModelConfig) -> dict:
    windowed = set(config.windowed_layers)
    return {
        "use_sliding_window": bool(windowed),
        "sliding_window": config.sliding_window if windowed else None,
        "layer_types": [
            "sliding_attention" if layer in windowed else "full_attention"
            for layer in range(config.num_layers)
        ],
    }


def _size(given: Mapping, field: str, *, least: int = 1, most: int = 2**31 - 1) -> int:
    value = given.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise SmoljaxError(
            f"config.json: {field} is {value!r}, expected a whole number from {least} to {most:,}"
        )
    return value


def _flag(given: Mapping, field: str) -> bool:
    value = given.get(field)
    if value not in (True, False, None):
        raise SmoljaxError(f"config.json: {field} is {value!r}, expected true or false")
    return bool(value)


def _number(given: Mapping, field: str, default: float) -> float:
    value = given.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise SmoljaxError(f"config.json: {field} is {value!r}, expected a positive number")
    return float(value)

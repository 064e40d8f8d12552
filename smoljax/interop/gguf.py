"""GGUF files, which llama.cpp and what is built on it run: one file with the weights, the tokenizer and the chat template.

llama.cpp compiles each architecture in, so a model goes out as the one that computes the same function, or not at all:

* `smollm3`: no RoPE in every fourth layer; the interval is a constant of llama.cpp, not a field of the file.
* `llama`: RoPE everywhere, with Llama 3's scaling as a tensor of factors.
* `qwen3`: RoPE everywhere, and QK-norm.

smoljax turns the pairs (i, i + H / 2) of a head, as Hugging Face does. For `smollm3` and `llama` llama.cpp turns
neighbours (2 i, 2 i + 1) instead, so the rows of query and key are put in that order here. Attention sees only the
products of queries and keys, so a layer without RoPE gives the same result in any order: a forgotten permutation
still speaks, badly.

H head width, N heads, D model width
"""

import logging
import math
from pathlib import Path

import numpy as np

from smoljax.errors import SmoljaxError, require
from smoljax.files import atomic_path
from smoljax.interop import tokenizers
from smoljax.interop.hf_leaves import Leaf, exported, leaves
from smoljax.model import ModelConfig, rope
from smoljax.tokens.tokenizer import Tokenizer

DTYPES = ("f32", "f16", "q8_0", "q4_0")

_log = logging.getLogger("smoljax")
_NOPE_INTERVAL = 4  # n_no_rope_layer_step of llama.cpp's smollm3.
_BLOCK = 32  # Weights that share a scale, in q8_0 and in q4_0.
_BETAS = (32.0, 1.0)  # llama.cpp's; these architectures do not read the fields for them.
_TENSORS = {
    ("embedding",): "token_embd",
    ("layers", "attention_norm"): "attn_norm",
    ("layers", "attention", "query"): "attn_q",
    ("layers", "attention", "key"): "attn_k",
    ("layers", "attention", "value"): "attn_v",
    ("layers", "attention", "query_norm"): "attn_q_norm",
    ("layers", "attention", "key_norm"): "attn_k_norm",
    ("layers", "attention", "output"): "attn_output",
    ("layers", "mlp_norm"): "ffn_norm",
    ("layers", "mlp", "gate"): "ffn_gate",
    ("layers", "mlp", "up"): "ffn_up",
    ("layers", "mlp", "down"): "ffn_down",
    ("final_norm",): "output_norm",
    ("head",): "output",
}
_ROTATED = (("layers", "attention", "query"), ("layers", "attention", "key"))


def save(
    path: Path | str,
    config: ModelConfig,
    params: dict,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str = "f32",
    chat_template: str | None = None,
    name: str = "smoljax",
) -> None:
    """Writes a GGUF file; it appears whole, in place of an older one, or not at all.

    One tensor of one layer is in host memory at a time.

    Args:
      path: the file ("model-q8_0.gguf").
      config: the model.
      params: its parameters, jax or numpy arrays that this host can reach. A subtree "mtp" is left out.
      tokenizer: written into the file; without one the file holds ids only. Where the model's vocab_size is larger,
        unused tokens fill the difference.
      dtype: of the matrices; gains stay f32. "f32", "f16", "q8_0" (8 bits and an f16 scale for 32 weights: 8.5 bits
        per weight) or "q4_0" (4.5 bits; the output matrix, or the embedding that stands for it, is q8_0). Matrices
        whose rows are no multiple of 32 are f16 in a quantised file, and named in a warning.
      chat_template: Jinja text.
      name: the model's name inside the file.

    Raises:
      SmoljaxError: llama.cpp has no architecture for the model (the field is named), a hidden_size that is no
        multiple of 32 in a quantised file, a tokenizer of an unknown kind, a parameter that is missing, unknown, of
        another shape or not finite, or a disk that is full.
    """
    gguf = require("gguf", extra="export")
    if dtype not in DTYPES:
        raise SmoljaxError(f"dtype is {dtype!r}: set it to one of {', '.join(DTYPES)}")
    architecture = choose_architecture(config)
    fields = _model_fields(config, architecture) | _tokenizer_fields(config, tokenizer)
    if chat_template is not None:
        fields["tokenizer.chat_template"] = chat_template
    flat = exported(config, params, path)
    kinds = {leaf.path: _storage(leaf, config, dtype) for leaf in leaves(config)}
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_name(name)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_file_type(gguf.LlamaFileType[_file_type(dtype)])
        if dtype in ("q8_0", "q4_0"):
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in fields.items():
            _add_field(writer, key, value)
        try:
            _write_tensors(gguf, writer, config, architecture, flat, kinds)
        except OSError as error:
            if error.errno is not None:
                raise
            # numpy's word for a write that was cut short.
            raise SmoljaxError(
                f"{path} could not be written whole ({error}): free some space, or write it elsewhere"
            ) from error
        finally:
            writer.close()


def choose_architecture(config: ModelConfig) -> str:
    """The llama.cpp architecture that computes what `config` says: "smollm3", "llama" or "qwen3".

    Raises:
      SmoljaxError: there is none; the message names the field.
    """
    if config.windowed_layers:
        raise _refusal(
            "windowed_layers", config.windowed_layers, "sliding windows in these architectures"
        )
    with_rope = [config.uses_rope(i) for i in range(config.num_layers)]
    nope_field = "no_rope_layer_interval" if config.nope_layers is None else "nope_layers"
    if all(with_rope):
        architecture = "qwen3" if config.qk_norm else "llama"
    elif config.qk_norm:
        raise _refusal("qk_norm", True, f"QK-norm beside layers without RoPE ({nope_field})")
    elif with_rope == [(i + 1) % _NOPE_INTERVAL != 0 for i in range(config.num_layers)]:
        architecture = "smollm3"
    else:
        raise _refusal(
            nope_field,
            getattr(config, nope_field),
            f"layers without RoPE other than every {_NOPE_INTERVAL}th",
        )
    scaling = config.rope_scaling
    if isinstance(scaling, rope.Llama3) and architecture != "llama":
        raise _refusal("rope_scaling.kind", "llama3", f"this scaling in its {architecture}")
    if isinstance(scaling, rope.Yarn):
        if not scaling.truncate:
            raise _refusal("rope_scaling.truncate", False, "YaRN without rounding")
        if (scaling.beta_fast, scaling.beta_slow) != _BETAS:
            field = "beta_slow" if scaling.beta_fast == _BETAS[0] else "beta_fast"
            raise _refusal(
                f"rope_scaling.{field}",
                getattr(scaling, field),
                f"YaRN with other betas than {_BETAS}",
            )
    return architecture


def _refusal(field: str, value: object, what: str) -> SmoljaxError:
    return SmoljaxError(
        f"model.{field} is {value!r}: llama.cpp has no {what}, so this model has no GGUF form; "
        "export it to Hugging Face instead"
    )


def _model_fields(config: ModelConfig, architecture: str) -> dict[str, object]:
    values: dict[str, object] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_seq_len,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if isinstance(scaling := config.rope_scaling, rope.Yarn):
        values["rope.scaling.type"] = "yarn"
        values["rope.scaling.factor"] = float(scaling.factor)
        values["rope.scaling.original_context_length"] = scaling.original_max_seq_len
        # llama.cpp multiplies cos and sin by YaRN's own 0.1 ln(factor) + 1, and by this.
        usual = rope.Yarn(scaling.factor, scaling.original_max_seq_len).amplitude
        values["rope.scaling.attn_factor"] = float(scaling.amplitude / usual)
    return {f"{architecture}.{key}": value for key, value in values.items()}


def _tokenizer_fields(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, object]:
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    if tokenizer.vocab_size > config.vocab_size:
        raise SmoljaxError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocab_size is {config.vocab_size}: "
            "give the tokenizer that the model was trained with"
        )
    fields = tokenizers.gguf_fields(tokenizer)
    unused = range(tokenizer.vocab_size, config.vocab_size)
    filling = {
        "tokens": [f"[PAD{i}]" for i in unused],
        "scores": [-1000.0] * len(unused),
        "token_type": [tokenizers.UNUSED] * len(unused),
    }
    for key, values in filling.items():
        if (key := f"tokenizer.ggml.{key}") in fields:
            fields[key] = [*fields[key], *values]
    return fields


def _add_field(writer, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _file_type(dtype: str) -> str:
    return {"f32": "ALL_F32"}.get(dtype, f"MOSTLY_{dtype.upper()}")


def _storage(leaf: Leaf, config: ModelConfig, dtype: str) -> str:
    """The GGML type of a leaf's tensors."""
    if len(leaf.tensor_shape) == 1:
        return "F32"
    row = leaf.tensor_shape[-1]
    if dtype.startswith("q") and row % _BLOCK:
        if row == config.hidden_size:  # Nearly all matrices; nothing would be left to quantise.
            raise SmoljaxError(
                f"model.hidden_size is {row}, and {dtype} stores blocks of {_BLOCK} weights of a row: "
                "use dtype f16 or f32"
            )
        _log.warning(
            "%s has rows of %d weights, no multiple of %d: f16 instead of %s",
            "/".join(leaf.path),
            row,
            _BLOCK,
            dtype,
        )
        return "F16"  # What llama.cpp's converter does.
    is_output = leaf.path == (("embedding",) if config.tie_embeddings else ("head",))
    if dtype == "q4_0" and is_output:
        # The output matrix loses most from few bits; llama.cpp's own q4_0 files keep it in 6.
        return "Q8_0"
    return dtype.upper()


def _write_tensors(
    gguf,
    writer,
    config: ModelConfig,
    architecture: str,
    flat: dict[tuple[str, ...], object],
    kinds: dict[tuple[str, ...], str],
) -> None:
    """Announces every tensor, then writes the fields and one tensor after the other."""
    order = [(leaf, i) for leaf in leaves(config) for i in range(max(leaf.layers, 1))]
    factors = None
    if isinstance(config.rope_scaling, rope.Llama3):
        factors = _rope_factors(config)
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for leaf, i in order:
        kind = gguf.GGMLQuantizationType[kinds[leaf.path]]
        _announce(gguf, writer, _tensor_name(leaf, i), leaf.tensor_shape, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for leaf, i in order:
        source = flat[leaf.path][i] if leaf.layers else flat[leaf.path]
        matrix = np.asarray(source, np.float32)
        where = "/".join(leaf.path) + (f" of layer {i}" if leaf.layers else "")
        _check_finite(matrix, where, "has a value that is not finite")
        if leaf.inputs:
            matrix = matrix.reshape(leaf.tensor_shape[::-1]).T
        if leaf.path in _ROTATED and architecture != "qwen3":
            matrix = _neighbours(matrix, config.head_dim)
        data = _stored(gguf, matrix, gguf.GGMLQuantizationType[kinds[leaf.path]])
        if data.dtype == np.float16:
            _check_finite(data, where, "does not fit f16 (65504 at most)")
        writer.write_tensor_data(data)


def _announce(gguf, writer, name: str, shape: tuple[int, ...], kind) -> None:
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        dtype = np.dtype(np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.float16)
        stored_shape = shape
    else:
        dtype = np.dtype(np.uint8)
        stored_shape = gguf.quants.quant_shape_to_byte_shape(shape, kind)
    nbytes = math.prod(stored_shape) * dtype.itemsize
    writer.add_tensor_info(name, stored_shape, dtype, nbytes, raw_dtype=kind)


def _stored(gguf, matrix: np.ndarray, kind) -> np.ndarray:
    with np.errstate(over="ignore"):  # Checked after.
        return gguf.quants.quantize(np.ascontiguousarray(matrix), kind)


def _tensor_name(leaf: Leaf, layer: int) -> str:
    name = f"{_TENSORS[leaf.path]}.weight"
    return f"blk.{layer}.{name}" if leaf.layers else name


def _neighbours(matrix: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows [N H, D] of each head from the order 0, 1, ... to 0, H/2, 1, H/2 + 1, ..."""
    heads = matrix.shape[0] // head_dim
    halves = matrix.reshape(heads, 2, head_dim // 2, -1)
    return halves.swapaxes(1, 2).reshape(matrix.shape)


def _rope_factors(config: ModelConfig) -> np.ndarray:
    """By how much llama.cpp divides each frequency, f32 [H / 2]."""
    plain, scaled = (
        rope.frequencies(head_dim=config.head_dim, theta=config.rope_theta, scaling=scaling)
        for scaling in (None, config.rope_scaling)
    )
    return (plain / scaled).astype(np.float32)


def _check_finite(array: np.ndarray, where: str, what: str) -> None:
    if not np.isfinite(array).all():
        raise SmoljaxError(
            f"parameter {where} {what}: export an earlier checkpoint, or f32 if it is only too large"
        )

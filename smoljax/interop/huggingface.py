"""Hugging Face folders (config.json and safetensors) to parameters and back, without torch or transformers.

Both ways move a few MB at a time. Loading fills one shard of one leaf after the other and puts it on its device, so that
the host holds no more than that shard beside what is already placed.
"""

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from smoljax.errors import SmoljaxError
from smoljax.files import atomic_directory
from smoljax.interop import hf_config, safetensors_files
from smoljax.interop.hf_leaves import Leaf, exported, flatten, leaves, unflatten
from smoljax.interop.safetensors_files import Stored
from smoljax.model import ModelConfig

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"

_log = logging.getLogger("smoljax")
_BLOCK_BYTES = 16 << 20
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_END_OF_TURN = "<|im_end|>"


def load(
    path: Path | str, *, shardings: dict | None = None, dtype: str = "float32"
) -> tuple[ModelConfig, dict]:
    """Reads a SmolLM3, Llama or Qwen3 folder.

    Args:
      path: the folder, with config.json and model.safetensors or its shards, in float32, bfloat16 or float16.
      shardings: the tree of the parameters with a jax Sharding at each leaf; the default device when None.
      dtype: "float32", which holds all three exactly, or "bfloat16".

    Returns:
      the model, and its parameters (see smoljax.model.init) with layers stacked. Fields of config.json that are not
      understood are named in a warning.

    Raises:
      SmoljaxError: the folder is of another family, or a tensor is missing, unknown, cut off, of another shape or
        not finite; the message names the file and the tensor.
    """
    if dtype not in ("float32", "bfloat16"):
        raise SmoljaxError(f"dtype is {dtype!r}: set it to float32 or bfloat16")
    config = load_config(path)
    tensors = safetensors_files.open_folder(path)
    wanted = leaves(config)
    _check_tensors(config, wanted, tensors)
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = {leaf.path: device for leaf in wanted}
    else:
        places = flatten(shardings)
    if {leaf.path for leaf in wanted} != set(places):
        raise SmoljaxError(
            f"the shardings are not those of the model in {path}: make them from load_config({str(path)!r})"
        )
    flat = {
        leaf.path: _load_leaf(leaf, tensors, places[leaf.path], DTYPES[dtype]) for leaf in wanted
    }
    return config, unflatten(flat)


def load_config(path: Path | str) -> ModelConfig:
    """The model of a folder, from its config.json alone.

    Raises:
      SmoljaxError: see hf_config.to_config.
    """
    file = Path(path) / CONFIG_FILE
    try:
        config, unknown = hf_config.to_config(safetensors_files.read_json(file))
    except SmoljaxError as error:
        raise SmoljaxError(str(error).replace("config.json:", f"{file}:", 1)) from error
    if unknown:
        _log.warning(
            "%s: these fields are not understood and not used: %s", file, ", ".join(unknown)
        )
    return config


def save(
    path: Path | str,
    config: ModelConfig,
    params: dict,
    *,
    tokenizer: object | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
    chat_template: str | None = None,
) -> None:
    """Writes a folder that transformers loads; it appears whole, in place of an older model, or not at all.

    Args:
      path: the folder.
      config: the model.
      params: its parameters, jax or numpy arrays that this host can reach. A subtree "mtp" is left out.
      tokenizer: a smoljax tokenizer, exported beside the model and asked for the ids of special tokens.
      dtype: of the tensors: "float32", "bfloat16" or "float16" (rounded to nearest).
      max_shard_bytes: larger checkpoints are cut into shards with an index.
      chat_template: written with the tokenizer.

    Raises:
      SmoljaxError: no Hugging Face family expresses the model, or a parameter is missing, unknown, of another shape
        or not finite in `dtype`.
    """
    _check_place(Path(path))
    values = hf_config.from_config(config, dtype=dtype, tokenizer=tokenizer)
    if chat_template is not None and tokenizer is None:
        raise SmoljaxError("a chat template is written with a tokenizer: give one, too")
    flat = exported(config, params, path)
    for keys, leaf in flat.items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise SmoljaxError(
                f"params {'/'.join(keys)} is spread over several hosts: export from a process that holds all of it"
            )
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise SmoljaxError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocab_size is {config.vocab_size}: "
            "give the tokenizer that the model was trained with"
        )
    sources = {name: (leaf, i) for leaf in leaves(config) for i, name in enumerate(leaf.names)}

    def blocks(name: str) -> Iterator[np.ndarray]:
        leaf, i = sources[name]
        array = _on_host(flat[leaf.path])
        array = array[i] if leaf.layers else array
        return _blocks(name, leaf, np.asarray(array), DTYPES[dtype])

    with atomic_directory(path) as folder:
        safetensors_files.write_folder(
            folder,
            {name: leaf.tensor_shape for name, (leaf, _) in sources.items()},
            blocks,
            dtype=DTYPES[dtype],
            max_shard_bytes=max_shard_bytes,
        )
        _write_json(folder / CONFIG_FILE, values)
        _write_json(folder / GENERATION_FILE, _generation(values, tokenizer, chat_template))
        if tokenizer is not None:
            from smoljax.interop import tokenizers

            tokenizers.export(folder, tokenizer, chat_template=chat_template)


def _check_place(path: Path) -> None:
    """The folder is replaced whole, so it must be one of ours."""
    is_other = path.is_dir() and any(path.iterdir()) and not (path / CONFIG_FILE).is_file()
    if path.is_file() or is_other:
        raise SmoljaxError(
            f"{path} exists and is no Hugging Face folder (it has no {CONFIG_FILE}): name another place"
        )


def _check_tensors(
    config: ModelConfig, wanted: tuple[Leaf, ...], tensors: dict[str, Stored]
) -> None:
    known = {name: leaf.tensor_shape for leaf in wanted for name in leaf.names}
    for name, shape in known.items():
        if name not in tensors:
            absent = [other for other in known if other not in tensors]
            raise SmoljaxError(
                f"tensor {name} {list(shape)} is missing ({len(absent)} of {len(known)} are): "
                "the weights are not those of this config.json, or a part was not downloaded"
            )
        if tensors[name].shape != shape:
            raise SmoljaxError(
                f"tensor {name} of {tensors[name].file} has shape {list(tensors[name].shape)}, config.json says {list(shape)}"
            )
    for name, stored in tensors.items():
        if name in known or name.endswith(
            ".rotary_emb.inv_freq"
        ):  # A constant that old files hold.
            continue
        if name == _HEAD and config.tie_embeddings:
            _check_same(stored, tensors[_EMBEDDING])
            continue
        raise SmoljaxError(
            f"tensor {name} of {stored.file} has no place in this model: config.json is of another one, or incomplete"
        )


def _check_same(head: Stored, embedding: Stored) -> None:
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    for start, stop in _row_blocks(embedding.shape) if same else ():
        same = same and np.array_equal(head.rows(start, stop), embedding.rows(start, stop))
    if not same:
        raise SmoljaxError(
            f"tensor {_HEAD} of {head.file} differs from {_EMBEDDING}, but config.json has tie_word_embeddings true: "
            "set it to false to keep both"
        )


def _load_leaf(
    leaf: Leaf, tensors: dict[str, Stored], sharding: jax.sharding.Sharding, dtype: np.dtype
) -> jax.Array:
    shape = leaf.full_shape
    devices: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        ranges = tuple(range(*part.indices(size)) for part, size in zip(index, shape))
        devices.setdefault(ranges, []).append(device)
    shards = []
    for ranges, same in devices.items():
        shard = _aligned(tuple(map(len, ranges)), dtype)
        per_layer = [tuple(ranges)] if not leaf.layers else [tuple(ranges[1:])] * len(ranges[0])
        names = [leaf.names[i] for i in ranges[0]] if leaf.layers else [leaf.name]
        for i, (name, part) in enumerate(zip(names, per_layer)):
            _fill(shard[i] if leaf.layers else shard, leaf, part, name, tensors[name])
        for device in same:
            shards.append(jax.device_put(shard, device).block_until_ready())
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _fill(
    target: np.ndarray, leaf: Leaf, part: tuple[range, ...], name: str, stored: Stored
) -> None:
    """Reads one layer's part of a tensor into `target` (contiguous, of the part's shape)."""
    split = leaf.inputs or 1
    first, second = _flat(leaf.shape[:split], part[:split]), _flat(leaf.shape[split:], part[split:])
    matrix = target.reshape(len(first), len(second))
    rows, columns = first, second
    if leaf.inputs:
        rows, columns, matrix = second, first, matrix.T
    if len(stored.shape) == 1:
        columns = None
    elif (columns == np.arange(columns[0], columns[0] + len(columns))).all():
        columns = slice(columns[0], columns[0] + len(columns))
    for begin, end in _row_blocks((len(rows), math.prod(stored.shape[1:]))):
        # Consecutive, unless somebody splits the width of a head: then the rows of each head are apart.
        for run in np.split(rows[begin:end], np.flatnonzero(np.diff(rows[begin:end]) != 1) + 1):
            block = stored.rows(run[0], run[-1] + 1)
            block = block[:, None] if columns is None else block[:, columns]
            block = np.asarray(block, np.float32)
            if not np.isfinite(block).all():
                raise SmoljaxError(
                    f"tensor {name} of {stored.file} holds NaN or infinite values: the checkpoint is damaged"
                )
            matrix[begin : begin + len(run)] = block
            begin += len(run)


def _flat(shape: tuple[int, ...], part: tuple[range, ...]) -> np.ndarray:
    """Positions, in the flattened axes, of a part of them."""
    if not shape:
        return np.zeros(1, int)
    return np.arange(math.prod(shape)).reshape(shape)[np.ix_(*part)].reshape(-1)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Empty, at an address that a CPU device takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _on_host(array: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """As numpy where that is a view, so that taking one layer neither compiles a program nor copies."""
    if isinstance(array, jax.Array) and [device.platform for device in array.devices()] == ["cpu"]:
        return np.asarray(array)
    return array


def _row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Row ranges of about _BLOCK_BYTES of float32."""
    step = max(1, _BLOCK_BYTES // (4 * math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _blocks(name: str, leaf: Leaf, array: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The rows of the tensor `name`, from one layer of a leaf."""
    if leaf.inputs:
        array = array.reshape(math.prod(leaf.shape[: leaf.inputs]), -1).T
    for start, stop in _row_blocks(array.shape):
        rows = array[start:stop]
        with np.errstate(over="ignore"):
            cast = np.ascontiguousarray(rows, dtype)
        if not np.isfinite(cast).all():
            if np.isfinite(rows).all():
                raise SmoljaxError(
                    f"params {'/'.join(leaf.path)} (tensor {name}) has values beyond the range of {dtype}: "
                    "export it in bfloat16 or float32"
                )
            raise SmoljaxError(
                f"params {'/'.join(leaf.path)} (tensor {name}) holds NaN or infinite values: "
                "export an older checkpoint"
            )
        yield cast


def _generation(values: dict, tokenizer: object | None, chat_template: str | None) -> dict:
    ids = {key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if chat_template is not None and _END_OF_TURN in chat_template:
        # A chat ends with its turn, a plain text with its document.
        end = tokenizer.special_id(_END_OF_TURN)
        if end not in (None, ids["eos_token_id"]):
            ids["eos_token_id"] = [end, ids["eos_token_id"]]
    return {"_from_model_config": True} | {
        key: value for key, value in ids.items() if value is not None
    }


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

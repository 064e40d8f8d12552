"""Quantised models as folders: model.safetensors with the integers and scales, and config.json that says how to read it.

Two int4 weights share a byte: of neighbours on the last axis, the first has the low half. Everything in config.json is
checked on loading, and so is the SHA-256 of the tensors.
"""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from smoljax import configuration, files, model
from smoljax.errors import SmoljaxError, require
from smoljax.interop.quantized_matrix import QuantizedMatrix
from smoljax.model import ModelConfig

FORMAT = "smoljax-quantized-1"
TENSORS = "model.safetensors"
_DTYPES = {"I8": np.int8, "U8": np.uint8, "F32": np.float32, "BF16": ml_dtypes.bfloat16}


def save(path: Path | str, config: ModelConfig, quantized: dict) -> None:
    """Writes the folder, whole or not at all.

    Args:
      path: folder; an older one is replaced.
      config: the model.
      quantized: of `quantize`.

    Raises:
      SmoljaxError: nothing in the tree is quantised.
    """
    safetensors = require("safetensors.numpy", extra="export")
    tensors, matrices = {}, {}
    for name, node in _flatten(quantized).items():
        if not isinstance(node, QuantizedMatrix):
            tensors[name] = np.asarray(node)
            continue
        qvalue = np.asarray(node.qvalue)
        bits = 4 if qvalue.dtype == ml_dtypes.int4 else 8
        matrices[name] = {
            "bits": bits,
            "shape": list(qvalue.shape),
            "activations": node.activations,
        }
        tensors[f"{name}.qvalue"] = pack(qvalue) if bits == 4 else qvalue
        tensors[f"{name}.scale"] = np.asarray(node.scale)
    if not matrices:
        raise SmoljaxError(
            f"nothing to save in {path}: no parameter is quantised, call quantize.quantize first"
        )
    data = safetensors.save(tensors)
    manifest = {
        "format": FORMAT,
        "model": config.as_section(),
        "matrices": matrices,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    with files.atomic_directory(path) as folder:
        files.atomic_write_bytes(folder / TENSORS, data)
        files.atomic_write_json(folder / "config.json", manifest)


def load(path: Path | str) -> tuple[ModelConfig, dict]:
    """What `save` wrote, bitwise.

    Returns:
      The model and its quantised parameters.

    Raises:
      SmoljaxError: the folder is not one of `save`, or its tensors are damaged, missing, or do not fit the model.
    """
    path = Path(path)
    manifest = _read_manifest(path / "config.json")
    config = configuration.build(ModelConfig, manifest["model"], "model")
    tensors = _read_tensors(path / TENSORS, manifest["sha256"])
    params: dict = {}
    for name, shape in _shapes(config).items():
        node = _read(path / TENSORS, tensors, name, manifest["matrices"].get(name))
        if node.shape != shape:
            raise SmoljaxError(
                f"tensor {name} of {path / TENSORS} has shape {node.shape}, expected {shape} by config.json: quantise "
                "the model again"
            )
        *folders, last = name.split(".")
        at = params
        for folder in folders:
            at = at.setdefault(folder, {})
        at[last] = node
    return config, params


def pack(qvalue: np.ndarray) -> np.ndarray:
    """int4 [..., n] to uint8 [..., ceil(n / 2)], two to a byte; an odd end is filled with 0."""
    nibbles = qvalue.astype(np.int8).view(np.uint8) & 0xF
    if nibbles.shape[-1] % 2:
        nibbles = np.concatenate([nibbles, np.zeros_like(nibbles[..., :1])], axis=-1)
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4


def unpack(packed: np.ndarray, length: int) -> np.ndarray:
    """The reverse of `pack`: int4 [..., length]."""
    nibbles = np.stack([packed & 0xF, packed >> 4], axis=-1)
    nibbles = nibbles.reshape(*packed.shape[:-1], -1)[..., :length].astype(np.int8)
    return np.where(nibbles > 7, nibbles - 16, nibbles).astype(ml_dtypes.int4)


def _read(path: Path, tensors: dict, name: str, entry: dict | None) -> jax.Array | QuantizedMatrix:
    wanted = (name,) if entry is None else (f"{name}.qvalue", f"{name}.scale")
    for tensor in wanted:
        if tensor not in tensors:
            raise SmoljaxError(f"tensor {tensor} is missing from {path}: quantise the model again")
    if entry is None:
        return jnp.asarray(tensors[name])
    qvalue, scale = (tensors[tensor] for tensor in wanted)
    if entry["bits"] == 4:
        qvalue = unpack(qvalue, entry["shape"][-1])
    return QuantizedMatrix(
        jnp.asarray(qvalue), jnp.asarray(scale), activations=entry["activations"]
    )


def _read_manifest(path: Path) -> dict:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SmoljaxError(
            f"{path} does not exist: name a folder that smoljax.interop.quantize.save wrote"
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SmoljaxError(f"{path} is not JSON ({error}): quantise the model again") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise SmoljaxError(
            f"{path} has format {found!r}, expected {FORMAT!r}: name a folder that smoljax.interop.quantize.save wrote"
        )
    for key in ("model", "matrices", "sha256"):
        if key not in manifest:
            raise SmoljaxError(f"{path} lacks the field {key!r}: quantise the model again")
    return manifest


def _read_tensors(path: Path, sha256: str) -> dict[str, np.ndarray]:
    safetensors = require("safetensors", extra="export")
    if not path.is_file():
        raise SmoljaxError(f"{path} does not exist: quantise the model again")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise SmoljaxError(
            f"{path} is cut off or damaged: {len(data)} bytes with SHA-256 {found[:12]}..., expected {sha256[:12]}... by "
            "config.json; copy it again"
        )
    # Not safetensors.numpy: it writes bfloat16 but does not read it.
    return {
        name: np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
        for name, tensor in safetensors.deserialize(data)
    }


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in _flatten(model.param_shapes(config)).items()}


def _flatten(params: dict) -> dict:
    flat, _ = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda node: isinstance(node, QuantizedMatrix)
    )
    return {".".join(key.key for key in path): leaf for path, leaf in flat}

"""Safetensors files, read and written block by block, so that memory does not grow with the file.

The format (huggingface/safetensors, README): 8 bytes little-endian length of a JSON header, the header (name to dtype,
shape and byte range), the tensors' bytes.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from smoljax.errors import SmoljaxError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # As the reference implementation has it.


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a file: dtype as the format names it ("F32"), shape, and where its bytes begin."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of the first axis, mapped from the file: only what is touched is read."""
        row = math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize
        return np.memmap(
            self.file,
            dtype=DTYPES[self.dtype],
            mode="r",
            offset=self.offset + start * row,
            shape=(stop - start, *self.shape[1:]),
        )


def open_folder(folder: Path | str, *, ignored: Collection[str] = ()) -> dict[str, Stored]:
    """All tensors of a folder by name, from model.safetensors or from the shards that its index names.

    Args:
      folder: of a Hugging Face model.
      ignored: names of tensors that are left out, of whatever dtype.

    Raises:
      SmoljaxError: neither is there, a shard is missing, or a file is damaged.
    """
    folder = Path(folder)
    if (folder / SINGLE).is_file():
        return open_file(folder / SINGLE, ignored=ignored)
    index = folder / INDEX
    if not index.is_file():
        raise SmoljaxError(
            f"{folder} holds neither {SINGLE} nor {INDEX}: name the folder of a Hugging Face checkpoint with safetensors "
            "(a pytorch_model.bin is not read: save the model again with safe_serialization=True)"
        )
    return _open_shards(folder, index, ignored)


def _open_shards(folder: Path, index: Path, ignored: Collection[str]) -> dict[str, Stored]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise SmoljaxError(
            f"{index} has no weight_map: it is not the index of a sharded checkpoint"
        )
    tensors: dict[str, Stored] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise SmoljaxError(
                f"{index} names the shard {shard!r}, which is not in {folder}: download it again"
            )
        for name, stored in open_file(folder / shard, ignored=ignored).items():
            if weight_map.get(name) != shard:
                raise SmoljaxError(
                    f"tensor {name} is in {folder / shard}, but {index} has it in {weight_map.get(name)!r}"
                )
            tensors[name] = stored
    for name, shard in weight_map.items():
        if name not in tensors and name not in ignored:
            raise SmoljaxError(f"{index} has tensor {name} in {shard}, which does not hold it")
    return tensors


def open_file(path: Path, *, ignored: Collection[str] = ()) -> dict[str, Stored]:
    """The tensors of one file but the ignored ones, checked to lie inside it.

    Raises:
      SmoljaxError: the file is cut off or is not a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= _LONGEST_HEADER:
            raise SmoljaxError(f"{path} is not a safetensors file ({size} bytes)")
        if 8 + length > size:
            raise SmoljaxError(
                f"{path} is cut off: {size} bytes, its header alone needs {8 + length}"
            )
        header = file.read(length)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        return {
            name: _stored(path, name, entry, begin=8 + length, size=size)
            for name, entry in entries.items()
            if name not in ignored
        }
    except SmoljaxError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise SmoljaxError(f"{path} has a damaged header: {error}") from error


def _stored(path: Path, name: str, entry: dict, *, begin: int, size: int) -> Stored:
    first, last = entry["data_offsets"]
    stored = Stored(path, entry["dtype"], tuple(entry["shape"]), begin + first)
    if first < 0 or begin + last > size:
        raise SmoljaxError(
            f"{path} is cut off: tensor {name} ends at byte {begin + last}, the file has {size}; download it again"
        )
    if stored.dtype not in DTYPES:
        raise SmoljaxError(
            f"tensor {name} of {path} has dtype {stored.dtype}, expected one of {', '.join(DTYPES)}: "
            "a quantised checkpoint must be saved in a floating-point dtype first"
        )
    if last - first != math.prod(stored.shape) * DTYPES[stored.dtype].itemsize:
        raise SmoljaxError(
            f"{path} has a damaged header: tensor {name}, {stored.dtype} {list(stored.shape)}, has {last - first} bytes"
        )
    return stored


def read_json(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
      SmoljaxError: it is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SmoljaxError(
            f"{path} does not exist: name the folder of a Hugging Face model"
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SmoljaxError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise SmoljaxError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def write_folder(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    blocks: Callable[[str], Iterable[np.ndarray]],
    *,
    dtype: np.dtype,
    max_shard_bytes: int,
) -> None:
    """Writes tensors of one dtype as model.safetensors, or as shards with an index when they are larger than allowed.

    Args:
      folder: where; it exists.
      shapes: name to shape, in the order in which they are written.
      blocks: gives the blocks of rows of a tensor, of `dtype`, in order.
      dtype: float32, float16 or bfloat16.
      max_shard_bytes: most bytes of tensors in a file; a tensor that is larger has a file for itself.
    """
    itemsize = np.dtype(dtype).itemsize
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        _write_file(folder / SINGLE, shapes, blocks, dtype)
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, {name: shapes[name] for name in names}, blocks, dtype)
        weight_map |= dict.fromkeys(names, file)
    total = sum(math.prod(shape) for shape in shapes.values())
    index = {
        "metadata": {"total_parameters": total, "total_size": total * itemsize},
        "weight_map": weight_map,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    blocks: Callable[[str], Iterable[np.ndarray]],
    dtype: np.dtype,
) -> None:
    entries: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        entries[name] = {
            "dtype": _NAMES[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name in shapes:
            for block in _bytes_of(blocks(name)):
                file.write(block)
        written = file.tell() - 8 - len(header)
    if written != end:
        raise ValueError(f"{path}: {written} bytes of tensors written, {end} announced")


def _bytes_of(blocks: Iterable[np.ndarray]) -> Iterator[memoryview]:
    for block in blocks:
        yield np.ascontiguousarray(block).reshape(-1).view(np.uint8).data

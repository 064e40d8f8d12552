"""One block of tokens as bytes, and the metadata that makes a folder of blocks a TFDS dataset.

A record is a `tf.Example`, written and read by hand (three message types, four fields) so that neither needs
TensorFlow. Field numbers: tensorflow/core/example/example.proto and feature.proto.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

_VARINT, _BYTES = 0, 2  # protobuf wire types
_BYTES_LIST, _INT64_LIST = 1, 3  # field numbers inside tf.Feature


@dataclasses.dataclass(frozen=True)
class Block:
    """Contiguous tokens of one split with all that is needed to rebuild segments and positions in them.

    Attributes:
      tokens: uint16 or uint32 [n + 1]; n tokens of the block, and the first token of the next one as the last target.
      document_starts: int32, sorted; offsets in [0, n] at which a document begins.
      first_document: index, within the split, of the document that holds tokens[0].
      first_position: position of tokens[0] inside that document.
    """

    tokens: np.ndarray
    document_starts: np.ndarray
    first_document: int
    first_position: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the block itself, without the lookahead."""
        return len(self.tokens) - 1


def encode_block(block: Block) -> bytes:
    """The block as a serialized `tf.Example`; arrays are little-endian bytes."""
    tokens = block.tokens.astype(block.tokens.dtype.newbyteorder("<"), copy=False)
    features = {
        "document_starts": _bytes_feature(block.document_starts.astype("<i4").tobytes()),
        "first_document": _int64_feature(block.first_document),
        "first_position": _int64_feature(block.first_position),
        "tokens": _bytes_feature(tokens.tobytes()),
    }
    entries = (
        _field(1, _field(1, name.encode()) + _field(2, feature))
        for name, feature in features.items()
    )
    return _field(1, b"".join(entries))


def decode_block(record: bytes, dtype: np.dtype) -> Block:
    """The block in a record; its arrays are views of `record`.

    Raises:
      ValueError: the record is not what `encode_block` writes.
    """
    features: dict[str, bytes | int] = {}
    try:
        ((_, example),) = _fields(memoryview(record))
        for _, entry in _fields(example):
            (_, name), (_, feature) = _fields(entry)
            ((kind, content),) = _fields(feature)
            ((_, value),) = _fields(content)
            if kind == _INT64_LIST and not isinstance(value, int):
                value, _ = _read_varint(value, 0)  # packed
            features[bytes(name).decode()] = value
        return Block(
            tokens=np.frombuffer(features["tokens"], dtype),
            document_starts=np.frombuffer(features["document_starts"], "<i4"),
            first_document=features["first_document"],
            first_position=features["first_position"],
        )
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"not a block of tokens: {error}") from error


def tfds_features(dtype: np.dtype) -> dict:
    """Content of `features.json`: how TFDS reads the records."""

    def array(dtype: str) -> dict:
        return _tfds_feature("tensor_feature.Tensor", dtype, "bytes", {"dimensions": ["-1"]})

    scalar = _tfds_feature("scalar.Scalar", "int64", "none", {})
    return {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {
            "features": {
                "document_starts": array("int32"),
                "first_document": scalar,
                "first_position": scalar,
                "tokens": array(np.dtype(dtype).name),
            }
        },
    }


def tfds_info(name: str, version: str, splits: dict[str, list[dict]]) -> dict:
    """Content of `dataset_info.json`; `splits` holds, for each split, its files as {"bytes", "blocks"}."""
    return {
        "name": name,
        "version": version,
        "description": "Token blocks with document starts, written by smoljax.",
        "fileFormat": "array_record",
        "splits": [
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": str(sum(file["bytes"] for file in files)),
                "shardLengths": [str(file["blocks"]) for file in files],
            }
            for split, files in splits.items()
            if files
        ],
    }


def tfds_file_name(name: str, split: str, number: int, count: int) -> str:
    """The name that TFDS expects of file `number` of `count`."""
    return f"{name}-{split}.array_record-{number:05d}-of-{count:05d}"


def _tfds_feature(kind: str, dtype: str, encoding: str, shape: dict) -> dict:
    return {
        "pythonClassName": f"tensorflow_datasets.core.features.{kind}",
        "tensor": {"dtype": dtype, "encoding": encoding, "shape": shape},
    }


def _bytes_feature(value: bytes) -> bytes:
    return _field(_BYTES_LIST, _field(1, value))


def _int64_feature(value: int) -> bytes:
    return _field(_INT64_LIST, _field(1, _varint(value)))


def _field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | _BYTES]) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        value, at = _read_varint(message, at)
        if key & 7 == _BYTES:
            if at + value > len(message):
                raise ValueError("it ends inside a field")
            yield key >> 3, message[at : at + value]
            at += value
        elif key & 7 == _VARINT:
            yield key >> 3, value
        else:
            raise ValueError(f"wire type {key & 7} is not used in a tf.Example")


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7

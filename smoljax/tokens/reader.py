"""Random access to the blocks of token shards; refuses shards that are damaged or of another tokenizer."""

import json
import threading
import zlib
from pathlib import Path

import numpy as np

from smoljax.errors import SmoljaxError, require
from smoljax.tokens.records import Block, decode_block
from smoljax.tokens.shards import (
    FORMAT,
    MANIFEST_FILE,
    SPLITS,
    document_id_files,
    file_sha256,
)

_AGAIN = "delete the folder and write the shards again, or copy the file again from where it came"


def read_manifest(directory: Path | str) -> dict:
    """The manifest of a folder of shards.

    Raises:
      SmoljaxError: there is none, or it is not one of token shards.
    """
    path = Path(directory) / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest.get("format")
    except FileNotFoundError as error:
        raise SmoljaxError(
            f"token shards are missing: {path} does not exist; tokenize the documents of this source first"
        ) from error
    except (ValueError, AttributeError) as error:
        raise SmoljaxError(f"{path} is damaged (not a JSON manifest: {error}): {_AGAIN}") from error
    if found != FORMAT:
        raise SmoljaxError(f"{path} has format {found!r}, expected {FORMAT!r}: {_AGAIN}")
    return manifest


class ShardReader:
    """Blocks of one split of one source, by number. Can be pickled, and used by several threads.

    Args:
      directory: the folder that holds manifest.json (`shard_directory(root, source)`).
      split: "train" or "heldout".
      expected_fingerprint: of the tokenizer that the model is trained with; None accepts any.

    Attributes:
      manifest: what the writer noted.
      source, block_tokens: name of the source; tokens in each block but the last.
      num_blocks, num_tokens, num_documents, text_bytes: counts of the split.

    Raises:
      SmoljaxError: a file is missing or has another size than the manifest says, or the tokenizer differs.
    """

    def __init__(
        self,
        directory: Path | str,
        split: str,
        *,
        expected_fingerprint: str | None = None,
    ):
        self._directory, self._split = Path(directory), split
        self.manifest = read_manifest(directory)
        if split not in self.manifest["splits"]:
            raise SmoljaxError(
                f"split {split!r} is not in {self._directory}; expected one of {', '.join(SPLITS)}"
            )
        found = self.manifest["tokenizer"]["fingerprint"]
        if expected_fingerprint is not None and found != expected_fingerprint:
            raise SmoljaxError(
                f"{self._directory} was written with the tokenizer {found[:16]}..., but this run uses "
                f"{expected_fingerprint[:16]}...: tokenize the documents again, or name the tokenizer they were "
                "written with"
            )
        content = self.manifest["splits"][split]
        self.source = self.manifest["source"]
        self.block_tokens = self.manifest["block_tokens"]
        self.num_blocks, self.num_tokens = content["blocks"], content["tokens"]
        self.num_documents, self.text_bytes = content["documents"], content["text_bytes"]
        self._files = content["files"]
        self._first_blocks = np.cumsum([0, *(file["blocks"] for file in self._files)])
        self._readers: dict[int, object] = {}
        self._lock = threading.Lock()
        for file in self._files:
            self._check_size(file)

    def block(self, number: int) -> Block:
        """Reads one block in a single range and checks its CRC.

        Raises:
          SmoljaxError: the block is damaged; names the file.
          IndexError: there is no such block.
        """
        if not 0 <= number < self.num_blocks:
            raise IndexError(f"block {number} of {self.num_blocks}")
        at = int(np.searchsorted(self._first_blocks, number, side="right")) - 1
        inside = int(number - self._first_blocks[at])
        path = self._directory / self._files[at]["name"]
        try:
            (record,) = self._reader(at, path).read([inside])
        except Exception as error:  # The library raises RuntimeError, IndexError and ValueError.
            raise SmoljaxError(
                f"{path} is damaged: block {inside} cannot be read ({_first_line(error)}): {_AGAIN}"
            ) from error
        crc, expected = f"{zlib.crc32(record):08x}", self._files[at]["crc32"][inside]
        if crc != expected:
            raise SmoljaxError(
                f"{path} is damaged: block {inside} has CRC {crc}, the manifest says {expected}: {_AGAIN}"
            )
        return decode_block(record, np.dtype(self.manifest["dtype"]))

    def document_id(self, index: int) -> str:
        """The id of a document of this split, by the index that blocks and batches carry."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        text_path, offsets_path = document_id_files(self._directory, self._split)
        try:
            begin, end = np.fromfile(offsets_path, "<u8", count=2, offset=8 * index).tolist()
            with text_path.open("rb") as file:
                file.seek(begin)
                return file.read(end - begin).decode("utf-8")
        except (OSError, ValueError) as error:
            raise SmoljaxError(
                f"{text_path} or its offsets are damaged ({error}): {_AGAIN}"
            ) from error

    def verify(self) -> None:
        """Reads every file of the split and compares its SHA-256 with the manifest.

        Raises:
          SmoljaxError: names the first file that differs.
        """
        expected = {self._directory / file["name"]: file["sha256"] for file in self._files}
        id_files = document_id_files(self._directory, self._split)
        id_hashes = self.manifest["splits"][self._split]["document_ids_sha256"]
        expected.update(zip(id_files, id_hashes, strict=True))
        for path, sha256 in expected.items():
            found = file_sha256(path) if path.is_file() else "missing"
            if found != sha256:
                raise SmoljaxError(
                    f"{path} is damaged: SHA-256 is {found[:16]}, the manifest says {sha256[:16]}: {_AGAIN}"
                )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_readers": {}, "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def _reader(self, at: int, path: Path) -> object:
        with self._lock:
            if at not in self._readers:
                module = require("array_record.python.array_record_module", extra="train")
                # No read-ahead: blocks are read in permuted order.
                self._readers[at] = module.ArrayRecordReader(str(path), "readahead_buffer_size:0")
            return self._readers[at]

    def _check_size(self, file: dict) -> None:
        path = self._directory / file["name"]
        if not path.is_file():
            raise SmoljaxError(f"shard {path} is missing, though the manifest lists it: {_AGAIN}")
        if (size := path.stat().st_size) != file["bytes"]:
            raise SmoljaxError(
                f"{path} is damaged: it has {size:,} bytes, the manifest says {file['bytes']:,}: {_AGAIN}"
            )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__

"""Writes token shards: blocks of about 1 MB in ArrayRecord files, with document ids and a manifest.

Layout of `<root>/<source>/1.0.0/`:

    manifest.json                                       counts, hashes, tokenizer, what it was made from
    <source>-<split>.array_record-00000-of-00002        one record = one block (see records.Block)
    document_ids-<split>.utf8, .offsets                 ids end to end, and where each begins
    dataset_info.json, features.json                    make the folder a TFDS dataset

Every document is stored as bos, its tokens, eos, and documents follow each other without gaps, so one block can
hold the end of one document, several whole ones and the beginning of another.
"""

import collections
import contextlib
import errno
import hashlib
import json
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from smoljax.errors import SmoljaxError, require
from smoljax.files import atomic_directory, atomic_write_json
from smoljax.progress import Progress
from smoljax.tokens.records import Block, encode_block, tfds_features, tfds_file_name, tfds_info
from smoljax.tokens.tokenizer import Tokenizer

VERSION = "1.0.0"  # TFDS finds a dataset at <name>/<version>.
FORMAT = "smoljax token shards, version 1"
SPLITS = ("train", "heldout")
MANIFEST_FILE = "manifest.json"
BLOCK_TOKENS = 2**19  # 1 MiB of uint16
TOKENS_PER_FILE = 2**27
_BATCH_CHARACTERS = 4 * 2**20  # Text encoded at a time: bounds memory, and keeps the threads busy.


def shard_directory(root: Path | str, source: str) -> Path:
    """Where the shards of `source` lie below `root`."""
    return Path(root) / source / VERSION


def write_shards(
    documents: Iterable[tuple[str, str, str]],
    directory: Path | str,
    tokenizer: Tokenizer,
    *,
    source: str,
    inputs_fingerprint: str | None = None,
    block_tokens: int = BLOCK_TOKENS,
    tokens_per_file: int = TOKENS_PER_FILE,
    num_threads: int | None = None,
    progress: Progress | None = None,
) -> dict:
    """Tokenizes documents into the shards of one source, in bounded memory; all of them appear, or none.

    Args:
      documents: (split, document id, text) in the order to store; splits are "train" and "heldout".
      directory: the root; the shards go to `<directory>/<source>/1.0.0/`.
      tokenizer: its fingerprint goes into the manifest.
      source: a name that TFDS accepts: small letters, digits and underscores, a letter first.
      inputs_fingerprint: hash of what the documents are. Shards that were made from the same inputs with the same
        tokenizer and sizes are left as they are, and `documents` is not read; None writes them anew.
      block_tokens: tokens in a block: the longest sequence that can be trained on, and what one read fetches.
      tokens_per_file: a new file begins after about this many tokens.
      num_threads: threads that encode; all cores by default.
      progress: told how many documents are done.

    Returns:
      the manifest.

    Raises:
      SmoljaxError: a name or size is wrong, or the disk is full.
    """
    _check_arguments(source, block_tokens, tokens_per_file)
    folder = shard_directory(directory, source)
    recipe = {
        "inputs_fingerprint": inputs_fingerprint,
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
        },
        "block_tokens": block_tokens,
        "tokens_per_file": tokens_per_file,
    }
    if inputs_fingerprint is not None and (manifest := _finished(folder, recipe)):
        return manifest
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    with atomic_directory(folder) as temporary:
        with contextlib.ExitStack() as stack:
            writers = {
                split: stack.enter_context(
                    _SplitWriter(temporary, source, split, tokenizer, dtype, recipe)
                )
                for split in SPLITS
            }
            done = 0
            for batch in _batches(documents):
                encoded = tokenizer.encode_batch(
                    [text for _, _, text in batch], num_threads=num_threads
                )
                for (split, document_id, text), ids in zip(batch, encoded, strict=True):
                    if split not in writers:
                        raise SmoljaxError(
                            f"document {document_id!r} of source {source!r} has split {split!r}; "
                            f"expected one of {', '.join(SPLITS)}"
                        )
                    writers[split].add(document_id, text, ids)
                done += len(batch)
                if progress:
                    progress.update(done)
            splits = {split: writer.finish() for split, writer in writers.items()}
        files = {split: content["files"] for split, content in splits.items()}
        atomic_write_json(temporary / "features.json", tfds_features(dtype))
        atomic_write_json(temporary / "dataset_info.json", tfds_info(source, VERSION, files))
        manifest = {
            "format": FORMAT,
            "source": source,
            "dtype": dtype.name,
            **recipe,
            "splits": splits,
        }
        atomic_write_json(temporary / MANIFEST_FILE, manifest)
    if progress:
        progress.close()
    return manifest


class _SplitWriter:
    """Cuts the stream of one split into blocks and files."""

    def __init__(
        self,
        folder: Path,
        source: str,
        split: str,
        tokenizer: Tokenizer,
        dtype: np.dtype,
        recipe: dict,
    ):
        self._folder, self._source, self._split, self._dtype = folder, source, split, dtype
        self._bos, self._eos = (np.array([i], dtype) for i in (tokenizer.bos_id, tokenizer.eos_id))
        self._block_tokens = recipe["block_tokens"]
        self._blocks_per_file = max(1, recipe["tokens_per_file"] // self._block_tokens)
        self._pending: list[np.ndarray] = []  # tokens that are in no block yet
        self._num_pending = 0
        self._block_start = 0  # index, in the split, of the first pending token
        self._starts: collections.deque[int] = collections.deque()  # documents that begin in it
        self._document, self._document_start = -1, 0  # the last document that began before it
        self._documents = self._tokens = self._text_bytes = 0
        self._files: list[dict] = []
        self._writer = None
        self._ids = _DocumentIds(folder, split)

    def __enter__(self) -> "_SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._ids.close()
        if self._writer is not None:
            with contextlib.suppress(Exception):  # Only after an error, which says more.
                self._writer.close()

    def add(self, document_id: str, text: str, ids: np.ndarray) -> None:
        """Appends one document."""
        self._starts.append(self._tokens)
        self._pending += [self._bos, ids.astype(self._dtype), self._eos]
        self._num_pending += len(ids) + 2
        self._tokens += len(ids) + 2
        self._documents += 1
        self._text_bytes += len(text.encode("utf-8"))
        self._ids.add(document_id)
        if self._num_pending > self._block_tokens:  # A block needs the token that follows it.
            self._write_full_blocks()

    def finish(self) -> dict:
        """Writes the last block, gives the files their final names, and returns the split's manifest."""
        if self._num_pending:
            self._pending.append(self._bos)  # What would follow: the next document.
            self._starts.append(self._tokens)
            tokens = np.concatenate(self._pending)
            self._write_block(tokens)
        self._close_file()
        for number, file in enumerate(self._files):
            name = tfds_file_name(self._source, self._split, number, len(self._files))
            os.replace(self._folder / file["name"], self._folder / name)
            file["name"] = name
        return {
            "documents": self._documents,
            "tokens": self._tokens,
            "text_bytes": self._text_bytes,
            "blocks": sum(file["blocks"] for file in self._files),
            "document_ids_sha256": self._ids.finish(),
            "files": self._files,
        }

    def _write_full_blocks(self) -> None:
        tokens, size = np.concatenate(self._pending), self._block_tokens
        start = 0
        while len(tokens) - start > size:
            self._write_block(tokens[start : start + size + 1])
            start += size
        self._pending = [tokens[start:]]
        self._num_pending = len(tokens) - start

    def _write_block(self, tokens: np.ndarray) -> None:
        size = len(tokens) - 1
        starts, end = [], self._block_start + size
        begins_with_document = bool(self._starts) and self._starts[0] == self._block_start
        first_document = self._document + begins_with_document
        first_position = 0 if begins_with_document else self._block_start - self._document_start
        while self._starts and self._starts[0] < end:
            self._document_start = self._starts.popleft()
            self._document += 1
            starts.append(self._document_start - self._block_start)
        if self._starts and self._starts[0] == end:  # It stays: the next block begins with it.
            starts.append(size)
        record = encode_block(
            Block(tokens, np.array(starts, np.int32), first_document, first_position)
        )
        if self._writer is None:
            self._open_file()
        with _full_disk_as_oserror():
            self._writer.write(record)
        file = self._files[-1]
        file["blocks"] += 1
        file["tokens"] += size
        file["crc32"].append(f"{zlib.crc32(record):08x}")
        if file["blocks"] == self._blocks_per_file:
            self._close_file()
        self._block_start = end

    def _open_file(self) -> None:
        module = require("array_record.python.array_record_module", extra="train")
        name = f"{self._split}-{len(self._files):05d}.unfinished"
        self._files.append(
            {"name": name, "bytes": 0, "sha256": "", "blocks": 0, "tokens": 0, "crc32": []}
        )
        # One record per chunk and no compression: a block is one contiguous range of the file.
        self._writer = module.ArrayRecordWriter(
            str(self._folder / name), "group_size:1,uncompressed"
        )

    def _close_file(self) -> None:
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        with _full_disk_as_oserror():
            writer.close()
        file = self._files[-1]
        path = self._folder / file["name"]
        file["bytes"] = path.stat().st_size
        file["sha256"] = file_sha256(path)


class _DocumentIds:
    """Appends document ids to a file, and to another where each begins."""

    def __init__(self, folder: Path, split: str):
        self._paths = document_id_files(folder, split)
        self._text, self._offsets = (path.open("wb") for path in self._paths)
        self._offsets.write(struct.pack("<Q", 0))

    def add(self, document_id: str) -> None:
        self._text.write(document_id.encode("utf-8"))
        self._offsets.write(struct.pack("<Q", self._text.tell()))

    def close(self) -> None:
        self._text.close()
        self._offsets.close()

    def finish(self) -> list[str]:
        self.close()
        return [file_sha256(path) for path in self._paths]


def document_id_files(folder: Path, split: str) -> tuple[Path, Path]:
    """Files that hold the ids of the documents of a split, end to end, and their n + 1 offsets (little-endian u64)."""
    return folder / f"document_ids-{split}.utf8", folder / f"document_ids-{split}.offsets"


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _batches(documents: Iterable[tuple[str, str, str]]) -> Iterator[list[tuple[str, str, str]]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document[2]) + 100  # Empty documents count too.
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _finished(folder: Path, recipe: dict) -> dict | None:
    """The manifest in `folder` when it was made by `recipe` and its files are all there."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or any(manifest[key] != recipe[key] for key in recipe):
            return None
        for split, content in manifest["splits"].items():
            if any((folder / f["name"]).stat().st_size != f["bytes"] for f in content["files"]):
                return None
            if not all(path.is_file() for path in document_id_files(folder, split)):
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest


def _check_arguments(source: str, block_tokens: int, tokens_per_file: int) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", source):
        fixed = re.sub(r"[^a-z0-9_]+", "_", source.lower())
        raise SmoljaxError(
            f"source name {source!r} cannot name a TFDS dataset: use small letters, digits and underscores, a "
            f"letter first ({fixed if fixed[:1].isalpha() else 'source_' + fixed!s})"
        )
    if block_tokens < 2 or block_tokens > 2**30:
        raise SmoljaxError(f"block_tokens is {block_tokens}, expected 2 to {2**30}")
    if tokens_per_file < block_tokens:
        raise SmoljaxError(
            f"tokens_per_file is {tokens_per_file}, less than one block of {block_tokens} tokens"
        )


@contextlib.contextmanager
def _full_disk_as_oserror() -> Iterator[None]:
    """The ArrayRecord writer reports a full disk by a RuntimeError's text."""
    try:
        yield
    except RuntimeError as error:
        for code in (errno.ENOSPC, errno.EDQUOT):
            if os.strerror(code) in str(error):
                raise OSError(code, str(error)) from error
        raise

"""Signatures of a shard's documents on disk, so that one bucket of all shards can be read without the others.

A file is a header and blocks of documents. A block holds the rows of its documents (uint32 [n]) and then, bucket by
bucket, their bands (uint64 [n, hashes_per_bucket]); all blocks but the last hold the same number of documents. The
header gives the shape, a checksum for the rows and for each bucket over all blocks, and its own checksum: a file that
was cut, or changed in any byte that is read, is named before a decision rests on it.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from smoljax.curation import storage
from smoljax.curation.dedup.minhash import MinHashConfig
from smoljax.errors import SmoljaxError

_MAGIC = b"smoljax minhash1"
_ROW, _HASH = np.dtype("<u4"), np.dtype("<u8")
# Documents per block: 7 MB of FineWeb's signatures, and reads of half a megabyte per bucket.
_BLOCK = 8192


class Writer:
    """Writes a shard's signatures, as they come, in bounded memory."""

    def __init__(self, path: Path, config: MinHashConfig):
        self._path, self._config = path, config

    def __enter__(self) -> "Writer":
        config = self._config
        self._rows = np.empty(_BLOCK, _ROW)
        self._bands = np.empty((_BLOCK, config.buckets, config.hashes_per_bucket), _HASH)
        self._waiting = self._documents = self._signed = 0
        self._digests = [xxhash.xxh3_128() for _ in range(1 + config.buckets)]
        self._file = open(self._path, "wb")
        self._file.write(bytes(_header_bytes(config.buckets)))
        return self

    def add(self, signatures: np.ndarray, valid: np.ndarray) -> None:
        """Takes the next documents' `minhash.signatures`."""
        bands = signatures[valid].reshape(-1, self._config.buckets, self._config.hashes_per_bucket)
        rows = self._documents + np.flatnonzero(valid)
        self._documents += len(valid)
        for start in range(0, len(rows), _BLOCK):
            self._fill(rows[start : start + _BLOCK], bands[start : start + _BLOCK])

    def __exit__(self, kind: type | None, *_: object) -> None:
        with self._file:
            if kind is None:
                self._flush()
                self._file.seek(0)
                self._file.write(self._header())

    def _fill(self, rows: np.ndarray, bands: np.ndarray) -> None:
        fits = min(len(rows), _BLOCK - self._waiting)
        for part in (slice(0, fits), slice(fits, None)):
            if self._waiting == _BLOCK:
                self._flush()
            here = slice(self._waiting, self._waiting + len(rows[part]))
            self._rows[here], self._bands[here] = rows[part], bands[part]
            self._waiting = here.stop

    def _flush(self) -> None:
        n, self._waiting = self._waiting, 0
        self._signed += n
        sections = [self._rows[:n], *(self._bands[:n, b] for b in range(self._config.buckets))]
        for digest, section in zip(self._digests, sections):
            data = section.tobytes()
            digest.update(data)
            self._file.write(data)

    def _header(self) -> bytes:
        config = self._config
        fields = {
            "documents": self._documents,
            "signed": self._signed,
            "config": asdict(config),
            "checksums": [digest.hexdigest() for digest in self._digests],
        }
        size = _header_bytes(config.buckets)
        text = json.dumps(fields).encode().ljust(size - len(_MAGIC) - 16)
        return _MAGIC + xxhash.xxh3_128_digest(text) + text


class Reader:
    """A shard's signature file, local or at a URL.

    Attributes:
      documents: rows of the shard, signed or not.
    """

    def __init__(self, path: str, config: MinHashConfig):
        """Reads and checks the header.

        Raises:
          SmoljaxError: the file is missing, cut, damaged, or of other signatures than `config` makes.
        """
        self._path, self._config = path, config
        self._header_size = _header_bytes(config.buckets)
        size = storage.size(path)
        if size is None:
            raise _damaged(path, "it is missing")
        with storage.open_file(path) as file:
            header = file.read(self._header_size)
        text = header[len(_MAGIC) + 16 :]
        if header[: len(_MAGIC)] != _MAGIC:
            raise _damaged(
                path, "it does not begin as a signature file, or was not written to its end"
            )
        if header[len(_MAGIC) : len(_MAGIC) + 16] != xxhash.xxh3_128_digest(text):
            raise _damaged(path, "its header does not fit the header's checksum")
        fields = json.loads(text)
        if fields["config"] != asdict(config):
            raise SmoljaxError(
                f"the signatures in {path} were made with {fields['config']}, but {asdict(config)} is asked "
                "for: make them again, or take the configuration that made them"
            )
        self.documents, self._signed = fields["documents"], fields["signed"]
        self._checksums = fields["checksums"]
        record = _ROW.itemsize + config.buckets * config.hashes_per_bucket * _HASH.itemsize
        expected = self._header_size + self._signed * record
        if size != expected:
            raise _damaged(path, f"it has {size} bytes instead of {expected}")
        self._record = record

    def bucket(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Blocks of (rows uint32 [n], bands uint64 [n, hashes_per_bucket]) of one bucket.

        Raises:
          SmoljaxError: after the last block, if what was read does not fit the checksums.
        """
        band_bytes = self._config.hashes_per_bucket * _HASH.itemsize
        rows_digest, bands_digest = xxhash.xxh3_128(), xxhash.xxh3_128()
        with storage.open_file(self._path) as file:
            for start in range(0, self._signed, _BLOCK):
                n = min(_BLOCK, self._signed - start)
                at = self._header_size + start * self._record
                rows = self._read(file, at, n * _ROW.itemsize)
                at += n * (_ROW.itemsize + number * band_bytes)
                bands = self._read(file, at, n * band_bytes)
                rows_digest.update(rows)
                bands_digest.update(bands)
                shape = (n, self._config.hashes_per_bucket)
                yield np.frombuffer(rows, _ROW), np.frombuffer(bands, _HASH).reshape(shape)
        found = [rows_digest.hexdigest(), bands_digest.hexdigest()]
        if found != [self._checksums[0], self._checksums[1 + number]]:
            raise _damaged(self._path, f"the bytes of bucket {number} do not fit their checksum")

    def _read(self, file: BinaryIO, at: int, size: int) -> bytes:
        file.seek(at)
        data = file.read(size)
        if len(data) != size:
            raise _damaged(self._path, f"it was cut while it was read, at byte {at + len(data)}")
        return data


def _header_bytes(buckets: int) -> int:
    return 1024 + 64 * buckets


def _damaged(path: str, how: str) -> SmoljaxError:
    return SmoljaxError(
        f"the signature file {path} is damaged: {how}; delete its folder and run the same command again"
    )

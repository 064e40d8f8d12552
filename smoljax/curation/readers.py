"""Pieces of input to raw documents, batch by batch, with damaged ones told apart from good ones.

A reader is a generator over one piece that yields `Document`s; a damaged document carries the rule that names
the damage and whatever is known about it. Damage inside one input never ends the others.
"""

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from smoljax.curation import media, schema, storage, warc
from smoljax.curation.shards import Piece, Shard
from smoljax.errors import SmoljaxError, require

_BATCH_BYTES = 1 << 20
_BATCH_ROWS = 512


@dataclass(frozen=True)
class Document:
    """One document as it lies in the input; `damage` is None, or the rule under which it is removed.

    `url` is where it was fetched from, if the input says so.
    """

    path: str
    media_type: str
    content: bytes = b""
    damage: str | None = None
    url: str | None = None


def read(
    shard: Shard, *, max_document_bytes: int
) -> Iterator[tuple[pa.RecordBatch, pa.RecordBatch]]:
    """Yields (RAW batch, the same columns plus reason for the damaged ones) over a shard, in a fixed order.

    Args:
      shard: the pieces to read.
      max_document_bytes: a larger document is removed as "read:too_big", unread where its size is known.
    """
    rows: list[Document] = []
    size = 0
    for piece in shard.pieces:
        for document in READERS[piece.format](piece, max_document_bytes):
            if document.damage is None and len(document.content) > max_document_bytes:
                document = Document(document.path, document.media_type, damage="too_big")
            rows.append(document)
            size += len(document.content)
            if size >= _BATCH_BYTES or len(rows) >= _BATCH_ROWS:
                yield _batch(shard.source, rows)
                rows, size = [], 0
    if rows:
        yield _batch(shard.source, rows)


def document_id(source: str, path: str) -> str:
    """32 hexadecimal digits that depend on the source's name and the document's path alone."""
    return xxhash.xxh3_128_hexdigest(f"{source}\0{path}".encode())


def parquet_cuts(path: str, shard_bytes: int) -> list[tuple[int, int, int]]:
    """(first row group, row group after the last, bytes) of pieces of about `shard_bytes`; [] if unreadable."""
    try:
        with storage.open_file(path) as file:
            metadata = pq.ParquetFile(file).metadata
            sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    except (pa.ArrowException, OSError):
        return []  # The reader meets the same error and names it.
    cuts, start, size = [], 0, 0
    for i, group in enumerate(sizes):
        if i > start and size + group > shard_bytes:
            cuts.append((start, i, size))
            start, size = i, 0
        size += group
    return [*cuts, (start, len(sizes), size)] if sizes else []


def describe_tfds(dataset: str, directory: str, split: str) -> tuple[int, int, str]:
    """(rows, bytes, version) of a split of a TFDS dataset.

    Raises:
      SmoljaxError: the dataset or the split is not in `directory`.
    """
    builder = _tfds_builder(dataset, directory)
    info = builder.info
    try:
        part = info.splits[split]
    except (KeyError, ValueError) as error:
        raise SmoljaxError(
            f"dataset {dataset!r} in {directory!r} has no split {split!r}: "
            f"it has {', '.join(sorted(info.splits))}"
        ) from error
    whole = info.splits[split.partition("[")[0]]
    num_bytes = round(whole.num_bytes * part.num_examples / max(1, whole.num_examples))
    return part.num_examples, num_bytes, f"{info.full_name} {whole.num_bytes}"


def _batch(source: str, rows: list[Document]) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    raw = pa.RecordBatch.from_arrays(
        [
            pa.array([document_id(source, row.path) for row in rows], pa.string()),
            pa.array([source] * len(rows), pa.string()),
            pa.array([row.path for row in rows], pa.string()),
            pa.array([row.url for row in rows], pa.string()),
            pa.array([row.media_type for row in rows], pa.string()),
            pa.array([row.content for row in rows], pa.binary()),
        ],
        schema=schema.RAW,
    )
    return schema.part(raw, [row.damage and f"read:{row.damage}" for row in rows])


def _read_file(piece: Piece, max_bytes: int) -> Iterator[Document]:
    if piece.media_type == media.UNKNOWN:
        yield Document(piece.name, media.UNKNOWN, damage="unknown_media_type")
    elif piece.size == 0:
        yield Document(piece.name, piece.media_type, damage="empty")
    elif piece.size > max_bytes:
        yield Document(piece.name, piece.media_type, damage="too_big")
    else:
        try:
            with storage.open_file(piece.path) as file:
                content = file.read()
        except OSError:
            yield Document(piece.name, piece.media_type, damage="unreadable")
        else:
            yield Document(piece.name, piece.media_type, content)


def _read_members(piece: Piece, max_bytes: int) -> Iterator[Document]:
    members = _zip_members if piece.format == "zip" else _tar_members
    with storage.open_file(piece.path) as file:
        try:
            for name, size, content in members(file):
                path = f"{piece.name}/{name}"
                kind = piece.media_type or media.media_type(name)
                if kind == media.UNKNOWN:
                    yield Document(path, kind, damage="unknown_media_type")
                elif size == 0:
                    yield Document(path, kind, damage="empty")
                elif size > max_bytes:
                    yield Document(path, kind, damage="too_big")
                else:
                    yield Document(path, kind, content())
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, RuntimeError):
            yield Document(piece.name, media.UNKNOWN, damage="unreadable_archive")


def _tar_members(file: BinaryIO) -> Iterator[tuple]:
    with tarfile.open(fileobj=file, mode="r:*") as archive:
        for member in archive:
            if member.isfile():
                yield member.name, member.size, lambda m=member: archive.extractfile(m).read()


def _zip_members(file: BinaryIO) -> Iterator[tuple]:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                yield member.filename, member.file_size, lambda m=member: archive.read(m)


def _read_warc(piece: Piece, max_bytes: int) -> Iterator[Document]:
    with storage.open_file(piece.path) as file:
        for record in warc.records(
            file,
            start=piece.start,
            stop=piece.stop,
            compressed=piece.format == "warc_gz",
            max_bytes=max_bytes,
        ):
            if piece.media_type not in (None, record.media_type) and record.damage is None:
                continue
            path = f"{piece.name}#{record.offset} {record.uri}".rstrip()
            yield Document(
                path, record.media_type, record.content, record.damage, record.uri or None
            )


def _read_jsonl(piece: Piece, max_bytes: int) -> Iterator[Document]:
    with storage.open_file(piece.path) as stored:
        try:
            for offset, line in _lines(stored, piece):
                path = f"{piece.name}#{offset}"
                if line.strip():
                    yield _json_document(path, piece, line)
        except (OSError, EOFError, ValueError, pa.ArrowException):
            yield Document(piece.name, piece.media_type, damage="truncated_stream")


def _lines(stored: BinaryIO, piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that begin in [start, stop); the offset is into the decompressed text."""
    stream: Iterable[bytes] = stored
    offset = piece.start
    if piece.format == "jsonl_gz":
        stream = gzip.GzipFile(fileobj=stored)
    elif piece.format == "jsonl_zst":
        stream = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stored, "r"), "zstd"))
    elif piece.start > 0:
        stored.seek(piece.start - 1)
        offset += len(stored.readline()) - 1  # The line that began before this piece is not ours.
    for line in stream:
        if piece.stop is not None and offset >= piece.stop:
            return
        yield offset, line
        offset += len(line)


def _json_document(path: str, piece: Piece, line: bytes) -> Document:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        return Document(path, piece.media_type, damage="invalid_utf8")
    except ValueError:
        return Document(path, piece.media_type, damage="invalid_json")
    row = row if isinstance(row, dict) else {}
    return _text_document(path, piece, row.get(piece.text_field), row.get(piece.url_field))


def _text_document(path: str, piece: Piece, text: object, url: object) -> Document:
    if not isinstance(text, str | bytes):
        return Document(path, piece.media_type, damage="no_text_field")
    try:
        content = text if isinstance(text, bytes) else text.encode("utf-8")
        url = url if isinstance(url, str) and url.encode("utf-8") else None
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair, which is no text.
        return Document(path, piece.media_type, damage="invalid_unicode")
    return Document(path, piece.media_type, content, url=url)


def _read_parquet(piece: Piece, max_bytes: int) -> Iterator[Document]:
    try:
        with storage.open_file(piece.path) as file:
            table = pq.ParquetFile(file)
            names = table.schema_arrow.names
            if piece.text_field not in names:
                raise SmoljaxError(
                    f"{piece.path} has no column {piece.text_field!r}: it has {', '.join(names)}; "
                    "set the source's text_field"
                )
            columns = [piece.text_field, *({piece.url_field} & set(names))]
            for group in range(
                piece.start, table.num_row_groups if piece.stop is None else piece.stop
            ):
                row = 0
                for batch in table.iter_batches(64, [group], columns):
                    for values in batch.to_pylist():
                        path = f"{piece.name}#{group}.{row}"
                        text, url = values[piece.text_field], values.get(piece.url_field)
                        yield _text_document(path, piece, text, url)
                        row += 1
    except (pa.ArrowException, OSError):
        yield Document(piece.name, piece.media_type, damage="unreadable_parquet")


def _read_tfds(piece: Piece, max_bytes: int) -> Iterator[Document]:
    builder = _tfds_builder(piece.path, piece.directory)
    rows = builder.as_data_source(split=piece.split)
    for start in range(piece.start, piece.stop, 64):
        numbers = range(start, min(start + 64, piece.stop))
        for number, row in zip(numbers, rows.__getitems__(list(numbers))):
            if piece.text_field not in row:
                raise SmoljaxError(
                    f"dataset {piece.path!r} has no feature {piece.text_field!r}: "
                    f"it has {', '.join(sorted(row))}; set the source's text_field"
                )
            yield _text_document(f"{piece.name}#{number}", piece, row[piece.text_field], None)


def _tfds_builder(dataset: str, directory: str):
    tfds = require("tensorflow_datasets", extra="train")
    try:
        return tfds.builder(dataset, data_dir=directory)
    except (tfds.core.registered.DatasetNotFoundError, OSError, ValueError) as error:
        raise SmoljaxError(
            f"TFDS dataset {dataset!r} is not in {directory!r} ({str(error).splitlines()[0]}): prepare it "
            "there with file_format='array_record', or name the right directory"
        ) from error


READERS = {
    "file": _read_file,
    "zip": _read_members,
    "tar": _read_members,
    "warc": _read_warc,
    "warc_gz": _read_warc,
    "jsonl": _read_jsonl,
    "jsonl_gz": _read_jsonl,
    "jsonl_zst": _read_jsonl,
    "parquet": _read_parquet,
    "tfds": _read_tfds,
}

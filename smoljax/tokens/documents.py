"""Curated documents (Parquet) to token shards, source by source."""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from smoljax.errors import SmoljaxError, require
from smoljax.progress import Progress
from smoljax.tokens.shards import (
    BLOCK_TOKENS,
    SPLITS,
    TOKENS_PER_FILE,
    file_sha256,
    write_shards,
)
from smoljax.tokens.tokenizer import Tokenizer

_ROWS = 256  # Documents decoded from Parquet at a time.


def find_sources(documents_dir: Path | str) -> list[str]:
    """Names of the sources in a folder of curated documents, sorted.

    Raises:
      SmoljaxError: the folder does not exist, or holds no source.
    """
    directory = Path(documents_dir)
    if not directory.is_dir():
        raise SmoljaxError(f"documents folder {directory} does not exist: curate documents first")
    sources = sorted(
        path.name
        for path in directory.iterdir()
        if any((path / split).is_dir() for split in SPLITS)
    )
    if not sources:
        raise SmoljaxError(
            f"{directory} holds no curated documents (expected <source>/train/*.parquet): curate documents first"
        )
    return sources


def read_texts(
    documents_dir: Path | str, split: str, *, sources: Iterable[str] | None = None
) -> Iterator[str]:
    """Texts of a split, taken from the sources in turn, so that a prefix holds something of each."""
    names = list(sources) if sources is not None else find_sources(documents_dir)
    iterators = [_read_split(Path(documents_dir) / name, split) for name in names]
    while iterators:
        for iterator in list(iterators):
            document = next(iterator, None)
            if document is None:
                iterators.remove(iterator)
            else:
                yield document[2]


def tokenize_documents(
    documents_dir: Path | str,
    shards_dir: Path | str,
    tokenizer: Tokenizer,
    *,
    sources: Iterable[str] | None = None,
    block_tokens: int = BLOCK_TOKENS,
    tokens_per_file: int = TOKENS_PER_FILE,
    num_threads: int | None = None,
) -> dict[str, dict]:
    """Writes the shards of every source; a source whose documents, tokenizer and sizes are unchanged is skipped.

    Args:
      documents_dir: holds `<source>/{train,heldout}/*.parquet` with the columns id and text.
      shards_dir: where `<source>/1.0.0/` go.
      tokenizer: made by `smoljax.tokens.tokenizer.load`.
      sources: names to tokenize; all by default.
      block_tokens, tokens_per_file, num_threads: see `write_shards`.

    Returns:
      the manifest of each source.

    Raises:
      SmoljaxError: there are no documents, or a file is not Parquet with these columns.
    """
    found = find_sources(documents_dir)
    names = list(sources) if sources is not None else found
    for name in names:
        if name not in found:
            raise SmoljaxError(
                f"source {name!r} is not in {documents_dir}; it holds {', '.join(found)}"
            )
    if tokenizer.lossy:
        print(f"note: {tokenizer.lossy}", file=sys.stderr)
    manifests = {}
    for name in names:
        directory = Path(documents_dir) / name
        progress = Progress(f"tokenize {name}", _count(directory), unit="documents")
        manifests[name] = write_shards(
            (document for split in SPLITS for document in _read_split(directory, split)),
            shards_dir,
            tokenizer,
            source=name,
            inputs_fingerprint=_fingerprint(directory),
            block_tokens=block_tokens,
            tokens_per_file=tokens_per_file,
            num_threads=num_threads,
            progress=progress,
        )
    if not any(m["splits"][split]["documents"] for m in manifests.values() for split in SPLITS):
        raise SmoljaxError(
            f"{documents_dir} holds no document in any source: see in its removed folders which filter took them"
        )
    return manifests


def _files(directory: Path, split: str) -> list[Path]:
    return sorted((directory / split).glob("*.parquet"))


def _open(path: Path) -> object:
    parquet = require("pyarrow.parquet", extra="data")
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise SmoljaxError(
            f"{path} is not a Parquet file ({error}): curate this source again"
        ) from error
    for column in ("id", "text"):
        if column not in file.schema_arrow.names:
            raise SmoljaxError(
                f"{path} has no column {column!r}, only {', '.join(file.schema_arrow.names)}: "
                "curate this source again"
            )
    return file


def _read_split(directory: Path, split: str) -> Iterator[tuple[str, str, str]]:
    for path in _files(directory, split):
        with _open(path) as file:
            for batch in file.iter_batches(_ROWS, columns=["id", "text"]):
                ids, texts = batch.column("id").to_pylist(), batch.column("text").to_pylist()
                for document_id, text in zip(ids, texts, strict=True):
                    yield split, document_id, text


def _count(directory: Path) -> int:
    total = 0
    for split in SPLITS:
        for path in _files(directory, split):
            with _open(path) as file:
                total += file.metadata.num_rows
    return total


def _fingerprint(directory: Path) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        for path in _files(directory, split):
            digest.update(f"{split}/{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()

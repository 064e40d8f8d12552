"""Curated documents (Parquet) to token shards, source by source."""

import hashlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from smoljax.errors import SmoljaxError, require
from smoljax.progress import Progress
from smoljax.tokens.rehydration import rehydration_weights
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
    rehydrate: bool = False,
    num_threads: int | None = None,
) -> dict[str, dict]:
    """Writes the shards of every source; a source whose documents, tokenizer and sizes are unchanged is skipped.

    Args:
      documents_dir: holds `<source>/{train,heldout}/*.parquet` with the columns id and text.
      shards_dir: where `<source>/1.0.0/` go.
      tokenizer: made by `smoljax.tokens.tokenizer.load`.
      sources: names to tokenize; all by default.
      block_tokens, tokens_per_file, num_threads: see `write_shards`.
      rehydrate: repeat the documents of the train split by their column cluster_size (`rehydration_weights`; once
        where it is null): all of them once, then those that come again, and so on, so that copies lie far apart.

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
        weights = _weights(directory) if rehydrate else None
        count = _count(directory) if weights is None else sum(int(w.sum()) for w in weights)
        progress = Progress(f"tokenize {name}", count, unit="documents")
        train = (
            _read_split(directory, "train")
            if weights is None
            else _read_rehydrated(directory, weights)
        )
        manifests[name] = write_shards(
            itertools.chain(train, _read_split(directory, "heldout")),
            shards_dir,
            tokenizer,
            source=name,
            inputs_fingerprint=_fingerprint(directory, rehydrate),
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


def _open(path: Path, columns: Sequence[str] = ("id", "text")) -> object:
    parquet = require("pyarrow.parquet", extra="data")
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise SmoljaxError(
            f"{path} is not a Parquet file ({error}): curate this source again"
        ) from error
    for column in columns:
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


def _read_rehydrated(
    directory: Path, weights: Sequence[np.ndarray]
) -> Iterator[tuple[str, str, str]]:
    """The train split in rounds: a document is in as many of the first ones as its weight says."""
    paths = _files(directory, "train")
    for done in range(max((int(w.max(initial=0)) for w in weights), default=0)):
        for path, of_file in zip(paths, weights, strict=True):
            if of_file.max(initial=0) <= done:
                continue
            start = 0
            with _open(path) as file:
                for batch in file.iter_batches(_ROWS, columns=["id", "text"]):
                    wanted = np.flatnonzero(of_file[start : start + batch.num_rows] > done)
                    start += batch.num_rows
                    for row in batch.take(wanted).to_pylist():
                        yield "train", row["id"], row["text"]


def _weights(directory: Path) -> list[np.ndarray]:
    """Of each file of the train split, int8 [rows]: how often its documents are read."""
    found = []
    for path in _files(directory, "train"):
        with _open(path, ("cluster_size",)) as file:
            sizes = file.read(["cluster_size"]).column(0).fill_null(1).to_numpy()
        found.append(rehydration_weights(sizes).astype(np.int8))
    return found


def _count(directory: Path) -> int:
    total = 0
    for split in SPLITS:
        for path in _files(directory, split):
            with _open(path) as file:
                total += file.metadata.num_rows
    return total


def _fingerprint(directory: Path, rehydrate: bool) -> str:
    digest = hashlib.sha256(b"rehydrated\n" if rehydrate else b"")
    for split in SPLITS:
        for path in _files(directory, split):
            digest.update(f"{split}/{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()

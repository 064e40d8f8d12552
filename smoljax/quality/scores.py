"""The files of curated documents, and where the score of each document is kept. This file imports no jax."""

import dataclasses
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from smoljax.curation import items
from smoljax.errors import SmoljaxError
from smoljax.tokens.documents import find_sources
from smoljax.tokens.shards import SPLITS, file_sha256

SCORES = "scores.npy"


@dataclasses.dataclass(frozen=True)
class File:
    """A file of curated documents.

    Attributes:
      source, split, path: where it is.
      rows: documents in it.
      sha256: of its bytes.
      judged: whether its documents are scored, or pass without.
    """

    source: str
    split: str
    path: Path
    rows: int
    sha256: str
    judged: bool

    @property
    def name(self) -> str:
        """Of its folder of scores."""
        return f"{self.source}-{self.split}-{self.path.stem}"


def find_files(documents_dir: Path, sources: Collection[str]) -> list[File]:
    """The files of curated documents, by source, split and name; those of `sources` are judged, all when empty.

    Raises:
      SmoljaxError: a source is not there, or there are no documents.
    """
    found = find_sources(documents_dir)
    for name in sources:
        if name not in found:
            raise SmoljaxError(
                f"config.quality.sources names {name!r}, which is not in {documents_dir}: it holds {', '.join(found)}"
            )
    return [
        File(
            source,
            split,
            path,
            pq.read_metadata(path).num_rows,
            file_sha256(path),
            not sources or source in sources,
        )
        for source in found
        for split in SPLITS
        for path in sorted((documents_dir / source / split).glob("*.parquet"))
    ]


def read(directory: Path, file: File) -> np.ndarray:
    """The scores of a judged file (apply.py wrote them), f32 [rows].

    Raises:
      SmoljaxError: they are missing or were changed.
    """
    return np.load(items.verified(str(directory / file.name), SCORES))

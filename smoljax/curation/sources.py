"""Where documents come from: a source is described by a recipe and cut into shards of bounded size.

A shard is the input of one work item. The cut depends only on names and sizes, never on the number of workers.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from smoljax.curation import media, readers, storage
from smoljax.curation.shards import Piece, Shard
from smoljax.errors import SmoljaxError


@dataclass(frozen=True)
class Files:
    """Files of a local folder or an object store.

    Attributes:
      name: the source's name.
      pattern: a path, a folder (read whole) or a glob; local or an fsspec URL (gs://bucket/*.warc.gz).
      preset: which stages its documents pass ("fast", "document", "code", ...).
      exclude: patterns of names to leave out, matched against the name under the fixed folder (`*` crosses "/").
      media_type: of the documents; None tells it from each file's ending. Of a WARC file, whose records tell it
        themselves, only the documents of this type are read.
      text_field: the column or key with the text, in JSONL and Parquet files.
      url_field: the same for the page's address, which the filter "url" looks at; it may be missing.
    """

    name: str
    pattern: str
    preset: str
    exclude: tuple[str, ...] = ()
    media_type: str | None = None
    text_field: str = "text"
    url_field: str = "url"

    def pieces(self, shard_bytes: int) -> Iterable[Piece]:
        """Every piece of the source, none larger than about `shard_bytes` where the format can be cut."""
        from fnmatch import fnmatchcase

        for file in storage.list_files(self.pattern):
            if any(fnmatchcase(file.name, pattern) for pattern in self.exclude):
                continue
            format, media_type = media.classify(file.name)
            for start, stop, size in _cuts(file, format, shard_bytes):
                yield Piece(
                    path=file.path,
                    name=file.name,
                    format=format,
                    media_type=self.media_type or media_type,
                    start=start,
                    stop=stop,
                    size=size,
                    version=file.version,
                    text_field=self.text_field,
                    url_field=self.url_field,
                )


@dataclass(frozen=True)
class TfdsText:
    """A text dataset of TensorFlow Datasets, read by random access (`tfds.data_source`).

    Attributes:
      name: the source's name.
      dataset: TFDS name with optional config and version ("wiki40b/en:1.3.0").
      split: "train", or a slice of it ("train[:10%]").
      preset: which stages its documents pass.
      directory: TFDS data_dir; local or gs://.
      text_field: the feature that holds the text.
    """

    name: str
    dataset: str
    preset: str
    directory: str
    split: str = "train"
    text_field: str = "text"

    def pieces(self, shard_bytes: int) -> Iterable[Piece]:
        """Ranges of rows that hold about `shard_bytes` each, by the dataset's own mean size."""
        rows, num_bytes, version = readers.describe_tfds(self.dataset, self.directory, self.split)
        step = max(1, int(shard_bytes * rows / num_bytes)) if num_bytes else rows
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield Piece(
                path=self.dataset,
                name=f"{self.dataset}/{self.split}",
                format="tfds",
                media_type="text/plain",
                start=start,
                stop=stop,
                size=math.ceil(num_bytes * (stop - start) / rows),
                version=version,
                text_field=self.text_field,
                directory=self.directory,
                split=self.split,
            )


Source = Files | TfdsText


def shards(sources: Iterable[Source], shard_bytes: int) -> list[Shard]:
    """Cuts every source into shards of at most about `shard_bytes` bytes, in the recipe's order.

    Raises:
      SmoljaxError: two sources share a name, or a source names no file.
    """
    found: list[Shard] = []
    names = set()
    for source in sources:
        if source.name in names:
            raise SmoljaxError(f"two sources are named {source.name!r}: give each its own name")
        names.add(source.name)
        group: list[Piece] = []
        size = 0
        for piece in source.pieces(shard_bytes):
            if group and size + piece.size > shard_bytes:
                found.append(Shard(source.name, source.preset, tuple(group)))
                group, size = [], 0
            group.append(piece)
            size += piece.size
        if group:
            found.append(Shard(source.name, source.preset, tuple(group)))
    return found


def _cuts(file: storage.File, format: str, shard_bytes: int) -> list[tuple[int, int | None, int]]:
    """(start, stop, bytes) of the pieces of one file."""
    if format == "parquet":
        return readers.parquet_cuts(file.path, shard_bytes) or [(0, None, file.size)]
    if format in ("jsonl", "warc_gz") and file.size > shard_bytes:
        edges = [*range(0, file.size, shard_bytes), file.size]
        return [(start, stop, stop - start) for start, stop in itertools.pairwise(edges)]
    # A compressed stream without members, and an uncompressed WARC (whose record border could also occur inside
    # a page), cannot be entered in the middle: they are read as one piece, still batch by batch.
    return [(0, None, file.size)]

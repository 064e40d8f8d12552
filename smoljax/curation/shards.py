"""The input of a work item: pieces of files that a reader reads from front to back."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A part of one input that one reader reads from front to back.

    Attributes:
      path: how to open it; for TFDS the dataset's name.
      name: stable name, the beginning of the documents' `path`.
      format: a key of `readers.READERS`.
      media_type: of the documents inside, or None where the reader tells.
      start, stop: what the format can seek to: bytes (jsonl, warc), row groups (parquet), rows (tfds). A
        record belongs to the piece in which it begins. `stop` None is the end.
      size: bytes, about.
      version: changes when the content does.
      text_field, url_field: the columns or keys that hold the text and its address, in record formats.
      directory, split: of a TFDS dataset.
    """

    path: str
    name: str
    format: str
    media_type: str | None
    start: int
    stop: int | None
    size: int
    version: str
    text_field: str
    url_field: str = ""
    directory: str = ""
    split: str = ""


@dataclass(frozen=True)
class Shard:
    """The input of one work item: consecutive pieces of one source."""

    source: str
    preset: str
    pieces: tuple[Piece, ...]

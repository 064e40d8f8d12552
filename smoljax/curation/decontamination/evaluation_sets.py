"""The evaluation sets that training text must not hold: files of items, and which of their fields count."""

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from smoljax.curation import media, storage
from smoljax.errors import SmoljaxError

_KEYS = ("files", "fields", "context")


@dataclass(frozen=True)
class EvaluationSet:
    """One benchmark.

    Attributes:
      name: of the benchmark, the second half of the reason of a removed document.
      files: a path, a folder or a glob: JSONL (also .gz and .zst) or Parquet with one item in a row, or text with one
        item in a file; local or an fsspec URL.
      fields: keys of the row whose texts make the item, joined in their order, dotted where they are nested
        ("choices.text"); () joins every string of the row. Each entry of a list makes an item of its own.
      context: keys whose texts come first but count only where they run into `fields`: a passage that the question
        is about, which may well be training text.
    """

    name: str
    files: str
    fields: tuple[str, ...] = ()
    context: tuple[str, ...] = ()

    def inputs(self) -> list[storage.File]:
        """Its files, sorted by name."""
        try:
            return storage.list_files(self.files)
        except SmoljaxError as error:
            raise SmoljaxError(f"the evaluation set {self.name!r}: {error}") from error

    def items(self) -> Iterator["Item"]:
        """Every item of every file.

        Raises:
          SmoljaxError: a file is missing, damaged or of an unknown format, a row lacks a field, or there is no item.
        """
        empty = True
        for file in self.inputs():
            for number, row in _rows(file):
                for context, text in _texts(row, self, f"{file.path}, item {number}"):
                    empty = False
                    yield Item(self.name, f"{file.name}#{number}", context, text)
        if empty:
            raise SmoljaxError(
                f"the evaluation set {self.name!r} has no item: {self.files} holds no row; check the files"
            )


class Item(NamedTuple):
    """One text of an evaluation set: `place` is its file's name, "#", and the number of its row."""

    evaluation_set: str
    place: str
    context: str
    text: str


def evaluation_sets(field: str, section: Mapping[str, object]) -> tuple[EvaluationSet, ...]:
    """The sets of a config section: name -> a path, or {"files": path, "fields": keys, "context": keys}.

    Args:
      field: dotted name of the section, for the errors.
      section: as a config has it.

    Raises:
      SmoljaxError: an entry is of another form.
    """
    found = []
    for name, value in section.items():
        entry = {"files": value} if isinstance(value, str) else value
        if not isinstance(entry, Mapping) or not isinstance(entry.get("files"), str):
            raise SmoljaxError(
                f"{field}.{name} is {value!r}: give the path of its files, or a mapping with {', '.join(_KEYS)}"
            )
        for key in entry:
            if key not in _KEYS:
                raise SmoljaxError(
                    f"{field}.{name}.{key} is not known: there are {', '.join(_KEYS)}"
                )
        fields, context = (_names(f"{field}.{name}.{key}", entry.get(key, ())) for key in _KEYS[1:])
        if context and not fields:
            raise SmoljaxError(
                f"{field}.{name} has a context and no fields: name the fields that follow it"
            )
        found.append(EvaluationSet(name, entry["files"], fields, context))
    return tuple(found)


def fingerprint(sets: Sequence[EvaluationSet]) -> str:
    """Of the sets' contents: the same wherever their files lie and whenever they were written."""
    digest = xxhash.xxh3_128()
    for wanted in sets:
        head = [wanted.name, wanted.fields, wanted.context, [f.name for f in wanted.inputs()]]
        digest.update(json.dumps(head).encode())
        for file in wanted.inputs():
            content = xxhash.xxh3_128()
            with storage.open_file(file.path) as stream:
                while block := stream.read(1 << 20):
                    content.update(block)
            digest.update(content.digest())
    return digest.hexdigest()


def _names(field: str, value: object) -> tuple[str, ...]:
    """A key, or several."""
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise SmoljaxError(f"{field} is {value!r}: give the key of a row, or several of them")
    return tuple(names)


def _rows(file: storage.File) -> Iterator[tuple[int, object]]:
    format, media_type = media.classify(file.name)
    try:
        with storage.open_file(file.path) as stream:
            if format.startswith("jsonl"):
                lines = enumerate(_decompressed(stream, format))
                yield from ((number, json.loads(line)) for number, line in lines if line.strip())
            elif format == "parquet":
                batches = pq.ParquetFile(stream).iter_batches(1024)
                yield from enumerate(row for batch in batches for row in batch.to_pylist())
            elif (media_type or "").startswith("text/"):
                yield 0, stream.read().decode("utf-8-sig")
            else:
                raise SmoljaxError(
                    f"the evaluation file {file.path} has no ending that is known: name it .jsonl, .parquet or .txt"
                )
    except (
        OSError,
        EOFError,
        zlib.error,
        UnicodeDecodeError,
        json.JSONDecodeError,
        pa.ArrowException,
    ) as error:
        raise SmoljaxError(
            f"the evaluation file {file.path} is damaged ({error}): fetch it again"
        ) from error


def _decompressed(stream: BinaryIO, format: str) -> Iterator[bytes]:
    if format == "jsonl_gz":
        return iter(gzip.GzipFile(fileobj=stream))
    if format == "jsonl_zst":
        return iter(io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, "r"), "zstd")))
    return iter(stream)


def _texts(row: object, wanted: EvaluationSet, place: str) -> Iterator[tuple[str, str]]:
    """(context, text) of each item in a row; of several where a field holds a list."""
    if not wanted.fields:
        yield "", " ".join(_strings(row))
        return
    choices = [_choices(row, key, place) for key in (*wanted.context, *wanted.fields)]
    for values in itertools.product(*choices):
        split = len(wanted.context)
        yield " ".join(values[:split]), " ".join(values[split:])


def _choices(row: object, key: str, place: str) -> list[str]:
    value = row
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            found = ", ".join(value) if isinstance(value, Mapping) else "no keys"
            raise SmoljaxError(f"the evaluation file {place} has no field {key!r}: it has {found}")
        value = value[part]
    # A null answer (of a question that has none) leaves the rest of the item.
    return list(_strings(value)) or [""]


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)

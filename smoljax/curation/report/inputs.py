"""What the report reads of a finished curation: the counts of all documents, and by preset a sample of them.

The sample is chosen by document ids, which are hashes: the documents with the least ids of at most WORK_ITEMS work
items, themselves chosen by the hash of their number. So it is the same on every run, and reading it takes as long for
a crawl as for a hundred gigabytes of it.
"""

import dataclasses
import heapq
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from smoljax import configuration
from smoljax.curation import chain, schema, shard_files, storage
from smoljax.errors import SmoljaxError

# Of a preset: the most documents, bytes of their text, and work items that a sample is drawn from.
DOCUMENTS = 2_000
TEXT_BYTES = 32 << 20
WORK_ITEMS = 32
# Removed documents that are read for each reason, and clusters.
PER_REASON = 50
CLUSTERS = 10

# The steps that count documents by stage.
_STEPS = ("extract", "filter", "finish")
_KEPT = ("train", "heldout")
_PARTS = (*_KEPT, "removed")
# What later stages find out about an extracted document.
_OUTCOME = ("id", "language", "language_score", "cluster_size", "reason")


@dataclasses.dataclass(frozen=True)
class Document:
    """A document of a sample.

    Attributes:
      text: as it was extracted; of one that was drawn by its reason, as the stage that removed it saw it.
      reason: why it was removed, None of those that were kept to the end.
      The others are the columns of schema.DOCUMENT.
    """

    id: str
    source: str
    path: str
    url: str | None
    text: str
    language: str | None
    language_score: float | None
    cluster_size: int | None
    reason: str | None


@dataclasses.dataclass(frozen=True)
class Preset:
    """The documents that passed through one preset.

    Attributes:
      name: of the preset.
      arguments: its stages and their arguments.
      sources: names.
      stages: stage -> "kept", "kept_bytes", "read_bytes", "removed_by_reason" and "edits" of all documents, in order.
      work_items: how many there are.
      work_items_read: of how many the sample is drawn.
      sample: documents out of "extract", in the order of their ids.
      removed: reason -> removed documents, in the order of their ids.
      cluster_sizes: size -> clusters, of what is kept in the work items read.
      clusters: a document of each of the largest, the largest first.
    """

    name: str
    arguments: Mapping
    sources: tuple[str, ...]
    stages: dict[str, dict]
    work_items: int
    work_items_read: int
    sample: tuple[Document, ...]
    removed: dict[str, tuple[Document, ...]]
    cluster_sizes: dict[int, int]
    clusters: tuple[Document, ...]


@dataclasses.dataclass(frozen=True)
class _Item:
    """A work item: its number among all, and the number of its files in the source's folders."""

    name: str
    source: str
    file: str


def read_manifest(workdir: Path) -> dict:
    """Of the documents.

    Raises:
      SmoljaxError: there is none: nothing was curated, or not to the end.
    """
    path = workdir / "documents" / "manifest.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SmoljaxError(
            f"{path} is not there or damaged ({error}): the report is about finished documents, "
            "run smoljax.curate with --only=documents on this --workdir first"
        ) from error


def read_presets(workdir: Path, directory: str, manifest: Mapping) -> tuple[Preset, ...]:
    """What the report is about, by preset, those without documents left out.

    Args:
      workdir: of the run.
      directory: of its work items.
      manifest: of its documents.

    Raises:
      SmoljaxError: a work item is missing or damaged, or the work items are not those of the documents.
    """
    by_preset: dict[str, list[_Item]] = {}
    for item in _items(workdir / "documents", manifest):
        by_preset.setdefault(manifest["sources"][item.source]["preset"], []).append(item)
    return tuple(
        _read_preset(workdir, directory, name, manifest["presets"][name], found)
        for name, found in by_preset.items()
    )


def _items(documents: Path, manifest: Mapping) -> Iterator[_Item]:
    """Work items are numbered through all sources, in the order of the manifest."""
    number = 0
    for source in manifest["sources"]:
        for path in sorted((documents / source / "removed").glob("*.parquet")):
            yield _Item(f"{number:05d}", source, path.name)
            number += 1


def _read_preset(
    workdir: Path, directory: str, name: str, arguments: Mapping, found: Sequence[_Item]
) -> Preset:
    chosen = sorted(found, key=lambda item: xxhash.xxh3_64_intdigest(item.name))[:WORK_ITEMS]
    documents = workdir / "documents"
    arguments = configuration.plain(arguments)
    sizes, clusters = _clusters(documents, chosen)
    return Preset(
        name=name,
        arguments=arguments,
        sources=tuple(dict.fromkeys(item.source for item in found)),
        stages=_stages(directory, arguments, found),
        work_items=len(found),
        work_items_read=len(chosen),
        sample=_sample(documents, directory, chosen),
        removed=_removed(documents, chosen),
        cluster_sizes=sizes,
        clusters=clusters,
    )


def _stages(directory: str, arguments: Mapping, found: Sequence[_Item]) -> dict[str, dict]:
    """Counts of all documents of the work items by stage, in the order in which the stages ran."""
    totals: dict[str, dict] = {}
    for item in found:
        for step in _STEPS:
            for name, entry in _result(f"{directory}/{step}/{item.name}")["stages"].items():
                total = totals.setdefault(name, _no_counts())
                for field in ("kept", "kept_bytes", "read_bytes"):
                    total[field] += entry[field]
                for field in ("removed_by_reason", "edits"):
                    total[field].update(entry[field])
    for name in ("read", *chain.stages(arguments)):
        totals.setdefault(name, _no_counts())  # Of a stage that no document reached.
    return totals


def _no_counts() -> dict:
    return {
        "kept": 0,
        "kept_bytes": 0,
        "read_bytes": 0,
        "removed_by_reason": Counter(),
        "edits": Counter(),
    }


def _result(folder: str) -> dict:
    try:
        return json.loads(storage.read_bytes(f"{folder}/manifest.json"))["result"]
    except (OSError, ValueError) as error:
        raise SmoljaxError(
            f"the work item {folder} is missing or damaged ({error}): the report needs the folder in which the "
            "documents were made, run smoljax.curate with --only=documents again"
        ) from error


def _sample(documents: Path, directory: str, chosen: Sequence[_Item]) -> tuple[Document, ...]:
    """Documents as they were extracted, with what was found out about them later."""
    batches = (
        batch
        for item in chosen
        for batch in shard_files.read(f"{directory}/extract/{item.name}", "kept.parquet")
    )
    rows = _within_bytes(_least(batches, DOCUMENTS).to_pylist())
    wanted = {row["id"] for row in rows}
    outcomes = {
        row["id"]: row
        for item in chosen
        for part in _PARTS
        for row in _rows(documents, item, part, columns=_OUTCOME, wanted=wanted)
    }
    for row in rows:
        if row["id"] not in outcomes:
            raise SmoljaxError(
                f"document {row['id']} ({row['path']}) is in the work items in {directory}, but not in {documents}: "
                "a later run was interrupted, run smoljax.curate with --only=documents again"
            )
    return tuple(_document(row | outcomes[row["id"]]) for row in rows)


def _within_bytes(rows: Sequence[dict]) -> list[dict]:
    """The first rows, up to TEXT_BYTES of text."""
    sizes = itertools.accumulate(len(row["text"].encode()) for row in rows)
    return [row for row, size in zip(rows, sizes) if size <= TEXT_BYTES] or list(rows[:1])


def _least(batches: Iterable[pa.RecordBatch], count: int) -> pa.Table:
    """The documents with the least ids, sorted by them."""
    least = schema.DOCUMENT.empty_table()
    for batch in batches:
        if least.num_rows == count:
            batch = batch.filter(pc.less(batch.column("id"), least.column("id")[-1]))
        if batch.num_rows:
            both = pa.concat_tables([least, pa.Table.from_batches([batch])])
            least = both.sort_by("id").slice(0, count)
    return least


def _removed(documents: Path, chosen: Sequence[_Item]) -> dict[str, tuple[Document, ...]]:
    """Of each reason the documents with the least ids."""
    ids: dict[str, list[str]] = {}
    for item in chosen:
        for row in _rows(documents, item, "removed", columns=("id", "reason")):
            ids.setdefault(row["reason"], []).append(row["id"])
    wanted = {i for found in ids.values() for i in heapq.nsmallest(PER_REASON, found)}
    removed: dict[str, list[Document]] = {reason: [] for reason in sorted(ids)}
    for item in chosen:
        for row in _rows(documents, item, "removed", wanted=wanted):
            removed[row["reason"]].append(_document(row))
    return {
        reason: tuple(sorted(found, key=lambda document: document.id))
        for reason, found in removed.items()
    }


def _clusters(
    documents: Path, chosen: Sequence[_Item]
) -> tuple[dict[int, int], tuple[Document, ...]]:
    """How many clusters there are of each size, and the documents that stand for the largest."""
    sized = [
        (-row["cluster_size"], row["id"])
        for item in chosen
        for part in _KEPT
        for row in _rows(documents, item, part, columns=("id", "cluster_size"))
        if row["cluster_size"] is not None
    ]
    largest = [i for size, i in heapq.nsmallest(CLUSTERS, sized) if size < -1]
    found = {
        row["id"]: _document(row)
        for item in chosen
        for part in _KEPT
        for row in _rows(documents, item, part, wanted=set(largest))
    }
    sizes = Counter(-size for size, _ in sized)
    return dict(sorted(sizes.items())), tuple(found[i] for i in largest)


def _rows(
    documents: Path,
    item: _Item,
    part: str,
    *,
    columns: Sequence[str] | None = None,
    wanted: Set[str] | None = None,
) -> Iterator[dict]:
    """Rows of one file, or those of the wanted ids; of what was kept, the reason is None."""
    values = None if wanted is None else pa.array(sorted(wanted), pa.string())
    file = pq.ParquetFile(documents / item.source / part / item.file)
    names = file.schema_arrow.names
    columns = [name for name in columns or names if name in names]
    for batch in file.iter_batches(columns=columns):
        if values is not None:
            batch = batch.filter(pc.is_in(batch.column("id"), value_set=values))
        for row in batch.to_pylist():
            yield {"reason": None, **row}


def _document(row: Mapping) -> Document:
    return Document(**{field.name: row[field.name] for field in dataclasses.fields(Document)})

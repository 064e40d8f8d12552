"""Keeps the documents whose scores are high enough: WORKDIR/documents and their scores to WORKDIR/selected.

The layout is that of WORKDIR/documents, with two columns more: `score` (f32) and `int_score` (int32), null where a source is
not judged. Removed documents lie in `removed`, with both and the reason "quality:low_score". This file imports no jax: the
files are written by processes of their own.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smoljax import files
from smoljax.curation import items, runner, schema, shard_files
from smoljax.errors import SmoljaxError
from smoljax.quality import scores
from smoljax.quality.config import MAX_SCORE, int_scores
from smoljax.tokens.shards import SPLITS

# Raised when the same scores and cutoff select otherwise than before.
CODE_VERSION = 1
STAGE = "quality"
REASON = f"{STAGE}:low_score"
MANIFEST = "manifest.json"
_COLUMNS = (pa.field("score", pa.float32()), pa.field("int_score", pa.int32()))


def select(
    selectable: Sequence[scores.File],
    workdir: Path,
    *,
    cutoff: np.float32,
    keys: Mapping[str, str],
    workers: int,
) -> dict:
    """Brings WORKDIR/selected up to date and returns its manifest, which is that of WORKDIR/documents with one stage more.

    Args:
      selectable: the files of WORKDIR/documents, their scores finished.
      workdir: of the run.
      cutoff: least score that is kept.
      keys: of the judged files' scores, by File.name.
      workers: processes.

    Raises:
      SmoljaxError: no document is left to train on, scores were changed, or the disk is full.
      KeyboardInterrupt: on Ctrl-C; the files that are done stay.
    """
    groups = _groups(selectable)
    work_items = _items(groups, workdir / "quality" / "scores", cutoff, keys)
    key = items.hash_of([item.key for item in work_items])
    finished = _finished(workdir, key)
    if finished is not None:
        return finished
    directory = workdir / "quality" / "select"
    done = runner.run(work_items, directory, workers=workers, stage="select")
    manifest = _manifest(workdir, groups, [one["result"] for one in done])
    manifest |= {"cutoff": float(cutoff), "selected_hash": key}
    if not any(source["train"]["documents"] for source in manifest["sources"].values()):
        raise SmoljaxError(
            f"no document is left to train on: none has a score of {cutoff:.3f} or more (rounded scores 0 to {MAX_SCORE}: "
            f"{manifest['int_scores']} documents): lower config.quality.threshold, or give keep_fraction instead"
        )
    _assemble(groups, directory, workdir, manifest)
    return manifest


def _groups(selectable: Sequence[scores.File]) -> list[tuple[scores.File, ...]]:
    """Train and held-out files of one source and number: what is removed from them goes into one file."""
    groups: dict[tuple[str, str], list[scores.File]] = {}
    for file in selectable:
        groups.setdefault((file.source, file.path.stem), []).append(file)
    return [tuple(group) for group in groups.values()]


def _items(
    groups: Sequence[Sequence[scores.File]],
    directory: Path,
    cutoff: np.float32,
    keys: Mapping[str, str],
) -> list[items.WorkItem]:
    return [
        items.WorkItem(
            name=f"{group[0].source}-{group[0].path.stem}",
            key=items.hash_of(
                CODE_VERSION, float(cutoff), [(f.name, f.sha256, keys.get(f.name)) for f in group]
            ),
            work=write,
            argument=(group, directory, cutoff),
            size=sum(file.path.stat().st_size for file in group),
            label=", ".join(str(file.path) for file in group),
        )
        for group in groups
    ]


def write(argument: tuple[Sequence[scores.File], Path, np.float32], folder: Path) -> dict:
    """Writes the kept documents of each file as SPLIT.parquet, and those that are removed as removed.parquet."""
    group, directory, cutoff = argument
    result = {split: {"documents": 0, "bytes": 0} for split in SPLITS}
    result |= {"removed": 0, "read_bytes": 0}
    histogram = np.zeros(MAX_SCORE + 1, int)
    columns = pa.schema([*pq.read_schema(group[0].path), *_COLUMNS])
    removed_columns = columns.append(schema.REASON)
    with shard_files.Writer(folder / "removed.parquet", removed_columns) as removed_file:
        for file in group:
            with shard_files.Writer(folder / f"{file.split}.parquet", columns) as kept_file:
                for batch in _scored(file, directory, columns):
                    kept, removed = _part(batch, cutoff)
                    kept_file.write(kept)
                    removed_file.write(removed)
                    result[file.split]["documents"] += kept.num_rows
                    result[file.split]["bytes"] += shard_files.text_bytes(kept)
                    result["removed"] += removed.num_rows
                    result["read_bytes"] += shard_files.text_bytes(batch)
                    rounded = batch.column("int_score").drop_null().to_numpy()
                    histogram += np.bincount(rounded, minlength=MAX_SCORE + 1)
    return {**result, "int_scores": histogram.tolist()}


def _scored(file: scores.File, directory: Path, columns: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The row groups of a file with the scores of its documents."""
    scores_N = scores.read(directory, file) if file.judged else None
    start = 0
    with pq.ParquetFile(file.path) as table:
        for group in range(table.num_row_groups):
            for batch in table.iter_batches(1 << 20, [group]):
                rows = slice(start, start + batch.num_rows)
                start += batch.num_rows
                if scores_N is None:
                    added = [pa.nulls(batch.num_rows, field.type) for field in _COLUMNS]
                else:
                    added = [pa.array(scores_N[rows]), pa.array(int_scores(scores_N[rows]))]
                yield pa.RecordBatch.from_arrays([*batch.columns, *added], schema=columns)


def _part(batch: pa.RecordBatch, cutoff: np.float32) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Kept and removed rows; a document without a score is kept."""
    low = pc.less(batch.column("score"), pa.scalar(cutoff, pa.float32())).to_pylist()
    return schema.part(batch, [REASON if is_low else None for is_low in low])


def _manifest(
    workdir: Path, groups: Sequence[Sequence[scores.File]], results: Sequence[dict]
) -> dict:
    """That of WORKDIR/documents, if it has one, with this stage added and the counts by source replaced."""
    path = workdir / "documents" / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"stages": []}
    sources: dict[str, dict] = {}
    for group, result in zip(groups, results):
        empty = {split: {"documents": 0, "bytes": 0} for split in SPLITS} | {"removed": 0}
        entry = sources.setdefault(group[0].source, empty)
        for split in SPLITS:
            for unit in ("documents", "bytes"):
                entry[split][unit] += result[split][unit]
        entry["removed"] += result["removed"]
    known = manifest.get("sources", {})
    return manifest | {
        "stages": [*manifest["stages"], _stage(sources, results)],
        "sources": {name: known.get(name, {}) | entry for name, entry in sources.items()},
        "int_scores": np.sum([result["int_scores"] for result in results], axis=0).tolist(),
    }


def _stage(sources: Mapping[str, dict], results: Sequence[dict]) -> dict:
    """This stage's row of the manifest's table."""
    sides = [entry[split] for entry in sources.values() for split in SPLITS]
    removed = sum(result["removed"] for result in results)
    return {
        "name": STAGE,
        "kept": sum(side["documents"] for side in sides),
        "removed": removed,
        "removed_by_reason": {REASON: removed} if removed else {},
        "read_bytes": sum(result["read_bytes"] for result in results),
        "kept_bytes": sum(side["bytes"] for side in sides),
        "edits": {},
    }


def _assemble(
    groups: Sequence[Sequence[scores.File]], directory: Path, workdir: Path, manifest: dict
) -> None:
    for left in workdir.glob(".selected.*"):  # By a run that was killed at this point.
        shutil.rmtree(left, ignore_errors=True)
    with files.atomic_directory(workdir / "selected") as folder:
        for group in groups:
            source, stem = group[0].source, group[0].path.stem
            for part in (*(file.split for file in group), "removed"):
                path = items.verified(f"{directory}/{source}-{stem}", f"{part}.parquet")
                target = folder / source / part / f"{stem}.parquet"
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(path, target)
                except OSError:  # A file system without links.
                    shutil.copyfile(path, target)
        files.atomic_write_json(folder / MANIFEST, manifest)


def _finished(workdir: Path, key: str) -> dict | None:
    try:
        manifest = json.loads((workdir / "selected" / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if manifest["selected_hash"] == key else None

"""What the work items of each step do: `step(argument, folder) -> result`, a pure function of its argument.

Folders under `<workdir>/curation/`, one per item and step:
  extract/NNNNN/  kept.parquet, removed.parquet                  pages to text, one item per input shard
  filter/NNNNN/   kept.parquet, removed.parquet, hashes.npy      the stages before "dedup"
  exact/all/      first.npy, rows.npy                            equal texts, over all shards
  finish/NNNNN/   train.parquet, heldout.parquet, removed.parquet    the stages behind "dedup", and the split
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from smoljax.curation import chain, dedup, items, readers, schema, shard_files, split
from smoljax.curation.shards import Shard


def extract(argument: tuple[Shard, Mapping, int], folder: Path) -> dict:
    """Reads a shard and turns its pages into text."""
    shard, preset, max_document_bytes = argument
    stages = chain.build(preset)
    counts = shard_files.Counts()
    total = 0
    with ExitStack() as files:
        kept_file = files.enter_context(_kept(folder))
        removed_file = files.enter_context(_removed(folder))
        for batch, damaged in readers.read(shard, max_document_bytes=max_document_bytes):
            counts.add("read", batch, damaged)
            removed_file.write(schema.removed_raw(damaged))
            for step in (*stages.pages, stages.extract):
                batch, removed = counts.run(step, batch)
                removed_file.write(shard_files.without_text(removed))
            kept_file.write(batch)
            total += shard_files.text_bytes(batch)
    return {"stages": counts.stages, "text_bytes": total}


def filter(argument: tuple[str, Mapping], folder: Path) -> dict:
    """Runs the stages before "dedup", and hashes what they keep."""
    extracted, preset = argument
    stages = chain.build(preset)
    counts = shard_files.Counts()
    for step in stages.before_dedup:
        counts.expect(step.name)
    hashes = [np.empty((0, 2), np.uint64)]
    with ExitStack() as files:
        kept_file = files.enter_context(_kept(folder))
        removed_file = files.enter_context(_removed(folder))
        for batch in shard_files.read(extracted, "kept.parquet"):
            for step in stages.before_dedup:
                batch, removed = counts.run(step, batch)
                removed_file.write(removed)
            kept_file.write(batch)
            if batch.num_rows:
                hashes.append(dedup.text_hashes(batch))
    np.save(folder / "hashes.npy", np.concatenate(hashes))
    return {"stages": counts.stages}


def exact(folders: Sequence[str], folder: Path) -> dict:
    """Finds equal texts in all shards: the first of them stays."""
    first = dedup.first_rows([np.load(items.verified(f, "hashes.npy")) for f in folders])
    # One array and the row counts: np.savez would put the time into the archive.
    np.save(folder / "first.npy", np.concatenate([*first, np.empty(0, bool)]))
    np.save(folder / "rows.npy", np.array([len(rows) for rows in first], np.int64))
    return {}


def finish(argument: tuple[str, str, Mapping, float], folder: Path) -> dict:
    """Takes duplicates out of a shard, runs the stages behind "dedup", and parts train from held-out documents."""
    root, name, preset, fraction = argument
    stages = chain.build(preset)
    first = _first_of(f"{root}/exact/all", int(name))
    counts = shard_files.Counts()
    sides = {side: {"documents": 0, "bytes": 0} for side in ("train", "heldout")}
    removed_rows = start = 0
    with ExitStack() as files:
        outputs = {
            side: files.enter_context(
                shard_files.Writer(folder / f"{side}.parquet", schema.DOCUMENT)
            )
            for side in sides
        }
        removed_file = files.enter_context(_removed(folder))
        for step in ("extract", "filter"):
            for batch in shard_files.read(f"{root}/{step}/{name}", "removed.parquet"):
                removed_file.write(batch)
                removed_rows += batch.num_rows
        for batch in shard_files.read(f"{root}/filter/{name}", "kept.parquet"):
            new = first[start : start + batch.num_rows]
            start += batch.num_rows
            if stages.dedup is not None:
                batch, removed = schema.part(batch, [None if row else "dedup:exact" for row in new])
                counts.add("dedup", batch, removed)
                removed_file.write(removed)
                removed_rows += removed.num_rows
            for step in stages.after_dedup:
                batch, removed = counts.run(step, batch)
                removed_file.write(removed)
                removed_rows += removed.num_rows
            for side, part in _sides(batch, fraction):
                outputs[side].write(part)
                sides[side]["documents"] += part.num_rows
                sides[side]["bytes"] += shard_files.text_bytes(part)
    return {"stages": counts.stages, **sides, "removed": removed_rows}


def _kept(folder: Path) -> shard_files.Writer:
    return shard_files.Writer(folder / "kept.parquet", schema.DOCUMENT)


def _removed(folder: Path) -> shard_files.Writer:
    return shard_files.Writer(folder / "removed.parquet", schema.REMOVED)


def _first_of(folder: str, number: int) -> np.ndarray:
    """Of one shard: which rows hold their text for the first time."""
    rows = np.load(items.verified(folder, "rows.npy"))
    start = int(rows[:number].sum())
    first = np.load(items.verified(folder, "first.npy"), mmap_mode="r")
    return first[start : start + int(rows[number])]


def _sides(batch: pa.RecordBatch, fraction: float) -> tuple[tuple[str, pa.RecordBatch], ...]:
    chosen = split.heldout(batch, fraction)
    return ("train", batch.filter(pc.invert(chosen))), ("heldout", batch.filter(chosen))

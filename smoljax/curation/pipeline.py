"""The steps of curation: extract, filter, deduplicate, split, assemble. Each is a set of work items.

Folders under `<workdir>/curation/`, one per item and step:
  extract/NNNNN/  kept.parquet, removed.parquet                  one item per input shard
  filter/NNNNN/   kept.parquet, removed.parquet, hashes.npy      one item per extracted shard
  dedup/all/      first.npy, rows.npy                            one item over all hashes
  split/NNNNN/    train.parquet, heldout.parquet, removed.parquet
and `<workdir>/documents/`, put together from the last step at once.
"""

import functools
import inspect
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from smoljax import files
from smoljax.curation import (
    dedup,
    extract,
    filters,
    language,
    presets,
    readers,
    runner,
    schema,
    split,
)
from smoljax.curation.shards import Shard
from smoljax.errors import SmoljaxError

# Raised when the same input and configuration give other output than before: finished items are then redone.
CODE_VERSION = 1

_FUNCTIONS = {
    "length": filters.length,
    "language": language.language,
    "gopher_repetition": filters.gopher_repetition,
    "gopher_quality": filters.gopher_quality,
    "fineweb_lines": filters.fineweb_lines,
    "code_quality": filters.code_quality,
}


def stages(preset: Mapping[str, Mapping]) -> list[tuple[str, schema.Stage]]:
    """The filters of a preset, in the order in which they run, as functions of a batch alone."""
    return [
        (name, functools.partial(_FUNCTIONS[name], **preset[name]))
        for name in presets.ORDER
        if name in preset
    ]


def check_arguments(field: str, name: str, arguments: Mapping) -> None:
    """Raises a SmoljaxError that names `field` when the filter `name` has no such argument, or lacks one."""
    try:
        inspect.signature(_FUNCTIONS[name]).bind(None, **arguments)
    except TypeError as error:
        known = [p for p in inspect.signature(_FUNCTIONS[name]).parameters if p != "batch"]
        raise SmoljaxError(f"{field} has {error}: the filter takes {', '.join(known)}") from error


def hash_of(*parts: object) -> str:
    """32 hexadecimal digits of anything that JSON can write."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=_jsonable).encode())


def fingerprint(shard: Shard) -> str:
    """Of a shard's input: names, sizes and versions, but not where the folder lies."""
    pieces = [asdict(piece) for piece in shard.pieces]
    for piece in pieces:
        del piece["path"], piece["directory"]
    return hash_of(shard.source, shard.preset, pieces)


def run_steps(
    shards: Sequence[Shard],
    workdir: Path,
    *,
    chains: Mapping[str, Mapping],
    max_document_bytes: int,
    heldout_fractions: Mapping[str, float],
    workers: int,
) -> tuple[list[dict], list[dict]]:
    """Runs all steps but the last and returns (split results in shard order, stage table)."""
    root = workdir / "curation"
    names = [f"{number:05d}" for number in range(len(shards))]

    def items(work, keys, arguments, sizes):
        return [
            runner.WorkItem(name, key, work, argument, size, f"{shard.source} shard {name}")
            for name, key, argument, size, shard in zip(names, keys, arguments, sizes, shards)
        ]

    sizes = [sum(piece.size for piece in shard.pieces) for shard in shards]
    keys = [hash_of("extract", CODE_VERSION, max_document_bytes, fingerprint(s)) for s in shards]
    extract_items = items(_extract, keys, [(s, max_document_bytes) for s in shards], sizes)
    extracted = runner.run(extract_items, root / "extract", workers=workers, stage="extract")

    chain_of = [chains[shard.preset] for shard in shards]
    keys = [hash_of("filter", CODE_VERSION, key, chain) for key, chain in zip(keys, chain_of)]
    inputs = [(root / "extract" / name, chain) for name, chain in zip(names, chain_of)]
    sizes = [manifest["result"]["text_bytes"] for manifest in extracted]
    filtered = runner.run(
        items(_filter, keys, inputs, sizes), root / "filter", workers=workers, stage="filter"
    )

    dedup_key = hash_of("dedup", CODE_VERSION, keys)
    hashes = [root / "filter" / name for name in names]
    one = runner.WorkItem("all", dedup_key, _dedup, hashes, sum(sizes), "all hashes")
    deduplicated = runner.run([one], root / "dedup", workers=1, stage="dedup")

    fractions = [heldout_fractions[shard.source] for shard in shards]
    keys = [hash_of("split", dedup_key, name, fractions[i]) for i, name in enumerate(names)]
    inputs = [(root, name, fraction) for name, fraction in zip(names, fractions)]
    parted = runner.run(
        items(_split, keys, inputs, sizes), root / "split", workers=workers, stage="split"
    )
    table = _stage_table(extracted, filtered, deduplicated, parted, workers)
    return [manifest["result"] for manifest in parted], table


def assemble(shards: Sequence[Shard], workdir: Path, manifest: Mapping) -> None:
    """Puts `documents/` together: the split's files, numbered within each source, and the manifest."""
    split_root = workdir / "curation" / "split"
    numbers: Counter[str] = Counter()
    for left in workdir.glob(".documents.*"):  # By a run that was killed at this point.
        shutil.rmtree(left, ignore_errors=True)
    with files.atomic_directory(workdir / "documents") as folder:
        for number, shard in enumerate(shards):
            for part in ("train", "heldout", "removed"):
                source = split_root / f"{number:05d}" / f"{part}.parquet"
                target = folder / shard.source / part / f"{numbers[shard.source]:05d}.parquet"
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(source, target)
                except OSError:  # Another file system, or one without links.
                    shutil.copyfile(source, target)
            numbers[shard.source] += 1
        files.atomic_write_json(folder / "manifest.json", manifest)


def _extract(argument: tuple[Shard, int], folder: Path) -> dict:
    shard, max_document_bytes = argument
    counts = _Counts()
    text_bytes = 0
    with (
        _Writer(folder / "kept.parquet", schema.DOCUMENT) as kept_file,
        _Writer(folder / "removed.parquet", schema.REMOVED) as removed_file,
    ):
        for raw, damaged in readers.read(shard, max_document_bytes=max_document_bytes):
            counts.add("read", raw.num_rows, damaged)
            removed_file.write(schema.removed_raw(damaged))
            start = time.monotonic()
            kept, removed = extract.extract(raw)
            counts.add("extract", kept.num_rows, removed, time.monotonic() - start)
            kept_file.write(kept)
            removed_file.write(removed)
            text_bytes += kept.column("text").nbytes
    return {"stages": counts.stages, "text_bytes": text_bytes}


def _filter(argument: tuple[Path, Mapping], folder: Path) -> dict:
    extracted, preset = argument
    chain = stages(preset)
    counts = _Counts()
    for name, _ in chain:
        counts.add(name, 0, None)
    hashes = [np.empty((0, 2), np.uint64)]
    with (
        _Writer(folder / "kept.parquet", schema.DOCUMENT) as kept_file,
        _Writer(folder / "removed.parquet", schema.REMOVED) as removed_file,
    ):
        for batch in _batches(extracted, "kept.parquet"):
            for name, stage in chain:
                start = time.monotonic()
                batch, removed = stage(batch)
                counts.add(name, batch.num_rows, removed, time.monotonic() - start)
                removed_file.write(removed)
            kept_file.write(batch)
            if batch.num_rows:
                hashes.append(dedup.text_hashes(batch))
    np.save(folder / "hashes.npy", np.concatenate(hashes))
    return {"stages": counts.stages}


def _dedup(folders: Sequence[Path], folder: Path) -> dict:
    first = dedup.first_rows([np.load(runner.verified(f, "hashes.npy")) for f in folders])
    # One array and the row counts: np.savez would put the time into the archive.
    np.save(folder / "first.npy", np.concatenate([*first, np.empty(0, bool)]))
    np.save(folder / "rows.npy", np.array([len(rows) for rows in first], np.int64))
    kept = sum(int(rows.sum()) for rows in first)
    removed = sum(map(len, first)) - kept
    reasons = {"dedup:exact": removed} if removed else {}
    return {"stages": {"dedup": {"kept": kept, "removed_by_reason": reasons, "seconds": 0.0}}}


def _split(argument: tuple[Path, str, float], folder: Path) -> dict:
    root, name, fraction = argument
    rows = np.load(runner.verified(root / "dedup" / "all", "rows.npy"))
    start = int(rows[: int(name)].sum())
    first = np.load(runner.verified(root / "dedup" / "all", "first.npy"), mmap_mode="r")
    sides = {side: {"documents": 0, "bytes": 0} for side in ("train", "heldout")}
    removed_rows = 0
    with (
        _Writer(folder / "train.parquet", schema.DOCUMENT) as train,
        _Writer(folder / "heldout.parquet", schema.DOCUMENT) as heldout,
        _Writer(folder / "removed.parquet", schema.REMOVED) as removed_file,
    ):
        for step in ("extract", "filter"):
            for batch in _batches(root / step / name, "removed.parquet"):
                removed_file.write(batch)
                removed_rows += batch.num_rows
        for batch in _batches(root / "filter" / name, "kept.parquet"):
            new = first[start : start + batch.num_rows]
            start += batch.num_rows
            batch, removed = schema.part(batch, [None if row else "dedup:exact" for row in new])
            removed_file.write(removed)
            removed_rows += removed.num_rows
            chosen = split.heldout(batch, fraction)
            for side, writer, mask in (
                ("train", train, pc.invert(chosen)),
                ("heldout", heldout, chosen),
            ):
                part = batch.filter(mask)
                writer.write(part)
                sides[side]["documents"] += part.num_rows
                sides[side]["bytes"] += pc.sum(pc.binary_length(part.column("text"))).as_py() or 0
    return {**sides, "removed": removed_rows}


class _Writer:
    """A Parquet file of one row group per batch; the same batches give the same bytes."""

    def __init__(self, path: Path, batch_schema: pa.Schema):
        self._path, self._schema = path, batch_schema

    def __enter__(self) -> "_Writer":
        self._file = pq.ParquetWriter(self._path, self._schema, compression="zstd")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, batch: pa.RecordBatch) -> None:
        if batch.num_rows:
            self._file.write_batch(batch.cast(self._schema))


class _Counts:
    """Kept and removed rows and seconds by stage, summed over batches."""

    def __init__(self):
        self.stages: dict[str, dict] = {}

    def add(
        self, stage: str, kept: int, removed: pa.RecordBatch | None, seconds: float = 0.0
    ) -> None:
        entry = self.stages.setdefault(stage, {"kept": 0, "removed_by_reason": {}, "seconds": 0.0})
        entry["kept"] += kept
        entry["seconds"] = round(entry["seconds"] + seconds, 4)
        if removed is not None:
            reasons = entry["removed_by_reason"]
            for reason, count in Counter(removed.column("reason").to_pylist()).items():
                reasons[reason] = reasons.get(reason, 0) + count


def _batches(folder: Path, name: str):
    table = pq.ParquetFile(runner.verified(folder, name))
    for group in range(table.num_row_groups):
        yield from table.iter_batches(1 << 20, [group])


def _stage_table(extracted, filtered, deduplicated, parted, workers: int) -> list[dict]:
    """The stages in the order in which they run, with counts summed over items."""
    totals: dict[str, dict] = {}
    for manifest in [*extracted, *filtered, *deduplicated]:
        for name, entry in manifest["result"]["stages"].items():
            total = totals.setdefault(
                name, {"kept": 0, "removed_by_reason": Counter(), "seconds": 0.0}
            )
            total["kept"] += entry["kept"]
            total["removed_by_reason"].update(entry["removed_by_reason"])
            total["seconds"] += entry["seconds"]
    totals["dedup"]["seconds"] = deduplicated[0]["seconds"]
    return [
        {
            "name": name,
            "kept": totals[name]["kept"],
            "removed": sum(totals[name]["removed_by_reason"].values()),
            "removed_by_reason": dict(sorted(totals[name]["removed_by_reason"].items())),
            "seconds": round(totals[name]["seconds"], 2),
        }
        for name in ("read", "extract", *presets.ORDER, "dedup")
        if name in totals
    ]


def _jsonable(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise SmoljaxError(f"a configuration cannot hold {value!r} of type {type(value).__name__}")

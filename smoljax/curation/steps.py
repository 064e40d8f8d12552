"""What the work items of each step do: `step(argument, folder) -> result`, a pure function of its argument.

Folders under `<workdir>/curation/`, one per item and step:
  extract/NNNNN/     kept.parquet, removed.parquet       pages to text, one item per input shard
  filter/NNNNN/      kept.parquet, removed.parquet       the stages before "dedup"
  signatures/NNNNN/  hashes.npy, signatures.bin          what "dedup" compares
  exact/GGG/         copies.npy                          equal texts; one item per group of shards (`pipeline`)
  bands/GGG-BB/      edges.bin                           near-duplicates; one item per group and bucket
  clusters/GGG/      NNNNN.npy                           for each document of each shard, how many it stands for
  finish/NNNNN/      train.parquet, heldout.parquet, removed.parquet    the stages behind "dedup", and the split
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
    """Runs the stages before "dedup"."""
    extracted, preset = argument
    stages = chain.build(preset)
    counts = shard_files.Counts()
    for step in stages.before_dedup:
        counts.expect(step.name)
    with ExitStack() as files:
        kept_file = files.enter_context(_kept(folder))
        removed_file = files.enter_context(_removed(folder))
        for batch in shard_files.read(extracted, "kept.parquet"):
            for step in stages.before_dedup:
                batch, removed = counts.run(step, batch)
                removed_file.write(removed)
            kept_file.write(batch)
    return {"stages": counts.stages}


def signatures(argument: tuple[str, dedup.DedupConfig], folder: Path) -> dict:
    """Hashes the texts of a shard, and signs them."""
    filtered, config = argument
    rows = 0
    hashes = [np.empty((0, 2), np.uint64)]
    with ExitStack() as files:
        if config.minhash is not None:
            writer = dedup.SignatureWriter(folder / "signatures.bin", config.minhash)
            signed = files.enter_context(writer)
        for batch in shard_files.read(filtered, "kept.parquet"):
            rows += batch.num_rows
            if config.exact:
                hashes.append(dedup.hashes(batch, config))
            if config.minhash is not None:
                signed.add(*dedup.signatures(batch, config))
    if config.exact:
        np.save(folder / "hashes.npy", np.concatenate(hashes))
    return {"rows": rows}


def exact(folders: Sequence[str], folder: Path) -> dict:
    """Finds equal texts in all shards of a group."""
    hashes = np.concatenate([np.load(items.verified(f, "hashes.npy")) for f in folders])
    np.save(folder / "copies.npy", dedup.copies(hashes))
    return {}


def bands(
    argument: tuple[Sequence[str], str | None, dedup.MinHashConfig, int], folder: Path
) -> dict:
    """Finds the documents of a group that agree in one bucket, exact duplicates left out."""
    folders, exact_folder, config, bucket = argument
    count = dedup.write_edges(
        [f"{signed}/signatures.bin" for signed in folders],
        config,
        bucket=bucket,
        output=folder / "edges.bin",
        compared=None if exact_folder is None else _copies(exact_folder) > 0,
    )
    return {"edges": count}


def clusters(
    argument: tuple[Sequence[str], str | None, Sequence[str], Sequence[int]], folder: Path
) -> dict:
    """Joins what all buckets of a group found.

    Of each document: the size of its cluster, exact duplicates counted, if it stays; 0 if it is a near-duplicate of
    an earlier one, and -1 if it is an exact one.
    """
    band_folders, exact_folder, names, rows = argument
    copies = None if exact_folder is None else _copies(exact_folder)
    edges = dedup.read_edges(items.verified(found, "edges.bin") for found in band_folders)
    sizes = dedup.cluster_sizes(edges, rows, copies)
    if copies is not None:
        sizes[copies == 0] = -1
    for name, part in zip(names, np.split(sizes, np.cumsum(rows)[:-1])):
        np.save(folder / f"{name}.npy", part)
    return {}


def finish(argument: tuple[str, str, Mapping, float, str | None], folder: Path) -> dict:
    """Takes duplicates out of a shard, runs the stages behind "dedup", and parts train from held-out documents."""
    root, name, preset, fraction, cluster_folder = argument
    stages = chain.build(preset)
    if cluster_folder is not None:
        sizes = np.load(items.verified(cluster_folder, f"{name}.npy"))
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
        removed_file = files.enter_context(_removed(folder, "zstd"))
        for step in ("extract", "filter"):
            for batch in shard_files.read(f"{root}/{step}/{name}", "removed.parquet"):
                removed_file.write(batch)
                removed_rows += batch.num_rows
        for batch in shard_files.read(f"{root}/filter/{name}", "kept.parquet"):
            if cluster_folder is not None:
                batch, removed = _without_duplicates(batch, sizes[start : start + batch.num_rows])
                start += batch.num_rows + removed.num_rows
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
    """For the next step, and no longer kept than the work items are: a faster compression serves."""
    return shard_files.Writer(folder / "kept.parquet", schema.DOCUMENT, compression="lz4")


def _removed(folder: Path, compression: str = "lz4") -> shard_files.Writer:
    return shard_files.Writer(folder / "removed.parquet", schema.REMOVED, compression=compression)


def _copies(folder: str) -> np.ndarray:
    return np.load(items.verified(folder, "copies.npy"), mmap_mode="r")


def _without_duplicates(
    batch: pa.RecordBatch, sizes: np.ndarray
) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    reasons = {0: "dedup:minhash", -1: "dedup:exact"}
    numbered = schema.replace(batch, cluster_size=pa.array(sizes, pa.int32(), mask=sizes < 1))
    return schema.part(numbered, [reasons.get(size) for size in sizes.tolist()])


def _sides(batch: pa.RecordBatch, fraction: float) -> tuple[tuple[str, pa.RecordBatch], ...]:
    chosen = split.heldout(batch, fraction)
    return ("train", batch.filter(pc.invert(chosen))), ("heldout", batch.filter(chosen))

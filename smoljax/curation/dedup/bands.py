"""Documents that agree in a bucket: an external sort of one bucket of all shards, in bounded memory.

A record is a band and its document, uint64 [hashes_per_bucket + 1], the document being shard * 2^32 + row. Records
are sorted by all their columns; where two neighbours' bands are equal in every hash, an edge joins their documents.
Those are the edges that datatrove's merge writes, in its order, since it compares band, file and document too.

Records are read until they fill the memory, sorted, and spilled as a run; the runs are merged block by block: of each
run the next block is looked at, and all records up to the least of the blocks' last ones can be sorted and passed on.
Everything is numpy on whole blocks; an edge does not depend on how many runs there were.

On paper, 100 million documents and FineWeb's 14 x 8 hashes (all shards together):
  signature files   100e6 * (14 * 64 + 4) B = 90 GB, written once and read once, but for the rows, which every bucket reads
  a bucket          100e6 * 72 B = 7.2 GB of runs on disk while it is sorted; with 1 GiB of memory 16 runs, merged in one
                    pass. Read 6.8 GB, write 7.2, read 7.2. Buckets are independent: 14 work items on 14 machines, or
                    one after another on one, whose disk then holds 7.2 GB at a time.
  edges             16 B each, at most one per document and bucket: 1.6 GB a bucket if every document has a duplicate
  clusters          8 B of memory per document = 0.8 GB (`clusters`), edges streamed
One merge pass is enough as long as a block of each run has some thousand records: 1 GiB of memory and 10 billion
documents make 1565 runs and blocks of 4083 records. Measured with ten million synthetic signatures:
benchmarks/results/dedup_scale_2026-11-25.md.
"""

import bisect
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from smoljax.curation.dedup import signature_files
from smoljax.curation.dedup.minhash import MinHashConfig

# Records that are copied into their order, and passed on, at once.
_SLICE = 1 << 16


def write_edges(
    paths: Sequence[str],
    config: MinHashConfig,
    *,
    bucket: int,
    output: Path,
    compared: np.ndarray | None = None,
    memory_bytes: int = 1 << 30,
) -> int:
    """Writes the edges of one bucket, and returns how many.

    Args:
      paths: the shards' signature files in shard order, local or URLs.
      config: that made them.
      bucket: which.
      output: file of uint64 [edges, 2], pairs of documents (shard * 2^32 + row), the smaller first. Runs are spilled
        beside it, and removed.
      compared: bool, one for each document of all shards in order: False leaves it out. None compares all.
      memory_bytes: about what the sort may take.

    Raises:
      SmoljaxError: a signature file is missing, damaged or of another configuration.
    """
    count = 0
    records = _records(paths, config, bucket, compared)
    with open(output, "wb") as file:
        for edges in _edges(_sorted(records, config.hashes_per_bucket + 1, output, memory_bytes)):
            file.write(edges.tobytes())
            count += len(edges)
    return count


def _records(
    paths: Sequence[str], config: MinHashConfig, bucket: int, compared: np.ndarray | None
) -> Iterator[np.ndarray]:
    """Blocks of records, in the order of their documents."""
    start = 0
    for shard, path in enumerate(paths):
        file = signature_files.Reader(path, config)
        for rows, bands in file.bucket(bucket):
            if compared is not None:
                wanted = compared[start + rows.astype(np.int64)]
                rows, bands = rows[wanted], bands[wanted]
            yield np.column_stack([bands, np.uint64(shard << 32) + rows])
        start += file.documents


def _edges(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Of consecutive sorted blocks of records, the pairs of documents whose bands are equal."""
    last = None
    for records in blocks:
        if last is not None:
            records = np.concatenate([last, records])
        at = np.flatnonzero(records[1:, 0] == records[:-1, 0])
        at = at[(records[at + 1, 1:-1] == records[at, 1:-1]).all(axis=1)]
        yield np.stack([records[at, -1], records[at + 1, -1]], axis=1)
        last = records[-1:].copy()


def _sorted(
    blocks: Iterator[np.ndarray], width: int, output: Path, memory_bytes: int
) -> Iterator[np.ndarray]:
    """All records in order, in blocks."""
    # A record, its copy, and its places in the order while it is sorted.
    capacity = max(2, memory_bytes // (2 * 8 * width + 24))
    runs: list[Path] = []
    try:
        buffer, filled = np.empty((capacity, width), np.uint64), 0
        for block in blocks:
            while len(block):
                if filled == capacity:
                    runs.append(_spilled(buffer, output, len(runs)))
                    filled = 0
                part = block[: capacity - filled]
                buffer[filled : filled + len(part)] = part
                filled, block = filled + len(part), block[len(part) :]
        if not runs:
            yield from _in_order(buffer[:filled])
            return
        runs.append(_spilled(buffer[:filled], output, len(runs)))
        del buffer  # The memory is the merge's now.
        yield from _merged(runs, width, max(1, capacity // len(runs)))
    finally:
        for run in output.parent.glob(f".{output.name}.run*"):
            run.unlink()


def _spilled(records: np.ndarray, output: Path, number: int) -> Path:
    path = output.with_name(f".{output.name}.run{number}")
    with open(path, "wb") as file:
        for part in _in_order(records):
            file.write(part.tobytes())
    return path


def _merged(runs: Sequence[Path], width: int, block: int) -> Iterator[np.ndarray]:
    """The records of sorted runs in order, `block` records of each run at a time in memory."""
    read = [0] * len(runs)
    heads = [np.empty((0, width), np.uint64)] * len(runs)
    ended = [False] * len(runs)
    while True:
        for r, path in enumerate(runs):
            if not len(heads[r]) and not ended[r]:
                offset = 8 * width * read[r]
                found = np.fromfile(path, np.uint64, block * width, offset=offset)
                heads[r] = found.reshape(-1, width)
                read[r] += len(heads[r])
                ended[r] = len(heads[r]) < block
        lasts = [head[-1].tolist() for head, end in zip(heads, ended) if not end]
        if lasts:
            bound = min(lasts)
            cuts = [_not_above(head, bound) for head in heads]
        else:
            cuts = [len(head) for head in heads]
        # Runs hold later and later documents: one behind another, equal bands are in the order of documents.
        yield from _in_order(np.concatenate([head[:cut] for head, cut in zip(heads, cuts)]))
        if not lasts:
            return
        heads = [head[cut:] for head, cut in zip(heads, cuts)]


def _not_above(records: np.ndarray, bound: list[int]) -> int:
    """How many of sorted records are at most `bound`, a record."""
    return bisect.bisect_right(range(len(records)), bound, key=lambda i: records[i].tolist())


def _in_order(records: np.ndarray) -> Iterator[np.ndarray]:
    """Records, of which those with equal bands are in order, in slices of all in order."""
    order = np.argsort(records[:, 0], kind="stable")
    first = records[order, 0]
    equal = first[1:] == first[:-1]
    tied = np.flatnonzero(np.append(equal, False) | np.append(False, equal))
    # Few records share their first hash; only these are compared further.
    ties = order[tied]
    order[tied] = ties[np.lexsort(records[ties, :-1].T[::-1])]
    for start in range(0, len(records), _SLICE):
        yield records[order[start : start + _SLICE]]

"""MinHash deduplication of ten million signatures in bounded memory: the sort of buckets, and the clusters.

  python benchmarks/dedup_scale.py --folder=/tmp/dedup_scale > benchmarks/results/dedup_scale_$(date +%F).md

Signature files as FineWeb's preset has them (14 buckets of 8 hashes) are written with clusters planted: a chain of
documents whose neighbours agree in the first and in the second bucket in turn, so that a cluster comes out only if
both buckets are sorted and joined. Sizes from 2 to 1,000, and one of a hundredth of all documents. Each step runs in
its own process. All clusters' sizes and first documents are compared with what was planted. 10 GB of disk, removed.
"""

import argparse
import functools
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from smoljax.curation import dedup
from smoljax.curation.dedup.minhash import FINEWEB

SHARDS = 10
SORTED = 2
_DRAWN = 1 << 14  # Documents whose signatures are drawn at a time.


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--memory_mb", type=int, default=256, help="what a sort may take")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    try:
        _measure(options.folder, options.documents, options.memory_mb)
    finally:
        shutil.rmtree(options.folder)


def _measure(folder: Path, documents: int, memory_mb: int) -> None:
    rows = [len(part) for part in np.array_split(np.arange(documents), SHARDS)]
    print(
        f"# {documents:,} signatures of {FINEWEB.buckets} x {FINEWEB.hashes_per_bucket} hashes in {SHARDS} shards, "
        f"{memory_mb} MiB for a sort\n"
    )
    print("| step | seconds | peak RSS, MB | written, MB | |\n|---|---|---|---|---|")
    _step("start of Python, imports", folder, lambda: "")
    _step("signature files", folder, lambda: _write(folder, rows))
    for bucket in range(SORTED):
        sort = functools.partial(_sort, folder, bucket, memory_mb)
        _step(f"bands of bucket {bucket}", folder, sort)
    _step("clusters", folder, lambda: _join(folder, rows))
    found = np.load(folder / "sizes.npy")
    expected = _expected(documents)
    if not (found == expected).all():
        sys.exit(f"{(found != expected).sum()} documents have other clusters than were planted")
    near = (expected > 1).sum()
    print(
        f"\nAll {near:,} planted clusters came out, with their sizes and first documents: "
        f"{(expected == 0).sum():,} documents would be removed, the largest cluster has {expected.max():,}."
    )


def _step(name: str, folder: Path, work) -> None:
    """Runs `work` in a child, and prints what it took."""
    before, start = _bytes(folder), time.monotonic()
    sys.stdout.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, work().encode())
        os._exit(0)
    os.close(writing)
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"{name}: exit status {status}")
    seconds, written = time.monotonic() - start, (_bytes(folder) - before) / 1e6
    said = os.read(reading, 1000).decode()
    print(f"| {name} | {seconds:.1f} | {usage.ru_maxrss / 1e3:.0f} | {written:,.0f} | {said} |")


def _write(folder: Path, rows: list[int]) -> str:
    keys = _keys(sum(rows))
    start = 0
    for shard, count in enumerate(rows):
        with dedup.SignatureWriter(folder / f"{shard}.bin", FINEWEB) as writer:
            for first in range(start, start + count, _DRAWN):
                part = keys[first : min(first + _DRAWN, start + count)]
                writer.add(_drawn(part), np.ones(len(part), bool))
        start += count
    return ""


def _sort(folder: Path, bucket: int, memory_mb: int) -> str:
    paths = [str(folder / f"{shard}.bin") for shard in range(SHARDS)]
    edges = dedup.write_edges(
        paths,
        FINEWEB,
        bucket=bucket,
        output=folder / f"{bucket}.edges",
        memory_bytes=memory_mb << 20,
    )
    return f"{edges:,} edges"


def _join(folder: Path, rows: list[int]) -> str:
    edges = dedup.read_edges(folder / f"{bucket}.edges" for bucket in range(SORTED))
    np.save(folder / "sizes.npy", dedup.cluster_sizes(edges, rows))
    return f"{sum(rows):,} documents"


def _clusters(documents: int) -> tuple[np.ndarray, np.ndarray]:
    """(documents in a random order, of each cluster where it begins in there)."""
    random = np.random.default_rng(0)
    sizes = random.choice(
        [1, 2, 3, 5, 100, 1000], documents, p=[0.8, 0.14, 0.04, 0.0199, 9e-5, 1e-5]
    )
    starts = np.concatenate([[0], documents // 100 + np.concatenate([[0], np.cumsum(sizes)])])
    return random.permutation(documents), starts[starts < documents]


def _keys(documents: int) -> np.ndarray:
    """uint64 [documents, 2]: documents with one key in a bucket agree in it."""
    order, starts = _clusters(documents)
    place = np.arange(documents) - np.repeat(starts, np.diff(np.append(starts, documents)))
    keys = np.empty((documents, SORTED), np.uint64)
    for bucket in range(SORTED):
        # The second, fourth, ... of a cluster has the key of the one before it; in the other bucket the third, fifth.
        follows = (place > 0) & (place % 2 == 1 - bucket)
        keys[order, bucket] = np.arange(documents) - follows
    return keys


def _drawn(keys: np.ndarray) -> np.ndarray:
    """Signatures [documents, 112], equal in a sorted bucket where the keys are, drawn by splitmix64."""
    width = FINEWEB.hashes_per_bucket
    found = np.empty((len(keys), FINEWEB.buckets, width), np.uint64)
    for bucket in range(FINEWEB.buckets):
        # A bucket that is not sorted only has to be there.
        key = keys[:, min(bucket, SORTED - 1)]
        state = (key * np.uint64(FINEWEB.buckets) + np.uint64(bucket)) * np.uint64(width)
        z = (state[:, None] + np.arange(1, width + 1, dtype=np.uint64)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        found[:, bucket] = (z ^ (z >> np.uint64(31))) & np.uint64((1 << 61) - 1)
    return found.reshape(len(keys), -1)


def _expected(documents: int) -> np.ndarray:
    order, starts = _clusters(documents)
    sizes = np.zeros(documents, np.int32)
    sizes[np.minimum.reduceat(order, starts)] = np.diff(np.append(starts, documents))
    return sizes


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


if __name__ == "__main__":
    main()

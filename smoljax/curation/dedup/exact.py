"""Exact duplicates over the whole corpus: of equal texts the one with the smallest (shard, row) stays.

So the outcome depends neither on the order in which shards were finished nor on the number of workers.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import xxhash


def text_hashes(batch: pa.RecordBatch) -> np.ndarray:
    """[rows, 2] uint64: the 128-bit xxh3 hash of each text's UTF-8 bytes."""
    hashes = [xxhash.xxh3_128_digest(text.encode()) for text in batch.column("text").to_pylist()]
    return np.frombuffer(b"".join(hashes), ">u8").reshape(-1, 2).astype(np.uint64)


def first_rows(shards: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each shard's hashes [rows, 2], a bool [rows]: True where the text occurs for the first time.

    24 bytes of memory per document, and a sort: a hundred million documents fit in 5 GB.
    """
    sizes = [len(hashes) for hashes in shards]
    if not sum(sizes):
        return [np.zeros(size, bool) for size in sizes]
    hashes = np.concatenate(shards)
    order = np.lexsort(
        (hashes[:, 1], hashes[:, 0])
    )  # Stable: equal hashes stay in (shard, row) order.
    ordered = hashes[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.zeros(len(order), bool)
    first[order[new]] = True
    return np.split(first, np.cumsum(sizes)[:-1])

"""Clusters of near-duplicates: what edges join, in memory of 8 bytes per document (12 above 2^32 of them).

Union-find in whole arrays: of an edge's two roots the greater is hung below the smaller, and paths are shortened by
looking up parents' parents, for all nodes of a block of edges at once. A cluster's root is its smallest document, so
what comes out depends neither on the order of edges nor on how they were parted among files.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

# Edges, or documents, that are looked at at once.
_BLOCK = 1 << 20


def cluster_sizes(
    edges: Iterable[np.ndarray], rows: Sequence[int], copies: np.ndarray | None = None
) -> np.ndarray:
    """Sizes of clusters, at their smallest documents.

    Args:
      edges: blocks of uint64 [n, 2], pairs of documents (shard * 2^32 + row) as `bands` writes them.
      rows: documents of each shard.
      copies: int32 [documents], how many each document counts for (`exact.copies`); None counts each once.

    Returns:
      int32 [documents], all shards one behind another: for the smallest document of each cluster the sum of its
      documents' copies, for others 0. A document without edges is its own cluster.
    """
    starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
    count = int(starts[-1])
    parents = np.arange(count, dtype=np.uint32 if count <= 1 << 32 else np.uint64)
    for block in edges:
        shard, row = (block >> np.uint64(32)).astype(np.int64), block & np.uint64(0xFFFFFFFF)
        _join(parents, starts[shard] + row.astype(np.int64))
    found = np.zeros(count, np.int32)
    for start in range(0, count, _BLOCK):
        nodes = np.arange(start, min(start + _BLOCK, count))
        counted = 1 if copies is None else copies[start : start + _BLOCK]
        np.add.at(found, _roots(parents, nodes), counted)
    return found


def read_edges(paths: Iterable[Path]) -> Iterator[np.ndarray]:
    """Blocks of the edges in files that `bands.write_edges` wrote."""
    for path in paths:
        with open(path, "rb") as file:
            while len(block := np.fromfile(file, np.uint64, 2 * _BLOCK)):
                yield block.reshape(-1, 2)


def _join(parents: np.ndarray, edges: np.ndarray) -> None:
    """Puts the ends of each edge [n, 2] below one root, in place."""
    while len(edges):
        roots = _roots(parents, edges.ravel()).reshape(-1, 2)
        low, high = roots.min(axis=1), roots.max(axis=1)
        open_ = low != high
        edges = np.stack([low[open_], high[open_]], axis=1)
        # Where several edges have one greater root, the smallest of their other ends takes it; the next round sees
        # to the rest.
        np.minimum.at(parents, edges[:, 1], edges[:, 0].astype(parents.dtype))


def _roots(parents: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """The roots [n] (int64) of nodes, which then hang directly below them."""
    found = parents[nodes]
    while ((further := parents[found]) != found).any():
        parents[nodes] = found = further
    return found.astype(np.int64)

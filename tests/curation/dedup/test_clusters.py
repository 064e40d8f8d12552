"""Clusters against scipy's connected components."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from smoljax.curation.dedup import clusters


def documents(numbers: np.ndarray, rows: list[int]) -> np.ndarray:
    """Documents (shard * 2^32 + row) of their numbers over all shards."""
    starts = np.concatenate([[0], np.cumsum(rows)])
    shard = np.searchsorted(starts, numbers, side="right") - 1
    return (shard << 32 | numbers - starts[shard]).astype(np.uint64)


def expected(pairs: np.ndarray, weights: np.ndarray) -> list[int]:
    count = len(weights)
    ones = np.ones(len(pairs))
    graph = coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    labels = connected_components(graph, directed=False)[1]
    found = np.zeros(count, int)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        found[members[0]] = weights[members].sum()
    return found.tolist()


@settings(deadline=None, max_examples=80)
@given(
    rows=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    density=st.sampled_from([0, 0.3, 0.7, 3]),
    seed=st.integers(0, 2**32 - 1),
    block=st.sampled_from([1, 3, 1000]),
)
def test_sizes_stand_at_the_smallest_documents_in_any_order_of_edges(rows, density, seed, block):
    random = np.random.default_rng(seed)
    count = sum(rows)
    pairs = random.integers(0, max(1, count), (int(density * count), 2))
    copies = random.integers(1, 5, count).astype(np.int32)
    edges = documents(pairs, rows).reshape(-1, 2)
    for order in (np.arange(len(edges)), random.permutation(len(edges))):
        blocks = [edges[order[i : i + block]] for i in range(0, len(edges), block)]
        assert clusters.cluster_sizes(blocks, rows, copies).tolist() == expected(pairs, copies)
    assert clusters.cluster_sizes([edges], rows).tolist() == expected(pairs, np.ones(count, int))


@pytest.mark.parametrize("kind", ["chain", "reversed chain", "star", "star of the last", "random"])
def test_shapes_that_are_hard_for_union_find(kind):
    """300,000 documents in one cluster; the shapes whose trees or rounds could grow with their number."""
    count = 300_000
    number = np.arange(count)
    pairs = {
        "chain": np.stack([number[:-1], number[1:]], axis=1),
        "reversed chain": np.stack([number[1:], number[:-1]], axis=1)[::-1],
        "star": np.stack([np.zeros(count - 1, int), number[1:]], axis=1),
        "star of the last": np.stack([number[:-1], np.full(count - 1, count - 1)], axis=1),
        "random": np.random.default_rng(0).permutation(count)[
            np.stack([number[:-1], number[1:]], 1)
        ],
    }[kind]
    blocks = np.array_split(documents(pairs, [count]), 7)
    sizes = clusters.cluster_sizes(blocks, [count])
    assert sizes[0] == count
    assert not sizes[1:].any()


def test_nothing_one_document_and_empty_shards():
    assert clusters.cluster_sizes([], []).tolist() == []
    assert clusters.cluster_sizes([], [0, 0]).tolist() == []
    assert clusters.cluster_sizes([], [0, 1, 0]).tolist() == [1]
    assert clusters.cluster_sizes([np.empty((0, 2), np.uint64)], [2]).tolist() == [1, 1]
    joined = np.array([[0, 2 << 32]], np.uint64)
    assert clusters.cluster_sizes([joined], [1, 0, 1]).tolist() == [2, 0]


def test_copies_of_nobody_count_for_nothing():
    """An exact duplicate has 0 copies and no edges: no cluster."""
    joined = np.array([[0, 2]], np.uint64)
    assert clusters.cluster_sizes([joined], [3], np.array([5, 0, 1], np.int32)).tolist() == [
        6,
        0,
        0,
    ]

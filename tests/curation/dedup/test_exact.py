"""Exact dedup and the split, against their definitions."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from smoljax.curation import split
from smoljax.curation.dedup import exact


def batch(texts: list[str]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array(texts, pa.string())], ["text"])


@given(st.lists(st.lists(st.sampled_from("abcdef"), max_size=6), max_size=5))
def test_the_first_of_equal_texts_stays(shards):
    texts = [text for shard in shards for text in shard]
    hashes = [exact.text_hashes(shard) for shard in shards]
    found = exact.copies(np.concatenate([*hashes, np.empty((0, 2), np.uint64)]))
    assert len(found) == len(texts)
    seen: set[str] = set()
    for text, count in zip(texts, found):
        assert count == (0 if text in seen else texts.count(text))
        seen.add(text)


def test_texts_that_differ_in_one_character_both_stay():
    assert exact.copies(exact.text_hashes(["a b", "a  b", "a b "])).tolist() == [1, 1, 1]


def test_no_document():
    assert exact.copies(np.empty((0, 2), np.uint64)).tolist() == []


def test_heldout_fraction_and_independence_of_batches():
    texts = [f"document {i}" for i in range(20_000)]
    whole = split.heldout(batch(texts), 0.1).to_pylist()
    # Binomial(20000, 0.1): mean 2000, standard deviation 42.
    assert abs(sum(whole) - 2000) < 5 * 42.5
    halves = [
        *split.heldout(batch(texts[:7]), 0.1).to_pylist(),
        *split.heldout(batch(texts[7:]), 0.1).to_pylist(),
    ]
    assert halves == whole
    assert not any(split.heldout(batch(texts), 0.0).to_pylist())


def test_a_larger_fraction_holds_out_the_same_documents_and_more():
    texts = [f"document {i}" for i in range(1000)]
    small = split.heldout(batch(texts), 0.05).to_pylist()
    large = split.heldout(batch(texts), 0.2).to_pylist()
    assert all(b for a, b in zip(small, large) if a)
    assert sum(large) > sum(small)

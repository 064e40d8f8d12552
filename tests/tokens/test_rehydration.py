"""Rehydration: FineWeb2's published weights, and token shards that hold documents as often."""

import collections

import numpy as np
import pytest

from smoljax.errors import SmoljaxError
from smoljax.tokens.documents import tokenize_documents
from smoljax.tokens.reader import ShardReader
from smoljax.tokens.rehydration import rehydration_weights
from smoljax.tokens.shards import shard_directory

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def test_weights_are_the_published_ones():
    """1->1, 2->2, 3->3, 4->3, 5 to 99->5, 100 to 999->8, from 1000 on 1."""
    sizes = np.array([1, 2, 3, 4, 5, 99, 100, 999, 1000, 10**6], np.int32)
    assert rehydration_weights(sizes).tolist() == [1, 2, 3, 3, 5, 5, 8, 8, 1, 1]
    assert rehydration_weights(np.empty(0, np.int32)).tolist() == []


def _write(path, texts, sizes):
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = [f"{path.parent.name}-{path.stem}-{row}" for row in range(len(texts))]
    columns = {"id": ids, "text": texts, "cluster_size": pa.array(sizes, pa.int32())}
    pq.write_table(pa.table(columns), path)


@pytest.fixture
def documents(tmp_path, texts):
    root = tmp_path / "documents"
    # More rows than are decoded at a time.
    sizes = [*[1] * 300, 2, 4, None, *[1] * 10, 150]
    _write(root / "s/train/00000.parquet", (texts * 300)[: len(sizes)], sizes)
    _write(root / "s/train/00001.parquet", texts[:3], [2, 5000, 1])
    _write(root / "s/train/00002.parquet", [], [])
    _write(root / "s/heldout/00000.parquet", texts[:2], [7, 1])
    return root


def ids(folder, split):
    reader = ShardReader(shard_directory(folder, "s"), split)
    return [reader.document_id(number) for number in range(reader.num_documents)]


def test_documents_come_again_in_rounds_and_held_out_ones_do_not(documents, bpe, tmp_path):
    plain = tokenize_documents(documents, tmp_path / "plain", bpe)
    again = tokenize_documents(documents, tmp_path / "again", bpe, rehydrate=True)
    once, found = ids(tmp_path / "plain", "train"), ids(tmp_path / "again", "train")
    counts = {"00000-300": 2, "00000-301": 3, "00000-313": 8, "00001-0": 2}
    expected = {name: counts.get(name.removeprefix("train-"), 1) for name in once}
    assert collections.Counter(found) == expected
    assert found[: len(once)] == once
    assert [name.removeprefix("train-") for name in found[len(once) :]] == [
        *("00000-300", "00000-301", "00000-313", "00001-0"),
        *("00000-301", "00000-313"),
        *["00000-313"] * 5,
    ]
    assert ids(tmp_path / "again", "heldout") == ids(tmp_path / "plain", "heldout")
    reader = ShardReader(shard_directory(tmp_path / "again", "s"), "train")
    assert reader.num_tokens == again["s"]["splits"]["train"]["tokens"]
    assert plain["s"]["splits"]["train"]["documents"] == len(once)


def test_shards_are_made_again_when_the_option_changes(documents, bpe, tmp_path):
    shards = tmp_path / "shards"
    first = tokenize_documents(documents, shards, bpe)
    again = tokenize_documents(documents, shards, bpe, rehydrate=True)
    assert again["s"]["inputs_fingerprint"] != first["s"]["inputs_fingerprint"]
    assert tokenize_documents(documents, shards, bpe, rehydrate=True) == again
    assert tokenize_documents(documents, shards, bpe) == first


def test_documents_without_sizes_of_clusters_are_named(documents, bpe, tmp_path):
    table = pq.read_table(documents / "s/train/00001.parquet").drop_columns(["cluster_size"])
    pq.write_table(table, documents / "s/train/00001.parquet")
    with pytest.raises(SmoljaxError, match=r"00001\.parquet has no column 'cluster_size'"):
        tokenize_documents(documents, tmp_path / "shards", bpe, rehydrate=True)

import pytest

from smoljax.errors import SmoljaxError
from smoljax.tokens.documents import find_sources, read_texts, tokenize_documents
from smoljax.tokens.reader import ShardReader
from smoljax.tokens.shards import shard_directory

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def _write(path, ids, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": ids, "text": texts, "language": ["en"] * len(ids)}), path)


@pytest.fixture
def documents(tmp_path, texts):
    root = tmp_path / "documents"
    _write(root / "b_source" / "train" / "00000.parquet", ["b0", "b1"], texts[:2])
    _write(root / "b_source" / "train" / "00001.parquet", ["b2"], texts[2:3])
    _write(root / "b_source" / "heldout" / "00000.parquet", ["b3"], texts[3:4])
    _write(root / "a_source" / "train" / "00000.parquet", ["a0", "a1", "a2"], texts[4:7])
    _write(root / "a_source" / "removed" / "00000.parquet", ["a9"], ["never read"])
    (root / "manifest.json").write_text("{}")
    return root


def test_sources_and_texts_in_turn(documents, texts):
    assert find_sources(documents) == ["a_source", "b_source"]
    expected = [texts[4], texts[0], texts[5], texts[1], texts[6], texts[2]]
    assert list(read_texts(documents, "train")) == expected


def test_tokenize_then_skip_then_only_what_changed(documents, texts, bpe, tmp_path, capsys):
    shards = tmp_path / "shards"
    manifests = tokenize_documents(documents, shards, bpe, block_tokens=4096)
    assert sorted(manifests) == ["a_source", "b_source"]
    reader = ShardReader(shard_directory(shards, "b_source"), "train")
    assert [reader.document_id(i) for i in range(3)] == ["b0", "b1", "b2"]
    assert reader.num_tokens == sum(len(bpe.encode(text)) + 2 for text in texts[:3])
    assert manifests["b_source"]["splits"]["heldout"]["documents"] == 1
    assert manifests["a_source"]["splits"]["heldout"]["documents"] == 0

    def times():
        return {
            name: (shard_directory(shards, name) / "manifest.json").stat().st_mtime_ns
            for name in manifests
        }

    before = times()
    assert tokenize_documents(documents, shards, bpe, block_tokens=4096) == manifests
    assert times() == before
    _write(documents / "b_source" / "train" / "00001.parquet", ["b2"], ["another text"])
    tokenize_documents(documents, shards, bpe, block_tokens=4096)
    after = times()
    assert after["a_source"] == before["a_source"]
    assert after["b_source"] != before["b_source"]


def test_errors(documents, bpe, tmp_path):
    with pytest.raises(SmoljaxError, match="does not exist: curate documents first"):
        tokenize_documents(tmp_path / "none", tmp_path / "s", bpe)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SmoljaxError, match="holds no curated documents"):
        tokenize_documents(tmp_path / "empty", tmp_path / "s", bpe)
    with pytest.raises(SmoljaxError, match=r"source 'c' is not in .*a_source, b_source"):
        tokenize_documents(documents, tmp_path / "s", bpe, sources=["c"])
    (documents / "a_source" / "train" / "00000.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(SmoljaxError, match=r"00000\.parquet is not a Parquet file"):
        tokenize_documents(documents, tmp_path / "s", bpe)
    pq.write_table(pa.table({"id": ["x"]}), documents / "a_source" / "train" / "00000.parquet")
    with pytest.raises(SmoljaxError, match="has no column 'text', only id"):
        tokenize_documents(documents, tmp_path / "s", bpe)


def test_an_empty_corpus_is_an_error(bpe, tmp_path):
    empty = pa.table({"id": pa.array([], pa.string()), "text": pa.array([], pa.string())})
    path = tmp_path / "documents" / "web" / "train" / "00000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(empty, path)
    with pytest.raises(SmoljaxError, match="holds no document in any source"):
        tokenize_documents(tmp_path / "documents", tmp_path / "s", bpe)

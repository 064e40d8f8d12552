import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smoljax.errors import SmoljaxError
from smoljax.tokens import tokenizer
from smoljax.tokens.reader import ShardReader
from smoljax.tokens.shards import shard_directory, write_shards


class Letters:
    """A tokenizer of one token per character, so that lengths are plain to see."""

    vocab_size, bos_id, eos_id, pad_id, fingerprint = 300, 1, 2, 3, "letters"

    def encode_batch(self, texts, *, num_threads=None):
        return [np.array([4 + ord(c) % 200 for c in text], np.int32) for text in texts]


class WideLetters(Letters):
    vocab_size, fingerprint = 100_000, "wide"


def _stream(documents):
    """What the blocks must hold: tokens, and for each its document and position, built the slow way."""
    tokens, document, position = [], [], []
    for index, text in enumerate(documents):
        ids = [1, *Letters().encode_batch([text])[0].tolist(), 2]
        tokens += ids
        document += [index] * len(ids)
        position += range(len(ids))
    return tokens, document, position


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=40),
    block_tokens=st.integers(2, 50),
    blocks_per_file=st.integers(1, 4),
)
def test_blocks_hold_the_stream(tmp_path_factory, lengths, block_tokens, blocks_per_file):
    root = tmp_path_factory.mktemp("shards")
    texts = ["abcdefghij"[i % 10] * n for i, n in enumerate(lengths)]
    manifest = write_shards(
        (("train", f"id {i}", text) for i, text in enumerate(texts)),
        root,
        Letters(),
        source="letters",
        block_tokens=block_tokens,
        tokens_per_file=block_tokens * blocks_per_file,
    )
    reader = ShardReader(shard_directory(root, "letters"), "train")
    tokens, document, position = _stream(texts)
    assert reader.num_tokens == len(tokens) == manifest["splits"]["train"]["tokens"]
    assert reader.num_blocks == -(-len(tokens) // block_tokens)
    following = [*tokens, 1]
    for number in range(reader.num_blocks):
        begin = number * block_tokens
        block = reader.block(number)
        end = min(begin + block_tokens, len(tokens))
        assert block.tokens.tolist() == following[begin : end + 1]
        assert (block.first_document, block.first_position) == (document[begin], position[begin])
        starts = [i - begin for i in range(begin, end) if position[i] == 0]
        if end == len(tokens) or position[end] == 0:
            starts.append(end - begin)
        assert block.document_starts.tolist() == starts
    assert [reader.document_id(i) for i in range(len(texts))] == [
        f"id {i}" for i in range(len(texts))
    ]


@pytest.fixture(scope="module")
def written(bpe, texts, tmp_path_factory):
    root = tmp_path_factory.mktemp("written")
    documents = [
        ("heldout" if i % 5 == 0 else "train", f"módulo/{i}", t) for i, t in enumerate(texts)
    ]
    manifest = write_shards(
        iter(documents), root, bpe, source="library", block_tokens=2**13, tokens_per_file=2**16
    )
    return root, manifest, documents


def test_real_text_comes_back(written, bpe):
    root, manifest, documents = written
    for split in ("train", "heldout"):
        texts = [text for s, _, text in documents if s == split]
        reader = ShardReader(
            shard_directory(root, "library"), split, expected_fingerprint=bpe.fingerprint
        )
        reader.verify()
        flat = np.concatenate([reader.block(i).tokens[:-1] for i in range(reader.num_blocks)])
        assert flat.dtype == np.uint16
        expected = [[1, *ids.tolist(), 2] for ids in bpe.encode_batch(texts)]
        np.testing.assert_array_equal(flat, np.concatenate(expected))
        assert reader.text_bytes == sum(len(text.encode()) for text in texts)
        assert reader.num_documents == len(texts)
        assert bpe.decode(flat) == "".join(texts)
    assert len(manifest["splits"]["train"]["files"]) > 1


def test_tfds_opens_the_same_files(written):
    tfds = pytest.importorskip("tensorflow_datasets")
    root, manifest, _ = written
    directory = shard_directory(root, "library")
    for split in ("train", "heldout"):
        reader = ShardReader(directory, split)
        by_folder = tfds.builder_from_directory(str(directory)).as_data_source(split)
        by_name = tfds.data_source("library", data_dir=str(root), split=split)
        assert len(by_folder) == len(by_name) == reader.num_blocks
        for number in (0, reader.num_blocks - 1):
            block = reader.block(number)
            for element in (by_folder[number], by_name[number]):
                np.testing.assert_array_equal(element["tokens"], block.tokens)
                np.testing.assert_array_equal(element["document_starts"], block.document_starts)
                assert element["first_document"] == block.first_document
                assert element["first_position"] == block.first_position
                assert element["tokens"].dtype == np.uint16
    builder = tfds.builder_from_directory(str(directory))
    assert builder.info.splits["train"].num_examples == manifest["splits"]["train"]["blocks"]


def test_wide_vocabulary_is_stored_in_32_bits(tmp_path):
    manifest = write_shards([("train", "a", "xyz")], tmp_path, WideLetters(), source="wide")
    assert manifest["dtype"] == "uint32"
    reader = ShardReader(shard_directory(tmp_path, "wide"), "train")
    assert reader.block(0).tokens.dtype == np.uint32
    assert reader.block(0).tokens.tolist() == [1, 124, 125, 126, 2, 1]


def test_same_documents_same_bytes(tmp_path, bpe, texts):
    for name, threads in (("one", 1), ("two", 2)):
        documents = (("train", str(i), text) for i, text in enumerate(texts[:20]))
        write_shards(
            documents, tmp_path / name, bpe, source="s", block_tokens=4096, num_threads=threads
        )
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) >= 7
    for file in files:
        if (tmp_path / "one" / file).is_file():
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_finished_shards_are_skipped_and_changed_ones_are_not(tmp_path):
    def write(documents, inputs="v1", letters=None, block_tokens=8):
        return write_shards(
            documents,
            tmp_path,
            letters or Letters(),
            source="s",
            inputs_fingerprint=inputs,
            block_tokens=block_tokens,
        )

    def unread():
        raise AssertionError("documents were read")
        yield

    first = write([("train", "a", "hello")])
    assert write(unread()) == first
    for change in ({"inputs": "v2"}, {"letters": WideLetters()}, {"block_tokens": 9}):
        with pytest.raises(AssertionError, match="documents were read"):
            write(unread(), **change)
    assert write(unread()) == first  # The failed ones left the old shards whole.
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["1.0.0"]
    file = shard_directory(tmp_path, "s") / first["splits"]["train"]["files"][0]["name"]
    file.unlink()
    assert write([("train", "a", "hello")]) == first
    assert file.is_file()


def test_wrong_arguments(tmp_path):
    documents = [("train", "a", "text")]
    with pytest.raises(SmoljaxError, match=r"source name 'Django-docs' .*django_docs"):
        write_shards(documents, tmp_path, Letters(), source="Django-docs")
    with pytest.raises(SmoljaxError, match="block_tokens is 1"):
        write_shards(documents, tmp_path, Letters(), source="s", block_tokens=1)
    with pytest.raises(SmoljaxError, match="tokens_per_file is 10"):
        write_shards(documents, tmp_path, Letters(), source="s", tokens_per_file=10)
    with pytest.raises(SmoljaxError, match="has split 'test'; expected one of train, heldout"):
        write_shards([("test", "a", "text")], tmp_path, Letters(), source="s")
    assert not list(tmp_path.rglob("*.json"))


def test_neither_writing_nor_reading_loads_tensorflow_or_jax(tmp_path):
    script = (
        "import sys, numpy as np\n"
        "from smoljax.tokens import documents, reader, shards, tokenizer\n"
        "t = tokenizer.load(sys.argv[1])\n"
        "shards.write_shards([('train', 'a', 'some text')], sys.argv[2], t, source='s')\n"
        "r = reader.ShardReader(shards.shard_directory(sys.argv[2], 's'), 'train')\n"
        "assert r.block(0).num_tokens == r.num_tokens\n"
        "bad = {'jax', 'tensorflow', 'flax', 'grain', 'tensorflow_datasets'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    tokenizer.train(
        ["some words to learn from, again and again " * 20], tmp_path / "t", vocab_size=290
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "t", tmp_path / "s"], check=True)


def test_memory_is_bounded(tmp_path):
    """100 MB of text pass through while the process grows by far less."""
    pytest.importorskip("resource")
    script = (
        "import resource, sys\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from test_shards import Letters\n"
        "import numpy as np\n"
        "from smoljax.tokens.shards import write_shards\n"
        "ids = np.full(10_000, 7, np.int32)\n"
        "Letters.encode_batch = lambda self, texts, num_threads=None: [ids for _ in texts]\n"
        "write_shards((('train', 'a', 'x' * 10_000) for _ in range(400)), sys.argv[1], Letters(), source='a')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "write_shards((('train', 'a', 'x' * 10_000) for _ in range(10_000)), sys.argv[1], Letters(), source='b')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, tmp_path, Path(__file__).parent],
        check=True,
        capture_output=True,
        text=True,
    )
    grown = int(out.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 64 * 2**20, f"{grown / 2**20:.0f} MiB more for 100 MB of text"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_said_and_leaves_the_old_shards(tmp_path):
    before = write_shards([("train", "a", "old")], tmp_path, Letters(), source="s")

    def documents():
        (unfinished,) = (path for path in (tmp_path / "s").iterdir() if path.name != "1.0.0")
        (unfinished / "train-00000.unfinished").symlink_to("/dev/full")
        yield "train", "a", "new"

    with pytest.raises(SmoljaxError, match="the disk is full while writing"):
        write_shards(documents(), tmp_path, Letters(), source="s")
    assert ShardReader(shard_directory(tmp_path, "s"), "train").manifest == before
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["1.0.0"]


def test_no_documents_make_an_empty_split(tmp_path):
    manifest = write_shards([("train", "a", "text")], tmp_path, Letters(), source="s")
    assert manifest["splits"]["heldout"]["documents"] == 0
    assert ShardReader(shard_directory(tmp_path, "s"), "heldout").num_blocks == 0
    info = json.loads((shard_directory(tmp_path, "s") / "dataset_info.json").read_text())
    assert [split["name"] for split in info["splits"]] == ["train"]

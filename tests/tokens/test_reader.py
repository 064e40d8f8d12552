import pickle
import shutil

import pytest

from smoljax.errors import SmoljaxError
from smoljax.tokens.reader import ShardReader, read_manifest
from smoljax.tokens.shards import shard_directory, write_shards


@pytest.fixture(scope="module")
def pristine(bpe, texts, tmp_path_factory):
    root = tmp_path_factory.mktemp("pristine")
    documents = (("train", str(i), text) for i, text in enumerate(texts[:30]))
    write_shards(documents, root, bpe, source="s", block_tokens=2**12, tokens_per_file=2**14)
    return shard_directory(root, "s")


@pytest.fixture
def shards(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "copy")


def _file(directory, number=1):
    return sorted(directory.glob("*.array_record-*"))[number]


def _read_all(directory):
    reader = ShardReader(directory, "train")
    return [reader.block(number).num_tokens for number in range(reader.num_blocks)]


def test_wrong_tokenizer_is_refused(shards, bpe):
    assert ShardReader(shards, "train", expected_fingerprint=bpe.fingerprint).num_blocks > 4
    with pytest.raises(
        SmoljaxError, match=r"was written with the tokenizer .* but this run uses other"
    ):
        ShardReader(shards, "train", expected_fingerprint="other")


def test_every_flipped_byte_of_a_file_is_noticed(shards):
    """Flips a byte at places all over a file: either a block is refused, or all of them are what they were."""
    file = _file(shards)
    good, sound = file.read_bytes(), _read_all(shards)
    refused = 0
    places = range(0, len(good), max(1, len(good) // 60))
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 0x10
        file.write_bytes(bad)
        with pytest.raises(SmoljaxError, match=r"array_record-00001.* is damaged"):
            ShardReader(shards, "train").verify()
        refused += _is_refused_or_unchanged(shards, sound, file.name)
    assert 10 < refused < len(places)  # The rest fell on padding between the records.


def _is_refused_or_unchanged(shards, sound, name):
    try:
        found = _read_all(shards)
    except SmoljaxError as error:
        found = str(error)
    if isinstance(found, str):
        return name in found and "damaged" in found
    assert found == sound
    return False


def test_flip_inside_the_data_names_file_and_block(shards):
    reader = ShardReader(shards, "train")
    file = _file(shards)
    tokens = reader.block(
        6
    ).tokens.tobytes()  # Four blocks lie in the first file, so this is the third of the second.
    bad = bytearray(file.read_bytes())
    bad[bad.index(tokens[1000:1100]) + 50] ^= 1
    file.write_bytes(bad)
    damaged = ShardReader(shards, "train")
    with pytest.raises(
        SmoljaxError, match=r"array_record-00001-of-.* block 2 .*write the shards again"
    ):
        damaged.block(6)
    assert damaged.block(3).num_tokens == 2**12


def test_a_block_that_is_sound_but_another_is_noticed_by_its_crc(shards):
    """Two files change places: every hash inside them is right, and only the manifest knows."""
    first, second = _file(shards, 0), _file(shards, 1)
    first_bytes, second_bytes = first.read_bytes(), second.read_bytes()
    assert len(first_bytes) == len(second_bytes)
    first.write_bytes(second_bytes)
    second.write_bytes(first_bytes)
    with pytest.raises(SmoljaxError, match=r"block 0 has CRC [0-9a-f]{8}, the manifest says"):
        ShardReader(shards, "train").block(0)


def test_truncated_file(shards):
    file = _file(shards)
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size - 100])
    with pytest.raises(
        SmoljaxError, match=rf"00001-of-.*{size - 100:,} bytes, the manifest says {size:,}"
    ):
        ShardReader(shards, "train")


def test_missing_files(shards, tmp_path):
    _file(shards).unlink()
    with pytest.raises(SmoljaxError, match=r"array_record-00001-of-.* is missing"):
        ShardReader(shards, "train")
    with pytest.raises(
        SmoljaxError, match=r"token shards are missing: .*manifest\.json does not exist"
    ):
        ShardReader(tmp_path / "nowhere", "train")


def test_damaged_manifest(shards):
    manifest = shards / "manifest.json"
    text = manifest.read_text()
    for damaged, message in (
        (text[:-50], "not a JSON manifest"),
        ("[]", "not a JSON manifest"),
        ('{"format": "other"}', "has format 'other', expected"),
    ):
        manifest.write_text(damaged)
        with pytest.raises(SmoljaxError, match=message):
            read_manifest(shards)


def test_unknown_split_and_block(shards):
    with pytest.raises(SmoljaxError, match="split 'test' is not in"):
        ShardReader(shards, "test")
    reader = ShardReader(shards, "train")
    for number in (-1, reader.num_blocks):
        with pytest.raises(IndexError):
            reader.block(number)
    with pytest.raises(IndexError):
        reader.document_id(reader.num_documents)


def test_damaged_document_ids(shards):
    (shards / "document_ids-train.offsets").write_bytes(b"short")
    with pytest.raises(SmoljaxError, match="document_ids-train"):
        ShardReader(shards, "train").document_id(3)
    with pytest.raises(SmoljaxError, match=r"document_ids-train\.offsets is damaged"):
        ShardReader(shards, "train").verify()


def test_pickles_after_use(shards):
    reader = ShardReader(shards, "train")
    reader.block(0)
    again = pickle.loads(pickle.dumps(reader))
    assert again.block(1).tokens.tolist() == reader.block(1).tokens.tolist()

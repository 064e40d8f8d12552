"""Signature files: what is written is read, bucket by bucket, and any damage is named."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoljax.curation.dedup import signature_files
from smoljax.curation.dedup.minhash import FINEWEB, FINEWEB2, MinHashConfig
from smoljax.errors import SmoljaxError

SMALL = MinHashConfig(buckets=3, hashes_per_bucket=2)


def drawn(count: int, config: MinHashConfig, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Signatures of `count` documents, of which a tenth has none."""
    random = np.random.default_rng(seed)
    size = (count, config.buckets * config.hashes_per_bucket)
    return random.integers(0, 2**61, size, np.uint64), random.random(count) > 0.1


def write(path, config: MinHashConfig, *parts: tuple[np.ndarray, np.ndarray]) -> str:
    with signature_files.Writer(path, config) as writer:
        for part in parts:
            writer.add(*part)
    return str(path)


def read(path: str, config: MinHashConfig, bucket: int) -> tuple[np.ndarray, np.ndarray]:
    blocks = list(signature_files.Reader(path, config).bucket(bucket))
    rows = [rows for rows, _ in blocks] or [np.empty(0, np.uint32)]
    bands = [bands for _, bands in blocks] or [np.empty((0, config.hashes_per_bucket), np.uint64)]
    return np.concatenate(rows), np.concatenate(bands)


@pytest.mark.parametrize("count", [0, 1, 8191, 8192, 8193, 30_000])
def test_every_bucket_comes_back(tmp_path, count):
    signatures, valid = drawn(count, SMALL)
    path = write(tmp_path / "a", SMALL, (signatures, valid))
    assert signature_files.Reader(path, SMALL).documents == count
    for bucket in range(SMALL.buckets):
        rows, bands = read(path, SMALL, bucket)
        assert (rows == np.flatnonzero(valid)).all()
        assert (bands == signatures[valid][:, 2 * bucket : 2 * bucket + 2]).all()


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 9000), max_size=4))
def test_the_bytes_do_not_depend_on_the_parts(tmp_path_factory, counts):
    folder = tmp_path_factory.mktemp("parts")
    signatures, valid = drawn(sum(counts), SMALL)
    at = np.cumsum(counts)[:-1] if counts else []
    parts = zip(np.split(signatures, at), np.split(valid, at))
    whole = write(folder / "whole", SMALL, (signatures, valid))
    parted = write(folder / "parted", SMALL, *parts)
    with open(whole, "rb") as a, open(parted, "rb") as b:
        assert a.read() == b.read()


def test_documents_without_signatures_only(tmp_path):
    signatures, _ = drawn(5, SMALL)
    path = write(tmp_path / "a", SMALL, (signatures, np.zeros(5, bool)))
    assert signature_files.Reader(path, SMALL).documents == 5
    assert len(read(path, SMALL, 0)[0]) == 0


@pytest.mark.parametrize("lost", [1, 7, 100, 100_000])
def test_a_cut_file_is_named(tmp_path, lost):
    path = tmp_path / "cut"
    write(path, SMALL, drawn(3000, SMALL))
    data = path.read_bytes()
    path.write_bytes(data[:-lost])
    with pytest.raises(SmoljaxError, match=r"cut is damaged: it has \d+ bytes instead of \d+"):
        signature_files.Reader(str(path), SMALL)


def test_every_flipped_bit_is_named(tmp_path):
    """Somewhere in each part of the file: magic, header, its padding, rows, bands, last byte."""
    path = tmp_path / "flipped"
    write(path, SMALL, drawn(9000, SMALL))
    data = path.read_bytes()
    header = 1024 + 64 * SMALL.buckets
    random = np.random.default_rng(0)
    places = [0, 20, 200, header - 1, header, len(data) - 1, *random.integers(0, len(data), 30)]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << int(random.integers(8))
        path.write_bytes(changed)
        with pytest.raises(SmoljaxError, match="flipped is damaged"):
            for bucket in range(SMALL.buckets):
                read(str(path), SMALL, bucket)


def test_a_missing_and_an_unfinished_file_are_named(tmp_path):
    with pytest.raises(SmoljaxError, match="gone is damaged: it is missing"):
        signature_files.Reader(str(tmp_path / "gone"), SMALL)
    path = tmp_path / "unfinished"
    with pytest.raises(ZeroDivisionError), signature_files.Writer(path, SMALL) as writer:
        writer.add(*drawn(10_000, SMALL))
        raise ZeroDivisionError
    with pytest.raises(SmoljaxError, match="was not written to its end"):
        signature_files.Reader(str(path), SMALL)


def test_signatures_of_another_configuration_are_refused(tmp_path):
    path = write(tmp_path / "a", FINEWEB, drawn(10, FINEWEB))
    with pytest.raises(SmoljaxError, match=r"were made with .*'sha1'.* but .*'xxh64'.* is asked"):
        signature_files.Reader(path, FINEWEB2)

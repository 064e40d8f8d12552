"""Whole or not at all."""

import errno
import os
import subprocess

import pytest

from smoljax import files
from smoljax.errors import SmoljaxError
from tests.conftest import with_small_files


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "manifest.json"
    files.atomic_write_json(path, {"shards": 1})
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        temporary.write_text("half of")
        raise RuntimeError
    assert path.read_text() == '{\n  "shards": 1\n}\n'
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_a_failure_leaves_the_old_folder(tmp_path):
    path = tmp_path / "shards"
    with files.atomic_directory(path) as new:
        (new / "a").write_text("first")
    with pytest.raises(RuntimeError), files.atomic_directory(path) as new:
        (new / "b").write_text("second")
        raise RuntimeError
    assert [file.name for file in path.iterdir()] == ["a"]
    with files.atomic_directory(path) as new:
        (new / "c").write_text("third")
    assert [file.name for file in path.iterdir()] == ["c"]
    assert os.listdir(tmp_path) == ["shards"]


def test_a_full_disk_is_explained(tmp_path):
    path = tmp_path / "x"
    explained = pytest.raises(SmoljaxError, match=r"disk is full while writing .*x.*free some")
    with explained, files.explain_full_disk(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), files.explain_full_disk(path):
        raise PermissionError  # Other failures keep their own name.


def test_a_process_that_cannot_write_leaves_nothing(tmp_path):
    """A real process with a real limit on the size of its files, as a disk that fills up."""
    path = tmp_path / "shard"
    path.write_bytes(b"old")
    program = f"from smoljax.files import atomic_write_bytes; atomic_write_bytes({str(path)!r}, bytes(1 << 20))"
    limited = subprocess.run(with_small_files(["-c", program]), capture_output=True, check=False)
    assert limited.returncode != 0
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["shard"]

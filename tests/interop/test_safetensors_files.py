"""Tensors that the caller leaves out, in one file and in shards; the rest of the module is tested by test_huggingface.py."""

import json

import numpy as np
import pytest

from smoljax.errors import SmoljaxError
from smoljax.interop import safetensors_files

safetensors = pytest.importorskip("safetensors.numpy", reason="needs the extra export")

WEIGHT = {"weight": np.ones((2, 3), np.float32)}
BUFFER = {"buffer": np.arange(4, dtype=np.int64)}  # Of a dtype that is refused otherwise.


def test_an_ignored_tensor_of_any_dtype_is_left_out(tmp_path):
    safetensors.save_file(WEIGHT | BUFFER, tmp_path / "model.safetensors")
    assert list(safetensors_files.open_folder(tmp_path, ignored=["buffer", "other"])) == ["weight"]
    with pytest.raises(SmoljaxError, match=r"buffer.*I64"):
        safetensors_files.open_folder(tmp_path)


def test_an_ignored_tensor_of_a_shard_is_not_missed(tmp_path):
    safetensors.save_file(WEIGHT, tmp_path / "1.safetensors")
    safetensors.save_file(BUFFER, tmp_path / "2.safetensors")
    index = {"weight_map": {"weight": "1.safetensors", "buffer": "2.safetensors"}}
    (tmp_path / safetensors_files.INDEX).write_text(json.dumps(index))
    assert list(safetensors_files.open_folder(tmp_path, ignored=["buffer"])) == ["weight"]
    index["weight_map"]["lost"] = "2.safetensors"
    (tmp_path / safetensors_files.INDEX).write_text(json.dumps(index))
    with pytest.raises(SmoljaxError, match=r"has tensor lost in 2\.safetensors, which does not"):
        safetensors_files.open_folder(tmp_path, ignored=["buffer"])

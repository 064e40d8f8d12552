"""The stored arrays are what transformers gives: made anew and compared. Needs `pip install "smoljax[test-hf]"`."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra test-hf")
pytest.importorskip("transformers", reason="needs the extra test-hf")

HERE = Path(__file__).parent
WRITTEN_BY = (
    "transformers_version",
)  # The only field of config.json that a newer release changes.


def test_transformers_gives_the_stored_arrays(tmp_path):
    made = subprocess.run(
        [sys.executable, HERE / "make_golden.py", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    names = sorted(path.name for path in (HERE / "golden").glob("*.npz"))
    assert names == sorted(path.name for path in tmp_path.glob("*.npz"))
    assert names
    for name in names:
        with np.load(HERE / "golden" / name) as stored, np.load(tmp_path / name) as fresh:
            assert stored.files == fresh.files
            for key in stored.files:
                compare(f"{name}: {key}", stored[key], fresh[key])


def compare(what, stored, fresh):
    """Texts and integers are equal; floats differ by 1e-5 of the array's largest; bfloat16 by a tenth of a rounding."""
    assert stored.dtype.kind == fresh.dtype.kind, what
    assert stored.shape == fresh.shape, what
    if stored.dtype.kind == "U":
        assert config(stored) == config(fresh), what
    elif what.endswith("bfloat16_logits"):
        # Rounding may fall either way where the order of a sum differs, but seldom.
        assert (stored != fresh).mean() < 0.1, what
    elif stored.dtype.kind == "f":
        np.testing.assert_allclose(
            fresh, stored, rtol=0, atol=1e-5 * np.abs(stored).max(), err_msg=what
        )
    else:
        np.testing.assert_array_equal(fresh, stored, err_msg=what)


def config(text):
    fields = json.loads(str(text))
    return {name: value for name, value in fields.items() if name not in WRITTEN_BY}

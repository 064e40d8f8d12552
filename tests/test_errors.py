"""A missing extra names the command that brings it."""

import pytest

from smoljax.errors import SmoljaxError, require


def test_a_module_that_is_there_is_returned():
    assert require("json.decoder", extra="data").__name__ == "json.decoder"


def test_a_missing_extra_is_named():
    with pytest.raises(SmoljaxError, match=r'no_such_module.*pip install "smoljax\[beam\]"'):
        require("no_such_module.part", extra="beam")


def test_a_broken_module_keeps_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import something_else_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_else_missing"):
        require("broken_module", extra="data")

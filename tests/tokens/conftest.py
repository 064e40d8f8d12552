import sysconfig
from pathlib import Path

import pytest

from smoljax.tokens import tokenizer


def standard_library_texts(limit: int) -> list[str]:
    """Real text that every Python has: its own sources."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths[:limit]]


@pytest.fixture(scope="session")
def texts():
    return standard_library_texts(60)


@pytest.fixture(scope="session")
def tokenizer_dir(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "bpe"
    tokenizer.train(iter(texts), path, vocab_size=2048)
    return path


@pytest.fixture(scope="session")
def bpe(tokenizer_dir):
    return tokenizer.load(tokenizer_dir)

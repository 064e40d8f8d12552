import sysconfig
from pathlib import Path

import pytest

from smoljax.tokens import tokenizer
from smoljax.tokens.shards import write_shards


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """Shards of two sources of real text (Python's own modules), and the tokenizer."""
    root = tmp_path_factory.mktemp("library")
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:80]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    trained = tokenizer.train(texts, root / "tokenizer", vocab_size=1024)
    for source, part in (("first", texts[:50]), ("second", texts[50:])):
        documents = [
            ("heldout" if i % 10 == 0 else "train", f"{source}/{paths[i].name}", text)
            for i, text in enumerate(part)
        ]
        write_shards(
            documents, root, trained, source=source, block_tokens=2**12, tokens_per_file=2**15
        )
    return root, trained

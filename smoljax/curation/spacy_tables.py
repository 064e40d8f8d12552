"""What the words of a language need of spaCy: the tables of its blank pipeline, without spaCy in this process.

spaCy brings 60 MB with it, and 240 MB where PyTorch is installed, which its library of layers then imports. So another
process reads the tables, once for each language and version of spaCy: they are kept in the user's cache folder
($XDG_CACHE_HOME or ~/.cache), under smoljax/.
"""

import functools
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from smoljax import files
from smoljax.errors import SmoljaxError, require

# Raised when `_read` gives other tables of the same spaCy.
_FORMAT = 1
# What spaCy's library of layers imports where it is installed, and blank pipelines do not need.
_UNNEEDED = ("cupy", "h5py", "mxnet", "tensorflow", "torch")


@functools.cache
def tables(language: str) -> dict:
    """The tables of one of spaCy's languages.

    Returns:
      "prefix", "suffix", "infix", "url" and "whole": regular expressions, None for one that the language lacks.
      "cases": chunk -> its words, of the special cases that are not whitespace.
      "marks": characters that can end a sentence.

    Raises:
      SmoljaxError: spaCy is not installed, or cannot be run.
    """
    if importlib.util.find_spec("spacy") is None:
        require("spacy", extra="data")
    name = f"spacy-{importlib.metadata.version('spacy')}-{language}-{_FORMAT}.json"
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smoljax" / name
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError:  # No home, or one that is not to be written to: read anew by each process.
            path = Path(tempfile.mkdtemp(prefix="smoljax-")) / name
        _read_elsewhere(language, path)
    return json.loads(path.read_text(encoding="utf-8"))


def _read_elsewhere(language: str, path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "smoljax.curation.spacy_tables", language, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SmoljaxError(
            f"spaCy's rules for the words of language {language!r} could not be read; "
            f"`{' '.join(done.args)}` ended with:\n{done.stderr}"
        )


def _read(language: str) -> dict:
    sys.modules.update(dict.fromkeys(_UNNEEDED))  # As if they were not installed.
    import spacy

    tokenizer = spacy.blank(language).tokenizer
    patterns = {
        "prefix": tokenizer.prefix_search,
        "suffix": tokenizer.suffix_search,
        "infix": tokenizer.infix_finditer,
        "url": tokenizer.url_match,
        "whole": tokenizer.token_match,
    }
    return {
        **{name: find and find.__self__.pattern for name, find in patterns.items()},
        "cases": {
            case: [token[spacy.symbols.ORTH] for token in tokens]
            for case, tokens in tokenizer.rules.items()
            if not case.isspace()
        },
        "marks": "".join(spacy.pipeline.Sentencizer.default_punct_chars),
    }


if __name__ == "__main__":
    files.atomic_write_json(sys.argv[2], _read(sys.argv[1]))

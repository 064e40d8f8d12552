"""One small, real run for all tests of this folder: Python's own documentation and code, from files to samples."""

import os
import pydoc_data.topics
from pathlib import Path

import pytest

# The document is too short to be kept, and both would do harm in a page that forgot to escape.
HOSTILE_NAME = "<img src=x onerror=alert(1)>.txt"
HOSTILE_TEXT = "<script>alert('removed')</script> </pre></body>"


def _raw(folder: Path) -> dict[str, str]:
    """Two sources: the topics of Python's help(), and modules of its library."""
    reference = folder / "reference"
    reference.mkdir(parents=True)
    for name, text in sorted(pydoc_data.topics.topics.items()):
        (reference / f"{name}.txt").write_text(text, encoding="utf-8")
    (reference / HOSTILE_NAME).write_text(HOSTILE_TEXT, encoding="utf-8")
    return {"reference": str(reference), "library": f"{Path(os.__file__).parent}/email/*.py"}


def _config(patterns: dict[str, str]) -> dict:
    return {
        "seed": 0,
        "curation": {
            "recipe": "data/files.py",
            "arguments": {
                "patterns": patterns,
                "presets": {"reference": "document", "library": "code"},
            },
            # With so few modules, half of them, so that some are on either side.
            "heldout_fraction": 0.1,
            "heldout_fractions": {"library": 0.5},
        },
        "tokenizer": {"vocab_size": 1024},
        "data": {"sources": ("reference", "library"), "seq_len": 64, "batch_size": 4},
        "model": {
            "vocab_size": 1024,
            "num_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 96,
            "num_heads": 2,
            "num_kv_heads": 1,
            "max_seq_len": 64,
            "scan_layers": False,
        },
        "optimizer": {"name": "adamw", "learning_rate": 3e-3, "warmup_steps": 2},
        "training": {
            "num_steps": 12,
            "log_every": 2,
            "eval_every": 4,
            "eval_batches": 1,
            "checkpoint_every": 12,
        },
        "generation": {"prompts": ("def ", "The <b>"), "max_new_tokens": 8, "seed": 0},
    }


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """The workdir of a run whose every step is done, by the project's own code."""
    from smoljax import curate, evaluate, generate, train

    workdir = tmp_path_factory.mktemp("run")
    config = _config(_raw(workdir / "raw"))
    assert curate.main(config, workdir, only="") == 0
    assert train.main(config, workdir) == 0
    assert evaluate.main(config, workdir) == 0
    assert generate.main(config, workdir, prompt="", samples="yes") == 0
    return workdir


@pytest.fixture(scope="session")
def steps() -> list[dict]:
    """What the flow hands to the report beside the files."""
    return [
        {
            "name": "documents",
            "command": "python -m smoljax.curate --only=documents",
            "seconds": 1.5,
        },
        {"name": "train", "command": "python -m smoljax.train --workdir='a <b>'", "seconds": 72.0},
    ]

"""The quality classifier on manuals: all-MiniLM-L6-v2, and a decoder of our own that was trained here, learn what a page is for.

In place of a language model stands a rule that anybody can check: the shelf that a page comes from (SHELVES). The embedder sees
the page's text alone.
"""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from smoljax import configuration, curate, curation
from smoljax.quality import annotations, run
from smoljax.quality.config import QualityConfig
from smoljax.training import Run, train
from tests.curation import corpora
from tests.quality import material

pytestmark = pytest.mark.network

PYTHON = "python3.11-doc/usr/share/doc/python3.11/html"
POSTGRES = "postgresql-doc-15/usr/share/doc/postgresql-doc-15/html"
# source: (its pages, the score that the rule gives them)
SHELVES = {
    "python_tutorial": (f"{PYTHON}/tutorial/*.html", 5),
    "django_tutorial": ("DJANGO/docs/intro/*.txt", 5),
    "postgres_tutorial": (f"{POSTGRES}/tutorial-*.html", 5),
    "python_howto": (f"{PYTHON}/howto/*.html", 4),
    "django_topics": ("DJANGO/docs/topics/**/*.txt", 4),
    "python_faq": (f"{PYTHON}/faq/*.html", 3),
    "python_c_api": (f"{PYTHON}/c-api/*.html", 2),
    "postgres_commands": (f"{POSTGRES}/sql-c*.html", 2),
    "django_release_notes": ("DJANGO/docs/releases/4*.txt", 1),
    "python_whats_new": (f"{PYTHON}/whatsnew/*.html", 1),
    "postgres_catalogs": (f"{POSTGRES}/catalog-*.html", 0),
    "python_index": (f"{PYTHON}/genindex*.html", 0),
}
CONFIG = {
    "curation": {
        "recipe": "data/files.py",
        "arguments": {"patterns": {}, "preset": "plain"},
        "presets": {"plain": {"order": ("extract",)}},
        "heldout_fraction": 0.05,
    },
    "tokenizer": {"vocab_size": 1024},
    "data": {"sources": tuple(sorted(SHELVES)), "seq_len": 64, "batch_size": 8},
    "model": {
        "vocab_size": 1024,
        "num_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_seq_len": 64,
        "scan_layers": False,
        "remat": "none",
    },
    "optimizer": {"name": "adamw", "learning_rate": 1e-2, "warmup_steps": 5},
    "training": {"num_steps": 30, "checkpoint_every": 30, "eval_every": 30, "eval_batches": 1},
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Documents of all shelves, and the scores of 300 of them, of which the judge has refused three."""
    corpora.pages("en", 1)  # Fetches the packages.
    workdir = tmp_path_factory.mktemp("manuals")
    patterns = {name: f"{corpora.folder()}/{pattern}" for name, (pattern, _) in SHELVES.items()}
    section = CONFIG["curation"] | {"arguments": {"patterns": patterns, "preset": "plain"}}
    settings = configuration.build(curation.CurationConfig, section, "curation")
    curation.curate(settings, workdir, workers=1)
    quality = workdir / "quality"
    run.run(QualityConfig("unread", requests=300), workdir, workers=1)
    sources = {row["id"]: row["source"] for row in rows(workdir, "documents")}
    lines = []
    for number, line in enumerate((quality / "requests.jsonl").read_text().splitlines()):
        request = json.loads(line)
        score = SHELVES[sources[request["id"]]][1]
        reply = "I cannot say." if number % 100 == 7 else f"It is from that shelf.\nScore: {score}"
        lines.append(json.dumps(request | {"reply": reply, "model": "the rule of the shelves"}))
    (quality / "annotations.jsonl").write_text("\n".join(lines))
    return workdir


def rows(workdir, folder: str) -> list[dict]:
    paths = sorted((workdir / folder).glob("*/[th]*/*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def f1(wanted: np.ndarray, kept: np.ndarray) -> float:
    return 2 * (wanted & kept).sum() / (wanted.sum() + kept.sum())


def best_by_length(workdir) -> float:
    """F1 of the best threshold on the length of the text, chosen with all scores known: what a filter without a model reaches."""
    found = rows(workdir, "documents")
    lengths = np.array([len(row["text"]) for row in found])
    wanted = np.array([SHELVES[row["source"]][1] >= 3 for row in found])
    cuts = np.quantile(lengths, np.linspace(0, 1, 50))
    return max(f1(wanted, kept) for cut in cuts for kept in (lengths >= cut, lengths <= cut))


def check_selection(workdir, embedder: str, *, max_tokens: int) -> dict:
    """Runs the classifier; returns its evaluation, after the selection was compared with the rule on documents that it did not score."""
    run.run(QualityConfig(embedder, max_tokens=max_tokens), workdir, workers=1)
    found = json.loads((workdir / "quality" / "evaluation.json").read_text())
    assert found["documents"] + found["trained_on"] == 297
    baseline = max(found["f1_if_all_are_kept"], best_by_length(workdir))
    assert found["f1"] > baseline
    annotated, _ = annotations.read(workdir / "quality" / "annotations.jsonl")
    seen = {one.id for one in annotated}
    new = [row for row in rows(workdir, "documents") if row["id"] not in seen]
    kept_ids = {row["id"] for row in rows(workdir, "selected")}
    wanted = np.array([SHELVES[row["source"]][1] >= 3 for row in new])
    kept = np.array([row["id"] in kept_ids for row in new])
    assert f1(wanted, kept) > baseline
    return found | {"baseline": baseline, "f1_of_new": f1(wanted, kept)}


def test_minilm_learns_what_is_worth_reading(workdir):
    found = check_selection(workdir, str(material.minilm()), max_tokens=64)
    # Halfway from what needs no model to perfection.
    assert found["f1"] > (1 + found["baseline"]) / 2
    assert found["mse"] < found["mse_of_the_mean"] / 2
    kept = [SHELVES[row["source"]][1] for row in rows(workdir, "selected")]
    all_scores = [SHELVES[row["source"]][1] for row in rows(workdir, "documents")]
    shares = [kept.count(score) / all_scores.count(score) for score in range(6)]
    assert min(shares[4:]) > 0.5 > max(shares[:2])


def test_a_decoder_that_was_trained_on_the_documents_learns_it_too(workdir):
    for part in ("tokenizer", "shards"):
        assert curate.main(CONFIG, workdir, only=part) == 0
    assert train(Run(CONFIG, workdir)) == 0
    check_selection(workdir, f"model:{workdir}", max_tokens=64)

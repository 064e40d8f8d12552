"""The quality part of curation as a person runs it: requests, scores, head, selection; bad input, interruptions, other thresholds.

Documents are real: the topics of Python's help(), modules of its library, and its tables of characters. In place of a language
model stands a rule that anybody can check: explanations get 4, programs 2, tables 0. The embedder is a tiny encoder with
random weights.
"""

import json
import os
import pydoc_data.topics
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smoljax import configuration, curate, curation, flow
from smoljax.errors import SmoljaxError
from smoljax.quality import annotations
from smoljax.quality import run as quality
from smoljax.quality.config import QualityConfig
from tests.quality import material

RULE = {"topics": 4, "modules": 2, "tables": 0}
LIBRARY = Path(os.__file__).parent


def run(config: QualityConfig, workdir: Path) -> str:
    return quality.run(config, workdir, workers=1)


@pytest.fixture(scope="module")
def curated(tmp_path_factory) -> Path:
    """A workdir with documents of the three sources, in several files each."""
    folder = tmp_path_factory.mktemp("curated")
    (folder / "topics").mkdir()
    for name, text in sorted(pydoc_data.topics.topics.items()):
        (folder / "topics" / f"{name}.txt").write_text(text, encoding="utf-8")
    patterns = {
        "topics": f"{folder}/topics",
        "modules": f"{LIBRARY}/asyncio/*.py",
        "tables": f"{LIBRARY}/encodings/*.py",
    }
    section = {
        "recipe": "data/files.py",
        "arguments": {"patterns": patterns, "preset": "plain"},
        "presets": {"plain": {"order": ("extract",)}},
        "heldout_fraction": 0.1,
        "shard_bytes": 200_000,
    }
    settings = configuration.build(curation.CurationConfig, section, "curation")
    curation.curate(settings, folder / "run", workers=1)
    return folder / "run"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return str(material.write_encoder(tmp_path_factory.mktemp("encoder") / "bert", "bert"))


@pytest.fixture
def workdir(curated, tmp_path) -> Path:
    shutil.copytree(curated / "documents", tmp_path / "documents")
    return tmp_path


def rows(folder: Path, part: str = "*") -> list[dict]:
    """All documents of a folder in the layout of WORKDIR/documents."""
    paths = sorted(folder.glob(f"*/{part}/*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def annotate(workdir: Path, *, score=None, requested: int = 200, **changes) -> Path:
    """WORKDIR/quality/annotations.jsonl as a language model that follows RULE would have it."""
    sources = {row["id"]: row["source"] for row in rows(workdir / "documents", "train")}
    path = workdir / "quality" / "requests.jsonl"
    annotations.write_requests(workdir / "documents", path, count=requested)
    score = score or (lambda source: RULE[source])
    lines = []
    for line in path.read_text().splitlines():
        request = json.loads(line)
        reply = f"I read it with care.\nScore: {score(sources[request['id']])}"
        lines.append(json.dumps(request | {"reply": reply, "model": "rule"} | changes))
    annotated = path.with_name("annotations.jsonl")
    annotated.write_text("\n".join(lines))
    return annotated


def mtimes(folder: Path) -> dict[str, int]:
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.parquet")}


def test_without_scores_it_asks_for_them(workdir, encoder):
    told = run(QualityConfig(encoder, requests=20), workdir)
    path = workdir / "quality" / "requests.jsonl"
    assert "20 requests" in told
    assert str(path.with_name("annotations.jsonl")) in told
    requests = [json.loads(line) for line in path.read_text().splitlines()]
    texts = {row["id"]: row["text"] for row in rows(workdir / "documents", "train")}
    assert len({request["id"] for request in requests}) == 20
    assert all(texts[request["id"]][:100] in request["request"] for request in requests)
    assert not (workdir / "selected").exists()
    path.write_text("with replies by now")
    assert "1 requests" in run(QualityConfig(encoder), workdir)
    assert path.read_text() == "with replies by now"


def test_documents_are_scored_and_selected(workdir, encoder, capsys):
    annotate(workdir)
    told = run(QualityConfig(encoder), workdir)
    evaluation = json.loads((workdir / "quality" / "evaluation.json").read_text())
    assert evaluation["documents"] + evaluation["trained_on"] == 200
    assert evaluation["f1"] > evaluation["f1_if_all_are_kept"]
    assert evaluation["mse"] < evaluation["mse_of_the_mean"]
    assert (workdir / "quality" / "evaluation.md").read_text() in told

    before = {row["id"]: row for row in rows(workdir / "documents", "[th]*")}
    kept, removed = rows(workdir / "selected", "[th]*"), rows(workdir / "selected", "removed")
    assert {row["id"] for row in kept + removed} == set(before)
    assert len(kept) + len(removed) == len(before)
    for row in kept + removed:
        assert before[row["id"]].items() <= row.items()
        assert row["int_score"] == min(max(round(row["score"]), 0), 5)
    assert min(row["score"] for row in kept) > 2.5 >= max(row["score"] for row in removed)
    assert {row["reason"] for row in removed} == {"quality:low_score"}
    schema = pq.read_schema(next((workdir / "selected").glob("*/train/*.parquet")))
    assert schema.field("score").type == pa.float32()
    shares = {
        source: np.mean([row["source"] == source for row in kept])
        / np.mean([row["source"] == source for row in kept + removed])
        for source in RULE
    }
    assert shares["topics"] > 2 * max(shares["modules"], shares["tables"])

    manifest = json.loads((workdir / "selected" / "manifest.json").read_text())
    assert manifest["stages"][-1]["name"] == "quality"
    assert manifest["stages"][-1]["kept"] == len(kept)
    assert manifest["stages"][-1]["removed_by_reason"] == {"quality:low_score": len(removed)}
    assert sum(manifest["int_scores"]) == len(before)
    for source, counts in manifest["sources"].items():
        mine = [row for row in rows(workdir / "selected", "train") if row["source"] == source]
        assert counts["train"]["documents"] == len(mine)
        assert counts["train"]["bytes"] == sum(len(row["text"].encode()) for row in mine)
    assert (
        manifest["decontamination"] is None
    )  # What the manifest of the documents had is there still.

    capsys.readouterr()
    times = mtimes(workdir)
    assert run(QualityConfig(encoder), workdir) == told
    assert mtimes(workdir) == times
    assert capsys.readouterr().err == ""


def test_another_threshold_embeds_nothing_again(workdir, encoder):
    annotate(workdir)
    run(QualityConfig(encoder), workdir)
    scored = mtimes(workdir / "quality" / "scores")
    few = len(rows(workdir / "selected", "[th]*"))
    run(QualityConfig(encoder, preset="fineweb_edu_score_2"), workdir)
    assert len(rows(workdir / "selected", "[th]*")) > few
    total = len(rows(workdir / "documents", "[th]*"))
    run(QualityConfig(encoder, keep_fraction=0.25), workdir)
    kept = rows(workdir / "selected", "[th]*")
    assert len(kept) == np.ceil(0.25 * total)
    assert mtimes(workdir / "quality" / "scores") == scored
    with pytest.raises(SmoljaxError, match=r"none has a score of 99\.000 or more|of 99\.000"):
        run(QualityConfig(encoder, threshold=99.0), workdir)


def test_only_what_has_changed_is_scored_again(workdir, encoder):
    annotate(workdir)
    run(QualityConfig(encoder), workdir)
    whole, scored = contents(workdir / "selected"), mtimes(workdir / "quality" / "scores")
    lost = next((workdir / "quality" / "scores").glob("topics-train-*"))
    shutil.rmtree(lost)
    shutil.rmtree(workdir / "selected")
    # What SIGKILL leaves at each of the three places where something is written.
    left = [
        workdir / "quality" / "scores" / f".{lost.name}.1.tmp",
        workdir / "quality" / "select" / ".topics-00000.1.tmp",
        workdir / ".selected.1.tmp",
    ]
    for folder in left:
        folder.mkdir()
    run(QualityConfig(encoder), workdir)
    assert not any(folder.exists() for folder in left)
    changed = {
        name.split("/")[0]
        for name, when in mtimes(workdir / "quality" / "scores").items()
        if scored[name] != when
    }
    assert changed == {lost.name}
    assert contents(workdir / "selected") == whole

    damaged = workdir / "quality" / "scores" / lost.name / "scores.npy"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 64
    damaged.write_bytes(data)
    with pytest.raises(SmoljaxError, match=rf"{lost.name}/scores\.npy is damaged"):
        run(QualityConfig(encoder), workdir)


def test_sources_that_are_not_judged_pass_without_a_score(workdir, encoder):
    annotate(workdir)
    run(QualityConfig(encoder, sources=("topics", "modules")), workdir)
    passed = [row for row in rows(workdir / "selected", "[th]*") if row["source"] == "tables"]
    assert len(passed) == len(list(LIBRARY.glob("encodings/*.py")))
    assert {(row["score"], row["int_score"]) for row in passed} == {(None, None)}
    assert all(row["score"] > 2.5 for row in rows(workdir / "selected", "[th]*") if row["score"])
    with pytest.raises(SmoljaxError, match=r"names 'books', which is not in .* modules, tables"):
        run(QualityConfig(encoder, sources=("books",)), workdir)


def test_a_head_of_another_run(workdir, encoder, tmp_path_factory):
    annotate(workdir)
    run(QualityConfig(encoder), workdir)
    whole = contents(workdir / "selected")
    head = shutil.move(workdir / "quality" / "head.json", workdir / "head.json")
    shutil.rmtree(workdir / "quality")
    run(QualityConfig(encoder, head=str(head)), workdir)
    assert contents(workdir / "selected") == whole
    other = material.write_encoder(tmp_path_factory.mktemp("other") / "e", "xlm-roberta")
    with pytest.raises(SmoljaxError, match="a head means nothing on other vectors"):
        run(QualityConfig(str(other), head=str(head)), workdir)
    with pytest.raises(SmoljaxError, match="head and annotations: give one of them"):
        QualityConfig(encoder, head=str(head), annotations="a.jsonl")


def test_another_embedder_trains_another_head(workdir, encoder, tmp_path_factory):
    annotate(workdir)
    run(QualityConfig(encoder), workdir)
    first = json.loads((workdir / "quality" / "head.json").read_text())
    run(QualityConfig(encoder, max_tokens=16, chunks="start_end"), workdir)
    second = json.loads((workdir / "quality" / "head.json").read_text())
    assert first["embedder"] != second["embedder"]
    assert second["chunks"] == "start_end"


def test_annotations_of_documents_that_are_not_there(workdir, encoder, capsys):
    path = annotate(workdir)
    stranger = json.dumps({"id": "0" * 32, "score": 3})
    path.write_text(f"{path.read_text()}\n{stranger}")
    run(QualityConfig(encoder), workdir)
    assert "1 of 201 annotations" in capsys.readouterr().err
    head = json.loads((workdir / "quality" / "head.json").read_text())
    assert head["about"]["annotations"] == 200
    lines = [json.dumps({"id": f"{number:032d}", "score": number % 6}) for number in range(100)]
    path.write_text("\n".join(lines))
    with pytest.raises(SmoljaxError, match=r"scores of 0 documents .* \(100 more are of others\)"):
        run(QualityConfig(encoder), workdir)


def test_scores_of_another_corpus(workdir, encoder):
    """Lines that bring their text need no document."""
    texts = [(row["text"], RULE[row["source"]]) for row in rows(workdir / "documents", "train")]
    lines = [
        json.dumps({"id": f"other-{number}", "text": text, "score": score})
        for number, (text, score) in enumerate(texts)
    ]
    path = workdir / "elsewhere.jsonl"
    path.write_text("\n".join(lines))
    run(QualityConfig(encoder, annotations=str(path)), workdir)
    head = json.loads((workdir / "quality" / "head.json").read_text())
    assert head["about"]["annotations"] == len(texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"requested": 30}, r"has scores of 30 documents .* at least 50"),
        ({"score": lambda source: 3}, r"all are of 2\.500 or more \(all scores.*\{3\.0: 200\}"),
        ({"score": lambda source: 1}, r"none are of 2\.500 or more"),
        ({"score": lambda source: 7}, r"holds no score \(200 replies without one"),
        ({"score": lambda source: "NaN"}, r"holds no score \(200 replies without one"),
    ],
)
def test_scores_that_teach_nothing_are_refused(workdir, encoder, options, message):
    annotate(workdir, **options)
    with pytest.raises(SmoljaxError, match=message):
        run(QualityConfig(encoder), workdir)
    assert not (workdir / "selected").exists()


def test_a_score_that_is_no_number_is_refused(workdir, encoder):
    path = annotate(workdir)
    path.write_text(f'{path.read_text()}\n{{"id": "x", "score": NaN}}')
    with pytest.raises(SmoljaxError, match=r"annotations\.jsonl:201: score is nan"):
        run(QualityConfig(encoder), workdir)


CONFIG = """
def get_config():
    return {{"quality": {{"embedder": {encoder!r}}}}}
"""


def command(workdir: Path) -> list[str]:
    options = ["--only=quality", f"--config={workdir}/config.py", f"--workdir={workdir}"]
    return [sys.executable, "-m", "smoljax.curate", *options]


def test_the_command_stops_on_request_and_goes_on(workdir, encoder):
    (workdir / "config.py").write_text(CONFIG.format(encoder=encoder))
    annotate(workdir)
    for path in list((workdir / "documents" / "topics" / "train").glob("*.parquet")):
        for copy in range(60):  # Work for some seconds.
            shutil.copy(path, path.with_name(f"{path.stem}-{copy:02d}.parquet"))
    process = subprocess.Popen(command(workdir), stderr=subprocess.PIPE, text=True)
    scores = workdir / "quality" / "scores"
    while process.poll() is None and not list(scores.glob("topics*/manifest.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 42, said
    assert "stopped on request" in said
    done = mtimes(scores)
    assert done
    assert not list(scores.glob(".*"))
    assert not (workdir / "selected").exists()

    finished = subprocess.run(command(workdir), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "| F1 |" in finished.stdout
    assert done.items() <= mtimes(scores).items()


def test_the_tokenizer_and_the_shards_are_of_what_was_selected(workdir, encoder):
    config = {"quality": {"embedder": encoder}, "tokenizer": {"vocab_size": 1024}}
    with pytest.raises(SmoljaxError, match="no documents are selected yet"):
        curate.main(config, workdir, only="tokenizer")
    annotate(workdir)
    for part in ("quality", "tokenizer", "shards"):
        assert curate.main(config, workdir, only=part) == 0
    kept = [row for row in rows(workdir / "selected", "train") if row["source"] == "topics"]
    shards = json.loads((workdir / "shards" / "topics" / "1.0.0" / "manifest.json").read_text())
    assert shards["splits"]["train"]["documents"] == len(kept)
    before = [row for row in rows(workdir / "documents", "train") if row["source"] == "topics"]
    assert 0 < len(kept) < len(before)


def test_the_path_in_one_command_refuses_what_needs_scores_from_outside(workdir, encoder):
    with pytest.raises(SmoljaxError, match="the config has a section quality, whose scores"):
        flow.main({"quality": {"embedder": encoder}}, workdir)

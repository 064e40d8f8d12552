"""The whole path as one command: made once, skipped when up to date, mended where something is missing."""

import json
import shutil
import subprocess
import sys

import pytest

SHORT = ("--config.training.num_steps=20", "--config.training.log_every=5")


def flow(workdir, *overrides):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "smoljax.flow",
            "--config=tests/tiny_config.py",
            f"--workdir={workdir}",
            *SHORT,
            *overrides,
        ],
        capture_output=True,
        text=True,
        check=False,
    )


def made(result):
    """The steps that were made, not skipped."""
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == 8
    return [line.split()[1].rstrip(":") for line in lines if not line.endswith("up to date")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("flow") / "run"
    first = flow(workdir)
    assert made(first) == [
        "documents",
        "tokenizer",
        "shards",
        "curation_report",
        "train",
        "evaluate",
        "generate",
        "report",
    ]
    return workdir


def test_it_makes_everything(finished):
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert evaluation["step"] == 20
    row = evaluation["heldout"]["code"]
    assert 0 < row["bits_per_byte"] < 8
    assert 0 < row["baselines"]["xz"] < row["baselines"]["unigram"] < 8
    samples = json.loads((finished / "samples.json").read_text())["samples"]
    assert [sample["prompt"] for sample in samples] == ["def ", "import "]
    report = (finished / "report.html").read_text()
    assert f"python -m smoljax.train --config=tests/tiny_config.py {SHORT[0]}" in report


def test_a_second_run_makes_nothing(finished):
    assert made(flow(finished)) == []


@pytest.mark.parametrize(
    ("lost", "again"),
    [
        ("evaluation.json", ["evaluate"]),
        ("report.html", ["report"]),
        ("tokenizer/tokenizer.model", ["tokenizer"]),
        ("documents/code/train/00000.parquet", ["documents"]),
        ("shards/code/1.0.0/manifest.json", ["shards"]),
        ("curation_report.html", ["curation_report"]),
    ],
)
def test_a_lost_output_is_made_again_and_nothing_else(finished, lost, again):
    """What is made again is the same, byte for byte, so what depends on it is still up to date."""
    path = finished / lost
    before = path.read_bytes()
    path.unlink()
    result = made(flow(finished))
    assert result == again
    if lost != "report.html":
        assert path.read_bytes() == before


def test_lost_training_is_made_again(finished):
    (finished / "train" / "metrics.jsonl").unlink()
    assert made(flow(finished))[0] == "train"
    rows = (finished / "train" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 20


def test_a_changed_setting_remakes_what_reads_it_and_loses_nothing(finished, tmp_path):
    workdir = tmp_path / "changed"
    shutil.copytree(finished, workdir)
    # Copied files have new times, so every step looks again; a first run settles that.
    flow(workdir)
    result = flow(workdir, "--config.optimizer.learning_rate=0.02")
    assert made(result) == ["train", "evaluate", "generate", "report"]
    assert list((workdir / "superseded").glob("train-*/train/checkpoints/20"))
    assert json.loads((workdir / "evaluation.json").read_text())["step"] == 20


def test_a_step_that_fails_stops_the_flow(tmp_path):
    result = flow(tmp_path, "--config.curation.arguments.patterns.code=/nowhere/*.py")
    assert result.returncode == 1
    assert "/nowhere" in result.stderr
    assert not (tmp_path / "shards").exists()

"""The verb as a person meets it: errors in one line, exit codes, GPUs by closed form; TPUs where libtpu is."""

import importlib.util
import json
import subprocess
import sys

import pytest

from smoljax.errors import SmoljaxError
from smoljax.planning.compiling import overflow
from smoljax.planning.topologies import GIB

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='libtpu is not installed: pip install "smoljax[plan]"',
)
SMALL = [
    "--config=tests/tiny_config.py",
    "--config.model.compute_dtype=bfloat16",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=-1",
]


def _plan(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "smoljax.plan", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--topology=v5e-100", "v5e-256"),
        ("--topology=", "v5p-8"),
        ("--tokens=many", "11.1e12"),
        ("--price=-1", "positive"),
        ("--search=1.5", "whole number"),
        ("--json=missing/plan.json", "missing"),
    ],
)
def test_bad_input_is_one_line(flag, message):
    result = _plan(*SMALL, "--topology=h100x2", flag)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_gpus_by_closed_form(tmp_path):
    path = tmp_path / "plan.json"
    budget = ["--tokens=1e9", "--price=2", f"--json={path}", "--search=1"]
    result = _plan(*SMALL, "--topology=h100x2", *budget)
    assert result.returncode == 0, result.stderr
    first, *_ = result.stdout.splitlines()
    assert first.startswith("tiny on h100x2: fits; ")
    for words in (
        "6N",
        "full attention",
        "days",
        "chip-hours",
        "cost",
        "bound by",
        "in the place of the GPUs'",
        "Search: 2 set",
    ):
        assert words in result.stdout
    plan = json.loads(path.read_text())
    assert plan["chips"] == 2
    # f32 parameters and two moments of AdamW, over two chips.
    assert plan["memory"]["parameters"] == pytest.approx(4 * plan["parameters"] / 2, rel=1e-6)
    assert plan["cost"] == pytest.approx(2 * plan["chip_hours"])
    assert {each["micro_batches"] for each in plan["search"]} == {1, 2}
    assert plan["step"]["fastest"] < plan["step"]["seconds"] < plan["step"]["slowest"]


def test_a_batch_that_does_not_divide():
    result = _plan(*SMALL, "--topology=h100x2", "--config.data.batch_size=3")
    assert result.returncode == 1
    assert "multiple of 2" in result.stderr


@pytest.mark.parametrize(
    ("message", "used", "limit"),
    [
        (
            "Ran out of memory in memory space hbm. Used 18.95G of 15.75G hbm. Exceeded",
            18.95,
            15.75,
        ),
        (
            "the total memory required for HLO temporaries (26.43G) exceeds available HBM (15.75G).",
            26.43,
            15.75,
        ),
    ],
)
def test_out_of_memory_is_a_result(message, used, limit):
    found = overflow(f"RESOURCE_EXHAUSTED: {message}")
    assert (found.used, found.limit, found.memory) == (used * GIB, limit * GIB, "hbm")


def test_another_refusal_is_an_error():
    with pytest.raises(SmoljaxError, match="Mosaic"):
        overflow("INTERNAL: Mosaic failed")


@needs_libtpu
def test_a_tpu_slice(tmp_path):
    path = tmp_path / "plan.json"
    result = _plan(*SMALL, "--topology=v5e-4", f"--json={path}", "--config.data.batch_size=8")
    assert result.returncode == 0, result.stderr
    plan = json.loads(path.read_text())
    assert plan["memory"]["from"] == "tpu"
    assert plan["step"]["products"] > 0
    assert {row["axes"] for row in plan["exchanges"]} <= {"fsdp", "none"}
    assert "all-gather" in {row["kind"] for row in plan["exchanges"]}


@needs_libtpu
def test_two_slices_exchange_gradients_over_the_network(tmp_path):
    """Each chip hands its fourth of the gradient to its host: of two slices a ring sends as much again."""
    path = tmp_path / "plan.json"
    axes = ["--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.data.batch_size=16"]
    result = _plan(
        *SMALL,
        "--topology=v5e-4x2",
        f"--json={path}",
        *axes,
        "--config.optimizer.name=adamw",
        "--config.model.scan_layers=True",
    )
    assert result.returncode == 0, result.stderr
    assert "data, network" in result.stdout
    plan = json.loads(path.read_text())
    rows = [row for row in plan["exchanges"] if row["axes"] == "data, network"]
    assert {row["kind"] for row in rows} == {"all-reduce"}
    sent = sum(row["bytes_sent"] for row in rows)
    assert sum(row["seconds"] for row in rows) == pytest.approx(sent / 3.125e9)
    assert sent == pytest.approx(4 * plan["parameters"] / 4, rel=0.05)  # f32, and a few scalars.
    assert {row["axes"] for row in plan["exchanges"]} <= {"data, network", "fsdp", "none"}


@needs_libtpu
def test_slices_want_the_data_axis():
    result = _plan(*SMALL, "--topology=v5e-16x2", "--config.data.batch_size=32")
    assert result.returncode == 1
    assert "multiple of 2" in result.stderr

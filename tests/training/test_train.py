"""Training as a person runs it: real processes, killed and stopped, and errors that say what to do."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from smoljax.command_line import MALLOC, load_config
from smoljax.training import Run
from smoljax.training.metrics import read_metrics
from tests.conftest import with_small_files

TIMES = ("tokens_per_second", "mfu")


def command(workdir, *overrides):
    return [
        sys.executable,
        "-m",
        "smoljax.train",
        "--config=tests/tiny_config.py",
        f"--workdir={workdir}",
        *overrides,
    ]


def train(workdir, *overrides):
    return subprocess.run(command(workdir, *overrides), capture_output=True, text=True, check=False)


def fresh(corpus, tmp_path, name):
    workdir = tmp_path / name
    workdir.mkdir()
    for part in ("shards", "tokenizer"):
        shutil.copytree(corpus / part, workdir / part)
    return workdir


def losses(workdir):
    """Every row of metrics, without the times."""
    return [
        {key: value for key, value in row.items() if key not in TIMES}
        for row in read_metrics(workdir / "train")
    ]


def final_params(workdir):
    run = Run(load_config("tests/tiny_config.py"), workdir)
    step, params = run.restore_params()
    return step, jax.tree.map(np.asarray, params)


def wait_for_step(workdir, process, step):
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in read_metrics(workdir / "train")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"step {step} was not reached in two minutes"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
    workdir = fresh(corpus, tmp_path_factory.mktemp("train"), "unbroken")
    result = train(workdir)
    assert result.returncode == 0, result.stderr[-3000:]
    return workdir, result.stderr


def test_it_learns_and_reports(unbroken):
    workdir, output = unbroken
    rows = read_metrics(workdir / "train")
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, 61))
    assert training[0]["loss"] == pytest.approx(
        np.log(512), rel=0.02
    )  # An untrained model guesses.
    assert training[-1]["loss"] < training[0]["loss"] - 1.0
    heldout = [row for row in rows if "heldout/all/bits_per_byte" in row]
    assert [row["step"] for row in heldout] == [25, 50, 60]
    assert heldout[-1]["heldout/code/bits_per_byte"] < heldout[0]["heldout/code/bits_per_byte"]
    assert "layers/attention/query" in output
    assert "muon" in output
    assert "tokens/s  MFU" in output
    assert "held-out bits per byte code" in output
    assert any(file.name.startswith("events.out") for file in (workdir / "train").iterdir())


def test_the_learning_rate_follows_the_schedule(unbroken):
    workdir, _ = unbroken
    rate = {row["step"]: row["learning_rate"] for row in losses(workdir) if "loss" in row}
    assert rate[6] == pytest.approx(1e-2)
    assert rate[30] == pytest.approx(1e-2)
    assert rate[1] == 0.0
    assert rate[60] < 1e-3


def test_nothing_heavy_is_imported_before_the_first_step(corpus, tmp_path):
    """TensorFlow, which writes TensorBoard's events, takes seconds to import: it comes after the first row of metrics."""
    workdir = fresh(corpus, tmp_path, "imports")
    arguments = command(workdir, "--config.training.num_steps=12")[2:]
    program = f"""
import json, runpy, sys
from pathlib import Path
rows, early, late = Path({str(workdir)!r}, "train", "metrics.jsonl"), set(), set()
def watch(event, names):
    if event == "import":
        started = rows.exists() and rows.stat().st_size
        (late if started else early).add(names[0].partition(".")[0])
sys.addaudithook(watch)
sys.argv = {arguments!r}
try:
    runpy.run_module("smoljax.train", run_name="__main__")
except SystemExit as end:
    print(json.dumps([end.code, sorted(early), sorted(late)]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"GLIBC_TUNABLES": MALLOC},  # Else it starts anew.
        capture_output=True,
        text=True,
        check=False,
    )
    code, early, late = json.loads(result.stdout.splitlines()[-1])
    assert code == 0
    assert "grain" in early
    assert "tensorflow" in late
    heavy = {
        "tensorflow",
        "tensorflow_datasets",
        "clu",
        "torch",
        "transformers",
        "datasets",
        "pyarrow",
        "matplotlib",
    }
    assert not heavy & set(early)


@pytest.mark.parametrize("kill_at", [3, 33])
def test_a_killed_run_goes_on_bitwise(unbroken, corpus, tmp_path, kill_at):
    """Killed before the first checkpoint, and between two: the same losses and parameters, bit for bit."""
    workdir = fresh(corpus, tmp_path, "killed")
    process = subprocess.Popen(
        command(workdir), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_step(workdir, process, kill_at)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(losses(workdir)) < len(losses(unbroken[0]))
    result = train(workdir)
    assert result.returncode == 0, result.stderr[-3000:]
    if kill_at > 20:
        assert "resuming from step 20" in result.stderr
    assert losses(workdir) == losses(unbroken[0])
    jax.tree.map(np.testing.assert_array_equal, final_params(workdir), final_params(unbroken[0]))


EVERYTHING = (
    "--config.optimizer.name=normuon",
    "--config.optimizer.clip=adagc",
    "--config.optimizer.skip_spikes=True",
    "--config.optimizer.average=ema",
    "--config.optimizer.average_decay=0.9",
    "--config.optimizer.metrics=True",
    "--config.optimizer.qk_clip_tau=0.2",
    "--config.data.batch_ramp=((10, 2), (20, 4))",
)


def test_every_part_of_the_optimizer_at_once_resumes_and_reports(corpus, tmp_path):
    """With a batch that is ramped up: the run that was stopped half way ends with the numbers of the one that was not."""
    whole, halves = fresh(corpus, tmp_path, "whole"), fresh(corpus, tmp_path, "halves")
    result = train(whole, *EVERYTHING)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "60 steps of 2 then 4 then 8 x 32 tokens" in result.stderr
    process = subprocess.Popen(
        command(halves, *EVERYTHING), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_step(halves, process, 15)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert train(halves, *EVERYTHING).returncode == 0
    assert losses(halves) == losses(whole)
    rows = [row for row in losses(whole) if "loss" in row]
    assert [rows[i]["tokens"] for i in (9, 19, 59)] == [20 * 32, 60 * 32, (60 + 40 * 8) * 32]
    last = rows[-1]
    assert last["optimizer/skipped"] == 0
    assert 0 < max(row["optimizer/clipped"] for row in rows) <= 1
    assert last["optimizer/gradient_cosine"] == pytest.approx(1)
    assert 0 < max(row["qk_clipped"] for row in rows) <= 1
    assert last["optimizer/update_ratio/layers/mlp/gate"] > 0
    assert 0 < last["optimizer/orthogonality_error/layers/mlp/gate"] < 0.5
    # Evaluation, later too, is of the averaged weights.
    config = json.loads((whole / "train" / "config.json").read_text())
    averaged = Run(config, whole).restore_params()[1]
    config["optimizer"]["average"] = ""
    params = Run(config, whole).restore_params()[1]
    assert (params["embedding"] != averaged["embedding"]).any()


def test_two_hosts_give_the_losses_of_one(unbroken, corpus, tmp_path):
    """Two processes that find each other on loopback, each with one device and half of every batch."""
    workdir = fresh(corpus, tmp_path, "hosts")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = [
        subprocess.Popen(
            command(workdir),
            env=os.environ
            | {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(host),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host in range(2)
    ]
    outputs = [host.communicate(timeout=300)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    assert "mesh {'data': 2" in outputs[0]
    together, alone = (
        [row["loss"] for row in losses(place) if "loss" in row] for place in (workdir, unbroken[0])
    )
    np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_another_seed_gives_other_losses(unbroken, corpus, tmp_path):
    workdir = fresh(corpus, tmp_path, "seed")
    elsewhere = tmp_path / "elsewhere"
    overrides = ("--config.seed=1", "--config.training.num_steps=10")
    result = train(workdir, *overrides, f"--config.training.checkpoint_directory={elsewhere}")
    assert result.returncode == 0
    assert (elsewhere / "10").is_dir()  # Checkpoints go where the config says.
    assert losses(workdir)[0]["loss"] != losses(unbroken[0])[0]["loss"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_saves_and_exits_with_42(corpus, tmp_path, number):
    workdir = fresh(corpus, tmp_path, "stopped")
    process = subprocess.Popen(
        command(workdir, "--config.training.num_steps=100000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(workdir, process, 5)
    process.send_signal(number)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 42, output
    saved = max(int(name) for name in os.listdir(workdir / "train" / "checkpoints"))
    assert saved == losses(workdir)[-1]["step"] >= 5
    assert f"step {saved:,} is saved" in output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.model.hidden_size=64"], "of another model: its hidden_size is 32"),
        (["--config.model.vocab_size=500"], "tokenizer has 512 tokens"),
        (["--config.data.seq_len=128"], "longer than config.model.max_seq_len 64"),
        (
            ["--config.data.seq_len=8192", "--config.model.max_seq_len=8192"],
            "block",
        ),
        (["--config.training.micro_batches=3"], "does not divide a batch of 8"),
        (["--config.mesh.data=3"], "does not divide 1 devices"),
        (["--config.optimizer.name=sgd"], "choose one of 'adamw', 'lion'"),
        (["--config.tokenizer.directory=/nowhere"], "/nowhere"),
        (["--config.data.directory=/nowhere"], "/nowhere"),
        (["--config.training.num_steps=0"], "config.training.num_steps is 0"),
    ],
)
def test_a_wrong_setting_gives_one_clear_line(unbroken, overrides, message):
    before = json.dumps(losses(unbroken[0]))
    result = train(unbroken[0], *overrides)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in result.stderr
    assert json.dumps(losses(unbroken[0])) == before  # Nothing that was there is lost.


def test_a_damaged_checkpoint_is_named(unbroken, tmp_path):
    workdir = tmp_path / "damaged"
    shutil.copytree(unbroken[0], workdir)
    state = workdir / "train" / "checkpoints" / "60" / "state"
    for file in state.rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    result = train(workdir, "--config.training.num_steps=61")
    assert result.returncode == 1
    assert "checkpoints/60" in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")


def test_a_checkpoint_is_asked_only_what_its_parameters_mean(unbroken, tmp_path):
    """One from before a field of ModelConfig existed, run in another way than it was trained."""
    workdir = tmp_path / "older"
    shutil.copytree(unbroken[0], workdir)
    (file,) = (workdir / "train" / "checkpoints" / "60" / "metadata").glob("metadata*")
    metadata = json.loads(file.read_text())
    del metadata["model"]["qk_norm"], metadata["model"]["windowed_layers"]
    file.write_text(json.dumps(metadata))
    result = train(workdir, "--config.training.num_steps=61", "--config.model.scan_layers=False")
    assert result.returncode == 0, result.stderr
    metadata["model"]["qk_norm"] = True
    file.write_text(json.dumps(metadata))
    (workdir / "train" / "checkpoints" / "61").rename(tmp_path / "61")
    result = train(workdir, "--config.training.num_steps=61")
    assert "its qk_norm is True, config.model.qk_norm is False" in result.stderr


def test_a_checkpoint_that_cannot_be_written_stops_the_run(corpus, tmp_path):
    """A real limit on the size of a file, as on a disk that fills up."""
    workdir = fresh(corpus, tmp_path, "full")
    result = subprocess.run(
        with_small_files(command(workdir)[1:]), capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: a checkpoint could not be written to")
    assert train(workdir).returncode == 0


def test_a_damaged_shard_is_named(corpus, tmp_path):
    workdir = fresh(corpus, tmp_path, "shard")
    (shard,) = (workdir / "shards" / "code").rglob("code-train*")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(bytes(data))
    result = train(workdir)
    assert result.returncode == 1
    assert "code-train.array_record" in result.stderr.strip().splitlines()[-1]


def test_a_loss_that_is_not_finite_stops_the_run(corpus, tmp_path):
    workdir = fresh(corpus, tmp_path, "nan")
    result = train(
        workdir,
        "--config.optimizer.name=adamw",
        "--config.optimizer.learning_rate=1e30",
        "--config.optimizer.warmup_steps=0",
        "--config.training.checkpoint_every=1",
    )
    assert result.returncode == 1
    assert not any((workdir / "train" / "checkpoints").iterdir())  # Such a state is not saved.
    last = result.stderr.strip().splitlines()[-1]
    assert "the loss of step" in last
    assert "lower config.optimizer.learning_rate" in last

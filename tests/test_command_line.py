"""Verbs as a person calls them: help, clear one-line errors, exit codes."""

import subprocess
import sys

import pytest

VERBS = ("curate", "train", "evaluate", "generate", "convert", "flow")


def call(verb, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"smoljax.{verb}", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains(verb):
    result = call(verb, "--help")
    assert result.returncode == 0
    assert f"python -m smoljax.{verb} --config=" in result.stdout
    assert "--workdir=DIR" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--config is missing (see --help)"),
        (("--config=configs/quickstart.py",), "--workdir is missing"),
        (
            ("--config=configs/quickstart.py", "--workdir=gs://bucket/run"),
            "--config.training.checkpoint_directory=gs://BUCKET/run",
        ),
        (("--config=configs/nope.py", "--workdir=x"), "configs/nope.py: there is no such file"),
        (
            ("--config=configs/quickstart.py", "--workdir=x", "--config.model.num_layer=3"),
            "did you mean --config.model.num_layers?",
        ),
        (
            ("--config=configs/quickstart.py", "--workdir=x", "--config.model.num_layers=three"),
            "--config.model.num_layers=three",
        ),
        (("--config=configs/quickstart.py", "--workdir=x", "--colour=red"), "flag 'colour'"),
        (("--config=configs/quickstart.py", "--workdir=x", "stray"), "'stray' is not a flag"),
    ],
)
def test_a_wrong_command_line_gives_one_clear_line(arguments, message):
    result = call("train", *arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1

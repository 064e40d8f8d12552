"""Verbs as a person calls them: help, clear one-line errors, exit codes."""

import subprocess
import sys

import pytest

VERBS = ("curate", "train", "evaluate", "generate", "convert", "plan", "flow")


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


def test_a_flag_sets_a_field_that_the_recipe_leaves_out(tmp_path):
    """The class of the section knows it, its type and its default."""
    program = (
        "from smoljax.command_line import run; "
        "run(lambda config, workdir: print(config['optimizer'], config['data']), usage='')"
    )
    flags = ("average=ema", "qk_clip_tau=100", "average_start=7", "no_decay_roles=('norm',)")
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            "--config=tests/tiny_config.py",
            f"--workdir={tmp_path}",
            *(f"--config.optimizer.{flag}" for flag in flags),
            "--config.data.batch_ramp=((10, 2), (20, 4))",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for words in (
        "'average': 'ema'",
        "'qk_clip_tau': 100.0",
        "'average_start': 7",
        "'no_decay_roles': ('norm',)",
        "'batch_ramp': ((10, 2), (20, 4))",
    ):
        assert words in result.stdout, result.stdout

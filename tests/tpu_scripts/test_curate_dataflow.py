"""tpu_scripts/curate_dataflow.sh: the command that it builds, and what it refuses; nothing reaches a cloud."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tpu_scripts" / "curate_dataflow.sh"
GIVEN = {
    "--config": "configs/quickstart.py",
    "--workdir": "runs/a b",
    "--bucket": "gs://my-bucket/run/",
    "--region": "us-central1",
    "--project": "my-project",
    "--container": "us-docker.pkg.dev/my-project/repository/smoljax:1",
}


@pytest.fixture
def call(tmp_path):
    """Runs a script; a `python` that writes its arguments to a file and a `gcloud` without settings are all it finds."""
    programs = tmp_path / "programs"
    programs.mkdir()
    arguments = tmp_path / "arguments.json"
    write = (
        f"import json, sys; json.dump(sys.argv[1:], open({str(arguments)!r}, 'w')); sys.exit(42)"
    )
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S -c "{write}" "$@"\n')
    (programs / "gcloud").write_text("#!/bin/sh\nexit 1\n")
    for name in ("python", "gcloud"):
        (programs / name).chmod(0o755)
    for tool in ("bash", "basename", "dirname", "sed", "tr"):
        (programs / tool).symlink_to(shutil.which(tool))

    def run(command: list[str]) -> tuple[int, str, str, list[str] | None]:
        """Exit code, output, errors, and the arguments that python was called with."""
        arguments.unlink(missing_ok=True)
        done = subprocess.run(
            command,
            env={"PATH": str(programs), "HOME": str(tmp_path)},
            cwd=SCRIPT.parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
        called = json.loads(arguments.read_text()) if arguments.exists() else None
        return done.returncode, done.stdout, done.stderr, called

    return run


def command(changes: dict, *rest: str) -> list[str]:
    flags = {**GIVEN, **changes}
    return ["bash", str(SCRIPT), *(f"{k}={v}" for k, v in flags.items() if v is not None), *rest]


def beam_options(called: list[str]) -> tuple[str, ...]:
    (found,) = (a for a in called if a.startswith("--config.curation.beam_options="))
    return ast.literal_eval(found.partition("=")[2])


def test_the_command_has_every_choice(call):
    code, output, error, called = call(
        command(
            {"--machine": "n2-highmem-8", "--workers": 3, "--max-workers": 200, "--disk": 100},
            "--autoscaling=none",
            "--beam=--no_use_public_ips --subnetwork=regions/r/subnetworks/s",
            "--",
            "--config.curation.arguments.pattern=gs://b/$x 'y'",
        )
    )
    assert (code, output, error) == (42, "", "")  # The exit code of smoljax.curate.
    assert called[:5] == [
        "-m",
        "smoljax.curate",
        "--config=configs/quickstart.py",
        "--workdir=runs/a b",
        "--only=documents",
    ]
    assert called[5] == "--config.curation.directory=gs://my-bucket/run/curation"
    assert called[7:] == ["--config.curation.arguments.pattern=gs://b/$x 'y'"]
    assert beam_options(called) == (
        "--runner=DataflowRunner",
        "--project=my-project",
        "--region=us-central1",
        "--job_name=smoljax-curation",
        "--temp_location=gs://my-bucket/run/beam/temporary",
        "--staging_location=gs://my-bucket/run/beam/staging",
        "--worker_machine_type=n2-highmem-8",
        "--num_workers=3",
        "--max_num_workers=200",
        "--autoscaling_algorithm=NONE",
        "--disk_size_gb=100",
        "--experiments=use_runner_v2",
        "--number_of_worker_harness_threads=1",
        "--sdk_container_image=us-docker.pkg.dev/my-project/repository/smoljax:1",
        "--sdk_location=container",
        "--no_use_public_ips",
        "--subnetwork=regions/r/subnetworks/s",
    )


def test_without_a_container_the_checkout_is_installed(call, tmp_path):
    (tmp_path / "requirements.txt").touch()
    changes = {"--container": None, "--requirements": tmp_path / "requirements.txt"}
    options = beam_options(call(command(changes))[3])
    assert options[-3:] == (
        f"--requirements_file={tmp_path}/requirements.txt",
        "--requirements_cache=skip",
        f"--setup_file={SCRIPT.parents[1]}/setup.py",
    )
    assert "--autoscaling_algorithm=THROUGHPUT_BASED" in options


def test_a_dry_run_prints_what_the_real_run_executes(call):
    rest = ("--", "--config.curation.arguments.pattern=gs://b/$x 'y'", "--config.name=a\nb")
    *_, called = call(command({}, *rest))
    code, output, error, nothing = call(command({}, "--dry-run", *rest))
    assert (code, error, nothing) == (0, "", None)
    assert call(["bash", "-c", output])[3] == called


def test_beam_takes_the_options(call):
    """Its own parser knows each, and its own check for Dataflow finds nothing wrong."""
    pytest.importorskip("apache_beam", reason='the extra "beam" is not installed')
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator
    from apache_beam.runners.dataflow.dataflow_runner import DataflowRunner

    options = PipelineOptions([*beam_options(call(command({}))[3])])
    found = options.get_all_options(drop_default=True, retain_unknown_options=True)
    assert found == options.get_all_options(drop_default=True)
    assert (
        found["region"],
        found["machine_type"],
        found["num_workers"],
        found["disk_size_gb"],
    ) == (
        "us-central1",
        "n2-standard-4",
        2,
        50,
    )
    assert PipelineOptionsValidator(options, DataflowRunner()).validate() == []
    wrong = PipelineOptions(["--runner=DataflowRunner", "--project=Not A Project"])
    assert PipelineOptionsValidator(wrong, DataflowRunner()).validate()


def test_the_verb_reads_the_options_as_the_script_writes_them(call, tmp_path):
    """The real smoljax.curate gets as far as Beam, which is told to run in this process."""
    pytest.importorskip("apache_beam", reason='the extra "beam" is not installed')
    (tmp_path / "a.py").write_text("def area(width, height):\n    return width * height\n" * 9)
    *_, called = call(command({}))
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\n\n"
        "def get_config():\n    return ConfigDict(dict(curation=dict(recipe='data/files.py', arguments=dict("
        f"patterns=dict(code='{tmp_path}/a.py'), preset='code'), heldout_fraction=0.0)))\n"
    )
    replaced = {
        "--config=configs/quickstart.py": f"--config={tmp_path}/config.py",
        "--workdir=runs/a b": f"--workdir={tmp_path}/run",
        "--config.curation.directory=gs://my-bucket/run/curation": "--config.curation.directory=memory://b/c",
    }
    arguments = [replaced.get(argument, argument) for argument in called]
    arguments = [a.replace("DataflowRunner", "FnApiRunner") for a in arguments]
    arguments = [a.replace("'--sdk_location=container', ", "") for a in arguments]
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=SCRIPT.parents[1],
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run/documents/code/train/00000.parquet").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--config": None}, "--config is missing"),
        ({"--config": "configs/none.py"}, "--config=configs/none.py: there is no such file"),
        ({"--workdir": None}, "--workdir is missing"),
        ({"--workdir": "gs://b/run"}, "--workdir=gs://b/run is a URL"),
        ({"--bucket": None}, "--bucket=: give a folder of a bucket"),
        ({"--bucket": "my-bucket/run"}, "--bucket=my-bucket/run: give a folder of a bucket"),
        ({"--bucket": "gs://my-bucket/a b"}, "--bucket=gs://my-bucket/a b: give a folder"),
        ({"--region": None}, "--region=: give a region"),
        ({"--region": "us-central1-a"}, "--region=us-central1-a: give a region, such as us-central1"),
        ({"--project": None}, "--project=: give the project's ID"),
        ({"--project": "My Project"}, "--project=My Project: give the project's ID"),
        ({"--container": None}, "the workers need smoljax: give --container or --requirements"),
        ({"--requirements": "setup.py"}, "--container and --requirements exclude each other"),
        ({"--container": None, "--requirements": "none.txt"}, "--requirements=none.txt: there is no such file"),
        ({"--container": "a'b"}, "holds a quote or a backslash"),
        ({"--machine": "big"}, "--machine=big: give a machine type"),
        ({"--workers": 0}, "--workers=0: use a whole number from 1 on"),
        ({"--workers": 60}, "--workers=60 is more than --max-workers=50"),
        ({"--max-workers": "many"}, "--max-workers=many: use a whole number from 1 on"),
        ({"--disk": 5}, "--disk=5: use a whole number from 20 on"),
        ({"--autoscaling": "yes"}, "--autoscaling=yes: use throughput or none"),
        ({"--beam": "num_workers=3"}, "--beam has 'num_workers=3'"),
        ({"--zone": "us-central1-a"}, "--zone=us-central1-a is not a flag of curate_dataflow.sh"),
    ],
)  # fmt: skip
def test_wrong_calls_are_refused_in_one_line(call, changes, message):
    code, output, error, called = call(command(changes))
    assert (code, output, called) == (2, "", None)
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1

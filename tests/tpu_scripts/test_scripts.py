"""tpu_scripts against a cloud in a folder (fake_cloud.py): real shells, real processes, no network."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from smoljax.errors import SmoljaxError
from smoljax.planning.topologies import topology
from tests.tpu_scripts import fake_cloud

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
VERBS = sorted(path.name for path in SCRIPTS.glob("*.sh") if path.name not in ("lib.sh", "host.sh"))
PLACE = ["--zone=us-east5-a", "--project=my-project"]
TOOLS = (
    "awk",
    "basename",
    "bash",
    "cat",
    "date",
    "dirname",
    "env",
    "git",
    "grep",
    "gzip",
    "head",
    "mktemp",
    "rm",
    "sed",
    "sleep",
    "sort",
)
TOOLS += ("tail", "tar", "tr")
# What a flag of smoljax may hold, and what a shell, ssh or YAML would like to eat.
ARGUMENTS = [
    "--config.data.batch_ramp=((1000, 64), (2000, 128))",
    "--config.data.sources=({'name': \"a b\", 'weight': 0.5},)",
    "$HOME `id` $(id) !! *",
    "back\\slash\\",
    "two\nlines\tand a tab",
    "it's é 日本",
    "~",
    "",
    "-",
]
# Stands for the trainer: says its steps, ends as HOME/plan says (a code per start), with 42 when asked to stop.
JOB = """
import json, os, pathlib, signal, sys, time
home = pathlib.Path.home()
(home / "arguments.json").write_text(json.dumps(sys.argv[1:]))
signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in sys.argv else lambda *_: sys.exit(42))
print("train: 10/20 steps (50%)  loss 2.7183")
plan = home / "plan"
while not plan.exists():
    time.sleep(0.05)
code = int(plan.read_text())
if code == 1:
    print("error: the shard is damaged", file=sys.stderr)
if code > 128:
    os.kill(os.getpid(), code - 128)
sys.exit(code)
"""


class Cloud:
    """The fake cloud with a checkout to work from."""

    def __init__(self, folder: Path):
        self.folder = folder / "cloud"
        self.checkout = folder / "checkout"
        programs = folder / "programs"
        for directory in (self.folder, self.folder / "hosts", programs):
            directory.mkdir()
        self.kept = []
        for program in ("gcloud", "kubectl"):
            (programs / program).write_text(
                f'#!/bin/sh\nexec {sys.executable} -S {fake_cloud.__file__} {self.folder} {program} "$@"\n'
            )
            (programs / program).chmod(0o755)
        for tool in TOOLS:
            (programs / tool).symlink_to(shutil.which(tool))
        self.environment = {
            "PATH": str(
                programs
            ),  # Nothing else: a real gcloud of this machine must be out of reach.
            "HOME": str(folder),
            "LANG": "C.UTF-8",
        }
        self.set({"compute/zone": "us-east5-a", "project": "my-project"})
        shutil.copytree(SCRIPTS, self.checkout / "tpu_scripts")
        (self.checkout / "job.py").write_text(JOB)
        (self.checkout / ".gitignore").write_text("runs/\n")
        (self.checkout / "runs").mkdir()
        (self.checkout / "runs" / "large").write_text("not to be copied")
        subprocess.run(["git", "init", "--quiet"], cwd=self.checkout, check=True)

    def set(self, settings: dict) -> None:
        (self.folder / "settings.json").write_text(json.dumps(settings))

    def command(self, script: str, *arguments: str) -> list[str]:
        return ["bash", str(self.checkout / "tpu_scripts" / script), *arguments]

    def run(self, script: str, *arguments: str, code: int = 0) -> str:
        """What the script prints; its exit code is `code`."""
        return self.shell(self.command(script, *arguments), code=code)

    def shell(self, command: list[str], *, code: int = 0) -> str:
        result = subprocess.run(
            command,
            env=self.environment,
            cwd=self.checkout,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == code, result.stdout
        return result.stdout

    def calls(self) -> list[list[str]]:
        """The calls of gcloud and kubectl since the last look, without questions for settings."""
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [call for call in map(json.loads, lines) if call[1] != "config"]

    def hosts(self) -> list[Path]:
        return sorted((self.folder / "hosts").iterdir())

    def plan(self, code: int, *, host: int | None = None) -> None:
        """Lets the job on one host, or on all, end with this code."""
        for home in self.hosts() if host is None else [self.hosts()[host]]:
            (home / "new_plan").write_text(str(code))
            os.replace(home / "new_plan", home / "plan")

    def wait_for(self, file: str) -> list[Path]:
        """Waits until every host has the file."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            paths = [home / file for home in self.hosts()]
            if paths and all(path.exists() for path in paths):
                return paths
            time.sleep(0.05)
        raise AssertionError(f"no {file} on {self.hosts()}")


@pytest.fixture
def cloud(tmp_path):
    made = Cloud(tmp_path)
    yield made
    for process in made.kept:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    for resource in fake_cloud.resources(made.folder).values():
        fake_cloud.take_hosts_away(made.folder, resource)


def pasted(cloud: Cloud, text: str) -> None:
    """Runs the output of --dry-run as a person would: in a shell."""
    cloud.shell(["bash", "-euc", text])


def test_the_scripts_are_clean():
    checked = subprocess.run(
        [str(Path(sys.executable).parent / "shellcheck"), "-x", *map(str, SCRIPTS.glob("*.sh"))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", VERBS)
def test_help_explains_every_flag(cloud, script):
    text = cloud.run(script, "--help")
    refused = cloud.run(script, "--nonsense", code=2)
    assert refused.startswith(f"error: --nonsense is not a flag of {script}, which takes --")
    assert refused.count("\n") == 1
    flags = re.findall(r"--[a-z-]+", refused)[2:]
    assert {"--dry-run", "--help"} <= set(flags)
    for flag in set(flags) - {"--help"}:
        assert flag in text, flag
    assert f"tpu_scripts/{script} " in text
    assert cloud.calls() == []


def test_topologies_are_those_of_the_plan():
    """Every size of every kind, one and two slices: the scripts and smoljax.plan mean the same machine."""
    names = [
        f"{kind}-{size}{slices}"
        for kind in ("v4", "v5e", "v5p", "v6e")
        for size in (1, 2, 4, 6144, 12288, *(2**i for i in range(3, 15)), 24, 100)
        for slices in ("", "x2", "x0")
    ]
    program = """source "$0"
        for t in "$@"; do
          (take_topology "$t" 2>/dev/null; echo "$t $accelerator $shape $slices $chips") || echo "$t no"
        done"""
    output = subprocess.run(
        ["bash", "-c", program, SCRIPTS / "lib.sh", *names],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name, line in zip(names, output.splitlines(), strict=True):
        try:
            plan = topology(name)
        except SmoljaxError:
            assert line == f"{name} no"
            continue
        accelerator = name.split("x")[0].replace("v5e", "v5litepod")
        shape = "x".join(map(str, plan.shape))
        assert line == f"{name} {accelerator} {shape} {plan.slices} {plan.chips_per_slice}"
    assert sum(not line.endswith(" no") for line in output.splitlines()) > 60


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("create.sh", "give one NAME, found 0"),
        ("create.sh a b --topology=v5p-8", "give one NAME, found 2: a b"),
        (
            "create.sh My_Run --topology=v5p-8",
            "NAME is 'My_Run': use at most 40 lower-case letters",
        ),
        ("create.sh a", "--topology is missing: use v5e-256"),
        ("create.sh a --topology=v5p-100", "does not exist: v5p comes as v5p-8 v5p-16 v5p-32"),
        ("create.sh a --topology=h100x8", "--topology=h100x8 does not exist: use v4-N, v5e-N"),
        ("create.sh a --topology=v5p-8 --spot --reserved", "exclude each other"),
        ("create.sh a --topology=v5p-8 --wait --every=soon", "--every=soon: use a whole number"),
        ("create.sh a --topology", "--topology needs a value"),
        ("create.sh a --topology=", "--topology is empty"),
        ("launch.sh a", "no command: put it behind --, as in launch.sh NAME -- python -m"),
        ("launch.sh a --", "no command"),
        ("keep.sh a --topology=v5p-8", "no command"),
        ("keep.sh a -- python", "--topology is missing"),
        ("watch.sh a --lines=0", "--lines=0: use a whole number from 1 on"),
        ("stop.sh a --wait=1.5", "--wait=1.5: use a whole number"),
        ("delete.sh", "give one NAME"),
        ("gke.sh a --topology=v5p-8 -- python", "--image is missing"),
        ("gke.sh a --topology=v6e-4x2 --image=i -- python", "slices of one host cannot be joined"),
    ],
)
def test_a_wrong_call_gives_one_clear_line(cloud, call, message):
    output = cloud.run(*call.split(), code=2)
    assert output.startswith("error: ")
    assert message in output
    assert output.count("\n") == 1
    assert cloud.calls() == []


def test_zone_and_project_come_from_flags_or_gcloud(cloud):
    cloud.set({"project": "my-project"})
    assert "no zone: add --zone=us-east5-a" in cloud.run("watch.sh", "a", code=2)
    cloud.set({"compute/zone": "us-east5-a"})
    assert "no project: add --project=ID" in cloud.run("watch.sh", "a", code=2)
    assert "a: MISSING" in cloud.run("watch.sh", "a", "--project=another", code=1)
    assert cloud.calls()[0][4:7] == ["list", "--zone=us-east5-a", "--project=another"]
    (Path(cloud.environment["PATH"]) / "gcloud").unlink()
    assert "gcloud is not installed" in cloud.run("stop.sh", "a", *PLACE, code=2)
    # Commands can be looked at where gcloud is not installed.
    assert "queued-resources delete a --force" in cloud.run("delete.sh", "a", *PLACE, "--dry-run")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            "--topology=v5p-128 --spot",
            "--accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 PLACE --node-id=run --spot --async",
        ),
        (
            "--topology v5e-256x2 --reserved",
            "--accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite PLACE --node-count=2 --node-prefix=run --reserved --async",
        ),
        (
            "--topology=v6e-8 --until=2h -- --network=mine --labels=team=slm",
            "--accelerator-type=v6e-8 --runtime-version=v2-alpha-tpuv6e PLACE --node-id=run --valid-until-duration=2h --network=mine --labels=team=slm --async",
        ),
        (
            "--topology=v4-64",
            "--accelerator-type=v4-64 --runtime-version=tpu-ubuntu2204-base PLACE --node-id=run --async",
        ),
    ],
)
def test_create_asks_for_what_was_meant(cloud, flags, expected):
    """Printed, pasted and run directly it is the same command, and gcloud accepts it."""
    expected = f"gcloud compute tpus queued-resources create run {expected}".replace(
        "PLACE", " ".join(PLACE)
    )
    arguments = flags.split()
    printed = cloud.run("create.sh", "run", "--dry-run", *arguments)
    assert printed == expected + "\n"
    assert cloud.calls() == []
    pasted(cloud, printed)
    assert cloud.calls() == [expected.split()]
    cloud.run("delete.sh", "run", "--yes")
    cloud.calls()
    cloud.run("create.sh", "run", *arguments)
    assert cloud.calls() == [expected.split()]


def test_the_fake_refuses_what_gcloud_would(cloud):
    for extra in ("--preemptible", "--spot=yes", "--labels", "--node-count=1"):
        cloud.run("create.sh", "run", "--topology=v5p-8", "--", extra, code=1)
    assert fake_cloud.resources(cloud.folder) == {}


def test_waiting_for_room(cloud):
    settings = {"compute/zone": "us-east5-a", "project": "my-project"}
    cloud.set(settings | {"states": ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]})
    output = cloud.run("create.sh", "run", "--topology=v5p-8", "--wait", "--every=1")
    assert output.split() == [
        "run:",
        "WAITING_FOR_RESOURCES",
        "run:",
        "PROVISIONING",
        "run:",
        "ACTIVE",
    ]
    cloud.set(settings | {"states": ["FAILED"]})
    output = cloud.run("create.sh", "other", "--topology=v5p-8", "--wait", code=1)
    assert "error: no TPUs for other: gcloud compute tpus queued-resources describe other" in output


def test_from_create_to_delete(cloud):
    """Two slices of two hosts: install, launch, look, stop, go on, end, tear down."""
    cloud.run("create.sh", "run", "--topology=v5p-16x2", "--spot")
    assert "run-0-w-0 installed\nrun-0-w-1 installed\nrun-1-w-0" in cloud.run("install.sh", "run")
    home = cloud.hosts()[3]
    assert (home / "smoljax" / "tpu_scripts" / "host.sh").exists()
    assert not (home / "smoljax" / "runs").exists()
    assert (home / "installation").read_text().splitlines()[1:] == [
        "python3 -m pip install --user --quiet uv",
        "python3 -m uv venv --quiet --seed --python 3.12 .venv",
        "pip -m pip install --quiet -e .[train,tpu,gcs]",
    ]
    assert cloud.run("ssh.sh", "run", "--", "bash", "-c", "echo $HOME").split() == [
        str(home) for home in cloud.hosts()
    ]

    started = cloud.run("launch.sh", "run", "--", "python", "job.py", *ARGUMENTS)
    assert started.splitlines() == [f"{home.name} started" for home in cloud.hosts()]
    for file in cloud.wait_for("arguments.json"):
        assert json.loads(file.read_text()) == ARGUMENTS
        file.unlink()
    refused = cloud.run("launch.sh", "run", "--", "python", "job.py", code=1)
    assert "error: run-0-w-0 is still running the last command" in refused
    watched = cloud.run("watch.sh", "run").splitlines()
    assert watched[0] == "run: ACTIVE"
    assert watched[1:5] == [
        f"{home.name} running: train: 10/20 steps (50%)  loss 2.7183" for home in cloud.hosts()
    ]
    assert watched[-1].startswith("train: 10/20 steps")

    stopped = cloud.run("stop.sh", "run").splitlines()
    assert [line.split(":")[0] for line in stopped] == [
        f"{home.name} stopped 42" for home in cloud.hosts()
    ]
    cloud.run("install.sh", "run")  # Again: the environment is kept.
    assert (home / "installation").read_text().count(" venv ") == 1
    # The command that --dry-run prints does the same.
    pasted(cloud, cloud.run("launch.sh", "run", "--dry-run", "--", "python", "job.py", *ARGUMENTS))
    for file in cloud.wait_for("arguments.json"):
        assert json.loads(file.read_text()) == ARGUMENTS
    cloud.plan(0)
    while "running" in (status := cloud.run("watch.sh", "run")):
        pass
    assert status.count(" exit 0: train: 10/20") == 4
    assert "exit code 0" in status.splitlines()[-1]
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(cloud.folder / "hosts") not in processes
    cloud.run("delete.sh", "run", "--yes")
    assert cloud.hosts() == []


def test_a_run_that_does_not_listen_is_killed(cloud):
    cloud.run("create.sh", "run", "--topology=v5p-8")
    cloud.run("install.sh", "run")
    cloud.run("launch.sh", "run", "--", "python", "job.py", "stubborn")
    cloud.wait_for("arguments.json")
    output = cloud.run("stop.sh", "run", "--wait=1")
    assert "run-w-0 stopped 137: train" in output
    assert "run-w-1 stopped 137: train" in output


class Kept:
    """A keep.sh at work."""

    def __init__(self, cloud: Cloud, *flags: str):
        self.cloud = cloud
        command = cloud.command(
            "keep.sh", "run", "--topology=v5p-16", "--spot", "--every=1", *flags
        )
        self.process = subprocess.Popen(
            [*command, "--", "python", "job.py", *ARGUMENTS],
            env=cloud.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        cloud.kept.append(self.process)

    def wait_for_start(self) -> None:
        """Until the job runs on every host of the TPUs there are now."""
        for file in self.cloud.wait_for("arguments.json"):
            file.unlink()

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, output


def test_keep_brings_a_run_through_crashes_and_preemption(cloud):
    kept = Kept(cloud, "--setup=touch mounted", "--delete")
    kept.wait_for_start()
    cloud.plan(139, host=1)  # A host dies; the other hangs until it is stopped.
    while not (cloud.hosts()[0] / "smoljax_run" / "stopped").exists():
        time.sleep(0.05)
    for home in cloud.hosts():
        (home / "plan").unlink(missing_ok=True)
    kept.wait_for_start()
    all_resources = fake_cloud.resources(cloud.folder)  # The TPUs are taken away.
    all_resources["run"]["states"] = ["SUSPENDED"]
    fake_cloud.take_hosts_away(cloud.folder, all_resources["run"])
    fake_cloud.save(cloud.folder, all_resources)
    kept.wait_for_start()
    assert all((home / "mounted").exists() for home in cloud.hosts())
    cloud.plan(0)
    code, output = kept.end()
    assert code == 0, output
    assert "run: ended early, restart 1 of 20: run-w-1 exit 139" in output
    assert "run: the TPUs were taken away" in output
    assert output.splitlines()[-1].endswith("run: done")
    verbs = [call[4] for call in cloud.calls()]
    assert [verb for verb in verbs if verb in ("create", "delete")] == ["create", "delete"] * 2
    assert verbs.count("scp") == 3
    assert cloud.hosts() == []


def test_keep_does_not_repeat_an_error_that_explains_itself(cloud):
    kept = Kept(cloud)
    kept.wait_for_start()
    cloud.plan(1, host=1)
    code, output = kept.end()
    assert code == 1
    assert output.splitlines()[-1].endswith(
        "run: failed: run-w-1 exit 1: error: the shard is damaged"
    )
    assert "run-w-0 exit 42" in cloud.run("watch.sh", "run")  # Not left hanging.


def test_keep_ends_when_asked_and_takes_up_what_runs(cloud):
    first = Kept(cloud)
    first.wait_for_start()
    os.killpg(first.process.pid, signal.SIGKILL)
    first.process.communicate()
    second = Kept(cloud)
    while "is running already" not in (line := second.process.stdout.readline()):
        assert line
    calls = cloud.calls()
    (
        cloud.folder / "offline"
    ).touch()  # For a while nothing answers: that is not a reason to begin anew.
    while len(lost := cloud.calls()) < 2:
        calls += lost
        time.sleep(2)
    (cloud.folder / "offline").unlink()
    cloud.run("stop.sh", "run")
    code, output = second.end()
    assert code == 42
    assert output.splitlines()[-1].endswith("run: stopped on request")
    verbs = [call[4] for call in calls + lost + cloud.calls()]
    assert verbs.count("create") == 1
    assert "delete" not in verbs


def test_keep_gives_up(cloud):
    kept = Kept(cloud, "--restarts=0")
    kept.wait_for_start()
    cloud.plan(134)
    code, output = kept.end()
    assert code == 1
    assert "gave up after 0 restarts: run-w-0 exit 134" in output


def test_keep_prints_a_round(cloud):
    printed = cloud.run(
        "keep.sh", "run", "--topology=v5p-16", "--spot", "--delete", "--dry-run", "--", "python"
    )
    assert [line.split()[4] for line in printed.splitlines()] == [
        "create",
        "scp",
        "ssh",
        "ssh",
        "ssh",
        "delete",
    ]
    assert cloud.calls() == []


GKE = ["--image=registry/smoljax:1", "--", "python", "-m", "smoljax.train", *ARGUMENTS]


def kubernetes_expands(word: str) -> str:
    """What the kubelet makes of a word of a command, with no variable set: $$ is $, other $(NAME) stay."""
    return word.replace("$$", "$")


def test_a_jobset_of_two_slices(cloud):
    flags = ["--topology=v5e-256x2", "--spot", "--bucket=my-bucket", "--service-account=trainer"]
    cloud.run("gke.sh", "run", *flags, *GKE)
    assert cloud.calls() == [["kubectl", "apply", "--filename=-"]]
    jobset = yaml.safe_load((cloud.folder / "applied.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "run"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 20
    (slices,) = jobset["spec"]["replicatedJobs"]
    assert slices["replicas"] == 2
    job = slices["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["backoffLimit"]) == (64, 64, 0)
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1]
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["serviceAccountName"] == "trainer"
    (container,) = pod["containers"]
    assert container["image"] == "registry/smoljax:1"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert list(map(kubernetes_expands, container["command"])) == GKE[2:]
    assert pod["volumes"][1]["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


@pytest.mark.parametrize(
    ("name", "hosts", "chips", "shape", "accelerator"),
    [
        ("v6e-1", 1, 1, "1x1", "tpu-v6e-slice"),
        ("v6e-8", 2, 4, "2x4", "tpu-v6e-slice"),
        ("v5p-128", 16, 4, "4x4x4", "tpu-v5p-slice"),
        ("v4-8", 1, 4, "2x2x1", "tpu-v4-podslice"),
    ],
)
def test_a_jobset_of_one_slice(cloud, name, hosts, chips, shape, accelerator):
    """Printed and pasted it is the JobSet that is applied."""
    printed = cloud.run("gke.sh", "run", f"--topology={name}", "--dry-run", *GKE)
    assert cloud.calls() == []
    pasted(cloud, printed)
    text = (cloud.folder / "applied.yaml").read_text()
    cloud.run("gke.sh", "run", f"--topology={name}", *GKE)
    assert (cloud.folder / "applied.yaml").read_text() == text
    (slices,) = yaml.safe_load(text)["spec"]["replicatedJobs"]
    assert slices["replicas"] == 1
    job = slices["template"]["spec"]
    assert job["completions"] == hosts
    pod = job["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": shape,
    }
    assert list(map(kubernetes_expands, pod["containers"][0]["command"])) == GKE[2:]

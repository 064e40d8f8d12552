"""The whole path in one command: `python -m smoljax.flow --config=configs/quickstart.py --workdir=runs/quickstart`.

Documents, tokenizer, shards, curation report, training, evaluation, samples, report: each step is the verb that a
person would call (its command is printed first). A step is skipped while its settings, its inputs and its outputs are
unchanged; delete an output and just that, and what changes with it, is made again. Outputs of older settings are moved
to WORKDIR/superseded, never deleted. Interrupt at any moment; the same command goes on. Exit codes as of the verbs.
"""

import dataclasses
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from smoljax import command_line, files
from smoljax.errors import SmoljaxError

LEDGER = "flow.json"


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the path.

    Attributes:
      name: as printed and kept in the ledger.
      verb: module and its own options.
      sections: config sections that it reads; a change in them makes the step run again.
      needs: steps whose outputs it reads.
      outputs: files and folders that it makes, relative to the workdir.
    """

    name: str
    verb: tuple[str, ...]
    sections: tuple[str, ...]
    needs: tuple[str, ...]
    outputs: tuple[str, ...]


STEPS = (
    Step(
        "documents", ("curate", "--only=documents"), ("curation", "evaluation"), (), ("documents",)
    ),
    Step(
        "tokenizer",
        ("curate", "--only=tokenizer"),
        ("tokenizer",),
        ("documents",),
        ("tokenizer",),
    ),
    Step(
        "shards",
        ("curate", "--only=shards"),
        ("shards",),
        ("documents", "tokenizer"),
        ("shards",),
    ),
    Step(
        "curation_report",
        ("curate", "--only=report"),
        ("curation", "tokenizer"),
        ("documents", "tokenizer"),
        ("curation_report.html", "curation_report.json"),
    ),
    Step(
        "train",
        ("train",),
        ("seed", "data", "model", "mesh", "optimizer", "training"),
        ("tokenizer", "shards"),
        ("train/checkpoints", "train/metrics.jsonl", "train/config.json"),
    ),
    Step("evaluate", ("evaluate",), ("evaluation",), ("train",), ("evaluation.json",)),
    Step("generate", ("generate", "--samples=yes"), ("generation",), ("train",), ("samples.json",)),
)


def main(config: dict, workdir: Path) -> int:
    """Brings every step up to date, then writes the report."""
    if config.get("quality"):
        raise SmoljaxError(
            "the config has a section quality, whose scores a language model gives outside of this path: run "
            "python -m smoljax.curate, which says what it needs, and then train, evaluate and generate one by one"
        )
    overrides = [argument for argument in sys.argv[1:] if argument.startswith("--config")]
    flow = Flow(config, workdir, overrides)
    start = time.monotonic()
    for number, step in enumerate(STEPS, start=1):
        code = flow.update(step, f"[{number}/{len(STEPS) + 1}]")
        if code:
            return code
    flow.report(f"[{len(STEPS) + 1}/{len(STEPS) + 1}]")
    print(f"done in {time.monotonic() - start:.0f} s: open {workdir / 'report.html'}")
    return 0


class Flow:
    """Runs steps and remembers, in WORKDIR/flow.json, what each was made from and what it made.

    Args:
      config: the whole config.
      workdir: the run's folder.
      overrides: the --config flags of this command, passed on to each verb.
    """

    def __init__(self, config: dict, workdir: Path, overrides: list[str]):
        self._config, self._workdir, self._overrides = config, workdir, overrides
        self._path = workdir / LEDGER
        self._ledger = _read_json(self._path)
        self._fingerprints: dict[str, str] = {}

    def update(self, step: Step, label: str) -> int:
        """Runs the step unless it is up to date; the exit code of its verb, 0 when skipped."""
        key = self._key(step)
        entry = self._ledger.get(step.name, {})
        if entry.get("key") == key and entry.get("outputs") == self._stat(step):
            print(f"{label} {step.name}: up to date", flush=True)
            self._fingerprints[step.name] = entry["fingerprint"]
            return 0
        self._make_room(step, entry, key)
        command = self.command(step)
        print(f"{label} {step.name}: {command}", flush=True)
        self._remember(step, {"key": key, "command": command})
        start = time.monotonic()
        code = _run(shlex.split(command)[1:])
        if code:
            return code
        missing = [name for name in step.outputs if not (self._workdir / name).exists()]
        if missing:
            raise SmoljaxError(
                f"{command} ended without writing {self._workdir / missing[0]}; run it again"
            )
        seconds = round(time.monotonic() - start, 1)
        fingerprint = self._fingerprint(step)
        self._fingerprints[step.name] = fingerprint
        self._remember(
            step,
            {
                "key": key,
                "command": command,
                "seconds": seconds,
                "fingerprint": fingerprint,
                "outputs": self._stat(step),
            },
        )
        return 0

    def report(self, label: str) -> None:
        """Writes report.html, from all outputs."""
        from smoljax.evaluation.report import write_report

        steps = [
            {
                "name": step.name,
                "command": self._ledger[step.name]["command"],
                "seconds": self._ledger[step.name]["seconds"],
            }
            for step in STEPS
        ]
        key = _hash([self._fingerprints, [step["command"] for step in steps]])
        entry = self._ledger.get("report", {})
        path = self._workdir / "report.html"
        if entry.get("key") == key and path.exists():
            print(f"{label} report: up to date", flush=True)
            return
        print(f"{label} report: {path}", flush=True)
        write_report(self._workdir, steps=steps)
        self._ledger["report"] = {"key": key}
        files.atomic_write_json(self._path, self._ledger)

    def command(self, step: Step) -> str:
        """The command line that repeats the step."""
        verb, *options = step.verb
        words = ["python", "-m", f"smoljax.{verb}", *self._overrides, f"--workdir={self._workdir}"]
        return shlex.join([*words, *options])

    def _key(self, step: Step) -> str:
        settings = {name: self._config.get(name) for name in step.sections}
        return _hash([settings, {name: self._fingerprints[name] for name in step.needs}])

    def _make_room(self, step: Step, entry: dict, key: str) -> None:
        """Outputs of other settings move away; the rest of outputs that lost a part is made again whole.

        What an interrupted run of the same settings left stays: its verb goes on from there.
        """
        present = [name for name in step.outputs if (self._workdir / name).exists()]
        if not present or (entry.get("key") == key and "outputs" not in entry):
            return
        if entry.get("key") == key:
            for name in present:
                _remove(self._workdir / name)
            return
        number = 1
        while (place := self._workdir / "superseded" / f"{step.name}-{number}").exists():
            number += 1
        for name in present:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (self._workdir / name).rename(place / name)
        print(f"    the {step.name} of older settings or inputs moved to {place}", flush=True)

    def _files(self, step: Step) -> list[Path]:
        found = []
        for name in step.outputs:
            path = self._workdir / name
            found += sorted(path.rglob("*")) if path.is_dir() else [path]
        return [path for path in found if path.is_file()]

    def _stat(self, step: Step) -> dict[str, list[int]]:
        return {
            str(path.relative_to(self._workdir)): [path.stat().st_size, path.stat().st_mtime_ns]
            for path in self._files(step)
        }

    def _fingerprint(self, step: Step) -> str:
        digest = hashlib.sha256()
        for path in self._files(step):
            digest.update(str(path.relative_to(self._workdir)).encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _remember(self, step: Step, entry: dict) -> None:
        self._ledger[step.name] = entry
        files.atomic_write_json(self._path, self._ledger)


def _run(arguments: list[str]) -> int:
    """Runs a verb in its own process; Ctrl-C reaches it by itself, and its exit code is ours."""
    process = subprocess.Popen([sys.executable, *arguments])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # The verb got it as well, saves what it has, and exits.


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


if __name__ == "__main__":
    command_line.run(main, usage=__doc__)

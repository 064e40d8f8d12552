"""What can happen to a run from outside: SIGKILL, Ctrl-C, a full disk, changed files. It says so, and goes on to the same bytes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from smoljax.configuration import build
from smoljax.curation import CurationConfig, curate, presets
from smoljax.errors import SmoljaxError
from tests.curation import material

ROOT = Path(__file__).parents[2]
# Every step has work items: near-duplicates and exact ones, and an evaluation set.
PRESETS = presets.defaults()
PRESETS["document"]["dedup"] = {"minhash": "fineweb"}


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A folder with a config over pages with copies and near-duplicates, a crawl that ends early, and Python's json package."""
    folder = tmp_path / "in"
    (folder / "html").mkdir(parents=True)
    for i in range(30):
        (folder / f"html/{i:02d}.html").write_text(material.page(i))
    for i in range(5):
        near = material.page(i).replace("number", "figure", 1)
        (folder / f"html/near{i}.html").write_text(near)
    (folder / "html/copy.html").write_text(material.page(9))
    crawl = material.warc_gz([material.page(i) for i in range(25, 45)])[:-60]
    (folder / "a.warc.gz").write_bytes(crawl)
    items = [{"text": material.prose(i).splitlines()[1] + " " + material.prose(i)} for i in (5, 30)]
    (folder / "quiz.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    recipe = material.write_recipe(
        tmp_path,
        f"Files('html', '{folder}/html/*', 'document')",
        f"Files('crawl', '{folder}/a.warc.gz', 'document')",
        f"Files('code', '{sysconfig.get_path('stdlib')}/json/*.py', 'code')",
    )
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\n\n"
        f"def get_config():\n    return ConfigDict(dict(curation={settings(recipe)!r}, "
        f"evaluation=dict(sets={sets(tmp_path)!r})))\n"
    )
    return tmp_path


def settings(recipe: str) -> dict:
    return {
        "recipe": recipe,
        "presets": PRESETS,
        "heldout_fraction": 0.2,
        "shard_bytes": 24_000,
    }


def sets(folder: Path) -> dict[str, str]:
    return {"quiz": f"{folder}/in/quiz.jsonl"}


def run_here(folder: Path, name: str) -> Path:
    """Curates in this process and returns the workdir."""
    config = build(CurationConfig, settings(str(folder / "recipe.py")), "curation")
    curate(config, folder / name, evaluation_sets=sets(folder), workers=1)
    return folder / name


def documents(run: Path) -> dict[str, bytes]:
    """Every file of the final output."""
    found = sorted(path for path in (run / "documents").rglob("*") if path.is_file())
    return {str(path.relative_to(run)): path.read_bytes() for path in found}


def start(folder: Path, name: str) -> subprocess.Popen:
    """The verb on two workers, in a process group of its own as from a shell."""
    command = [sys.executable, "-m", "smoljax.curate", f"--config={folder}/config.py"]
    return subprocess.Popen(
        [*command, f"--workdir={folder / name}", "--only=documents"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd=ROOT,
    )


def family(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def finished_items(run: Path) -> int:
    return len(list((run / "curation").glob("*/[0-9a-z]*/manifest.json")))


def wait_for(condition, process: subprocess.Popen) -> None:
    """Until the condition holds, or the process has ended."""
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_killed_at_twenty_random_moments_and_restarted_gives_the_same_bytes(corpus):
    """Every other time the run alone is killed, and its workers have to notice; else all of them at once.

    Each time a few more work items are finished than the time before, at last while the documents are put together.
    """
    whole = run_here(corpus, "whole")
    total = finished_items(whole)
    run = corpus / "run"
    draw = random.Random(0)
    killed = 0
    for number, moment in enumerate([*sorted(draw.sample(range(total), 18)), total, total]):
        more = max(moment, finished_items(run) + 1)
        process = start(corpus, "run")
        if moment < total:
            wait_for(lambda more=more: finished_items(run) >= more, process)
        else:
            wait_for(lambda: any(run.glob(".documents.*")), process)
        time.sleep(draw.uniform(0, 0.02))
        children = family(process)
        if number % 2:
            process.kill()
        elif process.poll() is None:  # Else it has ended before, which `killed` counts.
            os.killpg(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
    assert killed >= 15, killed
    process = start(corpus, "run")
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert documents(run) == documents(whole)
    assert len(documents(run)) > 20
    assert finished_items(run) == total
    assert not [path for path in run.rglob(".*") if path.is_dir()]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_request_to_stop_ends_all_processes_and_exits_with_42(corpus, name):
    for i in range(400):  # Work for some seconds.
        (corpus / f"in/html/more{i}.html").write_text(material.page(100 + i))
    run = corpus / "run"
    process = start(corpus, "run")
    wait_for(lambda: finished_items(run) >= 2, process)
    children = family(process)
    assert children
    if name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # As a terminal does: to the whole group.
    else:
        process.terminate()
    _, error = process.communicate(timeout=30)
    assert process.returncode == 42, error
    last = error.decode().splitlines()[-1]
    assert last == "stopped on request; the same command goes on from what is done"
    assert b"Traceback" not in error
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert finished_items(run) >= 2
    assert not list(run.glob("curation/*/.*.tmp"))


FULL_DISK = """
    import subprocess, sys
    from pathlib import Path
    from tests.curation.test_interruptions import SmoljaxError, documents, run_here

    folder = Path(sys.argv[1])
    small = folder / "small"
    def room(kilobytes):
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(small)], check=True)

    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)], check=True)
    for kilobytes in range(32, 5_000, 64):
        room(kilobytes)
        try:
            run_here(folder, "small")
            break
        except SmoljaxError as error:
            print(error, flush=True)
            assert not [path for path in small.rglob(".*") if path.is_dir()], list(small.rglob(".*"))
    assert documents(small) == documents(folder / "whole")
"""


def test_a_full_disk_is_named_and_with_room_the_same_command_goes_on(corpus):
    """A file system that grows by 64 kB after each failure, so that the disk is full in every step."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let us mount a file system of our own")
    whole = run_here(corpus, "whole")
    (corpus / "small").mkdir()
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", textwrap.dedent(FULL_DISK), str(corpus)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) >= 5
    assert {line.partition(str(corpus / "small"))[0] for line in lines} == {
        "the disk is full while writing "
    }
    assert all("run the same command again" in line for line in lines)
    steps = {line.partition("small/curation/")[2].partition("/")[0] for line in lines}
    assert steps >= {"extract", "filter", "finish"}
    assert whole


def test_a_changed_bit_in_a_manifest_of_each_step_makes_its_item_again(corpus):
    """Wherever in the manifest it is, in the counts of a stage too."""
    whole = documents(run_here(corpus, "run"))
    draw = random.Random(0)
    for _ in range(4):
        for step in STEPS:
            path = draw.choice(sorted((corpus / "run/curation" / step).glob("*/manifest.json")))
            data = bytearray(path.read_bytes())
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(7)
            path.write_bytes(data)
        shutil.rmtree(corpus / "run/documents")
        assert documents(run_here(corpus, "run")) == whole


STEPS = ("evaluation", "extract", "filter", "signatures", "exact", "bands", "clusters", "finish", "contamination")  # fmt: skip


def test_a_changed_bit_in_any_intermediate_file_is_named(corpus):
    """And after the folder that the message names is deleted, the same command makes the same documents."""
    whole = run_here(corpus, "whole")
    kinds: dict[tuple[str, str], Path] = {}
    for path in sorted((whole / "curation").glob("*/*/*")):
        name = "NNNNN.npy" if path.parts[-3] == "clusters" else path.name
        if path.name != "manifest.json" and path.stat().st_size:
            kinds[path.parts[-3], name] = path
    assert {step for step, _ in kinds} == set(STEPS)
    for step, name in kinds:
        run = corpus / "changed"
        shutil.copytree(whole, run)
        path = run / kinds[step, name].relative_to(whole)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        for later in STEPS[STEPS.index(step) + 1 :]:
            if step != "evaluation" or later != "extract":
                shutil.rmtree(run / "curation" / later)
        shutil.rmtree(run / "documents")
        with pytest.raises(SmoljaxError) as caught:
            run_here(corpus, "changed")
        named = f"curation/{step}/{path.parent.name}/{path.name} is damaged"
        assert named in str(caught.value), (step, name)
        assert "and run the same command again" in str(caught.value), (step, name)
        shutil.rmtree(path.parent)
        assert documents(run_here(corpus, "changed")) == documents(whole), (step, name)
        shutil.rmtree(run)

"""The runner's own contract, on work items of a few bytes."""

import contextlib
import json
import os
import pty
import re
import signal
import threading
import time

import fsspec
import pyarrow as pa
import pytest

from smoljax.curation import items as work_items
from smoljax.curation import runner
from smoljax.errors import SmoljaxError


def write(argument: str, folder) -> dict:
    (folder / "out.txt").write_text(argument)
    return {"length": len(argument)}


def fail(argument: str, folder) -> dict:
    (folder / "half.txt").write_text(argument)
    raise SmoljaxError(f"cannot work on {argument}")


def die(argument: str, folder) -> dict:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def pool(argument: str, folder) -> dict:
    return {"pool": pa.default_memory_pool().backend_name, "cores": pa.cpu_count()}


def item(name: str, work=write, *, key: str = "k") -> work_items.WorkItem:
    return work_items.WorkItem(name, key, work, f"text {name}", 1, f"input {name}")


def test_manifests_come_in_the_order_of_the_items(tmp_path):
    items = [item(f"{i:02d}") for i in range(6)]
    manifests = runner.run(items, tmp_path, workers=2, stage="test")
    assert [m["result"] for m in manifests] == [{"length": 7}] * 6
    written = json.loads((tmp_path / "03/manifest.json").read_text())
    assert {**manifests[3], "checksum": written["checksum"]} == written
    assert (tmp_path / "03/out.txt").read_text() == "text 03"


@pytest.mark.parametrize("work", [pool, fail])
def test_arrow_is_frugal_while_items_run_and_then_as_it_was(tmp_path, work):
    before = pool("", tmp_path)
    with contextlib.suppress(SmoljaxError):
        (manifest,) = runner.run([item("a", work)], tmp_path, workers=1, stage="test")
        assert manifest["result"] == {"pool": "system", "cores": 1}
    assert pool("", tmp_path) == before != {"pool": "system", "cores": 1}


def test_finished_items_are_kept_unless_the_key_or_a_file_changed(tmp_path):
    def times():
        return {p.parent.name: p.stat().st_mtime_ns for p in tmp_path.glob("*/out.txt")}

    runner.run([item("a"), item("b"), item("c")], tmp_path, workers=1, stage="test")
    before = times()
    (tmp_path / "b/out.txt").write_text("cut")
    runner.run([item("a"), item("b"), item("c", key="other")], tmp_path, workers=1, stage="test")
    after = times()
    assert after["a"] == before["a"]
    assert after["b"] != before["b"]
    assert after["c"] != before["c"]
    assert (tmp_path / "b/out.txt").read_text() == "text b"


def test_folders_of_an_earlier_configuration_go(tmp_path):
    runner.run([item("a"), item("b")], tmp_path, workers=1, stage="test")
    (tmp_path / ".c.123.tmp").mkdir()
    runner.run([item("a")], tmp_path, workers=1, stage="test")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_item_ends_the_run_and_leaves_nothing_half(tmp_path, workers):
    with pytest.raises(SmoljaxError, match="cannot work on text bad"):
        runner.run([item("bad", fail), item("good")], tmp_path, workers=workers, stage="test")
    assert {path.name for path in tmp_path.iterdir()} <= {"good"}


def test_a_worker_that_is_killed_is_named_with_its_input(tmp_path):
    with pytest.raises(
        SmoljaxError, match=r"a worker died \(signal SIGKILL\) while it read input [xy]"
    ):
        runner.run([item("x", die), item("y", die)], tmp_path, workers=2, stage="test")
    assert list(tmp_path.iterdir()) == []


def wait(argument: str, folder) -> dict:
    time.sleep(0.25)
    return {}


def test_on_a_terminal_progress_shows_rate_and_time_left(tmp_path):
    """What an earlier run finished counts as done, but not in the rate: 10 MB take a quarter of a second or more."""
    items = [work_items.WorkItem(str(i), "k", wait, "", 10_000_000, "input") for i in range(8)]
    runner.run(items[:4], tmp_path, workers=1, stage="read")
    ours, theirs = pty.openpty()
    with open(ours, "rb", buffering=0) as terminal, open(theirs, "w") as stderr:
        with contextlib.redirect_stderr(stderr):
            runner.run(items, tmp_path, workers=1, stage="read")
        shown = b""
        while not shown.endswith(b"\n"):
            shown += terminal.read(1 << 16)
    lines = [line.strip() for line in shown.decode().split("\r\x1b[2K") if line]
    found = re.fullmatch(r"read: 60/80 MB \(75%\)  ([0-9.]+) MB/s  ([0-9]+)s left", lines[1])
    assert found, lines
    assert float(found[1]) <= 40
    assert int(found[2]) >= 0
    assert re.fullmatch(r"read: 80 MB in [1-9][0-9]*s", lines[-1])


def test_what_one_thread_fetched_another_does_not_remove():
    """A worker of Beam's may run several items at once."""
    memory = fsspec.filesystem("memory")
    folder = "memory://threads/step"
    work_items.run_item(item("a"), folder)
    fetched = work_items.verified(f"{folder}/a", "out.txt")
    other = threading.Thread(target=work_items.run_item, args=(item("b"), folder))
    other.start()
    other.join()
    assert fetched.read_text() == "text a"
    work_items.forget_fetched()
    assert not fetched.exists()
    memory.rm("/threads", recursive=True)


def test_verified_names_a_changed_file(tmp_path):
    runner.run([item("a")], tmp_path, workers=1, stage="test")
    assert work_items.verified(str(tmp_path / "a"), "out.txt") == tmp_path / "a/out.txt"
    (tmp_path / "a/out.txt").write_text("text b")
    with pytest.raises(SmoljaxError, match=r"out\.txt is damaged"):
        work_items.verified(str(tmp_path / "a"), "out.txt")

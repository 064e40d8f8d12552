"""Work items on a pool of processes: each leaves one folder, whole and with its manifest, or nothing.

An item that is finished under the same key is not run again, so a killed run goes on where it stopped. What an
item writes depends only on its argument: not on workers, order or interruptions.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import xxhash

from smoljax import files
from smoljax.errors import SmoljaxError
from smoljax.progress import Progress

_MANIFEST = "manifest.json"
_MB = 10**6


@dataclass(frozen=True)
class WorkItem:
    """One unit of work.

    Attributes:
      name: of its folder ("00012").
      key: hash of everything that its output depends on (stage configuration, input fingerprint, code version).
      work: a function at a module's top level, `work(argument, folder) -> JSON-able dict`; it writes its files
        into `folder`, which is empty.
      argument: picklable.
      size: of its input, in bytes, for the progress line.
      label: what it works on, for errors.
    """

    name: str
    key: str
    work: Callable[[Any, Path], dict]
    argument: Any
    size: int
    label: str


def run(items: Sequence[WorkItem], directory: Path, *, workers: int, stage: str) -> list[dict]:
    """Runs the items that are not finished and returns every item's manifest, in the order of `items`.

    `directory/<name>/` then holds what the item wrote and its manifest.json: {"key", "result", "files"}. Folders
    of other names, from an earlier configuration, are removed.

    Args:
      items: with distinct names.
      directory: belongs to this stage alone.
      workers: processes; 1 works in this process.
      stage: for the progress line.

    Raises:
      SmoljaxError: an item failed, or a worker died; what other items finished stays.
      KeyboardInterrupt: on Ctrl-C, after the workers have stopped.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _remove_strangers(directory, {item.name for item in items})
    manifests = {item.name: _finished(directory, item) for item in items}
    todo = [item for item in items if manifests[item.name] is None]
    total = sum(item.size for item in items)
    done = total - sum(item.size for item in todo)
    progress = Progress(stage, total // _MB or None, unit="MB")
    progress.start_at(done // _MB)
    finished = _in_pool if min(workers, len(todo)) > 1 else _in_process
    with contextlib.closing(finished(todo, directory, min(workers, len(todo)))) as results:
        for item, manifest in results:
            manifests[item.name] = manifest
            done += item.size
            progress.update(done // _MB)
    if todo:
        progress.close()
    return [manifests[item.name] for item in items]


def run_item(item: WorkItem, directory: Path) -> dict:
    """Runs one item and returns its manifest. Its folder appears whole; a pure function of the item."""
    with files.atomic_directory(directory / item.name) as folder:
        start = time.monotonic()
        result = item.work(item.argument, folder)
        manifest = {
            "key": item.key,
            "result": result,
            "files": {
                path.name: {"bytes": path.stat().st_size, "xxh3": _file_hash(path)}
                for path in sorted(folder.iterdir())
            },
            "seconds": round(time.monotonic() - start, 3),
        }
        files.atomic_write_json(folder / _MANIFEST, manifest)
    return manifest


def verified(folder: Path, name: str) -> Path:
    """The path of a file of a finished item, after its content was compared with the manifest.

    Raises:
      SmoljaxError: the file is missing or was changed.
    """
    path = folder / name
    expected = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"][name]["xxh3"]
    found = _file_hash(path) if path.is_file() else "no file"
    if found != expected:
        raise SmoljaxError(
            f"{path} is damaged: its hash is {found}, its manifest says {expected}; "
            f"delete the folder {folder} and run the same command again"
        )
    return path


@contextlib.contextmanager
def only_run_in(directory: Path, *, patience: float = 5.0) -> Iterator[None]:
    """Holds `directory` for this run: a second run there is refused after `patience` seconds.

    Raises:
      SmoljaxError: another run is at work there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "a") as lock:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise SmoljaxError(
                        f"another curation is at work in {directory}: wait until it ends, "
                        "or choose another --workdir"
                    ) from error
                time.sleep(0.05)
        yield


def _finished(directory: Path, item: WorkItem) -> dict | None:
    folder = directory / item.name
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if manifest.get("key") != item.key:
        return None
    for name, file in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            return None
    return manifest


def _remove_strangers(directory: Path, names: set[str]) -> None:
    for path in directory.iterdir():
        if path.is_dir() and path.name not in names:
            shutil.rmtree(path, ignore_errors=True)


def _in_process(
    items: list[WorkItem], directory: Path, workers: int
) -> Iterator[tuple[WorkItem, dict]]:
    for item in items:
        yield item, run_item(item, directory)


def _in_pool(
    items: list[WorkItem], directory: Path, workers: int
) -> Iterator[tuple[WorkItem, dict]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["smoljax.curation.pipeline"])
    pool = {}
    for _ in range(workers):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, directory), daemon=True)
        process.start()
        theirs.close()
        pool[ours] = process
    waiting = deque(
        sorted(items, key=lambda item: -item.size)
    )  # Largest first: none is left over at the end.
    current: dict = {}
    try:
        for pipe in pool:
            current[pipe] = waiting.popleft()
            pipe.send(current[pipe])
        while current:
            for pipe in connection.wait(list(current)):
                item = current.pop(pipe)
                try:
                    error, manifest = pipe.recv()
                except (EOFError, ConnectionResetError):
                    pool[pipe].join()
                    _remove_temporaries(directory, item)
                    raise SmoljaxError(_death(item, pool[pipe].exitcode)) from None
                if error is not None:
                    raise error
                if waiting:
                    current[pipe] = waiting.popleft()
                    pipe.send(current[pipe])
                yield item, manifest
    finally:
        for pipe, process in pool.items():
            if pipe in current:
                process.terminate()
            pipe.close()
        for process in pool.values():
            process.join()
        for item in current.values():
            _remove_temporaries(directory, item)


def _serve(pipe: connection.Connection, directory: Path) -> None:
    """A worker: takes items from the pipe until it closes. Ends at once when the run that started it is gone."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent decides.
    incoming: deque = deque()
    arrived = threading.Semaphore(0)

    def listen() -> None:
        # Reading here, and not between items, notices at any time that the parent was killed.
        while True:
            try:
                incoming.append(pipe.recv())
            except (EOFError, OSError):
                os._exit(0)
            arrived.release()

    threading.Thread(target=listen, daemon=True).start()
    import pyarrow as pa

    pa.set_cpu_count(1)
    while True:
        arrived.acquire()
        try:
            answer = None, run_item(incoming.popleft(), directory)
        except Exception as error:
            answer = _portable(error), None
        try:
            pipe.send(answer)
        except OSError:
            return


def _portable(error: Exception) -> Exception:
    """SmoljaxErrors as they are; others with their traceback as text, since a traceback does not travel."""
    if isinstance(error, SmoljaxError):
        return SmoljaxError(str(error))
    import traceback

    return RuntimeError("in a worker:\n" + "".join(traceback.format_exception(error)))


def _death(item: WorkItem, exit_code: int | None) -> str:
    cause = f"exit code {exit_code}"
    if exit_code is not None and exit_code < 0:
        cause = f"signal {signal.Signals(-exit_code).name}"
    return (
        f"a worker died ({cause}) while it read {item.label}: SIGKILL mostly means that the memory was full "
        "(lower workers or config.curation.shard_bytes); what was finished is kept, so the same command goes on"
    )


def _remove_temporaries(directory: Path, item: WorkItem) -> None:
    for path in directory.glob(f".{item.name}.*"):
        shutil.rmtree(path, ignore_errors=True)


def _file_hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

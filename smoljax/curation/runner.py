"""Runs work items: in this process, on a pool of processes, or on Apache Beam. The results do not differ."""

import contextlib
import ctypes
import fcntl
import functools
import gc
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from pathlib import Path

from smoljax.curation import storage
from smoljax.curation.items import WorkItem, finished, run_item
from smoljax.errors import SmoljaxError
from smoljax.progress import Progress

_MB = 10**6
# glibc has functions for its heap; other systems do without. The numbers are those of its malloc.h.
_LIBC = ctypes.CDLL(None)
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8


def run(
    items: Sequence[WorkItem],
    directory: Path | str,
    *,
    workers: int,
    stage: str,
    beam_options: Sequence[str] | None = None,
) -> list[dict]:
    """Runs the items that are not finished and returns every item's manifest, in the order of `items`.

    `directory/<name>/` then holds what the item wrote and its manifest.json: {"key", "result", "files"}. Folders
    of other names, from an earlier configuration, are removed.

    Args:
      items: with distinct names.
      directory: belongs to this stage alone; local, or a URL that every worker can write to.
      workers: processes; 1 works in this process.
      stage: for the progress line.
      beam_options: run on Apache Beam with these options instead of processes of this machine.

    Raises:
      SmoljaxError: an item failed, or a worker died; what other items finished stays.
      KeyboardInterrupt: on Ctrl-C, after the workers have stopped.
    """
    directory = str(directory)
    storage.make_folder(directory)
    storage.remove_others(directory, {item.name for item in items})
    manifests = {item.name: finished(item, directory) for item in items}
    todo = [item for item in items if manifests[item.name] is None]
    total = sum(item.size for item in items)
    done = total - sum(item.size for item in todo)
    progress = Progress(stage, total // _MB or None, unit="MB")
    progress.start_at(done // _MB)
    with contextlib.closing(_finishing(todo, directory, workers, beam_options)) as results:
        for item, manifest in results:
            manifests[item.name] = manifest
            done += item.size
            progress.update(done // _MB)
    if todo:
        progress.close()
    return [manifests[item.name] for item in items]


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


def _finishing(
    todo: list[WorkItem], directory: str, workers: int, beam_options: Sequence[str] | None
) -> Iterator[tuple[WorkItem, dict]]:
    workers = min(workers, len(todo))
    if todo and beam_options is not None:
        from smoljax.curation import beam

        yield from beam.run(todo, directory, beam_options)
    elif workers > 1:
        yield from _in_pool(todo, Path(directory), workers)
    else:
        with _frugal() as release:
            for item in todo:
                yield item, run_item(item, directory)
                release()


def _in_pool(
    items: list[WorkItem], directory: Path, workers: int
) -> Iterator[tuple[WorkItem, dict]]:
    context = multiprocessing.get_context("forkserver")
    # Loaded once, and shared by all workers.
    context.set_forkserver_preload(["smoljax.curation.steps"])
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
    gc.freeze()  # The collector writes to all it looks at, and what was loaded before would be shared no more.
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
    with _frugal() as release:
        while True:
            arrived.acquire()
            try:
                answer = None, run_item(incoming.popleft(), str(directory))
            except Exception as error:
                answer = _portable(error), None
            release()
            try:
                pipe.send(answer)
            except OSError:
                return


@contextlib.contextmanager
def _frugal() -> Iterator[Callable[[], object]]:
    """Arrow on one core, and with the C library's memory: its own pool keeps what it has freed, 100 MB of it.

    Yields a function that gives freed memory back to the system.
    """
    import pyarrow as pa

    cores, pool = pa.cpu_count(), pa.default_memory_pool()
    pa.set_cpu_count(1)
    pa.set_memory_pool(pa.system_memory_pool())
    if hasattr(
        _LIBC, "mallopt"
    ):  # New threads share one heap, and large blocks go back to the system.
        _LIBC.mallopt(_M_ARENA_MAX, 1)
        _LIBC.mallopt(_M_MMAP_THRESHOLD, 1 << 17)
    try:
        yield functools.partial(getattr(_LIBC, "malloc_trim", int), 0)
    finally:
        pa.set_cpu_count(cores)
        pa.set_memory_pool(pool)


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

"""Metrics of a run: a JSONL file that a resumed run continues without a seam, and TensorBoard events."""

import json
import os
import queue
import threading
from pathlib import Path

from smoljax import files

JSONL = "metrics.jsonl"


class MetricsWriter:
    """Writes scalars to `directory/metrics.jsonl` at once, and to TensorBoard through clu in a thread, once that is asked for.

    clu brings TensorFlow, whose import takes seconds of the interpreter: `start_events` is called when the first step is done.

    Args:
      directory: the run's folder.
      resume_step: lines of later steps, left by a run that died after its last checkpoint, are
        removed, so that the file reads like that of an unbroken run.
    """

    def __init__(self, directory: Path, *, resume_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / JSONL
        kept = [row for row in read_metrics(directory) if row["step"] <= resume_step]
        files.atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._error: Exception | None = None
        self._thread = threading.Thread(
            target=self._write_events, args=(directory,), name="tensorboard", daemon=True
        )

    def start_events(self) -> None:
        """Begins to write TensorBoard events, those of rows already written too."""
        if self._thread.ident is None:
            self._thread.start()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes one row; `step` counts finished updates."""
        with files.explain_full_disk(self._file.name):
            self._file.write(json.dumps({"step": step, **scalars}) + "\n")
            self._file.flush()
        self._queue.put((step, scalars))

    def close(self) -> None:
        """Flushes both; raises what went wrong while writing TensorBoard events."""
        with files.explain_full_disk(self._file.name):
            os.fsync(self._file.fileno())
            self._file.close()
        self._queue.put(None)
        self.start_events()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _write_events(self, directory: Path) -> None:
        try:
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
            from clu import metric_writers

            writer = metric_writers.SummaryWriter(str(directory))
            while (item := self._queue.get()) is not None:
                writer.write_scalars(*item)
            writer.close()
        except Exception as error:  # Kept for the main thread, which raises it in close().
            self._error = error


def read_metrics(directory: Path | str) -> list[dict]:
    """All rows of a run's metrics file; a last line that was cut off by a kill is left out."""
    path = Path(directory) / JSONL
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]

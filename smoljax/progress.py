"""One progress line for long work: refreshed in place on a terminal, a plain line now and then in a log."""

import sys
import time
from typing import TextIO


class Progress:
    """Reports `done` of `total` with rate and time left.

    Args:
      name: what is being done ("extract").
      total: number of units, or None when unknown.
      unit: name of a unit, plural ("pages").
      stream: where to write; stderr by default.
      log_seconds: least time between two lines when the stream is not a terminal.
    """

    def __init__(
        self,
        name: str,
        total: int | None,
        *,
        unit: str,
        stream: TextIO | None = None,
        log_seconds: float = 10.0,
    ):
        self._name, self._total, self._unit = name, total, unit
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._interval = 0.2 if self._terminal else log_seconds
        self._start = self._last = time.monotonic()
        self._done = self._first = 0
        self._detail = ""

    def start_at(self, done: int) -> None:
        """Counts `done` units as finished before this run, so that they do not enter the rate."""
        self._done = self._first = done

    def update(self, done: int, detail: str = "") -> None:
        """Sets the number of finished units; writes only when enough time has passed."""
        self._done, self._detail = done, detail
        now = time.monotonic()
        if now - self._last >= self._interval:
            self._last = now
            self._write(self.line(), last=False)

    def close(self) -> None:
        """Writes the last line, with the time taken."""
        seconds = time.monotonic() - self._start
        detail = f"  {self._detail}" if self._detail else ""
        self._write(
            f"{self._name}: {self._done:,} {self._unit} in {duration(seconds)}{detail}", last=True
        )

    def line(self) -> str:
        """The current line as text."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = (self._done - self._first) / seconds
        text = f"{self._name}: {self._done:,}"
        if self._total:
            text += f"/{self._total:,} {self._unit} ({100 * self._done / self._total:.0f}%)"
        else:
            text += f" {self._unit}"
        text += f"  {rate:,.1f} {self._unit}/s"
        if self._total and rate > 0:
            text += f"  {duration((self._total - self._done) / rate)} left"
        return text + (f"  {self._detail}" if self._detail else "")

    def _write(self, text: str, *, last: bool) -> None:
        if self._terminal:
            self._stream.write("\r\x1b[2K" + text + ("\n" if last else ""))
        else:
            self._stream.write(text + "\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """Seconds as "42s", "3m05s" or "2h07m"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"

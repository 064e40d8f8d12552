"""The progress line: rate and time left, in place on a terminal, plain in a log."""

import io

from smoljax.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_plain_lines():
    stream = io.StringIO()
    progress = Progress("extract", 200, unit="pages", stream=stream, log_seconds=0.0)
    progress.update(50)
    progress.close()
    first, last, end = stream.getvalue().split("\n")
    assert first.startswith("extract: 50/200 pages (25%)  ")
    assert first.endswith(" left")
    assert last.startswith("extract: 50 pages in ")
    assert end == ""
    assert "\r" not in stream.getvalue()


def test_a_terminal_is_refreshed_in_place():
    stream = Terminal()
    progress = Progress("train", None, unit="steps", stream=stream)
    progress.update(1)
    assert stream.getvalue() == ""  # Too soon to write again.
    progress.close()
    assert stream.getvalue().startswith("\r\x1b[2Ktrain: 1 steps in ")


def test_what_was_done_before_does_not_enter_the_rate():
    progress = Progress("train", 100, unit="steps", stream=io.StringIO())
    progress.start_at(90)
    assert "0.0 steps/s" in progress.line()


def test_durations():
    assert [duration(seconds) for seconds in (42, 185, 7620)] == ["42s", "3m05s", "2h07m"]

"""Raw bytes to text, by media type: HTML main content, PDF pages, and UTF-8 text and code as they are."""

import functools
import signal
import threading
from collections.abc import Callable
from types import FrameType

import pyarrow as pa

from smoljax.curation import pdf, schema
from smoljax.curation.html import main_content, trafilatura_text
from smoljax.curation.html.bounds import DamagedPage
from smoljax.errors import SmoljaxError

_CODE = frozenset({"text/javascript", "application/sql"})


class _Damaged(ValueError):
    """Text that cannot be read; the message is the rule under which the document is removed."""


class Extractor:
    """The stage "extract": RAW batch to (DOCUMENT batch, REMOVED batch). One for each shard.

    Reasons: extract:no_text, extract:invalid_utf8, extract:unreadable_pdf, extract:encrypted_pdf, and of pages
    extract:unreadable_html, extract:unknown_encoding, extract:too_many_tags, extract:too_deep and
    extract:unclosed_formatting. Text of a removed document is what could be decoded, with U+FFFD for the rest.

    The verdict never depends on the time that a document takes. When one takes longer than `max_seconds`, the run
    ends with an error that names it (in threads other than a process's first there is no such end).

    Args:
      html: how the main content of a page is found.
        "resiliparse"  fast; a page is a pure function of its bytes.
        "trafilatura"  as FineWeb, but each page on its own; a page is a pure function of its bytes.
        "fineweb"      text for text what datatrove 0.10 makes of the pages of a shard: each depends on those before
                       it in the shard.
      max_tags: pages in which "<" stands more often are removed. By default 500,000 for resiliparse, which takes
        time in proportion, and 50,000 for trafilatura, which takes up to its square: 5 seconds for 16,000.
      max_seconds: for one document.
    """

    def __init__(
        self, *, html: str = "resiliparse", max_tags: int | None = None, max_seconds: float = 600.0
    ):
        if html not in _HTML:
            raise SmoljaxError(f"extract.html is {html!r}: there are {', '.join(_HTML)}")
        make, default = _HTML[html]
        self._html_text = functools.partial(
            make(), max_tags=default if max_tags is None else max_tags
        )
        self._max_seconds = max_seconds

    def __call__(self, raw: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch]:
        texts, reasons = [], []
        with _Alarm(self._max_seconds) as alarm:
            for source, path, media_type, content in zip(
                *(
                    raw.column(name).to_pylist()
                    for name in ("source", "path", "media_type", "content")
                )
            ):
                alarm.set(f"source {source!r}: {path}")
                text, reason = self._document(content, media_type)
                texts.append(text)
                reasons.append(reason and f"extract:{reason}")
        return schema.part(schema.documents(raw, texts), reasons)

    def _document(self, content: bytes, media_type: str) -> tuple[str, str | None]:
        try:
            text = self._text(content, media_type)
        except (DamagedPage, pdf.DamagedPdf, _Damaged) as error:
            return "" if media_type == "application/pdf" else content.decode(
                "utf-8", "replace"
            ), str(error)
        return text, None if text.strip() else "no_text"

    def _text(self, content: bytes, media_type: str) -> str:
        if media_type == "text/html":
            return self._html_text(content)
        if media_type == "application/pdf":
            return pdf.text(content)
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _Damaged("invalid_utf8") from error
        return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")


def is_code(media_type: str) -> bool:
    """Whether documents of this media type are program text, which has no human language."""
    return (media_type.startswith("text/x-") and media_type != "text/x-rst") or media_type in _CODE


# name -> (makes the function for one shard, its max_tags)
_HTML: dict[str, tuple[Callable[[], Callable[..., str]], int]] = {
    "resiliparse": (lambda: main_content.text, 500_000),
    "trafilatura": (lambda: trafilatura_text.text, 50_000),
    "fineweb": (lambda: trafilatura_text.InOrder().text, 50_000),
}


class _Expired(BaseException):
    """Not an Exception: libraries that swallow those must not swallow it."""


class _Alarm:
    """Ends the extraction of a document that takes longer than `seconds` by an error that names it."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._document = ""
        self._works = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "_Alarm":
        if self._works:
            self._previous = signal.signal(signal.SIGALRM, self._ring)
        return self

    def set(self, document: str) -> None:
        """Begins the time of the next document."""
        self._document = document
        if self._works:
            signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if self._works:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._previous)
        if isinstance(error, _Expired):
            raise SmoljaxError(
                f"{self._document} was not extracted after {self._seconds:g} seconds. No document is removed for "
                "the time it takes, which would differ by machine: exclude it in its source, lower extract.max_tags "
                "so that it is removed by its size, or raise extract.max_seconds"
            ) from None

    def _ring(self, _: int, __: FrameType | None) -> None:
        raise _Expired

"""PDF bytes to text in reading order: pages, running heads, wrapped lines and broken words put together."""

import re
import statistics
from collections import Counter

# PDFium writes U+0002 where a line ends in a hyphen that breaks a word, and U+FFFE for one it could not place.
_BROKEN_WORD = re.compile(r"[\x02\ufffe]\s*(?=[^\W\d_])(?![A-Z])")
_KEPT_HYPHEN = re.compile(
    r"[\x02\ufffe]\s*"
)  # Before a capital or a digit the hyphen is the word's own.
_HYPHEN_END = re.compile(r"(?<=[a-z])[-\u00ad]$")
_UNWANTED = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f\ufffe\uffff\ue000-\uf8ff]")
_ITEM = re.compile(r"(?:[•▪◦‣·*–—-]|\(?\d{1,3}[.)]|\(?[a-z][.)])\s")
_SENTENCE_END = re.compile(r"[.!?:;][\"'”’)\]]*$")
# A running head or foot must stand on this many pages, and on this share of them, before it is taken out.
_RUNNING_PAGES, _RUNNING_SHARE = 3, 0.25


class DamagedPdf(ValueError):
    """A PDF that gives no text; the message is the rule under which it is removed."""


def text(content: bytes) -> str:
    """The text of a PDF.

    Lines are taken in PDFium's order. Lines of one paragraph are joined, words broken at a line or page end
    are made whole, and lines that run along the top or bottom of many pages (numbers aside) are dropped.

    Raises:
      DamagedPdf: "unreadable_pdf", "encrypted_pdf" (it wants a password) or "no_text" (a scan, or empty pages).
    """
    pages = _without_running_lines([_lines(page) for page in _pages(content)])
    paragraphs: list[str] = []
    full = False
    for lines in pages:
        if not lines:
            continue
        width = _full_width(lines)
        for line in lines:
            if paragraphs and _continues(paragraphs[-1], line, full):
                paragraphs[-1] = _join(paragraphs[-1], line)
            else:
                paragraphs.append(line)
            full = len(line) >= width
    joined = "\n".join(paragraphs)
    if not joined.strip():
        raise DamagedPdf("no_text")
    return joined + "\n"


def _pages(content: bytes) -> list[str]:
    import pypdfium2  # Here, for pages and texts do without its 4 MB.

    try:
        document = pypdfium2.PdfDocument(content)
    except pypdfium2.PdfiumError as error:
        kind = "encrypted_pdf" if "password" in str(error).lower() else "unreadable_pdf"
        raise DamagedPdf(kind) from error
    pages = []
    try:
        for index in range(len(document)):
            try:
                page = document[index]
                text_page = page.get_textpage()
            except pypdfium2.PdfiumError:
                continue  # One broken page does not take the others with it.
            pages.append(text_page.get_text_bounded())
            text_page.close()
            page.close()
    finally:
        document.close()
    if not pages:
        raise DamagedPdf("unreadable_pdf")
    return pages


def _lines(page: str) -> list[str]:
    page = _KEPT_HYPHEN.sub("-", _BROKEN_WORD.sub("", page.replace("\r\n", "\n")))
    lines = (" ".join(_UNWANTED.sub("", line).split()) for line in page.split("\n"))
    return [line for line in lines if line]


def _without_running_lines(pages: list[list[str]]) -> list[list[str]]:
    for end in (0, -1):
        for fewest in (
            2,
            8,
            8,
        ):  # Up to three lines, the second and third only from a page that has many.
            edges = Counter(_shape(lines[end]) for lines in pages if lines)
            needed = max(_RUNNING_PAGES, _RUNNING_SHARE * len(pages))
            running = {shape for shape, count in edges.items() if count >= needed}
            if not running:
                break
            for lines in pages:
                if len(lines) >= fewest and _shape(lines[end]) in running:
                    lines.pop(end)
    return pages


def _shape(line: str) -> str:
    return re.sub(r"\d+", "0", line.replace(" ", ""))


def _full_width(lines: list[str]) -> float:
    """Characters from which a line counts as full, so that the next one may continue it."""
    lengths = sorted(map(len, lines))
    return max(30.0, 0.75 * statistics.median(lengths[len(lengths) // 2 :]))


def _continues(paragraph: str, line: str, full: bool) -> bool:
    """Whether `line` goes on with a paragraph whose last line was `full` (as wide as lines get), or not."""
    if _ITEM.match(line) or _SENTENCE_END.search(paragraph):
        return full and line[0].islower()
    return full or line[0].islower()


def _join(paragraph: str, line: str) -> str:
    if _HYPHEN_END.search(paragraph) and line[0].islower():
        return paragraph[:-1] + line
    return f"{paragraph} {line}"

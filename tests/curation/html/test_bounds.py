"""Bounds on pages: what breaks one, and what is just inside."""

import pytest

from smoljax.curation.html import bounds, main_content
from smoljax.curation.html.bounds import DamagedPage

SENTENCE = "The keeper of the lighthouse walked along the harbour and looked for the ship.\n"


def nested(depth: int) -> bytes:
    return b"<body>" + b"<div>" * depth + SENTENCE.encode() + b"</div>" * depth + b"</body>"


def unclosed(count: int, *, closed: int = 0) -> bytes:
    """A thousand paragraphs, in which <font>s are opened, and some of them closed."""
    fonts = [f"<font size={i}>" + "</FONT>" * (i < closed) for i in range(count)]
    paragraphs = "".join(f"<p>x{font}" for font in fonts)
    return f"<body>{paragraphs}{'<p>y' * (1000 - count)}".encode()


def text(page: bytes, max_tags: int = 100_000) -> str:
    return main_content.text(page, max_tags=max_tags)


def test_tags_are_counted():
    page = f"<p>{SENTENCE}</p>".encode() * 50
    assert text(page, 100).startswith(SENTENCE.strip())
    with pytest.raises(DamagedPage, match="too_many_tags"):
        text(page, 99)


def test_depth_is_that_of_the_tree():
    assert text(nested(500)) == SENTENCE
    with pytest.raises(DamagedPage, match="too_deep"):
        text(nested(600))
    flat = b"<body>" + b"<br>" * 5000 + SENTENCE.encode() + b"<p>" * 5000  # Tags that need no end.
    assert SENTENCE.strip() in text(flat)


def test_formatting_that_is_never_closed():
    for page in (unclosed(1000, closed=900), unclosed(100)):
        bounds.check_formatting(page, bounds.nested_tags(page))
    for page in (unclosed(1000), unclosed(1000, closed=100)):
        with pytest.raises(DamagedPage, match="unclosed_formatting"):
            text(page)


@pytest.mark.parametrize("page", [b"", b"<", b"</", b"a<", b"\xff\xfe<\0", b"<p", b"<!--"])
def test_scraps_of_pages_break_no_bound(page):
    assert "\0" not in text(page)

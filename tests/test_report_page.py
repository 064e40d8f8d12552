"""The elements of the report: what is text stays text, and the page parses as the HTML that was meant."""

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoljax import report_page as page

VOID = {"meta", "br", "img", "hr", "input", "link"}


class Parsed(HTMLParser):
    """Tags, attributes and text of a page; refuses a tag that is closed in the wrong order."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.texts, self._open = [], [], [], []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</pre></body>",
    "<!-- ",
    "&lt;b&gt;",
    "</style><script>",
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(
    "element",
    [
        lambda text: page.paragraph(text),
        lambda text: page.preformatted(text),
        lambda text: page.table([text, "n"], [[text, 1]]),
        lambda text: page.cards([(text, text)]),
        lambda text: page.bars([(text, 1.0, "--model")]),
        lambda text: page.folded(text, text, text),
        lambda text: page.section("here", text, text),
        lambda text: page.figure("<svg></svg>", text),
        lambda text: page.Html(page.page(text, page.text(text))),
    ],
)
def test_every_element_escapes_what_it_is_given(element, text):
    expected, found = Parsed(element("harmless")), Parsed(element(text))
    assert found.tags == expected.tags
    assert text in "".join(found.texts)


def test_html_is_what_is_not_escaped():
    """The control of the test above: the wrong type lets a tag through."""
    assert "script" in Parsed(page.paragraph(page.Html(HOSTILE[0]))).tags


@given(st.text())
def test_any_text_comes_back_but_for_control_and_direction_characters(text):
    found = "".join(Parsed(page.preformatted(text)).texts)
    assert len(found) == len(text.replace("\r\n", "\n"))
    for before, after in zip(text.replace("\r\n", "\n").replace("\r", "\n"), found):
        assert after in (before, "\ufffd")


def test_control_and_direction_characters_are_replaced():
    assert page.text("a\x00b\x1b[31m\u202ec\u2066\x85d\te\r\nf") == "a�b�[31m�c��d\te\nf"


def test_cut_says_how_much_is_missing():
    assert page.cut("12345", 5) == "12345"
    assert page.cut("1234 6789", 5) == "1234 … (4 more characters)"
    assert page.cut("x" * 5000, 10).endswith("(4,990 more characters)")


def test_numbers_are_set_right_and_grouped():
    table = page.table(
        ["name", "count", "share", "time"], [["a", 1234, 0.5, page.Number("2.1")]], total=True
    )
    cells = [(value, name) for tag, name, value in Parsed(table).attributes if tag == "td"]
    assert cells == [("number", "class")] * 3
    assert "1,234" in table
    assert "0.500" in table
    assert "2.1<" in table


def test_bars_are_to_scale():
    found = page.bars([("short", 1.0, "--model"), ("long", 4.0, "--xz")])
    widths = [
        value for tag, name, value in Parsed(found).attributes if (tag, name) == ("i", "style")
    ]
    assert [float(width.split("width: ")[1].split("%")[0]) for width in widths] == [21.0, 84.0]


def test_the_page_forbids_scripts_and_requests():
    source = page.page("title", page.paragraph("text"))
    policies = [value for _, name, value in Parsed(source).attributes if name == "content"]
    assert policies[0] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert source.startswith("<!doctype html>")

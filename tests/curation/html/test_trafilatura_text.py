"""Main content by trafilatura: datatrove's text on real pages in their order, and no memory where none is wanted."""

import threading

import pytest

pytest.importorskip("datatrove", reason="the oracle of the tests is not installed")

from datatrove.data import Document
from datatrove.pipeline.extractors import Trafilatura

from smoljax.curation.html import trafilatura_text
from smoljax.curation.html.bounds import DamagedPage
from tests.curation import corpora, material

MAX_TAGS = 50_000


def in_order(pages: list[bytes]) -> list[str]:
    extractor = trafilatura_text.InOrder()
    return [extractor.text(page, max_tags=MAX_TAGS) for page in pages]


def alone(pages: list[bytes]) -> list[str]:
    return [trafilatura_text.text(page, max_tags=MAX_TAGS) for page in pages]


def datatrove(pages: list[str]) -> list[str]:
    """What datatrove's extractor makes of pages in one process, "" for those that it drops."""
    found = dict.fromkeys(range(len(pages)), "")
    documents = [Document(text=page, id=str(i)) for i, page in enumerate(pages)]
    for document in Trafilatura(favour_precision=True, timeout=300).run(documents):
        found[int(document.id)] = document.text
    return list(found.values())


@pytest.fixture(scope="module")
def pages() -> list[bytes]:
    """Pages of news and of manuals that are quick to extract, and six of these three times more."""
    manuals = [page for _, page in corpora.pages("en", 260) if page.count(b"<") < 800]
    return [page for _, page in corpora.pages("web", 29)] + manuals[:90] + manuals[:6] * 3


@pytest.mark.network
def test_text_is_datatroves_on_pages_in_their_order(pages):
    decoded = [trafilatura_text.characters.guessed(page) for page in pages]
    expected = datatrove(decoded)
    assert in_order(pages) == expected
    assert sum(map(bool, expected)) > 100
    # The memory shows: pages that come for the fourth time lose passages, in datatrove's text and in ours.
    assert expected[-6:] != expected[29:35]


@pytest.mark.network
def test_a_page_alone_gives_the_same_text_whatever_came_before(pages):
    some = pages[20:50]
    first = alone(some)
    in_order(pages[:20])
    assert alone(some[::-1])[::-1] == first
    assert alone([some[0]] * 5) == [first[0]] * 5
    repeated = in_order([some[0]] * 5)
    assert repeated[0] == first[0]
    assert len(set(repeated)) > 1


def test_shards_do_not_see_each_other():
    pages = [material.page(number % 2).encode() for number in range(8)]
    expected = in_order(pages)
    assert len(set(expected)) > 2
    first, second = trafilatura_text.InOrder(), trafilatura_text.InOrder()
    found = [(first.text(p, max_tags=99), second.text(p, max_tags=99)) for p in pages]
    assert found == [(text, text) for text in expected]
    results = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: in_order(pages)})) for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(results.values()) == [expected] * 3


def test_pages_without_text_and_pages_beyond_the_bound():
    assert alone([b"", b"no page", b"<html><body><script>x</script></body></html>"]) == [""] * 3
    with pytest.raises(DamagedPage, match="too_many_tags"):
        alone([b"<p>" * (MAX_TAGS + 1)])
    assert trafilatura_text.text(b"<html><body>" + b"<div>x" * 9000, max_tags=MAX_TAGS)


def test_a_failing_page_is_named_and_a_failing_machine_is_not_hidden(monkeypatch):
    for error in (RecursionError, AttributeError):
        monkeypatch.setattr("trafilatura.extract", raising(error))
        with pytest.raises(DamagedPage, match="unreadable_html"):
            alone([b"<p>x"])
    monkeypatch.setattr("trafilatura.extract", raising(MemoryError))
    with pytest.raises(MemoryError):
        alone([b"<p>x"])


def raising(error: type[Exception]):
    def extract(*_, **__):
        raise error

    return extract

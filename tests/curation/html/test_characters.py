"""The characters of a page, as datatrove's reader finds them and as the page declares them."""

import pytest

from smoljax.curation.html import characters
from smoljax.curation.html.bounds import DamagedPage

GERMAN = "Die Größe der Öfen überrascht, und die Wärme in den Häusern auch. " * 5


def test_utf_8_is_tried_first():
    page = "\ufeff<meta charset=iso-8859-1>ß"
    assert characters.guessed(page.encode()) == page
    assert characters.declared(page.encode()) == page[1:]


def test_what_the_page_declares_counts_for_one_and_not_for_the_other():
    page = f"<meta charset=iso-8859-7><p>{GERMAN}".encode("latin-1")
    assert GERMAN in characters.guessed(page)
    assert GERMAN not in characters.declared(page)
    page = f"<meta charset=cp1250><p>{'Łódź, ' * 20}".encode("cp1250")
    assert "Łódź" in characters.declared(page)


def test_bytes_of_no_encoding():
    page = bytes(range(128, 256)) * 3
    with pytest.raises(DamagedPage, match="unknown_encoding"):
        characters.guessed(page)

"""Main content by resiliparse, on pages written here, whose text is known."""

import functools

from smoljax.curation.html import main_content
from tests.curation import material

text = functools.partial(main_content.text, max_tags=500_000)


def test_html_keeps_the_content_and_drops_the_frame():
    found = text(material.page(7).encode())
    assert found.startswith("Report 7\n")
    for line in material.prose(7).splitlines():
        assert line.strip() in found
    for debris in ("Home menu", "Imprint", "<"):
        assert debris not in found


def test_html_code_blocks_keep_their_lines():
    page = b"<main><p>Before the code that follows here.</p><pre>if x:\n    return 1\n</pre></main>"
    assert "if x:\n    return 1" in text(page)


def test_html_whose_class_names_look_like_debris_is_read_by_its_landmark():
    inside = "".join(f"<p>{material.prose(i)}</p>" for i in range(5))
    page = f"<body><div role=main class='related sidebar'>{inside}</div></body>"
    assert material.prose(3).split("\n")[0].strip() in text(page.encode())


def test_html_repeated_captions_become_one():
    captions = "<div>Storm over the harbour</div>" * 14
    page = f"<main>{captions}<p>{material.prose(1)}</p></main>"
    assert text(page.encode()).count("Storm over the harbour") == 1


def test_html_in_another_encoding():
    page = "<meta charset=iso-8859-1><main><p>Die Größe der Öfen überrascht.</p></main>"
    assert "Die Größe der Öfen überrascht." in text(page.encode("iso-8859-1"))

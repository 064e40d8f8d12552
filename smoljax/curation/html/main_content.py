"""Main content by resiliparse: fast, with what menus, forms and themes leave behind taken out."""

import itertools

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLParserException, HTMLTree

from smoljax.curation.html import bounds, characters

# What themes put into the page beside its content and main-content extraction leaves in. (Scripts and fields of
# forms it leaves out by itself, and "nav" where it looks for the main content.)
_SKIPPED = [
    "form",
    "[role=navigation], [role=search], [aria-hidden=true]",
    "a.headerlink, .toctree-wrapper, .sphinxsidebar, .viewcode-back",
]
_SKIPPED_OF_ALL = [*_SKIPPED, "nav"]
# Where a page itself says what its main content is.
_LANDMARKS = "main, [role=main], article"
# Below this share of the landmark's text, the heuristics have thrown the content away with the frame.
_LEAST_SHARE = 0.25


def text(content: bytes, *, max_tags: int) -> str:
    """Main content of an HTML page, with paragraphs, lists and code blocks on their own lines.

    Raises:
      DamagedPage: "unreadable_html", when no parser can make sense of the bytes, or a bound that the page breaks.
    """
    bounds.check_tags(content, max_tags)
    nested = bounds.nested_tags(content)
    bounds.check_formatting(content, nested)
    page = characters.declared(content)
    try:
        tree = HTMLTree.parse(page)
        bounds.check_depth(tree, nested)
        text = _plain(tree, main_content=True)
        # No landmark has more text than the page has characters.
        is_short = len(text) < _LEAST_SHARE * len(page)
        landmark = is_short and tree.body and tree.body.query_selector(_LANDMARKS)
        if landmark and len(text) < _LEAST_SHARE * len(landmark.text):
            declared = _plain(HTMLTree.parse(landmark.html), main_content=False)
            if len(text) < _LEAST_SHARE * len(declared):
                text = declared
    except HTMLParserException as error:
        raise bounds.DamagedPage("unreadable_html") from error
    lines = [line.rstrip() for line in text.replace("¶", "").split("\n")]
    text = _without_repeats(lines)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    text = text.strip("\n")
    return text and text + "\n"


def _without_repeats(page: list[str]) -> str:
    """The lines as text; of a line that stands three times running or more (captions of a slide show), leaves one."""
    if not any(a and a == b == c for a, b, c in zip(page, page[1:], page[2:])):
        return "\n".join(page)
    lines = []
    for line, run in itertools.groupby(page):
        count = len(list(run))
        lines += [line] * (1 if line and count >= 3 else count)
    return "\n".join(lines)


def _plain(html: HTMLTree, *, main_content: bool) -> str:
    return extract_plain_text(
        html,
        main_content=main_content,
        preserve_formatting=True,
        alt_texts=False,
        skip_elements=_SKIPPED if main_content else _SKIPPED_OF_ALL,
    )

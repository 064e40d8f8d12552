"""Bounds that make the extraction of a page end, counted in the page, so that they fall alike on every machine."""

import re
from collections.abc import Iterator

import numpy as np
from resiliparse.parse.html import HTMLTree, traverse_dom

# Elements that the parser opens again in every block until they are closed (HTML standard, 13.2.4.3).
_FORMATTING = b"a b big code em font i nobr s small strike strong tt u".split()
# Start tags of the elements that hold nothing, and have no end tag (HTML standard, 13.1.2).
_VOID = re.compile("<(?:area|base|br|col|embed|hr|img|input|link|meta|source|track|wbr)(?=[ >])")
_BEHIND_NAMES = np.frombuffer(b"\t\n\v\f\r />", np.uint8)
_MAX_REOPENED = 1_000_000
# Chrome and Safari nest no deeper; extraction takes the square of the depth.
_MAX_DEPTH = 512
_LESS_THAN, _SLASH = b"</"


class DamagedPage(ValueError):
    """A page that gives no text; the message is the rule under which it is removed."""


def check_tags(content: bytes, max_tags: int) -> None:
    """Raises DamagedPage "too_many_tags" where "<" stands more than `max_tags` times."""
    if _count_tags(content) > max_tags:
        raise DamagedPage("too_many_tags")


def nested_tags(content: bytes) -> int:
    """Start tags less end tags, at the place where that is most; a tag that needs no end counts as open.

    Of a page with so few start tags that it cannot be too deep, their number.
    """
    characters = np.frombuffer(content, np.uint8)
    tags = characters[:-1] == _LESS_THAN
    ends = tags & (characters[1:] == _SLASH)
    count = int(np.count_nonzero(tags)) - int(np.count_nonzero(ends))
    if count <= _MAX_DEPTH:
        return count
    at = np.flatnonzero(tags)
    following = characters[at + 1]
    letters = following | 32
    starts = (letters >= ord("a")) & (letters <= ord("z"))
    steps = starts.view(np.int8) - (following == _SLASH)
    return int(steps.cumsum(dtype=np.int32).max(initial=0))


def check_formatting(content: bytes, nested: int) -> None:
    """Raises DamagedPage "unclosed_formatting" for a page that its parser would blow up.

    A thousand <font> that nobody closes, with a thousand paragraphs behind each, are a million elements: 40 kB
    of such a page took 15 seconds and 1.7 GB. `nested` is the page's `nested_tags`.
    """
    tags = _count_tags(content)
    if nested * tags <= _MAX_REOPENED:
        return
    unclosed = sum(max(0, opened - closed) for opened, closed in _formatting_tags(content))
    if unclosed * tags > _MAX_REOPENED:
        raise DamagedPage("unclosed_formatting")


def _count_tags(content: bytes) -> int:
    """How often "<" stands in a page: bytes.count takes ten times as long where it stands often."""
    return int(np.count_nonzero(np.frombuffer(content, np.uint8) == _LESS_THAN))


def _formatting_tags(content: bytes) -> Iterator[tuple[int, int]]:
    """(start tags, end tags) of each formatting element."""
    characters = np.frombuffer(content.lower() + bytes(9), np.uint8)
    behind = np.flatnonzero(characters == _LESS_THAN) + 1
    ends = characters[behind] == _SLASH
    names = behind + ends
    # The eight bytes from each name on, as one number.
    words = np.lib.stride_tricks.sliding_window_view(characters, 8)[names].view("<u8").ravel()
    for name in _FORMATTING:
        bits = np.uint64((1 << 8 * len(name)) - 1)
        at = np.flatnonzero(words & bits == int.from_bytes(name, "little"))
        at = at[np.isin(characters[names[at] + len(name)], _BEHIND_NAMES)]
        closed = int(np.count_nonzero(ends[at]))
        yield len(at) - closed, closed


def check_depth(tree: HTMLTree, nested: int) -> None:
    """Raises DamagedPage "too_deep" where more than 512 elements are nested.

    The walk over the tree takes as long as extraction; it is spared where the tags alone are not nested so deep, in
    the page or as the tree is written with all its end tags.
    """
    if nested <= _MAX_DEPTH or tree.body is None:
        return
    if nested_tags(_VOID.sub("", tree.body.html).encode()) <= _MAX_DEPTH:
        return
    depth = 0

    def enter(place) -> None:
        nonlocal depth
        depth = max(depth, place.depth)

    traverse_dom(tree.body, enter, elements_only=True)
    if depth > _MAX_DEPTH:
        raise DamagedPage("too_deep")

"""Main content by trafilatura, with the options of FineWeb: datatrove 0.10's Trafilatura(favour_precision=True).

One of these options, `deduplicate`, drops a passage that trafilatura has seen three times, and what it has seen it
remembers from page to page: the same page gives another text when it comes later. `text` begins each page
without a memory. `InOrder` keeps it, as FineWeb's extraction did.
"""

import logging
import threading
from collections.abc import Callable

from smoljax.curation.html import bounds, characters
from smoljax.errors import require

# trafilatura keeps one memory for the process; threads of a runner take turns with it.
_TURN = threading.Lock()


def text(content: bytes, *, max_tags: int) -> str:
    """Main content of a page, a pure function of its bytes.

    Raises:
      DamagedPage: "unreadable_html", when trafilatura fails on the page, or a bound that the page breaks.
    """
    return _text(content, characters.declared, max_tags, _memory())


class InOrder:
    """Main content of the pages of one shard, each with the memory of those before it, as datatrove extracts them.

    Text is equal to datatrove's where its process was not started anew, as it is behind each page that took it
    more than a second. Characters are read as datatrove's WarcReader reads them.
    """

    def __init__(self):
        self._memory = None

    def text(self, content: bytes, *, max_tags: int) -> str:
        """Main content of the next page; raises what `text` does, and DamagedPage "unknown_encoding"."""
        if self._memory is None:
            self._memory = _memory()
        return _text(content, characters.guessed, max_tags, self._memory)


def _memory() -> object:
    """What trafilatura has seen, which is nothing yet."""
    require("trafilatura", extra="data")
    from trafilatura import deduplication, settings

    return deduplication.LRUCache(maxsize=settings.LRU_SIZE)


def _text(content: bytes, decode: Callable[[bytes], str], max_tags: int, memory: object) -> str:
    from trafilatura import deduplication, extract

    bounds.check_tags(content, max_tags)
    page = decode(content)
    logging.getLogger("trafilatura").setLevel(
        logging.CRITICAL
    )  # It logs an error for a page without text.
    with _TURN:
        deduplication.LRU_TEST = memory
        try:
            found = extract(page, favor_precision=True, include_comments=False, deduplicate=True)
        except MemoryError:
            raise
        except Exception as error:  # Of any kind; datatrove drops such a page too.
            raise bounds.DamagedPage("unreadable_html") from error
    return found or ""

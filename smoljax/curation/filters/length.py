"""Documents of too few or too many characters."""

from smoljax.curation.filters.check import Checks, Filter, above, below


@Filter
def length(text: str, *, min_characters: int, max_characters: int) -> Checks:
    """Removes documents of fewer or more characters: length:too_short, length:too_long."""
    yield below("too_short", len(text), min_characters)
    yield above("too_long", len(text), max_characters)

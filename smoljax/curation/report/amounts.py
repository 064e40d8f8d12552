"""Numbers as the report writes them."""

from collections.abc import Mapping


def number(value: float | None, *, beside: float | None = None) -> str:
    """A number in as many digits as a reader needs, and as many as tell it from the number beside it."""
    if value is None:
        return "–"
    whole = f"{value:,.0f}"
    if float(value).is_integer() or (abs(value) >= 1000 and whole != f"{beside or 0:,.0f}"):
        return whole
    texts = (f"{value:.{digits}g}" for digits in range(3, 18))  # 17 digits tell any two apart.
    if beside is None or value == beside:
        return next(texts)
    return next(t for t in texts if float(t) != beside and (float(t) < beside) == (value < beside))


def share(found: Mapping) -> str:
    """A share of the sample."""
    return "–" if found["share"] is None else f"{100 * found['share']:.1f} %"


def interval(found: Mapping) -> str:
    """Of a share, in percent."""
    if found["share"] is None or found["low"] == found["high"]:
        return "–"
    return f"{100 * found['low']:.1f} to {100 * found['high']:.1f}"


def percent(part: int, whole: int) -> str:
    """A part of a whole."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def megabytes(size: int | None) -> str:
    """A number of bytes."""
    return "–" if size is None else f"{size / 1e6:,.2f} MB"


def count(value: int | None) -> str:
    """A number of tokens, in three digits."""
    if value is None:
        return "–"
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= 0.9995 * unit:
            return f"{value / unit:.3g} {name}"
    return str(value)

"""The report's drawings, as SVG that takes its colours from the page."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from smoljax.curation.report import amounts
from smoljax.report_page import Html, text

_WIDTH, _HEIGHT = 640, 216
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 24, 30
# Room that the label of a threshold takes.
_LABEL = 160
# Counts below this have ticks at 2 and 5 too.
_FEW = 50


def histogram(found: Mapping, *, bound: float, low: bool) -> Html:
    """A histogram with its threshold; counts on a logarithmic axis.

    Pale bars count all documents, full bars those that no other rule of the stage removes.

    Args:
      found: from histogram.histogram.
      bound: the threshold.
      low: whether documents are removed below it.
    """
    edges = found["edges"]
    place = _places(edges, found["scale"])
    height = _heights(max([1, *found["documents"]]))
    at = place(bound)
    parts = [_grid(height, max([1, *found["documents"]])), _removed_area(at, low)]
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        beyond = stop <= bound if low else start >= bound
        for name, css in (("documents", "all"), ("passed", "passed")):
            count = found[name][number]
            if count:
                x, y = place(start), height(count)
                parts.append(
                    f'<rect class="{"beyond" if beyond else "inside"} {css}" x="{x + 0.5:.1f}" y="{y:.1f}" '
                    f'width="{max(0.8, place(stop) - x - 1):.1f}" height="{_HEIGHT - _BOTTOM - y:.1f}"/>'
                )
    parts += [_axis(found, place, bound, low), _threshold(at, bound, low)]
    label = f"histogram with the threshold {amounts.number(bound)}"
    return Html(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{text(label)}">{"".join(parts)}</svg>'
    )


def bar(kept: int, removed: int, total: int) -> Html:
    """What goes out of a stage and what it removes, as parts of all documents."""
    first = 200 * kept / max(1, total)
    second = 200 * removed / max(1, total)
    return Html(
        '<svg class="stage" viewBox="0 0 200 12" preserveAspectRatio="none">'
        '<rect class="track" width="200" height="12"/>'
        f'<rect class="inside" width="{first:.2f}" height="12"/>'
        f'<rect class="beyond" x="{first:.2f}" width="{second:.2f}" height="12"/></svg>'
    )


def _places(edges: Sequence[float], scale: str) -> Callable[[float], float]:
    width = _WIDTH - _LEFT - _RIGHT
    if scale == "log":
        span = math.log(edges[-1] / edges[0])
        return lambda value: _LEFT + width * math.log(max(value, edges[0]) / edges[0]) / span
    return lambda value: _LEFT + width * (value - edges[0]) / (edges[-1] - edges[0])


def _heights(most: int) -> Callable[[int], float]:
    """Logarithmic, and one document still has a height."""
    room = _HEIGHT - _TOP - _BOTTOM
    return lambda count: _HEIGHT - _BOTTOM - room * math.log(2 * count) / math.log(2 * most + 1e-9)


def _grid(height: Callable[[int], float], most: int) -> str:
    steps = (1, 2, 5) if most < _FEW else (1,)
    counts = [step * 10**power for power in range(len(str(most))) for step in steps]
    lines = []
    for count in counts:
        if count <= most:
            y = height(count)
            lines.append(
                f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{count:,}</text>'
            )
    return "".join(lines)


def _removed_area(at: float, low: bool) -> str:
    start, stop = (_LEFT, at) if low else (at, _WIDTH - _RIGHT)
    return (
        f'<rect class="area" x="{start:.1f}" y="{_TOP}" width="{max(0.0, stop - start):.1f}" '
        f'height="{_HEIGHT - _TOP - _BOTTOM}"/>'
    )


def _threshold(at: float, bound: float, low: bool) -> str:
    side = "end" if low else "start"
    x = at - 6 if low else at + 6
    label = (
        f"← removed below {amounts.number(bound)}"
        if low
        else f"removed above {amounts.number(bound)} →"
    )
    if (x if low else _WIDTH - x) < _LABEL:
        side, x = ("start", at + 6) if low else ("end", at - 6)
    return (
        f'<line class="bound" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP - 16}" y2="{_HEIGHT - _BOTTOM}"/>'
        f'<text class="label" x="{x:.1f}" y="{_TOP - 7}" text-anchor="{side}">{text(label)}</text>'
    )


def _axis(found: Mapping, place: Callable[[float], float], bound: float, low: bool) -> str:
    edges = found["edges"]
    y = _HEIGHT - _BOTTOM
    parts = [f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>']
    # A bin of one whole number is named in its middle.
    single = found["scale"] == "linear" and found["whole"] and edges[1] - edges[0] == 1
    shift = (place(edges[1]) - place(edges[0])) / 2 * (1 if low else -1) if single else 0.0
    for value in _round_values(edges, found["scale"]):
        x = place(value) + shift
        if _LEFT - 1 <= x <= _WIDTH - _RIGHT + 1:
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{y + 16}" text-anchor="middle">{amounts.number(value)}</text>'
            )
    return "".join(parts + _overflow(found))


def _overflow(found: Mapping) -> list[str]:
    """Says how far the outermost bins reach, where they hold more than is drawn."""
    least, greatest, edges = found["least"], found["greatest"], found["edges"]
    y = _HEIGHT - 4
    notes = []
    if least is not None and least < edges[0]:
        notes.append(f'<text class="tick" x="{_LEFT}" y="{y}">from {amounts.number(least)}</text>')
    if greatest is not None and greatest > edges[-1]:
        notes.append(
            f'<text class="tick" x="{_WIDTH - _RIGHT}" y="{y}" text-anchor="end">up to {amounts.number(greatest)}</text>'
        )
    return notes


def _round_values(edges: Sequence[float], scale: str) -> list[float]:
    """Values for the ticks."""
    if scale == "log":
        first, last = math.floor(math.log10(edges[0])), math.ceil(math.log10(edges[-1]))
        steps = (1,) if last - first > 3 else (1, 2, 5)
        values = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    else:
        rough = (edges[-1] - edges[0]) / 7
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(n * power for n in (1, 2, 5, 10) if n * power >= rough)
        if edges[1] - edges[0] == 1:
            step = max(1.0, step)
        first, last = math.ceil(edges[0] / step - 1e-9), math.floor(edges[-1] / step + 1e-9)
        values = [n * step for n in range(first, last + 1)]
    return [value for value in values if edges[0] <= value <= edges[-1]]

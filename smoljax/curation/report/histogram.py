"""Histograms in which the threshold is an edge, so that each bin lies on one side of it."""

import math

import numpy as np

BINS = 44
# A scale is logarithmic where the largest value is so many times the typical one, or the threshold is.
_WIDE = 40.0
# Of the threshold: where a logarithmic scale begins at the latest, since it has no zero.
_LOWEST = 1e-6
# What lies outside of these quantiles is put into the outermost bins, but for the side on which documents are removed:
# that is drawn as far as documents reach, up to this part of the rest of the axis.
_CORE = (0.005, 0.995)
_BEYOND = 0.5


def histogram(values: np.ndarray, *, bound: float, low: bool, passed: np.ndarray) -> dict:
    """Counts by bin.

    A value that equals the bound is not removed: bins hold their lower edge if documents are removed below the
    bound (`low`), and their upper edge otherwise. The outermost bins hold all that lies beyond them.

    Args:
      values: f64 [N], finite.
      bound: the threshold.
      low: whether documents are removed below it.
      passed: bool [N], counted apart: documents that nothing else removes.

    Returns:
      "scale" ("linear" or "log"), "whole" (whether there are only whole numbers), "edges" (one more than bins),
      "documents" and "passed" (counts by bin), "least" and "greatest" (values, None without any).
    """
    whole = float(bound).is_integer() and bool((values == np.round(values)).all())
    scale, edges = _edges(values, bound, low=low, least_width=1.0 if whole else 0.0)
    bins = np.searchsorted(edges[1:-1], values, side="right" if low else "left")
    return {
        "scale": scale,
        "whole": whole,
        "edges": edges.tolist(),
        "documents": np.bincount(bins, minlength=len(edges) - 1).tolist(),
        "passed": np.bincount(bins[passed], minlength=len(edges) - 1).tolist(),
        "least": float(values.min()) if len(values) else None,
        "greatest": float(values.max()) if len(values) else None,
    }


def _edges(
    values: np.ndarray, bound: float, *, low: bool, least_width: float
) -> tuple[str, np.ndarray]:
    """(scale, edges) with `bound` among the inner edges."""
    if not len(values):
        values = np.array([bound])
    least, greatest = np.quantile(values, _CORE, method="inverted_cdf").tolist()
    if _is_wide(values, bound, greatest):
        floor = max(float(values[values > 0].min(initial=bound)), bound * _LOWEST)
        logs = np.log10(np.maximum(values, floor))
        ends = _ends(
            logs,
            math.log10(bound),
            math.log10(max(least, floor)),
            math.log10(max(greatest, floor)),
            low,
        )
        return "log", _logarithmic(bound, *ends)
    return "linear", _linear(bound, *_ends(values, bound, least, greatest, low), least_width)


def _ends(
    values: np.ndarray, bound: float, least: float, greatest: float, low: bool
) -> tuple[float, float]:
    """The ends of an axis."""
    least, greatest = min(least, bound), max(greatest, bound)
    if low:
        return min(least, max(float(values.min()), bound - _BEYOND * (greatest - bound))), greatest
    return least, max(greatest, min(float(values.max()), bound + _BEYOND * (bound - least)))


def _is_wide(values: np.ndarray, bound: float, greatest: float) -> bool:
    if bound < 1 or values.min() < 0 or max(bound, greatest) < 10:
        return False
    return max(bound, greatest) > _WIDE * max(1.0, min(bound, float(np.median(values))))


def _linear(bound: float, least: float, greatest: float, least_width: float) -> np.ndarray:
    width = max(least_width, _round_up((greatest - least) / BINS or abs(bound) / BINS or 1.0))
    below = max(1, math.ceil((bound - least) / width - 1e-9))
    above = max(1, math.ceil((greatest - bound) / width - 1e-9))
    return bound + width * np.arange(-below, above + 1)


def _logarithmic(bound: float, least: float, greatest: float) -> np.ndarray:
    """Edges between two powers of ten, given as exponents."""
    per_decade = next((n for n in (20, 10, 5, 2) if n * (greatest - least) <= BINS), 1)
    below = max(1, math.ceil(per_decade * (math.log10(bound) - least) - 1e-9))
    above = max(1, math.ceil(per_decade * (greatest - math.log10(bound)) - 1e-9))
    return bound * 10.0 ** (np.arange(-below, above + 1) / per_decade)


def _round_up(width: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= width * (1 - 1e-9))

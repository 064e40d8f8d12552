"""Means and intervals, against a table of Student's t."""

import math

import pytest

from smoljax.research.statistics import estimate


@pytest.mark.parametrize(("count", "t"), [(2, 12.706), (3, 4.303), (4, 3.182), (10, 2.262)])
def test_the_interval_is_students(count, t):
    values = [float(i) for i in range(count)]
    mean = sum(values) / count
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1))
    found = estimate(values)
    assert found.mean == pytest.approx(mean)
    assert found.half_width == pytest.approx(t * spread / math.sqrt(count), rel=2e-4)
    assert found.count == count


def test_one_run_has_no_interval():
    assert estimate([1.5]) == (1.5, math.inf, 1)

"""Numbers as the report writes them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoljax.curation.report import amounts


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (0.12345, "0.123"),
        (5.0, "5"),
        (100000.0, "100,000"),
        (1234.56, "1,235"),
    ],
)
def test_numbers(value, text):
    assert amounts.number(value) == text


def test_a_value_is_told_from_its_threshold():
    assert amounts.number(0.15004, beside=0.15) == "0.15004"
    assert amounts.number(0.64961, beside=0.65) == "0.6496"
    assert amounts.number(0.15, beside=0.15) == "0.15"
    assert amounts.number(1000.25, beside=1000.0) == "1000.2"
    assert amounts.number(1234.56, beside=1000.0) == "1,235"


@given(st.floats(-1e6, 1e6))
def test_neighbours_are_told_apart(value):
    above = math.nextafter(value, math.inf)
    assert float(amounts.number(above, beside=value).replace(",", "")) > value or above.is_integer()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (999, "999"),
        (1234, "1.23 k"),
        (999_960, "1 M"),
        (2_500_000_000, "2.5 B"),
    ],
)
def test_counts_of_tokens(value, text):
    assert amounts.count(value) == text


def test_shares():
    assert amounts.percent(1, 3) == "33.3 %"
    assert amounts.percent(0, 0) == "–"
    assert amounts.interval({"share": 0.1, "low": 0.0552, "high": 0.1744}) == "5.5 to 17.4"
    assert amounts.interval({"share": 0.1, "low": 0.1, "high": 0.1}) == "–"

"""Histograms of the report: every document is counted once, on its own side of the threshold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoljax.curation.report.histogram import BINS, histogram

FRACTIONS = st.floats(0, 1)
COUNTS = st.integers(0, 200_000).map(float)
SCORES = st.floats(-50, 50)


@st.composite
def cases(draw):
    kind = draw(st.sampled_from([FRACTIONS, COUNTS, SCORES]))
    bound = draw(kind)
    values = draw(st.lists(st.one_of(kind, st.just(bound)), max_size=60))
    passed = draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    return np.array(values, float), bound, draw(st.booleans()), np.array(passed, bool)


@given(cases())
def test_bins_part_the_documents_as_the_rule_does(case):
    values, bound, low, passed = case
    found = histogram(values, bound=bound, low=low, passed=passed)
    edges = np.array(found["edges"])
    assert (np.diff(edges) > 0).all()
    assert len(edges) <= 2 * BINS + 3
    at = edges.tolist().index(bound)
    assert 0 < at < len(edges) - 1
    for name, chosen in (("documents", values), ("passed", values[passed])):
        counts = found[name]
        assert len(counts) == len(edges) - 1
        below = int((chosen < bound).sum())
        if low:
            assert sum(counts[:at]) == below
        else:
            assert sum(counts[at:]) == int((chosen > bound).sum())
        assert sum(counts) == len(chosen)


def test_whole_numbers_have_bins_of_their_own():
    values = np.array([0, 0, 1, 2, 2, 2, 5], float)
    found = histogram(values, bound=2.0, low=True, passed=values > 0)
    assert found["edges"] == [0, 1, 2, 3, 4, 5]
    # The last bin holds the 5 that lies on its upper edge.
    assert found["documents"] == [2, 1, 3, 0, 1]
    assert found["passed"] == [0, 1, 3, 0, 1]


def test_counts_of_words_have_a_logarithmic_axis():
    values = np.array([10.0**n for n in range(6)])
    found = histogram(values, bound=50.0, low=True, passed=np.ones(6, bool))
    assert found["scale"] == "log"
    edges = np.array(found["edges"])
    np.testing.assert_allclose(edges[1:] / edges[:-1], edges[1] / edges[0])
    assert (found["least"], found["greatest"]) == (1.0, 1e5)


def test_far_values_do_not_stretch_the_axis():
    values = np.concatenate([np.linspace(3, 9, 1000), [90.0]])
    found = histogram(values, bound=3.5, low=True, passed=np.ones(1001, bool))
    assert found["scale"] == "linear"
    assert found["edges"][-1] < 10
    assert found["greatest"] == 90.0
    assert sum(found["documents"]) == 1001


@pytest.mark.parametrize("low", [True, False])
def test_no_documents(low):
    found = histogram(np.empty(0), bound=0.1, low=low, passed=np.empty(0, bool))
    assert sum(found["documents"]) == 0
    assert (found["least"], found["greatest"]) == (None, None)

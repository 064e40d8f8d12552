from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoljax.errors import SmoljaxError
from smoljax.input_pipeline.batch_sizes import BatchSizes
from smoljax.input_pipeline.mixture import BLOCK_SAMPLES, Schedule, apportion

WEIGHTS = st.lists(st.floats(0, 1e3), min_size=1, max_size=8).filter(lambda w: sum(w) > 1e-3)
# Table of stage 1 in the SmolLM3 recipe: what the published numbers add up to.
SMOLLM3_SUM = 1.00565


@settings(max_examples=300, deadline=None)
@given(weights=WEIGHTS, total=st.integers(0, 10**12))
def test_counts_are_whole_exact_and_never_fall(weights, total):
    shares = [Fraction(w) for w in weights]
    before, after = apportion(shares, total), apportion(shares, total + 1)
    assert sum(before) == total
    assert sum(after) == total + 1
    gained = [b - a for a, b in zip(before, after, strict=True)]
    assert sorted(gained) == [0] * (len(weights) - 1) + [1]
    assert all(count == 0 for count, w in zip(before, weights, strict=True) if w == 0)


def test_a_known_division():
    """Seats of the Sainte-Lague example with votes 53000, 24000, 23000 and 7 seats: 3, 2, 2."""
    assert apportion([Fraction(v) for v in (53_000, 24_000, 23_000)], 7) == (3, 2, 2)


def _schedule(stages, sources=("a", "b", "c"), batch_size=16, seed=0):
    return Schedule(sources, stages, BatchSizes(batch_size), seed)


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, block=st.integers(0, 10**9))
def test_a_block_gives_what_the_cumulative_counts_say(weights, block):
    names = tuple(f"s{i}" for i in range(len(weights)))
    schedule = _schedule(((0, dict(zip(names, weights, strict=True))),), names)
    source, ordinal = schedule.block(0, block)
    begin, end = schedule.block_span(0, block)
    first, after = schedule.counts(begin), schedule.counts(end)
    for i in range(len(names)):
        assert ordinal[source == i].tolist() == list(range(first[i], after[i]))
    share = np.array(weights) / sum(weights)
    drift = np.abs(np.array(after, np.float64) - share * end)
    assert (drift < max(2, 1e-12 * end)).all()  # Far below one block of samples, at any distance.


def test_weights_that_do_not_sum_to_one_are_divided_by_their_sum():
    weights = {"a": 0.5, "b": 0.3, "c": SMOLLM3_SUM - 0.8}
    counts = _schedule(((0, weights),)).counts(10**6)
    assert sum(counts) == 10**6
    for count, weight in zip(counts, weights.values(), strict=True):
        assert abs(count - 10**6 * weight / SMOLLM3_SUM) <= 1


def test_stages_change_at_their_step():
    stages = ((0, {"a": 1}), (100, {"a": 0.5, "b": 0.5}), (333, {"c": 2}))
    schedule = _schedule(stages)
    batch = schedule.batch_sizes.final
    assert schedule.counts(100 * batch) == (1600, 0, 0)
    assert schedule.counts(333 * batch) == (1600 + 233 * 8, 233 * 8, 0)
    assert schedule.counts(400 * batch) == (1600 + 233 * 8, 233 * 8, 67 * 16)
    assert schedule.stage_of(100 * batch - 1) == 0
    assert schedule.stage_of(100 * batch) == 1
    # The last block of a stage is cut, and the next begins on time; numbers of a source go on where they were.
    span = schedule.block_span(1, (233 * batch) // BLOCK_SAMPLES)
    assert span[1] == 333 * batch
    seen = {0: [], 1: [], 2: []}
    sample = 0
    while sample < 500 * batch:
        key = schedule.block_of(sample)
        source, ordinal = schedule.block(*key)
        begin, end = schedule.block_span(*key)
        assert begin == sample
        for i in range(3):
            seen[i] += ordinal[source == i].tolist()
        stage = schedule.stage_of(begin)
        assert set(source.tolist()) == [{0}, {0, 1}, {2}][stage]
        sample = end
    for i in range(3):
        assert seen[i] == list(range(len(seen[i])))


def test_order_inside_a_block_is_mixed_and_depends_on_seed_and_block():
    stages = ((0, {"a": 1, "b": 1}),)
    first, _ = _schedule(stages).block(0, 0)
    for other in (_schedule(stages, seed=1).block(0, 0)[0], _schedule(stages).block(0, 1)[0]):
        assert 0.4 < (first == other).mean() < 0.6
    changes = (np.diff(first) != 0).sum()
    assert abs(changes - len(first) / 2) < 4 * np.sqrt(len(first) / 4)


def test_largest_remainders_in_each_block_alone_would_starve_a_small_source():
    """Negative control: rounding block by block gives a source of weight 1/10000 nothing for ever."""
    weight = 1e-4
    assert round(BLOCK_SAMPLES * weight) == 0
    schedule = _schedule(((0, {"a": 1 - weight, "b": weight}),))
    assert abs(schedule.counts(100 * BLOCK_SAMPLES)[1] - 100 * BLOCK_SAMPLES * weight) <= 1


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), r"start at steps \[\]"),
        (((5, {"a": 1}),), r"start at steps \[5\]; expected 0 first"),
        (((0, {"a": 1}), (0, {"a": 1})), r"steps \[0, 0\]"),
        (((0, {"d": 1}),), "gives a weight to 'd', which is not a source; sources are a, b, c"),
        (((0, {"a": -1}),), "gives 'a' the weight -1"),
        (((0, {"a": float("nan")}),), "gives 'a' the weight nan"),
        (((0, {"a": 0}),), "no positive weight"),
    ],
)
def test_wrong_stages_are_refused(stages, message):
    with pytest.raises(SmoljaxError, match=message):
        _schedule(stages)

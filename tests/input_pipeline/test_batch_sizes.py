"""Sizes and first windows of steps while the batch is ramped up, against counting them one by one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoljax.errors import SmoljaxError
from smoljax.input_pipeline.batch_sizes import BatchSizes

RISING = st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True).map(sorted)


@given(steps=RISING, sizes=RISING, final=st.integers(41, 60))
def test_windows_before_a_step_are_the_sum_of_the_steps_before_it(steps, sizes, final):
    count = min(len(steps), len(sizes))
    ramp = tuple(zip(steps[:count], sizes[:count], strict=True))
    batches = BatchSizes(final, ramp)
    assert batches.sizes == (*sizes[:count], final)
    for step in range(60):
        assert batches.before(step + 1) - batches.before(step) == batches.size(step)
    assert batches.before(0) == 0
    for end, size in ramp:
        assert batches.size(end - 1) == size
        assert batches.size(end) > size


def test_without_a_ramp_windows_are_a_product():
    assert BatchSizes(16).before(2**40) == 2**44
    assert BatchSizes(16).size(0) == 16


@pytest.mark.parametrize(
    "ramp", [((0, 4),), ((5, 0),), ((5, 4), (5, 6)), ((5, 4), (9, 4)), ((5, 8),)]
)
def test_a_ramp_that_does_not_rise_is_refused(ramp):
    with pytest.raises(SmoljaxError, match=r"batch_ramp.*rise"):
        BatchSizes(8, ramp)

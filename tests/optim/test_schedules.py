import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoljax.errors import SmoljaxError
from smoljax.optim import (
    TAILS,
    batch_size_ramp,
    constant,
    cosine,
    cyclic_wsd,
    inverse_sqrt,
    linear,
    wsd,
)

SMOLLM3 = dict(warmup_steps=2000, decay_start=4_198_001, decay_steps=522_000)


def published(step):
    """SmolLM3's rate in exact arithmetic, as nanotron's helpers.py states it."""
    if step <= 2000:
        return 2e-4 * step / 2000
    if step < 4_198_001:
        return 2e-4
    return 2e-4 * max(522_000 - (step - 4_198_001), 0) / 522_000


@pytest.mark.parametrize(
    "step",
    [0, 1, 1999, 2000, 2001, 4_198_000, 4_198_001, 4_198_002, 4_459_001, 4_720_000, 4_720_001],
)
def test_wsd_is_smollm3_at_the_boundaries(step):
    schedule = wsd(2e-4, **SMOLLM3)
    for value in (schedule(step), jax.jit(schedule)(np.int32(step))):
        assert value.dtype == np.float32
        assert value.shape == ()
        np.testing.assert_allclose(value, published(step), rtol=3e-7, atol=0)


def test_wsd_has_the_published_numbers():
    schedule = wsd(2e-4, **SMOLLM3)
    exact = {0: 0.0, 1: 1e-7, 2000: 2e-4, 4_198_001: 2e-4, 4_720_000: 2e-4 / 522_000, 4_720_001: 0}
    for step, value in exact.items():
        np.testing.assert_allclose(schedule(step), value, rtol=3e-7)
    # A decay that starts one step early is told apart.
    early = wsd(2e-4, **(SMOLLM3 | {"decay_start": 4_198_000}))
    assert early(4_198_001) < schedule(4_198_001)


@pytest.mark.parametrize(
    ("tail", "at_quarter", "at_half"),
    [("linear", 0.75, 0.5), ("cosine", (1 + 2**-0.5) / 2, 0.5), ("1-sqrt", 0.5, 1 - 2**-0.5)],
)
def test_tails(tail, at_quarter, at_half):
    schedule = wsd(2.0, warmup_steps=10, decay_start=100, decay_steps=40, tail=tail)
    got = [float(schedule(step)) for step in (5, 10, 100, 110, 120, 140, 1000)]
    want = [1.0, 2.0, 2.0, 2 * at_quarter, 2 * at_half, 0.0, 0.0]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_final_fraction_is_where_the_decay_ends_and_stays():
    schedule = wsd(1.0, warmup_steps=0, decay_start=5, decay_steps=10, final_fraction=0.1)
    np.testing.assert_allclose(
        [schedule(s) for s in (0, 5, 10, 15, 99)], [1, 1, 0.55, 0.1, 0.1], rtol=1e-6
    )


def test_cosine_and_linear_reach_the_end():
    options = dict(warmup_steps=10, num_steps=110, final_fraction=0.1)
    steps = (0, 5, 10, 60, 110)
    want = [0, 0.5, 1, 0.55, 0.1]
    np.testing.assert_allclose([cosine(1.0, **options)(s) for s in steps], want, rtol=1e-6)
    np.testing.assert_allclose([linear(1.0, **options)(s) for s in steps], want, rtol=1e-6)
    quarter = 0.1 + 0.9 * (1 + 2**-0.5) / 2
    assert float(cosine(1.0, **options)(35)) == pytest.approx(quarter, rel=1e-6)
    assert float(linear(1.0, **options)(35)) == pytest.approx(0.775, rel=1e-6)


def test_constant_warms_up_and_stays():
    np.testing.assert_allclose(
        [constant(3.0, warmup_steps=2)(s) for s in (0, 1, 2, 10**9)], [0, 1.5, 3, 3]
    )
    assert constant(3.0)(0) == 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: wsd(1, warmup_steps=1, decay_start=2, decay_steps=3, tail="sqrt"), "1-sqrt"),
        (lambda: wsd(1, warmup_steps=5, decay_start=4, decay_steps=3), "inside the warmup"),
        (lambda: wsd(1, warmup_steps=-1, decay_start=4, decay_steps=3), "below 0"),
        (lambda: cosine(1, warmup_steps=10, num_steps=10), "after the warmup"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(make, words):
    with pytest.raises(SmoljaxError, match=words):
        make()


@pytest.mark.parametrize("power", [1.2, 2.0, 0.5])
def test_the_power_tail_is_powercool(power):
    """min(peak, c * (T - t)^power), with c so that both meet where the decay starts."""
    schedule = wsd(3e-4, warmup_steps=5, decay_start=40, decay_steps=60, tail="power", power=power)
    steps = np.arange(5, 140)
    want = np.minimum(3e-4, 3e-4 / 60.0**power * np.maximum(100.0 - steps, 0) ** power)
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.arange(5, 140)), want, rtol=2e-6, atol=0)
    assert schedule(40) == np.float32(3e-4)
    assert schedule(100) == 0
    if power != 1.2:
        default = wsd(3e-4, warmup_steps=5, decay_start=40, decay_steps=60, tail="power")
        assert abs(float(default(70)) / float(schedule(70)) - 1) > 0.1


def test_inverse_sqrt_is_the_formula_of_the_papers():
    steps = np.array([0, 1, 50, 99, 100, 101, 400, 10_000, 2**31 - 1])
    vaswani = 0.5 * np.minimum(steps / 100, 10 / np.sqrt(np.maximum(steps, 1)))
    got = [inverse_sqrt(0.5, warmup_steps=100)(step) for step in steps]
    np.testing.assert_allclose(got, vaswani, rtol=3e-7)
    past = np.maximum(steps - 100, 0)
    scaled = 0.5 * np.where(steps < 100, steps / 100, np.sqrt(1000 / (1000 + past)))
    got = [inverse_sqrt(0.5, warmup_steps=100, timescale=1000)(step) for step in steps]
    np.testing.assert_allclose(got, scaled, rtol=3e-7)
    assert float(inverse_sqrt(1.0, warmup_steps=0, timescale=7)(7)) == pytest.approx(2**-0.5)


def test_cyclic_wsd_repeats_and_warms_up_from_where_it_ended():
    options = dict(cycle_steps=100, warmup_steps=10, decay_steps=40, final_fraction=0.1)
    schedule = cyclic_wsd(2.0, **options)
    once = wsd(2.0, warmup_steps=10, decay_start=60, decay_steps=40, final_fraction=0.1)
    for step in (0, 5, 10, 60, 61, 80, 100):
        assert schedule(step) == once(step)
    steps = (105, 110, 160, 180, 200, 205, 210, 300)
    want = [1.1, 2.0, 2.0, 1.1, 0.2, 1.1, 2.0, 0.2]
    np.testing.assert_allclose([schedule(step) for step in steps], want, rtol=1e-6)
    # No warmup: the next cycle is at its peak one step after the end.
    sudden = cyclic_wsd(2.0, cycle_steps=100, warmup_steps=0, decay_steps=40)
    np.testing.assert_allclose([sudden(step) for step in (0, 100, 101, 160, 200)], [2, 0, 2, 2, 0])
    last = 2_147_483_580  # 80 steps into its cycle, near the end of int32
    np.testing.assert_allclose(jax.jit(schedule)(np.int32(last)), 1.1, rtol=1e-6)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    tail=st.sampled_from(sorted(TAILS)),
    warmup=st.integers(0, 50),
    stable=st.integers(0, 2**30),
    decay=st.integers(1, 2**29),
    final=st.floats(0, 1),
    offsets=st.lists(st.floats(0, 1), min_size=8, max_size=8),
)
def test_up_in_the_warmup_and_never_up_after_it(tail, warmup, stable, decay, final, offsets):
    start = warmup + stable
    schedule = wsd(
        1.0,
        warmup_steps=warmup,
        decay_start=start,
        decay_steps=decay,
        tail=tail,
        final_fraction=final,
    )
    steps = sorted({start, start + decay, *(start + int(offset * decay) for offset in offsets)})
    values = [float(schedule(step)) for step in steps]
    assert values[0] == 1
    assert values[-1] == pytest.approx(final, abs=1e-7)
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(values))
    rising = [float(schedule(step)) for step in range(0, warmup + 1, 10)]
    assert all(earlier < later for earlier, later in itertools.pairwise(rising))


def test_the_last_steps_of_int32_are_exact():
    last = 2**31 - 1
    schedule = wsd(1.0, warmup_steps=10, decay_start=last - 1000, decay_steps=1000)
    for left in (1000, 999, 3, 1, 0):
        want = np.float32(left) / np.float32(1000)
        assert schedule(last - left) == want
        # Under jit a division by a constant may become a product: one rounding more.
        np.testing.assert_allclose(jax.jit(schedule)(np.int32(last - left)), want, rtol=1.3e-7)


def test_a_batch_ramp_rises_to_its_final_size():
    ramp = batch_size_ramp(8, 64, num_steps=100, num_stages=7, multiple_of=8)
    assert ramp == ((14, 8), (28, 16), (42, 24), (57, 32), (71, 40), (85, 48), (100, 56))
    assert batch_size_ramp(1, 4, num_steps=10, num_stages=2) == ((5, 1), (10, 2))


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
    multiple=st.integers(1, 16),
    start=st.integers(1, 8),
    growth=st.integers(1, 64),
    num_stages=st.integers(1, 16),
    num_steps=st.integers(1, 10**9),
)
def test_a_batch_ramp_is_in_multiples_or_refused(multiple, start, growth, num_stages, num_steps):
    start, final = start * multiple, (start + growth) * multiple
    options = dict(num_steps=num_steps, num_stages=num_stages, multiple_of=multiple)
    if num_stages > growth or num_stages > num_steps:
        with pytest.raises(SmoljaxError, match="give multiples"):
            batch_size_ramp(start, final, **options)
        return
    steps, sizes = zip(*batch_size_ramp(start, final, **options))
    assert sizes[0] == start
    assert steps[-1] == num_steps
    assert all(size % multiple == 0 and start <= size < final for size in sizes)
    assert list(steps) == sorted(set(steps))
    assert list(sizes) == sorted(set(sizes))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: wsd(1, warmup_steps=0, decay_start=2, decay_steps=3, tail="power", power=0),
            "power is 0",
        ),
        (lambda: inverse_sqrt(1, warmup_steps=0), "timescale"),
        (lambda: inverse_sqrt(1, warmup_steps=-1, timescale=5), "warmup_steps is -1"),
        (lambda: cyclic_wsd(1, cycle_steps=10, warmup_steps=6, decay_steps=5), "a cycle has 10"),
        (
            lambda: batch_size_ramp(7, 64, num_steps=10, num_stages=2, multiple_of=8),
            "give multiples",
        ),
        (lambda: batch_size_ramp(8, 64, num_steps=10, num_stages=0), "num_stages is 0"),
        (
            lambda: batch_size_ramp(8, 64, num_steps=10, num_stages=2, multiple_of=0),
            "multiple_of is 0",
        ),
        (
            lambda: wsd(float("nan"), warmup_steps=0, decay_start=2, decay_steps=3),
            "peak is nan: give a number at least 0",
        ),
        (lambda: constant(-1.0), "peak is -1.0"),
        (lambda: inverse_sqrt(-1.0, warmup_steps=2), "peak is -1.0"),
        (lambda: linear(1, warmup_steps=0, num_steps=9, final_fraction=2), "final_fraction is 2"),
    ],
)
def test_other_schedules_refuse_lengths_that_do_not_fit(make, words):
    with pytest.raises(SmoljaxError, match=words):
        make()

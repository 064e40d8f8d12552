import jax
import numpy as np
import pytest

from smoljax.errors import SmoljaxError
from smoljax.optim import constant, cosine, linear, wsd

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

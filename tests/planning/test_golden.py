"""The golden plans: one is compiled again here, all are compiled by `make golden-plans`."""

import pytest

from tests.planning import golden

COMPILED_HERE = "smollm3_135m.v5e-256"  # The smallest: about a minute.


@pytest.mark.parametrize("name", golden.NAMES)
def test_every_large_config_has_a_plan_of_the_pinned_compiler(name):
    first, *lines = golden.path(name).read_text().splitlines()
    assert first == f"libtpu {golden.LIBTPU}", "run `make golden-plans` and commit the difference"
    assert "fits True" in lines


def test_keys_of_a_split_sequence_go_round_and_are_never_gathered():
    """64k tokens of the 3B model over 16 devices each: along context nothing but the ring, and sums of gradients."""
    lines = golden.path(golden.LONG).read_text().splitlines()
    along = {line.split()[1].rstrip(":") for line in lines if line.startswith("context ")}
    assert along == {"collective-permute", "all-reduce"}


def test_a_ring_runs_two_kernels_at_each_step():
    """36 layers over 16 devices, forward and backward: three pairs of chunks of a device's own, then two at each of 15 steps."""
    (runs,) = [
        int(line.split()[2])
        for line in golden.path(golden.LONG).read_text().splitlines()
        if line.startswith("kernel runs")
    ]
    assert runs == 36 * 2 * (3 + 2 * 15)


@pytest.mark.skipif(
    not golden.installed(), reason=f'needs libtpu {golden.LIBTPU}: pip install "smoljax[plan]"'
)
def test_a_golden_plan_is_up_to_date():
    assert golden.text(COMPILED_HERE) == golden.path(COMPILED_HERE).read_text(), (
        "the plan changed; if it was meant, run `make golden-plans` and commit the difference"
    )

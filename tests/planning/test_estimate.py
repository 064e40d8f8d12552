"""Seconds, MFU and cost against closed forms."""

import dataclasses

import pytest

from smoljax.model import ModelConfig
from smoljax.planning import hlo
from smoljax.planning.estimate import (
    Times,
    bandwidth,
    estimate,
    price_collectives,
    roofline,
    times_of_program,
)
from smoljax.planning.topologies import CHIPS, topology

MODEL = ModelConfig(
    vocab_size=1024,
    num_layers=4,
    hidden_size=256,
    intermediate_size=1024,
    num_heads=4,
    num_kv_heads=2,
    compute_dtype="bfloat16",
    remat="full",
)
TIMES = Times(products=1.0, other=0.25, kernels=0.5, exposed=0.25, hidden=0.5)


def test_a_step_is_its_parts_and_the_range_holds_it():
    assert TIMES.step == 2.0
    assert TIMES.fastest < TIMES.step < TIMES.slowest
    assert TIMES.bound == "matrix products"
    assert dataclasses.replace(TIMES, exposed=9.0).bound == "the interconnect"


def test_mfu_days_and_cost():
    machine = topology("v5e-256")
    costs = estimate(
        TIMES, MODEL, machine, seq_len=512, batch_size=1024, tokens=1024 * 512 * 43_200, price=1.5
    )
    assert costs.days == 1.0  # 43,200 steps of 2 s.
    assert costs.chip_hours == 256 * 24
    assert costs.cost == 256 * 24 * 1.5
    assert costs.tokens_per_second == 1024 * 512 / 2
    for name, kind in (("6N", "none"), ("causal attention", "causal"), ("full attention", "full")):
        flops = MODEL.flops_per_token(512, attention=kind) * 1024 * 512
        assert costs.flops[name] == flops
        assert costs.mfu[name] == pytest.approx(flops / 2 / (256 * 197e12))


def test_no_budget_no_days():
    costs = estimate(
        TIMES, MODEL, topology("v5e-4"), seq_len=512, batch_size=4, tokens=None, price=2.0
    )
    assert (costs.days, costs.chip_hours, costs.cost) == (None, None, None)


def _program(cycles, *collectives):
    return hlo.Program({"loop": cycles}, cycles, (), collectives, 1)


def _gather(sent, *, asynchronous):
    return hlo.Collective("all-gather", sent, (0, 1), 10, asynchronous, "loop")


@pytest.mark.parametrize(
    ("asynchronous", "compute", "exposed"),
    [(False, 5.0, 1.0), (True, 5.0, 0.0), (True, 0.25, 0.75), (True, 0.0, 1.0)],
)
def test_exchange_hides_behind_its_loop_when_it_is_asynchronous(asynchronous, compute, exposed):
    chip = CHIPS["v5e"]
    program = _program(compute * chip.clock, _gather(1e9, asynchronous=asynchronous))
    (row,) = price_collectives(
        program, chip=chip, axes_of=lambda group: "fsdp", bandwidth_of=lambda group: 1e10
    )
    assert (row.runs, row.bytes_sent, row.seconds) == (10, 1e10, 1.0)
    assert row.exposed == pytest.approx(exposed)


def test_kernels_are_priced_by_their_flops():
    """36 layers forward twice and backward once, at half the peak: (2 + 2.5) times the forward FLOPs."""
    runs = (hlo.Kernel("fwd", 72, False), hlo.Kernel("bwd", 36, True))
    program = hlo.Program({}, 0.0, runs, (), 0)
    chip = CHIPS["v5e"]
    times = times_of_program(program, (), chip, attention_flops=1e12, num_layer_passes=36)
    assert times.kernels == pytest.approx(36 * 4.5e12 / chip.peak_flops / 0.5)
    two = (hlo.Kernel("fwd", 72, False), hlo.Kernel("dq", 36, True), hlo.Kernel("dkv", 36, True))
    split = times_of_program(
        dataclasses.replace(program, kernels=two),
        (),
        chip,
        attention_flops=1e12,
        num_layer_passes=36,
    )
    assert split.kernels == pytest.approx(36 * 5.5e12 / chip.peak_flops / 0.5)


def test_links():
    v5e, v5p = topology("v5e-256"), topology("v5p-128")
    line = [(x, 0) for x in range(16)]
    plane = [(x, y) for x in range(16) for y in range(16)]
    assert bandwidth(line, [0] * 16, v5e) == 2 * 45e9
    assert bandwidth(plane, [0] * 256, v5e) == 4 * 45e9
    assert bandwidth([(0, 0, z) for z in range(4)], [0] * 4, v5p) == 2 * 90e9
    assert bandwidth([(0, 0), (1, 0)], [0, 0], topology("v5e-4")) == 45e9  # No ring of two.
    assert bandwidth([(0, 0), (0, 0)], [0, 1], topology("v5e-256x2")) == v5e.chip.network_bandwidth


def test_the_closed_form_scales_as_it_must():
    machine = topology("v5p-128")
    one = roofline(MODEL, machine, seq_len=512, tokens=2**22, params_split=64)
    two = roofline(MODEL, machine, seq_len=512, tokens=2**23, params_split=64)
    assert two.products == pytest.approx(2 * one.products)
    assert two.hidden + two.exposed == pytest.approx(one.hidden + one.exposed)
    kept = dataclasses.replace(MODEL, remat="none")
    assert roofline(kept, machine, seq_len=512, tokens=2**22, params_split=64).step < one.step

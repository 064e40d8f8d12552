"""Seconds, MFU and cost against closed forms."""

import dataclasses

import pytest

from smoljax.model import ModelConfig
from smoljax.planning import hlo
from smoljax.planning.estimate import (
    Times,
    collective_seconds,
    estimate,
    kernel_rate,
    price_collectives,
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
BIG = ModelConfig(
    vocab_size=128_256,
    num_layers=36,
    hidden_size=2048,
    intermediate_size=11_008,
    num_heads=16,
    num_kv_heads=4,
    compute_dtype="bfloat16",
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
        program, chip=chip, axes_of=lambda collective: "fsdp", seconds_of=lambda collective: 0.1
    )
    assert (row.runs, row.bytes_sent, row.seconds) == (10, 1e10, 1.0)
    assert row.exposed == pytest.approx(exposed)


def _kernel_seconds(*kernels):
    program = hlo.Program({}, 0.0, kernels, (), 0)
    return times_of_program(
        program, (), CHIPS["v5e"], attention_flops=1e12, num_layer_passes=36, head_dim=128
    ).kernels


def test_kernels_are_priced_by_their_flops():
    """36 layers forward twice and backward once, at half the peak: (2 + 2.5) times the forward FLOPs."""
    forward = (hlo.Kernel("fwd", 36, False), hlo.Kernel("fwd", 36, False, again=True))
    one = 36e12 / CHIPS["v5e"].peak_flops / 0.5
    assert _kernel_seconds(*forward, hlo.Kernel("bwd", 36, True)) == pytest.approx(4.5 * one)
    split = (hlo.Kernel("dq", 36, True), hlo.Kernel("dkv", 36, True))
    assert _kernel_seconds(*forward, *split) == pytest.approx(5.5 * one)
    assert _kernel_seconds(forward[0], *split) == pytest.approx(4.5 * one)
    assert _kernel_seconds() == 0


def test_a_ring_does_the_same_work_in_more_runs():
    """Over a context axis of 4 every layer runs its kernel four times, on a fourth of the keys each."""
    ring = [hlo.Kernel("fwd", 4 * 36, False), hlo.Kernel("bwd", 4 * 36, True)]
    once = [hlo.Kernel("fwd", 36, False), hlo.Kernel("bwd", 36, True)]
    assert _kernel_seconds(*ring) == _kernel_seconds(*once)


def test_heads_narrower_than_a_matrix_unit_leave_part_of_it_idle():
    v5e, v6e, h100 = CHIPS["v5e"], CHIPS["v6e"], CHIPS["h100"]
    assert kernel_rate(v5e, 128) == v5e.peak_flops / 2
    assert kernel_rate(v5e, 64) == v5e.peak_flops / 4
    assert kernel_rate(v5e, 96) == v5e.peak_flops / 2 * 96 / 128
    assert kernel_rate(v6e, 128) == v6e.peak_flops / 4  # Its units are 256 wide.
    assert kernel_rate(h100, 64) == h100.peak_flops / 2


def _seconds(kind, group, places, machine, sent=90e9):
    collective = hlo.Collective(kind, sent, group, 1, False, "main")
    return collective_seconds(collective, places, topology=topology(machine))


LINE = [(x, 0) for x in range(16)]
PLANE = [(x, y) for x in range(16) for y in range(16)]


@pytest.mark.parametrize(
    ("kind", "places", "machine", "seconds"),
    [
        # 90 GB on links of 45 GB/s: a ring uses two, a plane of rings four; 8 steps of 1 us to the far side.
        ("all-gather", LINE, "v5e-256", 1.0 + 8e-6),
        ("all-gather", PLANE, "v5e-256", 0.5 + 16e-6),
        ("all-reduce", PLANE, "v5e-256", 0.5 + 32e-6),
        # Not a closed ring: half a side, a side of 4 on v5e, less than a cube of 4 x 4 x 4 on v5p.
        ("all-gather", LINE[:8], "v5e-256", 2.0 + 7e-6),
        ("all-gather", [(0, 0), (1, 0)], "v5e-4", 2.0 + 1e-6),
        ("all-gather", [(0, 0, z) for z in range(4)], "v5p-128", 0.5 + 2e-6),
        ("all-gather", [(0, 0, z) for z in range(4)], "v5p-64", 1.0 + 3e-6),
        # One link one way, to a neighbour; or two chips on, so that each link carries two chips' data.
        ("collective-permute", [(0, 0), (1, 0)], "v5e-256", 2.0 + 1e-6),
        ("collective-permute", [(0, 0), (2, 0)], "v5e-256", 4.0 + 1e-6),
    ],
)
def test_links(kind, places, machine, seconds):
    group = tuple(range(len(places)))
    assert _seconds(kind, group, places, machine) == pytest.approx(seconds)


def test_between_slices_the_network_counts():
    assert _seconds("all-reduce", (), [], "v5e-256x2") == 90e9 / 3.125e9
    assert _seconds("all-reduce", (), [], "v6e-256x2") == 90e9 / 12.5e9


def test_mfu_of_the_3b_model_in_three_conventions_by_hand():
    """SmolLM3-3B on 384 H100 at 13,750 tokens/s each: 25.7% of 989 TFLOP/s by 6 N, 28.2% with causal and 30.7% with full attention."""
    step = 384 * 6144 / (13_750 * 384)
    times = Times(products=step, other=0.0, kernels=0.0, exposed=0.0, hidden=0.0)
    costs = estimate(
        times,
        BIG,
        topology("h100x384"),
        seq_len=4096,
        batch_size=576,
        tokens=11.136e12,
        price=None,
    )
    per_token = {
        "6N": 6
        * 3_074_949_120,  # 36 layers of 78,118,912 numbers in matrices, and the table as the head.
        "causal attention": 6 * 3_074_949_120 + 6 * 36 * 4096 * 2048,
        "full attention": 6 * 3_074_949_120 + 12 * 36 * 4096 * 2048,
    }
    for name, flops in per_token.items():
        assert costs.flops[name] == flops * 576 * 4096
        assert costs.mfu[name] == pytest.approx(flops * 13_750 / 989e12)
    assert [round(100 * value, 1) for value in costs.mfu.values()] == [25.7, 28.2, 30.7]
    assert costs.days == pytest.approx(24.4, abs=0.05)  # The run took 24.

"""Seconds of a step without a compiler, against figures worked out by hand."""

import dataclasses

import pytest

from smoljax.planning.closed_form import product_flops, roofline
from smoljax.planning.topologies import topology
from tests.planning.test_estimate import BIG, MODEL


def test_the_closed_form_scales_as_it_must():
    machine = topology("v5p-128")
    one = roofline(MODEL, machine, seq_len=512, tokens=2**22, fsdp=64)
    two = roofline(MODEL, machine, seq_len=512, tokens=2**23, fsdp=64)
    assert two.products == pytest.approx(2 * one.products)
    assert two.hidden + two.exposed == pytest.approx(one.hidden + one.exposed)
    kept = dataclasses.replace(MODEL, remat="none")
    assert roofline(kept, machine, seq_len=512, tokens=2**22, fsdp=64).step < one.step


def test_closed_form_of_the_3b_model_by_hand():
    """A layer of SmolLM3-3B holds 78.1M numbers in matrices: 2 x 2048 x 2048 + 2 x 2048 x 512 + 3 x 2048 x 11,008."""
    model = dataclasses.replace(BIG, remat="none")
    layer = 2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 11_008
    once = 6 * (36 * layer + 128_256 * 2048)
    assert product_flops(model) == once
    # All but the down projection again.
    again = 2 * 36 * (layer - 2048 * 11_008)
    assert product_flops(dataclasses.replace(model, remat="full")) == once + again
    assert product_flops(dataclasses.replace(model, remat="dots")) == once
    machine = topology("v5e-256")
    times = roofline(model, machine, seq_len=4096, tokens=2**22, fsdp=256)
    assert times.products == pytest.approx(2**14 * once / (0.84 * 197e12))
    # Attention forward 2, backward 5 of the 6 N that the convention halves: 3.5/3 of 6 L S N H, at half the peak.
    attention = 2**14 * 6 * 36 * 4096 * 2048 * 7 / 6
    assert times.kernels == pytest.approx(attention / (0.5 * 197e12))
    # Three times the parameters in bf16, over four links of 45 GB/s.
    assert times.exposed + times.hidden == pytest.approx(
        3 * 2 * model.num_params * 255 / 256 / (4 * 45e9)
    )
    chunked = roofline(model, machine, seq_len=4096, tokens=2**22, fsdp=256, loss_chunk=1024)
    head = 2**14 * 2 * 128_256 * 2048
    assert chunked.products - times.products == pytest.approx(head / (0.84 * 197e12))


def test_gpus_of_several_nodes_share_their_network_cards():
    """Parameters over 128 GPUs pass through all eight cards of a node; copies in each node exchange an eighth of the gradient each."""
    spread = roofline(BIG, topology("a100x128"), seq_len=4096, tokens=2**22, fsdp=128)
    sent = 3 * 2 * BIG.num_params * 127 / 128
    assert spread.exposed + spread.hidden == pytest.approx(sent / (8 * 25e9))
    copies = roofline(BIG, topology("h100x128"), seq_len=4096, tokens=2**22, fsdp=8)
    inside = 3 * 2 * BIG.num_params * 7 / 8 / (450e9 * 370 / 450)
    between = 2 * 4 * BIG.num_params / 8 * 15 / 16 / 50e9
    assert copies.exposed + copies.hidden == pytest.approx(inside + between)


def test_gpus_rank_as_they_were_built():
    """H200 is H100 with faster memory; a B200 does 2,250 against 989 TFLOP/s, of which measured products reach a little less."""
    a100, h100, h200, b200 = (
        roofline(BIG, topology(f"{gpu}x8"), seq_len=4096, tokens=2**17, fsdp=8)
        for gpu in ("a100", "h100", "h200", "b200")
    )
    assert a100.step > h100.step > h200.step > b200.step
    assert h200.products == h100.products
    assert h200.other == pytest.approx(h100.other * 3.35 / 4.8)
    assert h100.products / b200.products == pytest.approx(2250 / 989 * 0.66 / 0.68)

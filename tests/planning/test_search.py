"""What is tried, and in which order it is ranked."""

import dataclasses

import pytest

from smoljax.command_line import load_config
from smoljax.planning.search import _rank, ranking, variants
from smoljax.planning.topologies import topology


@pytest.fixture(scope="module")
def config():
    config = load_config("configs/smollm3_3b.py")
    config["data"]["batch_size"] = 1024
    return config


def test_every_variant_divides(config):
    machine = topology("v5e-256x2")
    found = variants(config, machine)
    for variant in found:
        mesh = variant["mesh"]
        assert mesh["data"] * mesh["fsdp"] * mesh["tensor"] == 512
        assert mesh["data"] == 2  # Slices exchange gradients only.
        parts = mesh["data"] * mesh["fsdp"] * variant["training"]["micro_batches"]
        assert 1024 % parts == 0


def test_the_simplest_comes_first_and_then_one_setting_at_a_time(config):
    found = variants(config, topology("v5e-256"))
    first = found[0]
    assert (first["mesh"]["fsdp"], first["model"]["remat"]) == (256, "full")
    assert first["training"]["loss_chunk"] == 2048
    changed = [
        (v["mesh"]["tensor"] > 1)
        + (v["model"]["remat"] != "full")
        + (v["training"]["micro_batches"] > 1)
        for v in found
    ]
    assert max(changed[:6]) <= 1


def test_nothing_divides(config):
    odd = config | {"data": config["data"] | {"batch_size": 3}}
    assert variants(odd, topology("v5e-256")) == []
    assert "batch_size" in ranking([])


def test_what_fits_ranks_first_and_the_fastest_of_it():
    @dataclasses.dataclass
    class Step:
        step: float

    @dataclasses.dataclass
    class Costs:
        times: Step

    @dataclasses.dataclass
    class Tried:
        fits: bool
        needs: float
        estimate: Costs | None

    slow, fast = Tried(True, 1, Costs(Step(2.0))), Tried(True, 9, Costs(Step(1.0)))
    near, far = Tried(False, 20, None), Tried(False, 30, None)
    assert sorted([far, slow, near, fast], key=_rank) == [fast, slow, near, far]

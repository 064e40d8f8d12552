"""What is tried, and in which order it is ranked."""

import dataclasses
import functools

import pytest

from smoljax.command_line import load_config
from smoljax.errors import SmoljaxError
from smoljax.planning.search import ranking, search, variants
from smoljax.planning.topologies import GIB, topology


@pytest.fixture(scope="module")
def config():
    config = load_config("configs/smollm3_3b.py")
    config["data"]["batch_size"] = 1024
    return config


def test_every_variant_divides(config):
    machine = topology("v5e-256x2")
    found = list(variants(config | {"mesh": {"data": 2, "fsdp": -1}}, machine))
    assert len(found) > 100
    for _, variant in found:
        mesh = variant["mesh"]
        assert mesh["data"] * mesh["fsdp"] * mesh["tensor"] == 512
        assert mesh["data"] % 2 == 0  # Slices exchange gradients only.
        parts = mesh["data"] * mesh["fsdp"] * variant["training"]["micro_batches"]
        assert 1024 % parts == 0


def test_one_setting_is_changed_at_a_time_and_each_has_its_turn(config):
    found = [flags for flags, _ in variants(config, topology("v5e-256"))]
    assert [each[0] for each in found[:4]] == [
        "--config.training.micro_batches=2",
        "--config.model.remat=dots",
        "--config.mesh.data=16",
        "--config.training.loss_chunk=2048",
    ]
    assert found[2][1:] == [
        f"--config.mesh.{axis}" for axis in ("fsdp=16", "tensor=1", "context=1")
    ]
    fields = [{flag.split(".")[2].split("=")[0] for flag in flags} for flags in found[:13]]
    assert all(len(each) == 1 or "fsdp" in each for each in fields)
    assert len({tuple(flags) for flags in found}) == len(found)


def test_nothing_divides(config):
    odd = config | {"data": config["data"] | {"batch_size": 3}}
    assert list(variants(odd, topology("v5e-256"))) == []


@dataclasses.dataclass
class Step:
    step: float
    bound: str = "matrix products"


@dataclasses.dataclass
class Costs:
    times: Step
    tokens_per_second: float = 1e6

    @property
    def mfu(self):
        return {"causal attention": 0.5}


@dataclasses.dataclass
class Tried:
    """What the ranking reads of a plan."""

    fits: bool
    needs: float
    estimate: Costs | None
    mesh: str = "fsdp 256"
    remat: str = "full"
    micro_batches: int = 1
    loss_chunk: int = 2048
    batch_size: int = 1024
    topology: object = topology("v5e-256")


SLOW, FAST = Tried(True, 1, Costs(Step(2.0))), Tried(True, 9, Costs(Step(1.0)))
NEAR, FAR = Tried(False, 20 * GIB, None), Tried(False, 30 * GIB, None)


def _search(*answers, limit=12, minutes=1.0):
    """A search beside SLOW, whose other settings are planned at once: each as an answer, or an error."""

    def plan(answer):
        if isinstance(answer, BaseException):
            raise answer
        return answer

    others = [([f"--try={number}"], functools.partial(plan, a)) for number, a in enumerate(answers)]
    return search(SLOW, others, limit=limit, minutes=minutes)


def test_what_fits_ranks_first_and_the_fastest_of_it():
    plans = _search(FAR, FAST, NEAR, FAST, limit=3)
    assert plans == [FAST, SLOW, NEAR, FAR]
    lines = ranking(plans, SLOW).splitlines()
    assert [line[0] for line in lines[2:]] == [" ", "*", " ", " "]
    assert lines[4].endswith("does not fit: 4.25 GiB too much")


def test_what_cannot_be_planned_is_skipped_with_its_flags(capsys):
    assert _search(SmoljaxError("no such sides"), FAST, limit=1) == [FAST, SLOW]
    assert "skipped --try=0: no such sides" in capsys.readouterr().err


def test_an_interrupt_ranks_what_was_tried(capsys):
    assert _search(FAST, KeyboardInterrupt(), FAR) == [FAST, SLOW]
    assert "interrupted" in capsys.readouterr().err


def test_no_setting_is_begun_after_the_time(capsys):
    assert _search(FAST, minutes=1e-9) == [SLOW]
    said = capsys.readouterr().err
    assert "--search_minutes" in said
    assert "batch_size" not in said


def test_where_nothing_else_divides_it_says_so(capsys):
    assert _search() == [SLOW]
    assert "batch_size (1024) a multiple of 256" in capsys.readouterr().err

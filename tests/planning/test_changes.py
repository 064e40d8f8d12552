"""Advice: what frees memory when a run does not fit, what saves time when it does."""

import pytest

from smoljax.model import ModelConfig
from smoljax.planning.changes import cheapest
from smoljax.planning.estimate import Exchange, Times
from smoljax.planning.topologies import GIB

MODEL = ModelConfig(
    vocab_size=128_256,
    num_layers=36,
    hidden_size=2048,
    intermediate_size=11_008,
    num_heads=16,
    num_kv_heads=4,
    compute_dtype="bfloat16",
    remat="full",
)
TIMES = Times(products=2.3, other=0.4, kernels=0.5, exposed=7.0, hidden=0.1)


@pytest.fixture
def asked():
    return dict(
        times=TIMES,
        exchanges=(Exchange("fsdp", "all-gather", 512, 1.3e12, 7.0, 7.0),),
        kernel_runs=108,
        free_bytes=9 * GIB,
        seq_len=4096,
        batch_size=1024,
        micro_batches=1,
        loss_chunk=8192,
        batch_parts=256,
    )


def test_a_loss_in_512_chunks_is_the_first_thing_to_change(asked):
    """Found on SmolLM3-3B over 256 chips: 32 tokens per chip and chunk, each of which gathers the head."""
    first = cheapest(MODEL, **asked)[0]
    assert first.flags == "--config.training.loss_chunk=524288"
    assert first.seconds > 5


def test_at_most_three_and_all_of_them_fit(asked):
    changes = cheapest(MODEL, **asked)
    assert len(changes) <= 3
    assert all(change.bytes + asked["free_bytes"] > 0 for change in changes)
    assert not any("dots" in change.flags for change in changes)  # 25 GiB would not fit.


def test_what_does_not_fit_is_told_how_to_shrink(asked):
    asked |= {"times": None, "exchanges": (), "kernel_runs": None, "free_bytes": -2.0 * GIB}
    changes = cheapest(MODEL, **asked)
    assert len(changes) == 3
    assert all(change.bytes > 0 for change in changes)
    assert "--config.training.micro_batches=2" in [change.flags for change in changes]


def test_one_sequence_per_chip_cannot_be_split(asked):
    asked |= {"times": None, "free_bytes": -GIB, "batch_size": 256}
    flags = [change.flags for change in cheapest(MODEL, **asked)]
    assert not any("micro_batches" in flag for flag in flags)

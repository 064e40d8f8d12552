"""Bits per byte, against closed forms."""

import math

import numpy as np
import pytest

from smoljax import parallel
from smoljax.evaluation import perplexity
from smoljax.input_pipeline import MixtureConfig, open_mixture


def test_one_bit_per_byte():
    # 100 tokens at ln 2 nats each are 100 bits; over 100 bytes that is one bit per byte.
    assert perplexity.bits_per_byte(
        100 * math.log(2), 100, tokens=100, text_bytes=100
    ) == pytest.approx(1.0)


def test_half_of_the_text_stands_for_all_of_it():
    assert perplexity.bits_per_byte(
        50 * math.log(2), 50, tokens=100, text_bytes=100
    ) == pytest.approx(1.0)


def uniform_model(params, batch):
    """Gives every token the probability 1/512."""
    num_targets = int(np.sum(np.asarray(batch["loss_mask"])))
    return {"cross_entropy": num_targets * math.log(512), "num_targets": num_targets}


@pytest.mark.parametrize("max_batches", [None, 2])
def test_a_uniform_model_has_nine_bits_per_token(corpus, max_batches):
    mixture = open_mixture(
        MixtureConfig(str(corpus / "shards"), ("code", "more"), seq_len=32, batch_size=8)
    )
    results = perplexity.held_out(
        uniform_model,
        {},
        mixture,
        mesh=parallel.make_mesh(parallel.MeshConfig()),
        batch_size=8,
        max_batches=max_batches,
    )
    split = mixture.reader("code", "heldout")
    targets = split.num_tokens - split.num_documents
    row = results["code"]
    assert row["bits_per_byte"] == pytest.approx(9 * targets / split.text_bytes)
    assert row["loss"] == pytest.approx(math.log(512))
    assert "more" not in results  # It has no held-out text.
    assert results["all"]["bits_per_byte"] == pytest.approx(row["bits_per_byte"])
    if max_batches is None:
        assert row["tokens"] == targets  # Every target once: no more, no fewer.
    else:
        assert row["tokens"] < 2 * 8 * 32 + 1


def test_sources_are_combined_by_their_bytes():
    rows = {
        "a": {"bits_per_byte": 1.0, "loss": 2.0, "tokens": 10, "documents": 1, "bytes": 300},
        "b": {"bits_per_byte": 2.0, "loss": 4.0, "tokens": 30, "documents": 2, "bytes": 100},
    }
    together = perplexity.combine(rows)
    assert together["bits_per_byte"] == pytest.approx(1.25)
    assert together["loss"] == pytest.approx(3.5)
    assert together["documents"] == 3

"""Advice: what frees memory when a run does not fit, what saves time when it does."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import AbstractDevice, AbstractMesh

from smoljax.model import ModelConfig, init
from smoljax.model.functions import hidden
from smoljax.planning.changes import cheapest, saved_width
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
        loss_chunk=2048,
        batch_parts=256,
    )


def test_all_logits_at_once_save_a_product_where_memory_is_plenty(asked):
    """Of 16,384 tokens per chip and 128,256 words: 15.7 GiB in f32 with the gradient, against 2 GiB of 2,048 tokens."""
    flags = "--config.training.loss_chunk=16384"
    assert flags not in [change.flags for change in cheapest(MODEL, **asked)]
    asked["free_bytes"] = 20 * GIB
    (change,) = [change for change in cheapest(MODEL, **asked) if change.flags == flags]
    assert change.bytes == -8 * 128_256 * (16_384 - 2_048)
    # One product with the head, of 2 V D FLOPs per token, beside 6 N and all that a layer computes again: not its last product.
    head = 2 * 128_256 * 2048
    again = 2 * 36 * 2048 * (16 + 4 + 4 + 16) * 128 + 4 * 36 * 2048 * 11_008
    products = 6 * MODEL.num_params + again + head
    assert change.seconds == pytest.approx(2.3 * head / products, rel=0.001)


def test_at_most_three_and_all_of_them_fit(asked):
    changes = cheapest(MODEL, **asked)
    assert len(changes) <= 3
    assert all(change.bytes + asked["free_bytes"] > 0 for change in changes)
    assert not any("dots" in change.flags for change in changes)  # 32 GiB would not fit.


def test_what_does_not_fit_is_told_how_to_shrink(asked):
    asked |= {"times": None, "exchanges": (), "kernel_runs": None, "free_bytes": -2.0 * GIB}
    changes = cheapest(MODEL, **asked)
    assert len(changes) == 3
    assert all(change.bytes > 0 for change in changes)
    assert "--config.training.micro_batches=2" in [change.flags for change in changes]


def test_large_chunks_of_the_loss_can_shrink(asked):
    asked |= {"times": None, "free_bytes": -GIB, "loss_chunk": 16_384}
    first = cheapest(MODEL, **asked)[0]
    assert first.flags == "--config.training.loss_chunk=2048"
    assert first.bytes == 8 * 128_256 * (16_384 - 2_048)
    asked |= {"loss_chunk": 2048}
    assert not any("loss_chunk" in change.flags for change in cheapest(MODEL, **asked))


def test_one_sequence_per_chip_cannot_be_split(asked):
    asked |= {"times": None, "free_bytes": -GIB, "batch_size": 256}
    flags = [change.flags for change in cheapest(MODEL, **asked)]
    assert not any("micro_batches" in flag for flag in flags)


def test_each_field_is_named_once_and_keeps_more_of_a_layer_where_memory_is_plenty(asked):
    asked |= {"free_bytes": 76 * GIB, "batch_size": 256, "loss_chunk": 4096}
    changes = cheapest(MODEL, **asked)
    fields = [change.flags.partition("=")[0] for change in changes]
    assert len(set(fields)) == len(fields)
    (kept,) = [change for change in changes if "remat" in change.flags]
    # Nothing of a layer's 7.4 of 6 N is computed again, as with "none", which keeps more.
    assert kept.flags == "--config.model.remat=dots"
    assert kept.seconds == pytest.approx(2.3 * (1 - 6 / 7.4) + 0.5 / 4.5, rel=0.05)
    kept_all = dataclasses.replace(MODEL, remat="none")
    assert not [c for c in cheapest(kept_all, **asked) if "remat" in c.flags]


def test_the_kernel_is_not_run_twice_where_its_output_is_kept(asked):
    """save_attention saves one of 2 + 2.5 forward runs, as full recomputes exactly that beside the products."""
    asked |= {"free_bytes": 2.8 * GIB, "loss_chunk": 16_384}
    (change,) = [c for c in cheapest(MODEL, **asked) if "remat" in c.flags]
    assert change.flags == "--config.model.remat=save_attention"
    assert change.seconds == pytest.approx(0.5 / 4.5)
    assert change.bytes == -2 * 16_384 * 36 * 2048


def test_a_sequence_over_several_chips_leaves_each_its_part(asked):
    """64k tokens over a context axis of 16 are 4,096 a chip, whose logits all at once are no more than their chunk."""
    asked |= {"seq_len": 65_536, "batch_size": 256, "loss_chunk": 4096, "sequence_parts": 16}
    flags = [change.flags for change in cheapest(MODEL, **asked | {"free_bytes": 80 * GIB})]
    assert not any("loss_chunk" in flag for flag in flags)
    asked |= {"sequence_parts": 8}
    flags = [change.flags for change in cheapest(MODEL, **asked | {"free_bytes": 80 * GIB})]
    assert "--config.training.loss_chunk=8192" in flags


@pytest.mark.parametrize(
    ("remat", "width"),
    [
        ("full", 32),
        ("save_attention", 32 + 64),
        ("save_projections", 32 + 2 * 64 + 2 * 32),
        # Queries, keys, values, attention, what it adds, gate and up: every product that the backward pass reads.
        ("dots", 32 + 64 + 2 * 32 + 64 + 32 + 2 * 80),
    ],
)
def test_what_a_policy_saves_is_what_jax_saves(remat, width, capsys):
    """Beside each layer's input, by the list of what JAX saves of a layer on TPUs."""
    model = ModelConfig(
        vocab_size=64,
        num_layers=3,
        hidden_size=32,
        intermediate_size=80,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        compute_dtype="bfloat16",
        remat=remat,
    )
    tpu = AbstractMesh((1,), ("data",), abstract_device=AbstractDevice("TPU v5 lite", None, "tpu"))
    params = jax.eval_shape(lambda: init(model, jax.random.key(0)))
    with jax.sharding.use_abstract_mesh(tpu):
        print_saved_residuals(
            lambda params, tokens: jnp.sum(hidden(model, params, tokens)),
            params,
            jax.ShapeDtypeStruct((2, 128), jnp.int32),
        )
    shapes = re.findall(
        r"^bf16\[3,([\d,]+)\] output of scan", capsys.readouterr().out, re.MULTILINE
    )
    numbers = sum(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert numbers == 2 * 128 * width
    assert saved_width(model) + 32 == width

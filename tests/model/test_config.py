"""Sizes, counts and refusals of ModelConfig."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from smoljax.errors import SmoljaxError
from smoljax.model import ModelConfig, forward, init

SMOLLM3_3B = ModelConfig(
    vocab_size=128256,
    num_layers=36,
    hidden_size=2048,
    intermediate_size=11008,
    num_heads=16,
    num_kv_heads=4,
)
SMALL = ModelConfig(
    vocab_size=128,
    num_layers=2,
    hidden_size=128,
    intermediate_size=352,
    num_heads=2,
    num_kv_heads=1,
    scan_layers=False,
)


def test_counts_of_smollm3_3b():
    # Counted by transformers on the published config.
    assert SMOLLM3_3B.num_params == 3_075_098_624
    assert SMOLLM3_3B.num_params - SMOLLM3_3B.num_params_without_embedding == 262_668_288
    assert SMOLLM3_3B.head_dim == 128
    assert [i for i in range(36) if not SMOLLM3_3B.uses_rope(i)] == [
        3,
        7,
        11,
        15,
        19,
        23,
        27,
        31,
        35,
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_those_of_the_parameters(tied):
    config = dataclasses.replace(SMALL, tie_embeddings=tied, head_dim=32)
    params = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == config.num_params


def test_flops_of_smollm3_3b():
    # 6 N with N = 3.075e9, and 6 x 36 x 2048 x 4096 for causal attention.
    assert SMOLLM3_3B.flops_per_token(4096, "none") == pytest.approx(6 * 3_075_098_624, rel=1e-4)
    attention = SMOLLM3_3B.flops_per_token(4096) - SMOLLM3_3B.flops_per_token(4096, "none")
    assert attention == 6 * 36 * 2048 * 4096
    attention = SMOLLM3_3B.flops_per_token(4096, "full") - SMOLLM3_3B.flops_per_token(4096, "none")
    assert attention == 12 * 36 * 2048 * 4096


def test_flops_of_a_layer_are_what_the_compiler_counts():
    B, S = 1, 256

    def compiled_flops(num_layers, implementation):
        config = dataclasses.replace(SMALL, num_layers=num_layers, attention=implementation)
        params = jax.eval_shape(lambda: init(config, jax.random.key(0)))
        tokens_BS = jax.ShapeDtypeStruct((B, S), jnp.int32)
        gradient = jax.grad(lambda params, tokens_BS: forward(config, params, tokens_BS).sum())
        return jax.jit(gradient).lower(params, tokens_BS).compile().cost_analysis()["flops"]

    def formula(attention):
        one = dataclasses.replace(SMALL, num_layers=1).flops_per_token(S, attention)
        return B * S * (SMALL.flops_per_token(S, attention) - one)

    full = compiled_flops(2, "reference") - compiled_flops(1, "reference")
    # The compiler also counts norms, softmax and masks: a few per cent at this width.
    assert full == pytest.approx(formula("full"), rel=0.06)
    assert full > 1.15 * formula("none")  # Control: leaving attention out is seen.
    blocked = compiled_flops(2, "xla") - compiled_flops(1, "xla")
    assert formula("causal") < blocked < full  # Four query blocks do 5/8 of the square.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3, "num_heads": 4}, r"num_kv_heads is 3.*num_heads=4.*\[1, 2, 4\]"),
        ({"num_layers": 0}, "num_layers is 0.*at least 1"),
        ({"vocab_size": 10.5}, "vocab_size is 10.5"),
        ({"num_layers": True}, "num_layers is True"),
        (
            {"hidden_size": 100, "num_heads": 3, "num_kv_heads": 1},
            "hidden_size is 100.*num_heads=3",
        ),
        ({"head_dim": 15}, "head_dim is 15.*even"),
        ({"no_rope_layer_interval": -1}, "no_rope_layer_interval is -1"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0.*positive"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"remat": "some"}, "remat is 'some'.*none, full, dots, save_attention, save_projections"),
        ({"compute_dtype": "float64"}, "compute_dtype is 'float64'.*float32, bfloat16"),
        ({"attention": "flash"}, "attention is 'flash'.*xla"),
    ],
)
def test_refusals_name_field_value_and_legal_values(change, message):
    with pytest.raises(SmoljaxError, match=message):
        dataclasses.replace(SMALL, **{"head_dim": None, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nope_layers": (2,)}, "model.nope_layers is (2,): set it to layer numbers from 0 to 1"),
        ({"windowed_layers": (0,)}, "give both, or neither"),
        ({"sliding_window": 8}, "give both, or neither"),
        ({"sliding_window": 0, "windowed_layers": (0,)}, "model.sliding_window is 0"),
        ({"rope_scaling": {"kind": "linear"}}, "set it to one of yarn, llama3"),
        ({"rope_scaling": {"kind": "yarn", "factor": 2.0}}, "lacks original_max_seq_len"),
        (
            {"rope_scaling": {"kind": "yarn", "factor": -1, "original_max_seq_len": 8}},
            "rope_scaling.factor is -1",
        ),
        (
            {"rope_scaling": {"kind": "llama3", "factor": 8, "scale": 1}},
            "model.rope_scaling.scale is not a field of llama3",
        ),
    ],
)
def test_wrong_layer_kinds_are_refused(change, message):
    with pytest.raises(SmoljaxError, match=re.escape(message)):
        dataclasses.replace(SMALL, **change)


def test_nope_layers_replace_the_interval():
    config = dataclasses.replace(SMALL, num_layers=4, nope_layers=[2, 0])
    assert [config.uses_rope(layer) for layer in range(4)] == [False, True, False, True]
    assert hash(config) != hash(dataclasses.replace(config, nope_layers=None))


def test_counts_with_qk_norm_are_those_of_the_parameters():
    config = dataclasses.replace(SMALL, qk_norm=True)
    params = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == config.num_params
    assert config.flops_per_token(128, "none") == SMALL.flops_per_token(128, "none")


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_window_hides_what_lies_behind_it(scan_layers):
    """One windowed layer: a token further back than the window changes nothing, one inside it does."""
    config = dataclasses.replace(
        SMALL, num_layers=1, sliding_window=4, windowed_layers=(0,), scan_layers=scan_layers
    )
    params = init(config, jax.random.key(0))
    tokens_BS = jnp.arange(12)[None]
    run = jax.jit(forward, static_argnums=0)
    last_V = run(config, params, tokens_BS)[0, -1]
    assert (run(config, params, tokens_BS.at[0, 7].set(99))[0, -1] == last_V).all()
    assert (run(config, params, tokens_BS.at[0, 8].set(99))[0, -1] != last_V).any()

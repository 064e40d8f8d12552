"""Multipliers by role against the published table, and the coordinate check: activations that do not follow the width.

B batch, S sequence, D model width
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smoljax.errors import SmoljaxError
from smoljax.model import ModelConfig, hidden, init, logical_axes, unembedding
from smoljax.optim import OptimizerConfig, build, forward_multipliers, multipliers, update_rule

N, L = 4.0, 8.0  # width and depth, as multiples of the base model's


@pytest.mark.parametrize(
    ("kind", "rule", "hidden_rate", "eps"),
    [
        # Dey et al. 2025 (arXiv 2505.01618), Table 1, alpha = 1; muP leaves the depth out.
        ("mup", "adamw", 1 / N, 1 / N),
        ("completep", "adamw", 1 / N, 1 / (N * L)),
        # |O|_op = 1 and sqrt(d_out / d_in) does not follow the width; 0.2 sqrt(max) grows with its root.
        ("completep", "muon_spectral", 1.0, 1.0),
        ("completep", "muon_rms", N**-0.5, 1.0),
    ],
)
def test_the_table(kind, rule, hidden_rate, eps):
    table = multipliers(kind, width=N, depth=L, rule=rule)
    assert table["hidden"].init_std == pytest.approx(N**-0.5)
    assert table["hidden"].learning_rate == pytest.approx(hidden_rate)
    assert table["hidden"].weight_decay == pytest.approx(1 / hidden_rate)
    assert table["hidden"].eps == pytest.approx(eps)
    for role in ("embedding", "head", "norm", "bias"):
        assert (table[role].init_std, table[role].learning_rate) == (1, 1)
    forward = forward_multipliers(kind, width=N, depth=L, head_width=4.0)
    assert forward.readout == 1 / N
    assert forward.residual == (1 / L if kind == "completep" else 1)
    assert forward.attention == 1 / 2  # 4^-1/2 on top of H^-1/2 makes 1/H.


def test_the_base_model_and_the_standard_parametrization_are_all_ones():
    for kind, width, depth in (("standard", N, L), ("mup", 1, 1), ("completep", 1, 1)):
        table = multipliers(kind, width=width, depth=depth)
        assert {value for row in table.values() for value in row} == {1.0}
        assert set(forward_multipliers(kind, width=width, depth=depth)) == {1.0}


def test_wrong_arguments_are_named():
    with pytest.raises(SmoljaxError, match="choose one of standard, mup"):
        multipliers("mu-p", width=2)
    with pytest.raises(SmoljaxError, match="muon_rms"):
        multipliers("mup", width=2, rule="muon")
    with pytest.raises(SmoljaxError, match="width"):
        multipliers("mup", width=0)


# Learning rates are larger than usual, so that what would blow up at a width does so within a few steps.
CASES = {
    "adamw": OptimizerConfig(name="adamw", learning_rate=0.02, eps=1e-12),
    "muon_rms": OptimizerConfig(
        name="muon", learning_rate=0.05, adamw_learning_rate=0.02, eps=1e-12
    ),
    "muon_spectral": OptimizerConfig(
        name="muon", scale="spectral", learning_rate=0.1, adamw_learning_rate=0.02, eps=1e-12
    ),
}
OPTIMIZERS = CASES | {"small": OptimizerConfig(name="adamw", learning_rate=0.001, eps=1e-12)}
WIDTHS, DEPTHS = (64, 128, 256), (2, 8)


def model(width, depth, parametrization):
    """Heads of 16; all hidden widths grow alike."""
    base = {"mup": dict(base_hidden_size=64), "standard": {}}
    base["completep"] = dict(base_hidden_size=64, base_num_layers=2)
    return ModelConfig(
        vocab_size=32,
        num_layers=depth,
        hidden_size=width,
        intermediate_size=width,
        num_heads=width // 16,
        num_kv_heads=width // 16,
        tie_embeddings=False,
        init_std=0.05,
        scan_layers=True,
        parametrization=parametrization,
        **base[parametrization],
    )


@functools.cache
def coordinates(config, case, embedding=1, steps=5):
    """RMS of the logits and of what hidden states (before the readout's factor) and logits changed by, means of log over two seeds.

    The head begins at zero: random logits of a fresh model shrink with the width, and have nothing to do with the rates.
    The embedding begins `embedding` times as large as the model has it.
    """
    optimizer = dataclasses.replace(
        OPTIMIZERS[case], schedule="constant", weight_decay=0, clip_norm=None
    )
    tokens_BS = jax.random.randint(jax.random.key(99), (4, 17), 0, config.vocab_size)
    transform = build(
        optimizer,
        jax.eval_shape(lambda: init(config, jax.random.key(0))),
        logical_axes=logical_axes(config),
        num_steps=steps,
        multipliers=config.multipliers(update_rule(optimizer)),
    )

    def activations(params):
        hidden_BSD = hidden(config, params, tokens_BS[:, :-1])
        return hidden_BSD, hidden_BSD @ unembedding(config, params)

    def loss(params):
        logits_BSV = activations(params)[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits_BSV, tokens_BS[:, 1:]).mean()

    def step(carry, _):
        params, state = carry
        updates, state = transform.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    def run(seed):
        params = init(config, jax.random.key(seed))
        params["head"] = jnp.zeros_like(params["head"])
        params["embedding"] = embedding * params["embedding"]
        before = activations(params)
        (params, _), _ = jax.lax.scan(step, (params, transform.init(params)), length=steps)
        after = activations(params)
        change = (after[0] - before[0]) / config.forward_multipliers.readout
        return jnp.log(jnp.std(change)), jnp.log(jnp.std(after[1]))

    moved, logits = jax.jit(lambda: jax.lax.map(run, jnp.arange(2)))()
    return {"change of hidden states": float(moved.mean()), "logits": float(logits.mean())}


def slopes(models, sizes, case, embedding=1):
    """Slope of log RMS over log size for each coordinate."""
    values = [coordinates(config, case, embedding) for config in models]
    return {
        name: np.polyfit(np.log(sizes), [each[name] for each in values], 1)[0] for name in values[0]
    }


@pytest.mark.parametrize("case", CASES)
def test_mup_keeps_activations_and_their_change_as_the_width_grows(case):
    got = slopes([model(width, 2, "mup") for width in WIDTHS], WIDTHS, case)
    assert max(map(abs, got.values())) < 0.1, got


def test_without_it_they_grow_with_the_width():
    got = slopes([model(width, 2, "standard") for width in WIDTHS], WIDTHS, "adamw")
    assert max(got.values()) > 0.3, got


def test_completep_keeps_them_as_the_depth_grows_and_mup_alone_does_not():
    """Measured: -0.04 and 0.00 with the depth's multipliers, and hidden states whose change grows in proportion without them.

    Embeddings have RMS 1 here and rates are small, so that the stream that the final norm divides by is the embedding's and
    what it shows is the sum of what the layers changed.
    """
    got = slopes([model(64, depth, "completep") for depth in DEPTHS], DEPTHS, "small", 20)
    assert max(map(abs, got.values())) < 0.1, got
    got = slopes([model(64, depth, "mup") for depth in DEPTHS], DEPTHS, "small", 20)
    assert got["change of hidden states"] > 0.9, got

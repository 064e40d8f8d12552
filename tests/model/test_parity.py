"""Agreement with transformers' SmolLM3, from arrays that make_golden.py wrote; needs no torch.

B batch, S sequence, V vocabulary
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoljax.losses import cross_entropy
from smoljax.model import ModelConfig, forward, hidden, unembedding

BOUNDARY = 10
TIED = ModelConfig(
    vocab_size=384,
    num_layers=4,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    rope_theta=50_000.0,
    no_rope_layer_interval=4,
    max_seq_len=128,
)
CONFIGS = {
    "tied": TIED,
    "untied": dataclasses.replace(
        TIED, tie_embeddings=False, rope_theta=10_000.0, no_rope_layer_interval=2
    ),
}


def from_transformers(config, tensor, *, norms=False):
    """Our tree from `tensor(name)`: a weight [out, in], or a gradient norm, per parameter."""
    D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim

    def stack(name, shape):
        parts = [tensor(f"model.layers.{i}.{name}.weight") for i in range(config.num_layers)]
        return np.stack(parts if norms or shape is None else [x.T.reshape(shape) for x in parts])

    tree = {
        "embedding": tensor("model.embed_tokens.weight"),
        "layers": {
            "attention": {
                "query": stack("self_attn.q_proj", (D, N, H)),
                "key": stack("self_attn.k_proj", (D, K, H)),
                "value": stack("self_attn.v_proj", (D, K, H)),
                "output": stack("self_attn.o_proj", (N, H, D)),
            },
            "mlp": {
                "gate": stack("mlp.gate_proj", (D, -1)),
                "up": stack("mlp.up_proj", (D, -1)),
                "down": stack("mlp.down_proj", (-1, D)),
            },
            "attention_norm": stack("input_layernorm", None),
            "mlp_norm": stack("post_attention_layernorm", None),
        },
        "final_norm": tensor("model.norm.weight"),
    }
    if not config.tie_embeddings:
        tree["head"] = tensor("lm_head.weight").T
    return tree


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request):
    golden = np.load(Path(__file__).parent / "golden" / f"smollm3_{request.param}.npz")
    config = CONFIGS[request.param]
    weights = from_transformers(
        config, lambda name: golden[f"weight/{name}"].astype(np.float32) / 64
    )
    return config, golden, jax.tree.map(jnp.asarray, weights)


def difference(config, params, golden, segment_ids_BS=None, name="logits"):
    run = jax.jit(forward, static_argnums=0)
    logits_BSV = run(config, params, jnp.asarray(golden["tokens"]), segment_ids_BS)
    return float(np.abs(logits_BSV - golden[name]).max())


def documents(golden):
    B, S = golden["tokens"].shape
    return jnp.broadcast_to((jnp.arange(S) >= BOUNDARY).astype(jnp.int32) + 1, (B, S))


def test_logits_agree(case):
    config, golden, params = case
    assert np.abs(golden["logits"]).max() > 5  # They say something.
    assert difference(config, params, golden) < 2e-4


def test_packed_logits_agree(case):
    config, golden, params = case
    assert difference(config, params, golden, documents(golden), "packed_logits") < 2e-4
    # Control: without segment ids the second document sees the first.
    assert difference(config, params, golden, None, "packed_logits") > 0.1


def test_packed_loss_and_gradient_norms_agree(case):
    config, golden, params = case
    tokens_BS = jnp.asarray(golden["tokens"])
    S = tokens_BS.shape[1]
    position_S = jnp.arange(S)
    mask_BS = jnp.broadcast_to(
        (position_S != BOUNDARY - 1) & (position_S != S - 1), tokens_BS.shape
    )

    def loss(params):
        total, num_targets, _ = cross_entropy(
            hidden(config, params, tokens_BS, documents(golden)),
            unembedding(config, params),
            jnp.roll(tokens_BS, -1, axis=1),
            mask_BS,
            chunk_size=16,
        )
        return total / num_targets

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, golden["packed_loss"], rtol=1e-5)
    expected = from_transformers(config, lambda name: golden[f"gradient_norm/{name}"], norms=True)

    def compare(path, got, want):
        layers = "layers" in jax.tree_util.keystr(path)
        axes = tuple(range(1 if layers else 0, got.ndim))
        norms = np.sqrt(np.square(np.asarray(got, np.float64)).sum(axis=axes))
        np.testing.assert_allclose(norms, want, rtol=1e-4, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, gradient, expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"no_rope_layer_interval": 0},
        {"no_rope_layer_interval": 3},
        {"rope_theta": 20_000.0},
        {"norm_eps": 1e-2},
    ],
)
def test_a_wrong_setting_does_not_agree(case, wrong):
    config, golden, params = case
    assert difference(dataclasses.replace(config, **wrong), params, golden) > 2e-3


def test_inverted_nope_does_not_agree(case, monkeypatch):
    config, golden, params = case
    uses_rope = ModelConfig.uses_rope
    monkeypatch.setattr(ModelConfig, "uses_rope", lambda self, layer: not uses_rope(self, layer))
    inverted = dataclasses.replace(config, max_seq_len=127)  # Another config: it compiles anew.
    assert difference(inverted, params, golden) > 2e-3

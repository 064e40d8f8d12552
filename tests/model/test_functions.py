"""The decoder through its pure functions.

B batch, S sequence, D model width, V vocabulary
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from smoljax.errors import SmoljaxError
from smoljax.model import ModelConfig, forward, hidden, init, logical_axes, unembedding

CONFIG = ModelConfig(
    vocab_size=96,
    num_layers=4,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    scan_layers=False,
    init_std=0.2,  # Large enough for attention and RoPE to matter.
)
SCANNED = dataclasses.replace(CONFIG, scan_layers=True)

compiled_init = jax.jit(init, static_argnums=0)
compiled_forward = jax.jit(forward, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return compiled_init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens_BS():
    return jax.random.randint(jax.random.key(1), (2, 24), 0, CONFIG.vocab_size)


def value_and_gradient(config, params, tokens_BS, **options):
    def loss(params):
        return jnp.sum(jnp.square(forward(config, params, tokens_BS, **options)))

    return jax.jit(jax.value_and_grad(loss))(params)


def test_parameters_have_the_shapes_and_names_of_the_contract():
    config = dataclasses.replace(CONFIG, tie_embeddings=False)
    L, D, N, K, H, F, V = 4, 32, 4, 2, 8, 48, 96
    shapes = {
        "embedding": (V, D),
        "layers": {
            "attention": {
                "query": (L, D, N, H),
                "key": (L, D, K, H),
                "value": (L, D, K, H),
                "output": (L, N, H, D),
            },
            "mlp": {"gate": (L, D, F), "up": (L, D, F), "down": (L, F, D)},
            "attention_norm": (L, D),
            "mlp_norm": (L, D),
        },
        "final_norm": (D,),
        "head": (D, V),
    }
    params = init(config, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == shapes
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    axes = logical_axes(config)
    assert axes["layers"]["attention"]["output"] == ("layers", "heads", "head_dim", "embed")
    assert axes["head"] == ("embed", "vocab")
    lengths = jax.tree.map(len, axes, is_leaf=lambda node: isinstance(node, tuple))
    assert lengths == jax.tree.map(jnp.ndim, params)


def test_init_is_normal_with_gains_of_one_and_differs_by_layer(params):
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if "norm" in jax.tree_util.keystr(path):
            assert (leaf == 1).all()
        else:
            assert abs(leaf.mean()) < 4 * 0.2 / leaf.size**0.5
            assert abs(leaf.std() / 0.2 - 1) < 4 / (2 * leaf.size) ** 0.5
    query = params["layers"]["attention"]["query"]
    assert not np.array_equal(query[0], query[1])


def test_init_does_not_depend_on_execution(params):
    for other in (SCANNED, dataclasses.replace(CONFIG, remat="full", compute_dtype="bfloat16")):
        again = compiled_init(other, jax.random.key(0))
        jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.parametrize(
    ("scan", "remat"),
    [
        (True, "none"),
        (True, "full"),
        (True, "dots"),
        (True, "save_attention"),
        (True, "save_projections"),
        (False, "save_attention"),
    ],
)
def test_every_execution_computes_the_same(params, tokens_BS, scan, remat):
    config = dataclasses.replace(CONFIG, scan_layers=scan, remat=remat)
    value, gradient = value_and_gradient(config, params, tokens_BS)
    expected_value, expected_gradient = value_and_gradient(CONFIG, params, tokens_BS)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient)):
        np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


def test_layers_are_repeated_on_a_cpu_and_run_in_a_loop_elsewhere(params, tokens_BS):
    def loops(config, platform):
        # Two kinds of devices that nothing runs on: only tracing asks for their platform.
        device = AbstractDevice(f"{platform} of nobody", None, platform)
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
            traced = jax.make_jaxpr(functools.partial(hidden, config))(params, tokens_BS)
        unrolls = [
            equation.params["unroll"]
            for equation in traced.eqns
            if equation.primitive.name == "scan" and equation.params["length"] == config.num_layers
        ]
        return [unroll == 1 for unroll in unrolls]

    default = dataclasses.replace(CONFIG, scan_layers=None, attention="reference")
    assert loops(default, "cpu") == [False]
    assert loops(default, "tpu") == loops(default, "gpu") == [True]
    for scan in (True, False):
        named = dataclasses.replace(default, scan_layers=scan)
        assert loops(named, "cpu") == loops(named, "tpu") == [scan]


def test_remat_holds_less_for_the_backward_pass(params):
    tokens_BS = jnp.zeros((2, 128), jnp.int32)

    def temporaries(remat):
        config = dataclasses.replace(SCANNED, remat=remat)
        shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))

        def loss(params):
            return jnp.sum(jnp.square(hidden(config, params, tokens_BS)))

        compiled = jax.jit(jax.grad(loss)).lower(shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    held = {remat: temporaries(remat) for remat in ("none", "dots", "save_attention", "full")}
    assert held["full"] < held["save_attention"] < held["dots"] < held["none"]


def test_packed_documents_do_not_see_each_other(params, tokens_BS):
    segment_ids_BS = jnp.asarray([[1] * 10 + [2] * 14, [1] * 3 + [2] * 18 + [0] * 3])
    other_BS = jnp.where(segment_ids_BS == 2, (tokens_BS + 7) % CONFIG.vocab_size, tokens_BS)
    before, after = (
        np.asarray(compiled_forward(CONFIG, params, x_BS, segment_ids_BS))
        for x_BS in (tokens_BS, other_BS)
    )
    inside = np.asarray(segment_ids_BS == 2)
    np.testing.assert_array_equal(before[~inside], after[~inside])
    assert (before[inside] != after[inside]).any()
    assert np.isfinite(before).all()


def test_a_packed_document_gets_the_logits_it_gets_alone(params, tokens_BS):
    segment_ids_BS = jnp.asarray([[1] * 10 + [2] * 14] * 2)
    packed = compiled_forward(CONFIG, params, tokens_BS, segment_ids_BS)[:, 10:]
    alone = compiled_forward(CONFIG, params, tokens_BS[:, 10:])
    # Positions go on counting in the window, and RoPE is relative.
    np.testing.assert_allclose(packed, alone, atol=2e-4)
    leaked = compiled_forward(CONFIG, params, tokens_BS)[:, 10:]  # Control: without segment ids.
    assert np.abs(leaked - alone).max() > 0.1


def test_positions_matter_through_their_differences_only(params, tokens_BS):
    positions_BS = jnp.broadcast_to(jnp.arange(24), (2, 24))
    plain = compiled_forward(CONFIG, params, tokens_BS)
    np.testing.assert_array_equal(
        plain, compiled_forward(CONFIG, params, tokens_BS, None, positions_BS)
    )
    shifted = compiled_forward(CONFIG, params, tokens_BS, None, positions_BS + 100)
    np.testing.assert_allclose(shifted, plain, atol=5e-4)
    stretched = compiled_forward(CONFIG, params, tokens_BS, None, positions_BS * 2)
    assert np.abs(stretched - plain).max() > 0.1


def test_layers_without_rope_ignore_positions(params, tokens_BS):
    config = dataclasses.replace(CONFIG, no_rope_layer_interval=1)  # No layer has RoPE.
    positions_BS = jax.random.randint(jax.random.key(2), (2, 24), 0, 1000)
    np.testing.assert_array_equal(
        compiled_forward(config, params, tokens_BS),
        compiled_forward(config, params, tokens_BS, None, positions_BS),
    )


def test_tied_and_untied_heads(params, tokens_BS):
    assert unembedding(CONFIG, params).shape == (32, 96)
    untied = dataclasses.replace(CONFIG, tie_embeddings=False)
    same = {**params, "head": params["embedding"].T}
    np.testing.assert_allclose(
        compiled_forward(CONFIG, params, tokens_BS),
        compiled_forward(untied, same, tokens_BS),
        atol=1e-5,
    )


def test_bfloat16_compute_is_close_and_keeps_float32_gradients(params, tokens_BS):
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    assert hidden(config, params, tokens_BS).dtype == jnp.bfloat16
    logits_BSV = compiled_forward(config, params, tokens_BS)
    assert logits_BSV.dtype == jnp.float32
    exact_BSV = compiled_forward(CONFIG, params, tokens_BS)
    assert np.abs(logits_BSV - exact_BSV).mean() < 0.05 * np.abs(exact_BSV).mean()
    _, gradient = value_and_gradient(config, params, tokens_BS)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


def test_shapes_that_do_not_agree_are_refused(params, tokens_BS):
    with pytest.raises(SmoljaxError, match=r"segment_ids has shape \(2, 23\).*\(2, 24\)"):
        hidden(CONFIG, params, tokens_BS, tokens_BS[:, 1:])

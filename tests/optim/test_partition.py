import jax
import jax.numpy as jnp
import pytest

from smoljax.errors import SmoljaxError
from smoljax.optim import MatrixSpec, OptimizerConfig, Rule, assign, describe, treatments


def test_roles_of_the_decoder(random_tree, axes):
    got = {path: a.role for path, a in assign(random_tree(0), logical_axes=axes).items()}
    attention = {f"layers/attention/{n}": "hidden" for n in ("query", "key", "value", "output")}
    mlp = {f"layers/mlp/{name}": "hidden" for name in ("gate", "up", "down")}
    norms = {"layers/attention_norm": "norm", "layers/mlp_norm": "norm", "final_norm": "norm"}
    assert got == attention | mlp | norms | {"embedding": "embedding", "head": "head"}


def test_input_and_output_axes_of_the_attention_kernels(random_tree, axes):
    got = assign(jax.eval_shape(lambda: random_tree(0)), logical_axes=axes)
    assert got["layers/attention/query"].spec == MatrixSpec(inputs=(-3,), outputs=(-2, -1))
    assert got["layers/attention/output"].spec == MatrixSpec(inputs=(-3, -2), outputs=(-1,))
    assert got["layers/mlp/down"].spec == MatrixSpec(inputs=(-2,), outputs=(-1,))


def test_rules_by_path_need_no_axes_and_the_first_match_counts():
    params = {"wte": jnp.ones((8, 4)), "blocks": [{"w": jnp.ones((4, 4)), "b": jnp.ones(4)}]}
    rules = (
        Rule("embedding", path="^wte$"),
        Rule("norm", path="/b$"),
        Rule("hidden", path="^blocks/"),
    )
    got = {path: a.role for path, a in assign(params, rules=rules).items()}
    assert got == {"wte": "embedding", "blocks/0/w": "hidden", "blocks/0/b": "norm"}


def test_every_unmatched_leaf_is_listed():
    params = {
        "embedding": jnp.ones((8, 4)),
        "router": jnp.ones((4, 2)),
        "gate": jnp.ones((2, 4, 4)),
    }
    axes = {
        "embedding": ("vocab", "embed"),
        "router": ("embed", "experts"),
        "gate": ("a", "b", "c"),
    }
    with pytest.raises(
        SmoljaxError, match=r"2 parameter.*gate \[2, 4, 4\].*router \[4, 2\].*Rule"
    ) as error:
        assign(params, logical_axes=axes)
    assert "embedding" not in str(error.value)


def test_batch_axes_stand_in_front_and_nothing_else_does():
    def role(*names):
        leaf = jnp.ones((2,) * len(names))
        return assign({"w": leaf}, logical_axes={"w": names})["w"].role

    assert role("layers", "experts", "embed", "mlp") == "hidden"
    assert role("layers", "embed") == "norm"  # two axes, and yet no matrix
    with pytest.raises(SmoljaxError, match="no role rule"):
        role("blocks", "embed", "mlp")


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.bool_])
def test_leaves_that_are_not_real_floats_are_refused(dtype):
    with pytest.raises(SmoljaxError, match=f"parameter w is {jnp.dtype(dtype).name}"):
        assign({"w": jnp.ones((2, 2), dtype)}, rules=(Rule("hidden", path="w"),))


def test_two_leaves_of_one_path_are_refused():
    params = {"a/b": jnp.ones((4, 4)), "a": {"b": jnp.ones((4, 4))}}
    with pytest.raises(SmoljaxError, match="several leaves of the tree have the path a/b: rename"):
        assign(params, rules=[Rule("hidden", path=".")])


def test_axis_names_must_fit_the_leaf():
    with pytest.raises(SmoljaxError, match="one axis name for each axis"):
        assign({"w": jnp.ones((2, 2, 2))}, logical_axes={"w": ("embed", "mlp")})


def test_a_rule_that_matches_nothing_in_particular_is_refused():
    with pytest.raises(SmoljaxError, match="neither axes nor a path"):
        assign({"w": jnp.ones((2, 2))}, rules=(Rule("hidden"),))


def test_describe_prints_what_each_leaf_gets(random_tree, axes):
    config = OptimizerConfig(name="muon", learning_rate=0.02, adamw_learning_rate=0.005)
    text = describe(random_tree(0), treatments(config), logical_axes=axes)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    assert rows["layers/attention/query"] == [
        "3x32x4x8",
        "3,072",
        "hidden",
        "muon",
        "0.02",
        "0.1",
        "wsd",
    ]
    assert rows["embedding"] == ["128x32", "4,096", "embedding", "adamw", "0.005", "0", "wsd"]
    assert rows["final_norm"] == ["32", "32", "norm", "adamw", "0.005", "0.1", "wsd"]
    total = sum(leaf.size for leaf in jax.tree.leaves(random_tree(0)))
    assert rows["all"][-1] == f"{total:,}"
    assert "36,864" in next(line for line in text.splitlines() if line.startswith("all of muon"))


def test_a_role_without_treatment_is_named():
    with pytest.raises(SmoljaxError, match="'router' has no treatment"):
        describe(
            {"w": jnp.ones((2, 2))},
            treatments(OptimizerConfig()),
            rules=(Rule("router", path="w"),),
        )

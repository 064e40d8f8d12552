import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smoljax import optim
from smoljax.errors import SmoljaxError

HEAVY = ("flax", "grain", "tensorflow", "orbax", "torch")

TRANSFORMS = {
    "muon": lambda: optim.muon(0.1, weight_decay=0.1, cautious=True, metrics=True),
    "normuon": lambda: optim.normuon(0.1),
    "adamuon": lambda: optim.adamuon(0.1),
    "muonh": lambda: optim.muonh(0.1),
    "adamh": lambda: optim.adamh(0.1),
    "soap": lambda: optim.soap(0.1),
    "centralize": optim.centralize,
    "normalize_blocks": optim.normalize_blocks,
    "clip_by_global_norm": lambda: optim.clip_by_global_norm(1.0),
    "adagc": optim.adagc,
    "zclip": optim.zclip,
    "add_decayed_weights": lambda: optim.add_decayed_weights(0.1, cautious=True),
    "ema_weights": lambda: optim.ema_weights(0.9),
    "tail_average": lambda: optim.tail_average(1),
    "measure_updates": optim.measure_updates,
    "skip_spikes": lambda: optim.skip_spikes(optax.adamw(0.1)),
}
OF_MATRICES = ("muon", "normuon", "adamuon", "muonh", "adamh", "soap", "centralize")


def test_importing_it_loads_only_jax_and_optax():
    code = f"""
import sys
import smoljax.optim
loaded = [name for name in {HEAVY} if name in sys.modules]
ours = [name for name in sys.modules if name.startswith("smoljax.") and not name.startswith("smoljax.optim")]
print(loaded, sorted(ours))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] ['smoljax.errors']"


def test_every_public_name_is_there_and_documented():
    for name in optim.__all__:
        value = getattr(optim, name)
        assert not callable(value) or value.__doc__, name
    assert sorted(optim.__all__, key=lambda name: (not name.isupper(), name)) == optim.__all__


def odd_tree(name):
    """Tuples, lists, a None, an empty dict, a bfloat16 leaf; and vectors, scalars and an empty leaf where they may be."""
    rng = np.random.default_rng(0)

    def array(*shape, dtype="float32"):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    tree = {
        "a": (array(4, 3), None, array(2, 3, 4, dtype="bfloat16")),
        "none": None,
        "nothing": {},
        "z": [array(4, 4), array(3, 4)],
    }
    if name not in OF_MATRICES:
        tree |= {"scalar": array(), "vector": array(3), "empty": jnp.zeros((0, 2)), "number": 0.5}
    return tree


@pytest.mark.parametrize("name", TRANSFORMS)
def test_any_tree_goes_through_and_the_state_keeps_its_types(name):
    params = odd_tree(name)
    transform = optax.chain(TRANSFORMS[name](), optax.scale(-0.1))
    first = state = transform.init(params)
    update = jax.jit(transform.update)
    for _ in range(2):
        updates, state = update(params, state, params)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
        assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, params)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    for old, new in zip(jax.tree.leaves(first), jax.tree.leaves(state), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    assert jax.tree.structure(first) == jax.tree.structure(state)


@pytest.mark.parametrize("dtype", ["complex64", "int32"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_leaves_that_are_not_real_floats_are_refused_at_init(name, dtype):
    params = {"layers": {"w": jnp.ones((4, 4), dtype)}}
    with pytest.raises(SmoljaxError, match=f"parameter layers/w is {dtype}"):
        TRANSFORMS[name]().init(params)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: optim.muon(0.1, beta=1.0), "beta is 1.0: give a number at least 0 and below 1"),
        (lambda: optim.muon(0.1, eps=-1.0), "eps is -1.0"),
        (lambda: optim.muon(0.1, dtype="int8"), "dtype is 'int8'"),
        (lambda: optim.muon(0.1, momentum_dtype="int8"), "momentum_dtype is 'int8'"),
        (lambda: optim.normuon(0.1, b2=2.0), "b2 is 2.0"),
        (lambda: optim.adamuon(0.1, beta=-0.1), "beta is -0.1"),
        (lambda: optim.hyperball(-0.1), "learning_rate is -0.1"),
        (lambda: optim.muonh(1.0), "learning_rate is 1.0"),
        (lambda: optim.adamh(0.1, b1=3.0), "b1 is 3.0"),
    ],
)
def test_numbers_out_of_range_are_refused_at_once(make, words):
    with pytest.raises(SmoljaxError, match=words):
        make()


def test_a_function_of_specs_under_inject_hyperparams_is_explained():
    def specs(tree):
        return jax.tree.map(lambda _: optim.MatrixSpec(), tree)

    params = {"w": jnp.ones((4, 3))}
    with pytest.raises(SmoljaxError, match="static_args"):
        optax.inject_hyperparams(optim.muon)(0.1, specs=specs).init(params)
    transform = optax.inject_hyperparams(optim.muon, static_args="specs")(0.1, specs=specs)
    updates, _ = transform.update(params, transform.init(params), params)
    assert updates["w"].shape == (4, 3)

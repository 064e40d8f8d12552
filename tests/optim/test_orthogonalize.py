import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from smoljax.errors import SmoljaxError
from smoljax.optim import MatrixSpec, newton_schulz
from smoljax.optim.orthogonalize import orthogonalizer

OPTIONS = dict(coefficients="keller", steps=None, dtype=None, mesh=None, mesh_axis=None)


def tree():
    rng = np.random.default_rng(0)
    shapes = {"wide": (8, 20), "tall": (3, 20, 8), "fused": (8, 48)}
    return {name: jnp.float32(rng.standard_normal(shape)) for name, shape in shapes.items()}


SPECS = {"wide": MatrixSpec(), "tall": MatrixSpec(), "fused": MatrixSpec(split=(20, 8, 20))}


def test_every_matrix_is_the_one_that_newton_schulz_gives_alone():
    calls = []

    def measure(o_BMN):
        calls.append(o_BMN.shape)
        return jnp.sum(jnp.square(o_BMN), axis=(-2, -1))

    got = orthogonalizer(**OPTIONS, measure=measure)(tree(), SPECS)
    split = jnp.split(tree()["fused"], [20, 28], axis=1)
    want = {
        "wide": [tree()["wide"][None]],
        "tall": [tree()["tall"]],
        "fused": [piece[None] for piece in split],
    }
    for path, matrices in want.items():
        assert len(got[path]) == len(matrices)
        for piece, matrix in zip(got[path], matrices):
            alone = newton_schulz(matrix, coefficients="keller")
            np.testing.assert_allclose(piece.matrices, alone, atol=1e-5)
            np.testing.assert_allclose(piece.measures, jnp.sum(alone**2, axis=(1, 2)), rtol=1e-4)
    # Two shapes, whatever way round: two iterations, each matrix on its own on a CPU.
    assert sorted(calls) == [(8, 8), (8, 20)]


def test_without_a_measure_there_is_nothing_to_compute():
    shapes = jax.eval_shape(lambda x: orthogonalizer(**OPTIONS)(x, SPECS), tree())
    assert all(piece.measures is None for pieces in shapes.values() for piece in pieces)


def test_unknown_options_are_refused_at_once():
    mesh = Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    for options, words in [
        ({"coefficients": "muon"}, "keller"),
        ({"mesh": mesh, "mesh_axis": ("fsdp", "stage")}, "'stage' is not an axis of the mesh"),
        ({"mesh_axis": "fsdp"}, "give mesh and mesh_axis together"),
    ]:
        with pytest.raises(SmoljaxError, match=words):
            orthogonalizer(**(OPTIONS | options))

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoljax.errors import SmoljaxError
from smoljax.optim import MatrixSpec
from smoljax.optim.matrices import (
    from_matrices,
    from_statistics,
    matrix_shapes,
    specs_by_path,
    to_matrices,
    to_statistics,
)

L, D, N, H = 2, 3, 4, 5
TO_HEADS = MatrixSpec(inputs=(-3,), outputs=(-2, -1))
FROM_HEADS = MatrixSpec(inputs=(-3, -2), outputs=(-1,))


def counting(*shape):
    return jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape)


@st.composite
def layouts(draw):
    """A shape of up to five axes and a spec that fits it: axes in any order and sign, split or not, heads or not."""
    ndim = draw(st.integers(2, 5))
    shape = draw(st.lists(st.integers(1, 6), min_size=ndim, max_size=ndim))
    axes = draw(st.permutations(range(ndim)))
    stop = draw(st.integers(2, ndim))
    middle = draw(st.integers(1, stop - 1))
    inputs, outputs = axes[:middle], axes[middle:stop]
    heads = None
    if draw(st.booleans()):
        axis, per_matrix = draw(st.sampled_from(axes[:stop])), draw(st.integers(1, 3))
        shape[axis] *= per_matrix
        heads = (axis - draw(st.sampled_from([0, ndim])), per_matrix)
    split = ()
    if draw(st.booleans()):
        unit = per_matrix if heads and axis == outputs[0] else 1
        split = tuple(unit * size for size in draw(st.lists(st.integers(1, 4), min_size=1)))
        shape[outputs[0]] = sum(split)
    signed = [
        tuple(a - draw(st.sampled_from([0, ndim])) for a in axes) for axes in (inputs, outputs)
    ]
    return tuple(shape), MatrixSpec(*signed, split=split, heads=heads)


@given(layouts())
@settings(deadline=None, max_examples=200)
def test_leaf_and_matrices_are_the_same_numbers(layout):
    shape, spec = layout
    leaf = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    pieces = to_matrices(leaf, spec)
    assert tuple(piece.shape for piece in pieces) == matrix_shapes("w", shape, spec)
    assert len(pieces) == max(1, len(spec.split))
    assert sum(piece.size for piece in pieces) == leaf.size
    np.testing.assert_array_equal(from_matrices(pieces, shape, spec), leaf)


@given(layouts(), st.sampled_from(["matrix", "neuron"]))
@settings(deadline=None, max_examples=100)
def test_statistics_come_back_and_keep_the_axes_that_count_matrices(layout, per):
    shape, spec = layout
    shapes = matrix_shapes("w", shape, spec)
    rng = np.random.default_rng(0)
    pieces = [
        rng.standard_normal((count, 1, d_out if per == "neuron" else 1)).astype(np.float32)
        for count, _, d_out in shapes
    ]
    statistic = from_statistics(pieces, shape, spec, per=per)
    assert statistic.size == sum(piece.size for piece in pieces)
    assert statistic.ndim == len(shape)
    matrix_axes = {axis % len(shape) for axis in spec.inputs + spec.outputs}
    for axis in set(range(len(shape))) - matrix_axes:
        assert statistic.shape[axis] == shape[axis]
    for got, want in zip(to_statistics(statistic, shape, spec, per=per), pieces):
        np.testing.assert_array_equal(got, want)


def test_kernels_to_and_from_heads():
    query, output = counting(L, D, N, H), counting(L, N, H, D)
    np.testing.assert_array_equal(to_matrices(query, TO_HEADS)[0], query.reshape(L, D, N * H))
    np.testing.assert_array_equal(to_matrices(output, FROM_HEADS)[0], output.reshape(L, N * H, D))


def test_a_head_or_a_pair_of_heads_is_a_matrix():
    query, output = counting(L, D, N, H), counting(L, N, H, D)
    for per_matrix in (1, 2):
        (pieces,) = to_matrices(query, dataclasses.replace(TO_HEADS, heads=(-2, per_matrix)))
        want = [
            query[layer, :, head : head + per_matrix].reshape(D, per_matrix * H)
            for layer in range(L)
            for head in range(0, N, per_matrix)
        ]
        np.testing.assert_array_equal(pieces, want)
        (pieces,) = to_matrices(output, dataclasses.replace(FROM_HEADS, heads=(-3, per_matrix)))
        want = [
            output[layer, head : head + per_matrix].reshape(per_matrix * H, D)
            for layer in range(L)
            for head in range(0, N, per_matrix)
        ]
        np.testing.assert_array_equal(pieces, want)


def test_fused_kernel_is_query_key_and_value():
    fused = counting(L, D, N + 2, H)
    whole = dataclasses.replace(TO_HEADS, split=(N, 1, 1))
    query, key, value = to_matrices(fused, whole)
    np.testing.assert_array_equal(query, fused[:, :, :N].reshape(L, D, N * H))
    np.testing.assert_array_equal(key, fused[:, :, N])
    np.testing.assert_array_equal(value, fused[:, :, N + 1])
    per_head = dataclasses.replace(whole, heads=(-2, 1))
    assert matrix_shapes("w", fused.shape, per_head) == ((L * N, D, H), (L, D, H), (L, D, H))


def test_statistics_lie_as_the_leaf_does():
    def shape(leaf_shape, spec, per):
        stacks = [
            np.ones((count, 1, d_out if per == "neuron" else 1))
            for count, _, d_out in matrix_shapes("w", leaf_shape, spec)
        ]
        return from_statistics(stacks, leaf_shape, spec, per=per).shape

    pairs_in = dataclasses.replace(FROM_HEADS, heads=(-3, 2))
    fused = dataclasses.replace(TO_HEADS, split=(2, 1, 1))
    assert shape((L, D, N, H), TO_HEADS, "matrix") == (L, 1, 1, 1)
    assert shape((L, D, N, H), TO_HEADS, "neuron") == (L, 1, N, H)
    assert shape((L, N, H, D), pairs_in, "matrix") == (L, N // 2, 1, 1)
    assert shape((L, N, H, D), pairs_in, "neuron") == (L, N // 2, 1, D)
    assert shape((L, D, N, H), fused, "matrix") == (L, 1, 3, 1)


@pytest.mark.parametrize(
    ("shape", "spec", "words"),
    [
        ((3,), MatrixSpec(), r"layers/w has shape \[3\], which holds no matrix with input axes"),
        ((), MatrixSpec(), "holds no matrix"),
        ((3, 3), MatrixSpec((0,), (-2,)), "holds no matrix"),
        ((3, 3), MatrixSpec((0,), ()), "holds no matrix"),
        ((3, 9), MatrixSpec(split=(3, 3)), r"w has shape \[3, 9\].*sum to 9, the size of axis -1"),
        ((3, 9), MatrixSpec(split=(9, 0)), "positive sizes that sum to 9"),
        (
            (2, 3, 4, 5),
            dataclasses.replace(TO_HEADS, heads=(0, 1)),
            r"heads on axis 0: choose one of the input and output axes \(-3, -2, -1\)",
        ),
        ((2, 3, 4, 5), dataclasses.replace(TO_HEADS, heads=(4, 1)), "heads on axis 4"),
        ((2, 3, 4, 5), dataclasses.replace(TO_HEADS, heads=(-2, 3)), "choose a divisor of 4"),
        ((2, 3, 4, 5), dataclasses.replace(TO_HEADS, heads=(-2, 0)), "choose a divisor of 4"),
        (
            (3, 8, 5),
            dataclasses.replace(TO_HEADS, split=(4, 2, 2), heads=(-2, 4)),
            "choose a divisor of 2",
        ),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(shape, spec, words):
    with pytest.raises(SmoljaxError, match=words):
        matrix_shapes("layers/w", shape, spec)


def test_specs_are_found_by_path():
    tree = {"a": {"w": jnp.ones((2, 2))}, "b": jnp.ones((2, 2))}
    spec = MatrixSpec(inputs=(1,), outputs=(0,))
    assert specs_by_path(None, tree) == {"a/w": MatrixSpec(), "b": MatrixSpec()}
    specs = {"a": {"w": spec}, "b": MatrixSpec()}
    assert specs_by_path(specs, {"a": {"w": tree["b"]}})["a/w"] is spec
    assert specs_by_path(lambda _: specs, tree)["a/w"] is spec
    with pytest.raises(SmoljaxError, match="no MatrixSpec for a/w, b"):
        specs_by_path({"c": spec}, tree)

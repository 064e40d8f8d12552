"""Shardings from logical axes, and errors that name what does not divide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from smoljax import parallel
from smoljax.errors import SmoljaxError
from smoljax.parallel.rules import param_spec

AUTO = (AxisType.Auto,) * 4


def abstract_mesh(data, fsdp, tensor, context):
    return AbstractMesh((data, fsdp, tensor, context), parallel.AXES, axis_types=AUTO)


def test_a_matrix_is_split_over_fsdp_and_tensor():
    shapes = {"up": jax.ShapeDtypeStruct((4, 16, 64), jnp.float32)}
    axes = {"up": ("layers", "embed", "mlp")}
    placed = parallel.param_shardings(abstract_mesh(1, 4, 2, 1), axes, shapes)
    assert placed["up"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert placed["up"].shard_shape((4, 16, 64)) == (4, 4, 32)


def test_an_axis_that_does_not_divide_is_named():
    shapes = {"layers": {"key": jax.ShapeDtypeStruct((4, 16, 3, 8), jnp.float32)}}
    axes = {"layers": {"key": ("layers", "embed", "kv_heads", "head_dim")}}
    with pytest.raises(SmoljaxError, match=r"key.*kv_heads.*size 3.*2 devices.*tensor"):
        parallel.param_shardings(abstract_mesh(1, 1, 2, 1), axes, shapes)


def test_the_legal_counts_divide_every_axis_that_tensor_splits():
    shapes = {"query": jax.ShapeDtypeStruct((16, 12, 8), jnp.float32)}
    shapes |= {"key": jax.ShapeDtypeStruct((16, 4, 8), jnp.float32)}
    axes = {"query": ("embed", "heads", "head_dim"), "key": ("embed", "kv_heads", "head_dim")}
    with pytest.raises(SmoljaxError, match=r"key.*size 4.*8 devices.*one of 1, 2, 4$"):
        parallel.param_shardings(abstract_mesh(1, 1, 8, 1), axes, shapes)


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        # 32 does not divide the width, but beside 2 of tensor the 64 units; the gain has nothing else.
        (("layers", "embed", "mlp"), (32, 24, 64), (None, None, ("tensor", "fsdp"))),
        (("vocab", "embed"), (128, 24), (("tensor", "fsdp"), None)),
        (("layers", "embed", "heads", "head_dim"), (32, 24, 6, 32), (None, None, "tensor", "fsdp")),
        (("layers", "embed"), (32, 24), (None, None)),
        # It divides the width, and so stays there.
        (("layers", "embed", "mlp"), (32, 96, 64), (None, "fsdp", "tensor")),
    ],
)
def test_fsdp_splits_another_axis_where_it_does_not_divide_the_width(axes, shape, spec):
    assert param_spec(abstract_mesh(1, 32, 2, 1), axes, shape) == PartitionSpec(*spec)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1, 1)),
        ({"data": 1, "fsdp": -1}, (1, 8, 1, 1)),
        ({"data": -1, "tensor": 2, "context": 2}, (2, 1, 2, 2)),
    ],
)
def test_the_free_axis_takes_what_is_left(sizes, shape):
    assert parallel.MeshConfig(**sizes).shape(8) == shape


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "does not divide 8 devices"),
        ({"data": 2, "fsdp": 2}, "does not divide 8 devices"),
        ({"data": -1, "fsdp": -1}, "only one may be -1"),
        ({"data": 0}, "mesh.data is 0: .*count of devices"),
        ({"fsdp": -2}, "mesh.fsdp is -2: .*count of devices"),
        ({"tensor": 1.5}, "mesh.tensor is 1.5: .*count of devices"),
        ({"data": 16}, "multiply to 16; make that 8, or set one axis to -1"),
        ({"tensor": 3}, "multiply to 3; make that one of 1, 2, 4, 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(SmoljaxError, match=message):
        parallel.MeshConfig(**sizes).shape(8)


def test_a_batch_goes_to_the_mesh_and_back():
    mesh = parallel.make_mesh(parallel.MeshConfig())
    batch = {"tokens": np.arange(12, dtype=np.int32).reshape(4, 3)}
    rows = parallel.local_rows(mesh, 4)
    assert rows == slice(0, 4)
    placed = parallel.put_batch(batch, mesh, rows=rows, batch_size=4)
    np.testing.assert_array_equal(placed["tokens"], batch["tokens"])


def test_a_batch_that_does_not_divide_is_named():
    with pytest.raises(SmoljaxError, match=r"batch_size is 6.*multiple of 4"):
        parallel.local_rows(abstract_mesh(2, 2, 1, 1), 6)


def test_micro_batches_divide_what_a_device_has():
    mesh = abstract_mesh(2, 2, 1, 1)
    parallel.check_batch(mesh, batch_size=24, micro_batches=3, seq_len=8)
    with pytest.raises(
        SmoljaxError, match=r"24.*4 devices.*in 4 micro-batches.*multiple of 16.*1, 2, 3, 6"
    ):
        parallel.check_batch(mesh, batch_size=24, micro_batches=4, seq_len=8)


def test_a_sequence_that_tensor_does_not_divide_is_named():
    parallel.check_sequence(abstract_mesh(2, 1, 4, 1), 12)
    with pytest.raises(SmoljaxError, match=r"seq_len is 10.*4 devices of mesh axis tensor.*of 4"):
        parallel.check_sequence(abstract_mesh(2, 1, 4, 1), 10)
    with pytest.raises(SmoljaxError, match=r"seq_len is 36.*multiple of 8"):
        parallel.check_sequence(abstract_mesh(1, 1, 4, 2), 36)


def test_a_sequence_that_does_not_divide_is_named():
    for legal in (8, 16):
        parallel.check_sequence(abstract_mesh(2, 1, 1, 4), legal)
    parallel.check_sequence(abstract_mesh(2, 4, 1, 1), 7)
    with pytest.raises(SmoljaxError, match=r"seq_len is 12, .* 4 devices .* multiple of 8"):
        parallel.check_sequence(abstract_mesh(2, 1, 1, 4), 12)

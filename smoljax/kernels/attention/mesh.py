"""How a mesh splits attention: rows of the batch, heads, and for the ring the sequence.

B batch, S sequence, N query heads, K key-value heads, H head width
"""

import math

import jax

from smoljax.errors import SmoljaxError

# As in smoljax.parallel.rules, which needs more than JAX (tests/kernels/attention/test_pallas_tpu.py holds them together).
BATCH_AXES = ("data", "fsdp")
HEADS_AXIS = "tensor"
SEQUENCE_AXIS = "context"


def split_axes(q_BSNH: jax.Array, k_BSKH: jax.Array) -> tuple[tuple[str, ...], str | None]:
    """The axes of the active mesh that split the batch, and the one that splits heads.

    Raises:
      SmoljaxError: they do not divide them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    batch = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
    heads = HEADS_AXIS if HEADS_AXIS in mesh.shape else None
    batch_parts = math.prod(mesh.shape[axis] for axis in batch)
    B, K = q_BSNH.shape[0], k_BSKH.shape[2]
    if B % batch_parts:
        raise SmoljaxError(
            f"attention got a batch of {B}, which does not divide over the {batch_parts} devices of mesh axes "
            f"{BATCH_AXES}: make it a multiple of {batch_parts}"
        )
    if K % mesh.shape.get(heads, 1):
        raise SmoljaxError(
            f"attention got {K} key-value heads, which do not divide over the {mesh.shape[heads]} devices of mesh axis "
            f"{HEADS_AXIS!r}: set it to a divisor of {K}"
        )
    return batch, heads


def sequence_parts() -> int:
    """Devices of the active mesh along the axis that splits the sequence; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(SEQUENCE_AXIS, 1)


def splits_sequence() -> str | None:
    """Why a backend that needs the whole sequence cannot run on the active mesh, or None when it can."""
    if sequence_parts() == 1:
        return None
    return f"mesh axis {SEQUENCE_AXIS!r} splits the sequence, which it needs whole"

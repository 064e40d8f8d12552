"""The device mesh: data, fsdp, tensor, context."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from smoljax.errors import SmoljaxError

AXES = ("data", "fsdp", "tensor", "context")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one axis may be -1 and takes what the others leave.

    Attributes:
      data: the batch is split, parameters are replicated.
      fsdp: the batch is split, and so are parameters and optimizer state.
      tensor: heads, feed-forward width and vocabulary are split.
      context: the sequence is split.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1

    def shape(self, num_devices: int) -> tuple[int, int, int, int]:
        """The mesh shape on `num_devices` devices, in the order of AXES."""
        sizes = dataclasses.astuple(self)
        free = [axis for axis, size in zip(AXES, sizes) if size == -1]
        known = math.prod(size for size in sizes if size != -1)
        if len(free) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise SmoljaxError(
                f"config.mesh is {dict(zip(AXES, sizes))}: each axis is a count of devices, and only one may be -1"
            )
        if num_devices % known or (not free and known != num_devices):
            raise SmoljaxError(
                f"config.mesh {dict(zip(AXES, sizes))} does not divide {num_devices} devices: "
                "make the product of its axes equal to the number of devices, or set one axis to -1"
            )
        return tuple(num_devices // known if size == -1 else size for size in sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices (of every host), neighbours placed by JAX for the topology."""
    devices = devices if devices is not None else jax.devices()
    return jax.make_mesh(
        config.shape(len(devices)), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )

"""The device mesh: data, fsdp, tensor, context."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from smoljax.errors import SmoljaxError

AXES = ("data", "fsdp", "tensor", "context")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one axis may be -1 and takes what the others leave.

    Attributes:
      data: the batch is split, parameters are replicated.
      fsdp: the batch is split, and so are parameters and optimizer state.
      tensor: heads, feed-forward width and vocabulary are split, and between blocks the sequence.
      context: the sequence is split.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1

    def shape(self, num_devices: int) -> tuple[int, int, int, int]:
        """The mesh shape on `num_devices` devices, in the order of AXES.

        Raises:
          SmoljaxError: an axis is no count of devices, two are -1, or the counts do not multiply to `num_devices`.
        """
        sizes = dataclasses.astuple(self)
        named = dict(zip(AXES, sizes))
        for axis, size in named.items():
            if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
                raise SmoljaxError(
                    f"config.mesh.{axis} is {size!r}: set it to a count of devices of at least 1, or to -1, "
                    "which takes what the other axes leave"
                )
        free = [axis for axis, size in named.items() if size == -1]
        if len(free) > 1:
            raise SmoljaxError(
                f"config.mesh.{free[0]} and config.mesh.{free[1]} are -1: only one may be -1, "
                "since it takes what the other axes leave"
            )
        known = math.prod(size for size in sizes if size != -1)
        if num_devices % known or (not free and known != num_devices):
            legal = f"one of {', '.join(map(str, divisors(num_devices)))}" if free else num_devices
            raise SmoljaxError(
                f"config.mesh {named} does not divide {num_devices} devices: its axes{' but the -1' if free else ''} "
                f"multiply to {known}; make that {legal}{'' if free else ', or set one axis to -1'}"
            )
        return tuple(num_devices // known if size == -1 else size for size in sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices (of every host), neighbours placed by JAX for the topology: an axis takes whole sides of the torus of
    TPUs where sides multiply to it, else parts of them, in which neighbours are still next to each other.

    Over several slices of TPUs the data axis goes from slice to slice: its exchange, one sum of gradients a step, is the only
    one that the network between them carries well.

    Raises:
      SmoljaxError: the axes do not divide the devices, or the slices do not divide the data axis.
    """
    devices = devices if devices is not None else jax.devices()
    shape = config.shape(len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % slices:
        raise SmoljaxError(
            f"config.mesh.data is {shape[0]}, which does not divide over {slices} slices: "
            f"set it to a multiple of {slices}, as only the data axis goes from slice to slice"
        )
    options = {"devices": devices, "allow_split_physical_axes": True}
    if slices == 1:
        arranged = mesh_utils.create_device_mesh(shape, **options)
    else:
        inside = (shape[0] // slices, *shape[1:])
        arranged = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1, 1), **options)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def divisors(number: int) -> list[int]:
    """All of them, from 1 up."""
    return [n for n in range(1, number + 1) if number % n == 0]

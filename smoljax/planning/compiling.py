"""The real train step, compiled ahead of time for machines that are not here: no data, no arrays, no accelerator."""

import dataclasses
import functools
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from smoljax import configuration, parallel
from smoljax.errors import SmoljaxError, require
from smoljax.planning.topologies import GIB, Topology
from smoljax.training import Run

_SIZE = r"([\d.]+)([KMGT]?)"
# The two ways in which the compiler says so: before it places anything, and after.
_TOO_MUCH = (
    rf"Used {_SIZE} of {_SIZE} (\w+)",
    rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)",
)


@dataclasses.dataclass(frozen=True)
class Overflow:
    """The compiler's verdict that a program needs more memory than a chip has.

    Attributes:
      used: bytes that it needs.
      limit: bytes that a chip has.
      memory: which one ("hbm", "vmem").
    """

    used: float
    limit: float
    memory: str


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program on one chip.

    Attributes:
      params: bytes of parameters.
      optimizer: bytes of optimizer state, the step number included.
      batch: bytes of the batch.
      temporaries: bytes of everything else at once (activations among them); None when it does not fit.
      peak: most bytes in use at a time; None when it does not fit.
      hlo: the optimised program as text; "" when it does not fit.
      overflow: why it does not fit, or None.
      rematerialisations: times that the compiler warned of gathering a whole array because it could not reshard it.
      seconds: time that compiling took.
      memory_from: platform whose compiler gave the figures.
    """

    params: float
    optimizer: float
    batch: float
    temporaries: float | None
    peak: float | None
    hlo: str
    overflow: Overflow | None
    rematerialisations: int
    seconds: float
    memory_from: str


@dataclasses.dataclass(frozen=True)
class PlannedRun(Run):
    """A Run whose devices are those of a topology: settings, shapes and shardings are training's own.

    Attributes:
      devices: what the mesh is made of.
    """

    devices: tuple = ()

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The topology's devices, arranged as config.mesh says."""
        mesh = configuration.build(parallel.MeshConfig, self.config.get("mesh", {}), "mesh")
        return parallel.make_mesh(mesh, self.devices)


def planned_run(config: dict, topology: Topology) -> PlannedRun:
    """The run that training would make of `config` on `topology`.

    Raises:
      SmoljaxError: libtpu is missing, or a size does not divide over the mesh.
    """
    run = PlannedRun(_as_there(config, topology), Path("."), _devices(topology))
    run.check_mesh(run.mesh)
    return run


def compile_step(run: PlannedRun, topology: Topology) -> Compiled:
    """Lowers and compiles the train step of `run`; a program that does not fit is a result too.

    Raises:
      SmoljaxError: the compiler refuses for another reason.
    """
    start = time.monotonic()
    batch = run.batch_shapes(run.data.batch_size)
    sizes = {
        "params": _bytes_per_chip(run.shapes.params, run.shardings.params),
        "optimizer": _bytes_per_chip(run.shapes.opt_state, run.shardings.opt_state) + 4,
        "batch": _bytes_per_chip(batch, {name: x.sharding for name, x in batch.items()}),
        "memory_from": topology.chip.platform if topology.chip.platform == "tpu" else "cpu",
    }
    lowered = run.lower(run.train_step(), batch)
    try:
        with _native_log() as log:
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return Compiled(
            **sizes,
            temporaries=None,
            peak=None,
            hlo="",
            overflow=overflow(str(error)),
            rematerialisations=0,
            seconds=time.monotonic() - start,
        )
    memory = compiled.memory_analysis()
    # The compiler's own peak leaves out what it could not pack, and then lies below its temporaries.
    together = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak = max(getattr(memory, "peak_memory_in_bytes", 0), together)
    return Compiled(
        **sizes,
        temporaries=memory.temp_size_in_bytes,
        peak=peak,
        hlo=compiled.as_text(),
        overflow=None,
        rematerialisations=log[0].count("nvoluntary full rematerialization"),
        seconds=time.monotonic() - start,
    )


def overflow(message: str) -> Overflow:
    """What the compiler's out-of-memory error says.

    Raises:
      SmoljaxError: the message is of another kind.
    """
    for pattern in _TOO_MUCH:
        if found := re.search(pattern, message):
            break
    else:
        first = " ".join(message.split())[:400]
        raise SmoljaxError(f"the compiler refuses this program: {first}")
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    memory = found[5].lower() if found.re.groups == 5 else "hbm"
    return Overflow(float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]], memory)


def _devices(topology: Topology) -> tuple:
    if topology.chip.platform == "gpu":
        return tuple(jax.devices()[: topology.num_chips])
    require("libtpu", extra="plan")
    slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
    with _native_log():
        description = topologies.get_topology_desc(topology.compiler_name, platform="tpu", **slices)
    return tuple(description.devices)


def _as_there(config: dict, topology: Topology) -> dict:
    """The config with what GPUs choose by themselves, since this host's CPUs compile in their place.

    Attention is the plain one: that of GPUs (cuDNN) cannot be compiled for without one.
    """
    if topology.chip.platform != "gpu":
        return config
    model = config["model"]
    chosen = {"attention": "xla", "scan_layers": True}
    return config | {
        "model": model | {name: value for name, value in chosen.items() if model.get(name) is None}
    }


def _bytes_per_chip(shapes, shardings) -> float:
    def leaf(shape, sharding):
        return math.prod(sharding.shard_shape(shape.shape)) * shape.dtype.itemsize

    return float(sum(jax.tree.leaves(jax.tree.map(leaf, shapes, shardings))))


@contextmanager
def _native_log() -> Iterator[list[str]]:
    """Takes what native code writes to stderr meanwhile; the list holds it afterwards."""
    taken: list[str] = []
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield taken
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            taken.append(file.read().decode(errors="replace"))


def mesh_text(mesh: Mesh, axes: Sequence[str] = parallel.AXES) -> str:
    """The axes of a mesh that split something ("fsdp 256")."""
    return " x ".join(f"{axis} {mesh.shape[axis]}" for axis in axes if mesh.shape[axis] > 1) or "1"

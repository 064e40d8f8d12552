"""What a cloud's name for a machine means: how many chips of which kind, and what each can do."""

import dataclasses
import math
import re

from smoljax.errors import SmoljaxError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, as its maker's data sheet states it.

    Attributes:
      name: as in the names of topologies ("v5e").
      platform: "tpu" or "gpu".
      peak_flops: dense bf16 FLOP/s.
      hbm_bytes: memory that a program may use.
      link_bandwidth: bytes/s one way, over all links that one axis of a torus has (TPU), or over the switch inside a node (GPU).
      network_bandwidth: bytes/s one way and per chip between slices or nodes.
      clock: Hz, in which the compiler counts its estimated cycles; 0 where there is no such estimate.
    """

    name: str
    platform: str
    peak_flops: float
    hbm_bytes: float
    link_bandwidth: float
    network_bandwidth: float
    clock: float


# TPUs: peaks, memory and links of cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; one-way link rates and the network's share of a chip
# from the table "TPU specs" of jax-ml.github.io/scaling-book/tpus (a link there is one way; a ring has one each way). The clock is
# peak / (MXUs x width^2 x 2): that is the unit in which large products of a compiled program come out at their peak.
# v5e's memory is what its compiler grants (15.75 GiB), v6e's likewise (31.25); v4's and v5p's are nominal.
# GPUs: nvidia.com data sheets (SXM, dense bf16); NVLink per GPU one way, and 400 Gbit/s of InfiniBand per GPU (A100: 200).
CHIPS = {
    "v4": Chip("v4", "tpu", 275e12, 32 * GIB, 2 * 45e9, 6.25e9, 1.05e9),
    "v5e": Chip("v5e", "tpu", 197e12, 15.75 * GIB, 2 * 45e9, 3.125e9, 1.5e9),
    "v5p": Chip("v5p", "tpu", 459e12, 95 * GIB, 2 * 90e9, 6.25e9, 1.75e9),
    "v6e": Chip("v6e", "tpu", 918e12, 31.25 * GIB, 2 * 90e9, 12.5e9, 1.75e9),
    "a100": Chip("a100", "gpu", 312e12, 80e9, 300e9, 25e9, 0),
    "h100": Chip("h100", "gpu", 989e12, 80e9, 450e9, 50e9, 0),
    "h200": Chip("h200", "gpu", 989e12, 141e9, 450e9, 50e9, 0),
}
GPUS_PER_NODE = 8

_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
    1024: "8x8x16",
    2048: "8x16x16",
    4096: "16x16x16",
    6144: "16x16x24",
}
# By kind: number in the cloud's name -> shape of the slice. v4 and v5p count TensorCores, two to a chip.
_SHAPES = {
    "v4": {2 * chips: shape for chips, shape in _CUBES.items() if chips <= 4096},
    "v5e": _FLAT,
    "v5p": {2 * chips: shape for chips, shape in _CUBES.items()},
    "v6e": _FLAT,
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of equal chips and how they are joined.

    Attributes:
      name: the name it was asked for by.
      chip: the kind of chip.
      shape: chips of one slice along each axis of its torus; for GPUs, chips of one node.
      slices: slices (or nodes) joined by the network.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int

    @property
    def chips_per_slice(self) -> int:
        """Chips that reach each other without the network."""
        return math.prod(self.shape)

    @property
    def num_chips(self) -> int:
        """All chips."""
        return self.chips_per_slice * self.slices

    @property
    def compiler_name(self) -> str:
        """What libtpu calls a slice of it ("v5e:16x16")."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def topology(name: str) -> Topology:
    """The topology of a cloud's name: v5e-256, v5p-128 (64 chips), v5e-256x2 (two slices), h100x8.

    Raises:
      SmoljaxError: no such topology; it lists those of the kind, or all kinds.
    """
    tpu = re.fullmatch(r"(v\d+[a-z]?)-(\d+)(?:x(\d+))?", name)
    if tpu and tpu[1] in _SHAPES:
        sizes = _SHAPES[tpu[1]]
        if int(tpu[2]) not in sizes or tpu[3] == "0":
            raise SmoljaxError(
                f"--topology={name}: {tpu[1]} comes as {', '.join(f'{tpu[1]}-{n}' for n in sizes)}, "
                "and xN behind it makes N slices"
            )
        shape = tuple(int(side) for side in sizes[int(tpu[2])].split("x"))
        return Topology(name, CHIPS[tpu[1]], shape, int(tpu[3] or 1))
    gpu = re.fullmatch(r"([a-z]\d+)x(\d+)", name)
    if gpu and gpu[1] in CHIPS and int(gpu[2]) > 0:
        chips = int(gpu[2])
        if chips > GPUS_PER_NODE and chips % GPUS_PER_NODE:
            raise SmoljaxError(
                f"--topology={name}: {chips} GPUs are not whole nodes of {GPUS_PER_NODE}: "
                f"use up to {GPUS_PER_NODE}, or a multiple of it"
            )
        nodes = max(1, chips // GPUS_PER_NODE)
        return Topology(name, CHIPS[gpu[1]], (chips // nodes,), nodes)
    gpus = [chip.name for chip in CHIPS.values() if chip.platform == "gpu"]
    raise SmoljaxError(
        f"--topology={name or '(missing)'} does not exist: use a TPU slice "
        f"({', '.join(f'{kind}-{min(sizes)} to {kind}-{max(sizes)}' for kind, sizes in _SHAPES.items())}; "
        f"v5e-256x2 is two slices), or GPUs ({', '.join(f'{gpu}x8' for gpu in gpus)})"
    )

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
      hbm_bandwidth: bytes/s between that memory and the chip.
      link_bandwidth: bytes/s one way over one link of the torus (TPU), or into the switch of a node (GPU).
      network_bandwidth: bytes/s one way and per chip between slices or nodes.
      product_share: of the peak, in the matrix products of a whole train step (closed forms; compiled programs say themselves).
      clock: Hz, in which the compiler counts its estimated cycles; 0 where there is no such estimate.
      mxu_width: rows and columns of a matrix unit, to which narrower operands are padded; 0 where it does not matter.
    """

    name: str
    platform: str
    peak_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    product_share: float
    clock: float
    mxu_width: int


# TPUs: peak, memory, its bandwidth and the number of links from docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} (v5e 197 TFLOP/s, 819 GB/s,
# 400 GB/s over four links both ways; v5p 459, 2,765, 1,200 over six, network 50 Gbit/s a chip; v6e 918, 1,638, 800 over four). Links one
# way, nine tenths of those, and the network's share of a chip (6.25 GB/s; v5e 3.125, v6e 12.5) from the table "TPU specs" of
# jax-ml.github.io/scaling-book/tpus.
# The clock is peak / FLOPs in a cycle, the unit in which large products come out near their peak: at 1.75 GHz v6e's compiler reaches
# 457,000 of 524,288 a cycle (16,384 x 2,048 by 2,048 x 11,008), v5e's 128,800 of 131,072 at 1.5 GHz.
# v5e's memory is what its compiler grants (15.75 GiB), v6e's likewise (31.25); v4's and v5p's are nominal.
# product_share: FLOPs of the matrix products of configs/smollm3_3b.py against the cycles that libtpu 0.0.42 notes for them (v4 has the
# matrix unit of v5p): on v5e 0.85 of what a single large product reaches. Where single products have been measured, 0.85 of the best
# of them: v6e 0.79 of its peak (github.com/yangwhale/gpu-tpu-pedia, tpu/v7_perf), A100 271 of 312 TFLOP/s, H100 and H200 794 of 989, B200
# 1,745 of 2,250 (github.com/stas00/ml-engineering, compute/accelerator).
# GPUs: SXM boards, dense bf16; memory and its bandwidth, NVLink (a third generation's 300 GB/s one way, 450, 900) and 400 Gbit/s of
# InfiniBand a GPU (A100: 200) from jax-ml.github.io/scaling-book/gpus, where collectives reach 370 of 450 GB/s: the links are given
# at that share. B200's 180 GB are those of the HGX board.
_NVLINK = 370 / 450
CHIPS = {
    "v4": Chip(
        "v4", "tpu", 275e12, 32 * GIB, 1.2e12, 45e9, 6.25e9, 0.86, clock=1.05e9, mxu_width=128
    ),
    "v5e": Chip(
        "v5e", "tpu", 197e12, 15.75 * GIB, 819e9, 45e9, 3.125e9, 0.84, clock=1.5e9, mxu_width=128
    ),
    "v5p": Chip(
        "v5p", "tpu", 459e12, 95 * GIB, 2.765e12, 90e9, 6.25e9, 0.86, clock=1.75e9, mxu_width=128
    ),
    "v6e": Chip(
        "v6e", "tpu", 918e12, 31.25 * GIB, 1.638e12, 90e9, 12.5e9, 0.67, clock=1.75e9, mxu_width=256
    ),
    "a100": Chip("a100", "gpu", 312e12, 80e9, 2.0e12, _NVLINK * 300e9, 25e9, 0.74, 0, 0),
    "h100": Chip("h100", "gpu", 989e12, 80e9, 3.35e12, _NVLINK * 450e9, 50e9, 0.68, 0, 0),
    "h200": Chip("h200", "gpu", 989e12, 141e9, 4.8e12, _NVLINK * 450e9, 50e9, 0.68, 0, 0),
    "b200": Chip("b200", "gpu", 2250e12, 180e9, 8.0e12, _NVLINK * 900e9, 50e9, 0.66, 0, 0),
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

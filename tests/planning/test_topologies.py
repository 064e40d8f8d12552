"""Names of clouds: chips, shapes, slices, and errors that list what is legal."""

import pytest

from smoljax.errors import SmoljaxError
from smoljax.planning.topologies import CHIPS, topology


@pytest.mark.parametrize(
    ("name", "compiler_name", "chips", "slices"),
    [
        ("v5e-256", "v5e:16x16", 256, 1),
        ("v5p-128", "v5p:4x4x4", 64, 1),
        ("v4-8", "v4:2x2x1", 4, 1),
        ("v6e-256", "v6e:16x16", 256, 1),
        ("v6e-8", "v6e:2x4", 8, 1),
        ("v5e-256x2", "v5e:16x16", 512, 2),
        ("v5p-12288", "v5p:16x16x24", 6144, 1),
    ],
)
def test_names_of_the_cloud(name, compiler_name, chips, slices):
    machine = topology(name)
    assert (machine.compiler_name, machine.num_chips, machine.slices) == (
        compiler_name,
        chips,
        slices,
    )


@pytest.mark.parametrize(
    ("name", "chips", "nodes"),
    [
        ("h100x8", 8, 1),
        ("h100x384", 384, 48),
        ("a100x2", 2, 1),
        ("h200x8", 8, 1),
        ("b200x16", 16, 2),
    ],
)
def test_gpus(name, chips, nodes):
    machine = topology(name)
    assert (machine.num_chips, machine.slices, machine.chip.platform) == (chips, nodes, "gpu")


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        ("v5e-100", "v5e-128, v5e-256"),
        ("v5p-3", "v5p-128"),
        ("v9-8", "h100x8"),
        ("", "v5e-256x2"),
        ("h100x12", "multiple"),
        ("v5e-256x0", "slices"),
        ("h100x0", "h100x8"),
    ],
)
def test_a_topology_that_does_not_exist(name, legal):
    with pytest.raises(SmoljaxError, match=legal):
        topology(name)


@pytest.mark.parametrize(
    ("name", "links", "both_ways"), [("v5e", 4, 400e9), ("v5p", 6, 1200e9), ("v6e", 4, 800e9)]
)
def test_links_are_nine_tenths_of_what_the_cloud_documents(name, links, both_ways):
    """docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}: bidirectional bandwidth of a chip."""
    assert 2 * links * CHIPS[name].link_bandwidth == pytest.approx(0.9 * both_ways)


@pytest.mark.parametrize(
    ("name", "mxus", "width"), [("v5e", 4, 128), ("v5p", 8, 128), ("v4", 8, 128), ("v6e", 4, 256)]
)
def test_clock_is_that_of_the_peak(name, mxus, width):
    """A matrix unit does width^2 multiply-adds a cycle (cloud.google.com/tpu/docs/system-architecture-tpu-vm). v6e is documented with
    two units, whose 918 TFLOP/s at v5p's clock are the work of four: its compiler notes up to 87% of that."""
    chip = CHIPS[name]
    assert chip.clock * mxus * width**2 * 2 == pytest.approx(chip.peak_flops, rel=0.01)

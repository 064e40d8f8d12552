import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MESHES = {
    "one axis": ("fsdp=8", "fsdp", "P(None, 'fsdp', None)"),
    "three axes": ("data=2,fsdp=2,tensor=2", "fsdp,tensor,data", "P(None, 'fsdp', 'tensor')"),
}


def on_eight_devices(script, *arguments):
    """What a script of this folder found on 8 devices, and what XLA said."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "0",  # lets XLA's warnings through
    }
    # The compile cache would hold the warnings back.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout) | {"log": done.stderr}


@pytest.fixture(scope="module", params=MESHES)
def report(request):
    """sharded_muon.py's, and how the momentum should lie."""
    mesh, mesh_axis, momentum = MESHES[request.param]
    return on_eight_devices("sharded_muon.py", mesh, mesh_axis) | {"wanted momentum": momentum}


def test_no_collective_inside_the_iteration(report):
    assert report["between"] == []
    assert "all-to-all" in report["kinds"]  # the reshards before and after it


def test_each_shape_is_exchanged_once_each_way_over_each_mesh_axis(report):
    """Three shapes: square, key, and feed-forward. Two axes cut the leaves, and the third holds copies of them.

    It costs each shape a permutation on the way in and an all-gather on the way out. Were attention's output stacked with
    query as it comes, cut the other way, there would be twice as many permutations.
    """
    if "tensor" in report["wanted momentum"]:
        exchanges = {kind: n for kind, n in report["kinds"].items() if kind != "all-reduce"}
        assert exchanges == {"all-to-all": 3 * 2 * 2, "collective-permute": 3, "all-gather": 3}


def test_cut_matrices_are_told_apart(report):
    assert report["wrong"]


def test_no_leaf_is_copied_to_every_device_on_the_way(report):
    log = report["log"]
    assert "Involuntary full rematerialization" not in log.split("the wrong way")[0]
    if "tensor" in report["momentum"]:  # asked for all axes at once, XLA does just that
        assert "Involuntary full rematerialization" in log.split("the wrong way")[1]


def test_updates_are_those_of_one_device(report):
    assert report["difference"] < 1e-7


def test_momentum_is_sharded_like_its_parameter(report):
    assert report["momentum"] == report["wanted momentum"]


@pytest.fixture(scope="module")
def states():
    """What sharded_state.py found for each optimizer."""
    return on_eight_devices("sharded_state.py", "fsdp=4,tensor=2")


@pytest.mark.parametrize("name", ["normuon", "adamuon", "muonh", "soap"])
def test_statistics_are_split_like_their_parameters(states, name):
    """Each device holds an eighth, but for a few numbers that no axis divides; and the updates are those of one device."""
    assert states[name]["bytes on a device"] < 1.05 * states[name]["bytes"] / 8
    assert states[name]["difference"] < 2e-6 < 0.01 * states[name]["largest"]


def test_soap_decomposes_on_each_device_its_share_alone(states):
    """Two leaves of three layers have 12 preconditioners of 32x32: two on each of 8 devices, the last four of zeros."""
    assert {tuple(shape) for shape in states["soap"]["decomposed"]} == {("2", "32")}
    assert "Involuntary full rematerialization" not in states["log"]

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


@pytest.fixture(scope="module", params=MESHES)
def report(request):
    """What sharded_muon.py found on 8 devices, what XLA said, and how the momentum should lie."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "0",  # lets XLA's warnings through
    }
    # The compile cache would hold the warnings back.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    script = Path(__file__).with_name("sharded_muon.py")
    mesh, mesh_axis, momentum = MESHES[request.param]
    done = subprocess.run(
        [sys.executable, script, mesh, mesh_axis],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout) | {"log": done.stderr, "wanted momentum": momentum}


def test_no_collective_inside_the_iteration(report):
    assert report["between"] == []
    assert "all-to-all" in report["kinds"]  # the reshards before and after it


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

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def report():
    """What sharded_muon.py found on 8 devices."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    script = Path(__file__).with_name("sharded_muon.py")
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_no_collective_inside_the_iteration(report):
    assert report["between"] == []
    assert "all-to-all" in report["kinds"]  # the reshards before and after it


def test_cut_matrices_are_told_apart(report):
    assert report["wrong"]


def test_updates_are_those_of_one_device(report):
    assert report["difference"] < 1e-7


def test_momentum_is_sharded_like_its_parameter(report):
    assert report["momentum"] == "P(None, 'fsdp', None)"

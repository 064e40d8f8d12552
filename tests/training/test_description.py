"""The table of parameters: numbers counted by hand, for machines that are not here."""

import subprocess
import sys

import pytest
from jax.sharding import AbstractMesh, AxisType

from smoljax import parallel
from smoljax.command_line import load_config
from smoljax.errors import SmoljaxError
from smoljax.training import Run, describe


def described(num_devices, tmp_path, **mesh):
    config = load_config("configs/smollm3_3b.py")
    return describe(Run(config | {"mesh": mesh}, tmp_path), num_devices=num_devices)


def row(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return " ".join(line.split())


def test_every_parameter_of_the_3b_model_on_64_devices(tmp_path):
    text = described(64, tmp_path, data=1, fsdp=-1, tensor=4)
    size = 4 * 36 * 2048 * 11008 // 64
    assert row(text, "layers/mlp/gate") == (
        "layers/mlp/gate 36x2048x11008 float32 layers embed mlp "
        f"- fsdp tensor {size:,} hidden adamw 0.0002 0.1"
    )
    # SmolLM3 does not decay its embedding.
    assert row(text, "embedding").endswith(
        f"vocab embed tensor fsdp {4 * 128256 * 2048 // 64:,} embedding adamw 0.0002 0"
    )
    # 72 gains of layers and the last are split over fsdp alone, 16 ways.
    num_params, gains = 3_075_098_624, 73 * 2048
    on_a_device = 4 * ((num_params - gains) // 64 + gains // 16)
    assert f"{num_params:,}, {4 * num_params:,} bytes, {on_a_device:,} on a device" in text
    # Two moments, and four counters of steps.
    assert f"optimizer state  {8 * num_params + 16:,} bytes, {2 * on_a_device + 16:,}" in text
    assert "mesh data 1 x fsdp 16 x tensor 4 x context 1: 64 devices" in text


def test_an_axis_that_fsdp_does_not_divide_is_whole_and_another_split(tmp_path):
    config = load_config("configs/smollm3_135m.py")
    text = describe(Run(config, tmp_path), num_devices=256)
    assert f" fsdp - {4 * 49152 * 576 // 256:,} " in row(text, "embedding")
    assert f" - fsdp - {4 * 30 * 1536 * 576 // 256:,} " in row(text, "layers/mlp/down")
    # Nine heads of 64: no axis divides by 256.
    assert f" - - - - {4 * 30 * 576 * 9 * 64:,} " in row(text, "layers/attention/query")


@pytest.mark.parametrize("num_devices", [1, 8, 64, 256])  # v5p-128 has 64 chips.
@pytest.mark.parametrize("name", ["smollm3_135m", "smollm3_350m"])
def test_small_configs_run_as_shipped(tmp_path, name, num_devices):
    run = Run(load_config(f"configs/{name}.py"), tmp_path)
    mesh = AbstractMesh(
        parallel.MeshConfig(**run.config["mesh"]).shape(num_devices),
        parallel.AXES,
        axis_types=(AxisType.Auto,) * 4,
    )
    run.check_mesh(mesh)
    assert mesh.shape["fsdp"] == num_devices


def test_what_does_not_divide_is_refused(tmp_path):
    with pytest.raises(SmoljaxError, match=r"kv_heads.*size 4.*8 devices.*one of 1, 2, 4$"):
        described(64, tmp_path, data=8, tensor=8)
    with pytest.raises(
        SmoljaxError, match=r"does not divide 64 devices.*multiply to 3.*1, 2, 4, 8"
    ):
        described(64, tmp_path, data=3, fsdp=-1)


def test_the_verb_needs_no_workdir_and_no_devices():
    command = [sys.executable, "-m", "smoljax.train", "--config=configs/smollm3_350m.py"]
    done = subprocess.run(
        [*command, "--describe", "--config.mesh.data=4", "--config.mesh.fsdp=64"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "mesh data 4 x fsdp 64 x tensor 1 x context 1: 256 devices" in done.stdout
    wrong = subprocess.run(
        [*command, "--describe=many"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 1
    assert "--describe=256" in wrong.stderr

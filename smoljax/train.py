"""Trains a model: `python -m smoljax.train --config=configs/quickstart.py --workdir=runs/quickstart`.

Reads WORKDIR/shards and WORKDIR/tokenizer (or config.data.directory, config.tokenizer.directory), writes
WORKDIR/train: checkpoints, metrics.jsonl, TensorBoard events, config.json. Goes on from the newest checkpoint.
On several hosts start the same command on each. With --describe it prints where every parameter lives and who updates it, and
ends: it needs no workdir and no accelerator. Exit codes: 0 done, 1 failed, 42 stopped on request after saving.
"""

from pathlib import Path

from smoljax import command_line
from smoljax.errors import SmoljaxError

OPTIONS = {
    "describe": "print all parameters with their places on the mesh, optimizers and bytes, for so many devices, and end; alone it is "
    "for what config.mesh multiplies to, or the devices here",
}


def main(config: dict, workdir: Path, *, describe: str = "") -> int:
    """Trains to the end, or to the next request to stop."""
    if describe:
        return _describe(config, describe)
    from smoljax.parallel import start

    start.start()
    from smoljax.training import Run, train

    return train(Run(config, workdir))


def _describe(config: dict, devices: str) -> int:
    if devices != "here" and not (devices.isdecimal() and int(devices)):
        raise SmoljaxError(f"--describe={devices} is no number of devices: write --describe=256")
    from smoljax.training import Run, describe

    print(describe(Run(config, Path(".")), num_devices=None if devices == "here" else int(devices)))
    return 0


if __name__ == "__main__":
    import sys

    sys.argv = [each if each != "--describe" else "--describe=here" for each in sys.argv]
    describes = any(each.startswith("--describe=") for each in sys.argv)
    command_line.run(
        main, usage=__doc__, options=OPTIONS, default_workdir="." if describes else None
    )

"""Trains a model: `python -m smoljax.train --config=configs/quickstart.py --workdir=runs/quickstart`.

Reads WORKDIR/shards and WORKDIR/tokenizer (or config.data.directory, config.tokenizer.directory), writes
WORKDIR/train: checkpoints, metrics.jsonl, TensorBoard events, config.json. Goes on from the newest checkpoint.
On several hosts start the same command on each. Exit codes: 0 done, 1 failed, 42 stopped on request after saving.
"""

from pathlib import Path

from smoljax import command_line


def main(config: dict, workdir: Path) -> int:
    """Trains to the end, or to the next request to stop."""
    from smoljax.parallel import start

    start.start()
    from smoljax.training import Run, train

    return train(Run(config, workdir))


if __name__ == "__main__":
    command_line.run(main, usage=__doc__)

"""The plans of all large configs, as text: a regression in memory, kernels or exchange shows as a diff in review.

`make golden-plans` (python -m tests.planning.golden [NAME ...]) rewrites tests/golden/plan/*.txt after a deliberate change: one to two
minutes for each. It needs libtpu of the pinned version. NAMES are like smollm3_3b.v5e-256; without any, all are written.
"""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from smoljax.planning.topologies import topology

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "tests" / "golden" / "plan"
LIBTPU = "0.0.42.1"  # What jax 0.10.2 asks for; figures of other versions are not comparable.
SEQUENCES_PER_CHIP = 4
CONFIGS = ("smollm3_135m", "smollm3_350m", "smollm3_3b")
LONG = "smollm3_3b_long.v5p-128"  # With the batch and the mesh of its config.
NAMES = [
    f"{config}.{machine}" for config in CONFIGS for machine in ("v5e-256", "v5p-128", "v6e-256")
] + [LONG]


def path(name: str) -> Path:
    """Where the golden text of a plan is kept."""
    return FOLDER / f"{name}.txt"


def installed() -> bool:
    """Whether libtpu of the pinned version is here."""
    try:
        return importlib.metadata.version("libtpu") == LIBTPU
    except importlib.metadata.PackageNotFoundError:
        return False


def text(name: str) -> str:
    """The figures of one config on one machine, with 4 sequences per chip (LONG: its own), as the verb `plan` finds them."""
    config, machine = name.split(".")
    batch_size = SEQUENCES_PER_CHIP * topology(machine).num_chips
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "plan.json"
        arguments = [
            f"--config={ROOT / 'configs' / config}.py",
            f"--topology={machine}",
            f"--json={result}",
            *([] if name == LONG else [f"--config.data.batch_size={batch_size}"]),
        ]
        done = subprocess.run(
            [sys.executable, "-m", "smoljax.plan", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if not result.is_file():
            raise RuntimeError(done.stderr[-2000:])
        plan = json.loads(result.read_text())
    memory = plan["memory"]
    lines = [
        f"libtpu {LIBTPU}",
        f"mesh {plan['mesh']}, remat {plan['remat']}, loss chunk {plan['loss_chunk']}",
        f"fits {plan['fits']}",
        *(
            f"{part} {memory[part]:.0f} bytes"
            for part in ("parameters", "optimizer", "temporaries", "peak")
            if memory[part] is not None
        ),
        f"kernel runs {plan['kernel_runs']}",
        *(
            f"{row['axes']} {row['kind']}: {row['runs']} runs, {row['bytes_sent']:.0f} bytes"
            for row in plan["exchanges"]
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for each in sys.argv[1:] or NAMES:
        path(each).write_text(text(each))
        print(f"{path(each).relative_to(ROOT)}", flush=True)

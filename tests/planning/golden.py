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
# Widths 576 and 960 do not divide over 256 devices, and a side of a v6e slice is 16.
_OVER_16 = ["--config.mesh.data=-1", "--config.mesh.fsdp=16"]
MESHES = {"smollm3_135m": _OVER_16, "smollm3_350m": _OVER_16, "smollm3_3b": []}
NAMES = [
    f"{config}.{machine}" for config in MESHES for machine in ("v5e-256", "v5p-128", "v6e-256")
]


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
    """The figures of one config on one machine, with 4 sequences per chip, as the verb `plan` finds them."""
    config, machine = name.split(".")
    batch_size = SEQUENCES_PER_CHIP * topology(machine).num_chips
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "plan.json"
        arguments = [
            f"--config={ROOT / 'configs' / config}.py",
            f"--topology={machine}",
            f"--config.data.batch_size={batch_size}",
            f"--json={result}",
            *MESHES[config],
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

"""The plans of all large configs, as text: a regression in memory, kernels or exchange shows as a diff in review.

`python -m tests.planning.golden [NAME ...]` rewrites tests/golden/plan/*.txt after a deliberate change (a minute or more for each;
needs libtpu of the pinned version). NAMEs are like smollm3_3b.v5e-256; without any, all are written.
"""

import importlib.metadata
import sys
from pathlib import Path

from smoljax.command_line import load_config
from smoljax.planning.environment import compile_here
from smoljax.planning.topologies import topology

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "tests" / "golden" / "plan"
LIBTPU = "0.0.42"  # What jax 0.10.2 asks for; figures of other versions are not comparable.
SEQUENCES_PER_CHIP = 4
NAMES = [
    f"{config}.{machine}"
    for config in ("smollm3_135m", "smollm3_350m", "smollm3_3b")
    for machine in ("v5e-256", "v5p-128", "v6e-256")
]


def installed() -> bool:
    """Whether libtpu of the pinned version is here."""
    try:
        return importlib.metadata.version("libtpu").startswith(LIBTPU + ".")
    except importlib.metadata.PackageNotFoundError:
        return False


def text(name: str) -> str:
    """The figures of one config on one machine, with 4 sequences per chip."""
    stem, machine_name = name.split(".")
    machine = topology(machine_name)
    compile_here(machine)
    from smoljax.planning.plan import make_plan

    config = load_config(str(ROOT / "configs" / f"{stem}.py"))
    config["data"]["batch_size"] = SEQUENCES_PER_CHIP * machine.num_chips
    plan = make_plan(config, machine)
    lines = [
        f"attention {plan.attention}",
        f"fits {plan.fits}",
        f"parameters {plan.compiled.params:.0f} bytes",
        f"optimizer {plan.compiled.optimizer:.0f} bytes",
        f"peak {plan.needs:.0f} bytes",
    ]
    if plan.program:
        lines += [
            f"temporaries {plan.compiled.temporaries:.0f} bytes",
            f"kernel runs {plan.program.kernel_runs}",
            *(
                f"{row.axes} {row.kind}: {row.runs} runs, {row.bytes_sent:.0f} bytes"
                for row in plan.exchanges
            ),
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for each in sys.argv[1:] or NAMES:
        (FOLDER / f"{each}.txt").write_text(text(each))

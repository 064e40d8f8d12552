"""Plans a run without an accelerator: `python -m smoljax.plan --config=configs/smollm3_3b.py --topology=v5p-128 --tokens=11.1e12`.

Compiles the real train step for the topology on this computer and prints memory, time, exchange and cost, and what would help.
Topologies by their cloud names: v5e-256, v5p-128 (64 chips), v6e-256, v5e-256x2 (two slices); GPUs by closed form: h100x8.
Needs the extra "plan" (libtpu) for TPUs; SmolLM3-3B takes 80 s of one core. Exit code 1 when the run does not fit.
--search tries other settings and ranks them, each as long (six and the own one on v5p-128: 9 minutes); Ctrl-C ends it with those
that were tried.
"""

import functools
from pathlib import Path

from smoljax import command_line
from smoljax.errors import SmoljaxError

OPTIONS = {
    "topology": "machine to plan for, such as v5p-128",
    "tokens": "token budget, such as 11.1e12: adds days and chip-hours",
    "price": "price of one chip for one hour: adds the cost",
    "json": "also write the plan to this file",
    "search": "number of settings to try (mesh shapes, remat policies, micro-batches, loss chunks); alone it is 12",
    "search_minutes": "longest time for the search, by default 20",
}


def main(config: dict, workdir: Path, **options: str) -> int:
    """Prints the plan; 1 when it does not fit."""
    del workdir  # Nothing is read from it.
    from smoljax.planning.topologies import topology

    machine = topology(options["topology"])
    numbers = {name: _number(name, options[name]) for name in ("tokens", "price")}
    search_number = _number("search", options["search"])
    if search_number and search_number % 1:
        raise SmoljaxError(f"--search={options['search']} is not a whole number of settings")
    output = Path(options["json"]) if options["json"] else None
    if output and not output.parent.is_dir():
        raise SmoljaxError(f"--json={output}: there is no folder {output.parent}: make it first")
    minutes = _number("search_minutes", options["search_minutes"]) or 20.0

    from smoljax.planning.environment import compile_here

    compile_here(machine)
    from smoljax import files
    from smoljax.planning.plan import make_plan
    from smoljax.planning.table import as_json, table

    plan = make_plan(config, machine, **numbers)
    print(table(plan))
    result = as_json(plan)
    if search_number:
        from smoljax.planning.search import ranking, search, variants

        others = (
            (flags, functools.partial(make_plan, variant, machine, **numbers))
            for flags, variant in variants(config, machine)
        )
        tried = search(plan, others, limit=int(search_number), minutes=minutes)
        print("\n" + ranking(tried, plan))
        result["search"] = [as_json(one) for one in tried]
    if output:
        files.atomic_write_json(output, result)
    return 0 if plan.fits else 1


def _number(name: str, text: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise SmoljaxError(f"--{name}={text} is not a positive number: write it like 11.1e12")
    return value


if __name__ == "__main__":
    import sys

    sys.argv = [argument if argument != "--search" else "--search=12" for argument in sys.argv]
    command_line.run(main, usage=__doc__, options=OPTIONS, default_workdir=".")

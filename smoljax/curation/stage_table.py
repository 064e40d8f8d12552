"""Documents, bytes and seconds by stage, summed over the work items of all steps."""

from collections import Counter
from collections.abc import Mapping, Sequence

from smoljax.curation import chain
from smoljax.curation.step_runner import Done

# Of a stage: what is counted by name.
_COUNTED = ("removed_by_reason", "edits")


def stage_table(done: Sequence[Done], chains: Sequence[Mapping]) -> list[dict]:
    """The stages in the order in which they run, with counts summed over items."""
    totals: dict[str, dict] = {}
    for step in done:
        for result in step.results:
            for name, entry in result["stages"].items():
                total = totals.setdefault(name, {field: Counter() for field in _COUNTED})
                for field in ("kept", "read_bytes", "kept_bytes", "seconds"):
                    total[field] = total.get(field, 0) + entry[field]
                for field in _COUNTED:
                    total[field].update(entry[field])
    return [
        {
            "name": name,
            "kept": totals[name]["kept"],
            "removed": sum(totals[name]["removed_by_reason"].values()),
            "removed_by_reason": dict(sorted(totals[name]["removed_by_reason"].items())),
            "read_bytes": totals[name]["read_bytes"],
            "kept_bytes": totals[name]["kept_bytes"],
            "edits": dict(sorted(totals[name]["edits"].items())),
            "seconds": round(totals[name]["seconds"], 2),
        }
        for name in _merged_order(chains)
        if name in totals
    ]


def _merged_order(chains: Sequence[Mapping]) -> list[str]:
    """The stages of all chains, each chain's order kept where they agree."""
    merged = ["read"]
    for preset in chains:
        order = chain.stages(preset)
        for position, name in enumerate(order):
            if name not in merged:
                following = (merged.index(n) for n in order[position:] if n in merged)
                merged.insert(next(following, len(merged)), name)
    return merged

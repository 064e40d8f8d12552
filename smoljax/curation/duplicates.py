"""Which shards are looked through for duplicates together, and the work items that do it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from smoljax.curation import chain, dedup, steps
from smoljax.curation.items import hash_of
from smoljax.curation.shards import Shard
from smoljax.curation.step_runner import StepRunner


@dataclass(frozen=True)
class Group:
    """Shards whose documents are compared with each other: their presets give "dedup" the same arguments.

    Attributes:
      name: of the group's work items.
      config: those arguments.
      shards: names of the shards' work items.
    """

    name: str
    config: dedup.DedupConfig
    shards: list[str]


def group_shards(
    names: Sequence[str], shards: Sequence[Shard], chains: Sequence[Mapping]
) -> list[Group]:
    """In the order of their first shards; a shard whose preset does not name "dedup" is in none."""
    found: dict[tuple, list[str]] = {}
    for name, shard, preset in zip(names, shards, chains):
        config = chain.dedup_arguments(preset)
        if config is not None:
            source = shard.source if config.scope == "source" else None
            found.setdefault((config, source), []).append(name)
    return [
        Group(f"{number:03d}", config, members)
        for number, ((config, _), members) in enumerate(found.items())
    ]


def find(
    run: StepRunner,
    groups: Sequence[Group],
    keys: Mapping[str, str],
    sizes: Mapping[str, int],
) -> tuple[dict[str, tuple[str, str]], float]:
    """Finds the duplicates in each group.

    Args:
      run: runs work items.
      groups: of shards.
      keys, sizes: of each shard's filtered documents, by its name.

    Returns:
      for each shard the folder of its clusters, and the key of what is in there; and the seconds it took.
    """
    members = sorted((name, group.config) for group in groups for name in group.shards)
    names = [name for name, _ in members]
    signed = run(
        "signatures",
        steps.signatures,
        names,
        keys=[hash_of(keys[name], asdict(config)) for name, config in members],
        arguments=[(run.folder("filter", name), config) for name, config in members],
        sizes=[sizes[name] for name in names],
    )
    key_of = dict(zip(names, signed.keys))
    rows_of = {name: result["rows"] for name, result in zip(names, signed.results)}
    # All that follows is made of these alone.
    group_keys = {g.name: hash_of(g.shards, [key_of[name] for name in g.shards]) for g in groups}
    group_sizes = {g.name: sum(sizes[name] for name in g.shards) for g in groups}
    folders = {g.name: [run.folder("signatures", name) for name in g.shards] for g in groups}
    copies = {g.name: run.folder("exact", g.name) if g.config.exact else None for g in groups}

    compared = [group.name for group in groups if group.config.exact]
    exact = run(
        "exact",
        steps.exact,
        compared,
        keys=[group_keys[name] for name in compared],
        arguments=[folders[name] for name in compared],
        sizes=[group_sizes[name] for name in compared],
    )
    buckets = {
        f"{group.name}-{bucket:02d}": (group, bucket)
        for group in groups
        if group.config.minhash is not None
        for bucket in range(group.config.minhash.buckets)
    }
    bands = run(
        "bands",
        steps.bands,
        list(buckets),
        keys=[hash_of(group_keys[group.name], bucket) for group, bucket in buckets.values()],
        arguments=[
            (folders[group.name], copies[group.name], group.config.minhash, bucket)
            for group, bucket in buckets.values()
        ],
        sizes=[
            group_sizes[group.name] // group.config.minhash.buckets for group, _ in buckets.values()
        ],
    )
    clusters = run(
        "clusters",
        steps.clusters,
        [group.name for group in groups],
        keys=[group_keys[group.name] for group in groups],
        arguments=[
            (
                [run.folder("bands", name) for name, (g, _) in buckets.items() if g is group],
                copies[group.name],
                group.shards,
                [rows_of[name] for name in group.shards],
            )
            for group in groups
        ],
        sizes=[group_sizes[group.name] for group in groups],
    )
    seconds = sum(sum(step.seconds) for step in (signed, exact, bands, clusters))
    found = {
        name: (run.folder("clusters", group.name), group_keys[group.name])
        for group in groups
        for name in group.shards
    }
    return found, seconds

"""Runs a step of curation: a work item for each of some names, under keys that hold all that its output depends on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from smoljax.curation import items, runner

# Raised when the same input and configuration give other output than before: finished items are then redone.
CODE_VERSION = 7


@dataclass(frozen=True)
class Done:
    """A finished step: its items' keys, folders, results and seconds, in order."""

    keys: list[str]
    folders: list[str]
    results: list[dict]
    seconds: list[float]


class StepRunner:
    """Makes the work items of a step and runs them."""

    def __init__(self, root: str, labels: Mapping[str, str], options: Mapping):
        """`labels` says what an item of a name works on, for errors."""
        self._root, self._labels, self._options = root, labels, options

    def __call__(
        self,
        step: str,
        work: Callable,
        names: Sequence[str],
        *,
        keys: Sequence[str],
        arguments: Sequence,
        sizes: Sequence[int],
    ) -> Done:
        keys = [items.hash_of(step, CODE_VERSION, key) for key in keys]
        todo = [
            items.WorkItem(
                name, key, work, argument, size, self._labels.get(name, f"{step} {name}")
            )
            for name, key, argument, size in zip(names, keys, arguments, sizes, strict=True)
        ]
        manifests = runner.run(todo, f"{self._root}/{step}", stage=step, **self._options)
        folders = [f"{self._root}/{step}/{name}" for name in names]
        return Done(
            keys, folders, [m["result"] for m in manifests], [m["seconds"] for m in manifests]
        )

    def folder(self, step: str, name: str) -> str:
        """Where an item writes."""
        return f"{self._root}/{step}/{name}"

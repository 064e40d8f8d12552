"""What a filter is made of: checks in the order of the decision.

A filter is written once, as a generator of checks over one text. The pipeline stops it at the first check that
fails, which gives the reason; the report runs it to its end, to draw every statistic beside its bound. So a
generator goes on behind a failing check, and does not raise there, on empty text neither. What it returns at its
end, if anything, is the text as the filter leaves it.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Generator

import pyarrow as pa

from smoljax.curation import schema


@dataclasses.dataclass(frozen=True)
class Check:
    """One rule at one text. Comparisons are strict, as datatrove's are.

    Attributes:
      reason: name of the rule, the second half of the reason of a removed document.
      measure: the statistic, or a function that finds it.
      bound: its threshold.
      low: whether the text is removed below the bound, or above it.
      limit: what the statistic cannot be beyond, on the side of the bound: where this passes, the statistic, which
        takes longer, need not be known.
    """

    reason: str
    measure: float | Callable[[], float]
    bound: float
    low: bool
    limit: float | None = None

    @functools.cached_property
    def value(self) -> float:
        """The statistic."""
        return self.measure() if callable(self.measure) else self.measure

    @property
    def fails(self) -> bool:
        """Whether the text is removed."""
        if self.limit is not None and not self._beyond(self.limit):
            return False
        return self._beyond(self.value)

    def _beyond(self, value: float) -> bool:
        return value < self.bound if self.low else value > self.bound


def above(
    reason: str, value: float | Callable[[], float], bound: float, *, at_most: float | None = None
) -> Check:
    """Removed when `value` is greater than `bound`."""
    return Check(reason, value, bound, False, at_most)


def below(
    reason: str, value: float | Callable[[], float], bound: float, *, at_least: float | None = None
) -> Check:
    """Removed when `value` is smaller than `bound`."""
    return Check(reason, value, bound, True, at_least)


Checks = Generator[Check, None, str | None]


class Filter:
    """A decorator: makes the checks of one text into a stage, `(batch, **arguments) -> (kept, removed)`.

    The batch needs a column `text`; `removed` has one column more, `reason`, which is "filter:rule". The filter's
    name is the function's.
    """

    def __init__(self, checks: Callable[..., Checks]):
        functools.update_wrapper(self, checks)
        self.checks = checks
        self.name = checks.__name__

    def __call__(
        self, batch: pa.RecordBatch, **arguments: object
    ) -> tuple[pa.RecordBatch, pa.RecordBatch]:
        inspect.signature(self.checks).bind("", **arguments)
        texts = batch.column("text").to_pylist()
        decisions = [self.decide(text, **arguments) for text in texts]
        kept, removed = schema.part(
            batch, [reason and f"{self.name}:{reason}" for reason, _ in decisions]
        )
        edited = [text for reason, text in decisions if reason is None]
        if all(text is None for text in edited):
            return kept, removed
        before = kept.column("text").to_pylist()
        after = [old if new is None else new for old, new in zip(before, edited)]
        return schema.replace(kept, text=pa.array(after, pa.string())), removed

    def decide(self, text: str, **arguments: object) -> tuple[str | None, str | None]:
        """(the first failing rule or None, the edited text or None where it stays as it was)."""
        checks = self.checks(text, **arguments)
        while True:
            try:
                check = next(checks)
            except StopIteration as end:
                return None, end.value
            if check.fails:
                return check.reason, None

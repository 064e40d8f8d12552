"""How many windows each step takes, and how many all steps before it took: whole numbers that follow from the step alone."""

import dataclasses
import itertools

from smoljax.errors import SmoljaxError


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """A batch size, with smaller ones before it if it is ramped up.

    Attributes:
      final: windows per step once the ramp is over.
      ramp: (step, windows) pairs: so many windows per step before that step.

    Raises:
      SmoljaxError: steps or sizes that are below 1 or do not rise.
    """

    final: int
    ramp: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        steps, sizes = [step for step, _ in self.ramp], self.sizes
        for name, values in (("steps", [0, *steps]), ("sizes", [0, *sizes])):
            if any(a >= b for a, b in itertools.pairwise(values)):
                raise SmoljaxError(
                    f"config.data.batch_ramp is {self.ramp} before batch_size {self.final}: its {name} must be at least "
                    "1 and rise, as in ((1000, 64), (2000, 128)) before a batch_size of 256"
                )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every size that occurs, in the order in which they do."""
        return (*(size for _, size in self.ramp), self.final)

    def size(self, step: int) -> int:
        """Windows of a step (from 0)."""
        return next((size for end, size in self.ramp if step < end), self.final)

    def before(self, step: int) -> int:
        """Windows of all steps before a step: the number of its first window."""
        windows = start = 0
        for end, size in self.ramp:
            windows += size * (min(end, step) - start)
            start = min(end, step)
        return windows + self.final * (step - start)

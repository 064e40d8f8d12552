"""Which source each sample of a run comes from: exact counts in every block of samples, weights that change by step.

After any number n of samples of a stage, source i has given the number of seats that the method of Sainte-Lague
(divisors 1, 3, 5, ...) gives it among n. That number is known in closed form, never falls as n grows, and stays within
one seat of n * weight in all but contrived cases, so that nothing drifts. Within a block of `BLOCK_SAMPLES` the order of the
sources is a hash's; hence the source of a sample, and its number within its source, follow from the sample's
number alone.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from smoljax.errors import SmoljaxError
from smoljax.input_pipeline.batch_sizes import BatchSizes
from smoljax.input_pipeline.permutation import hash_integers, key_of

BLOCK_SAMPLES = 2048


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The source of every sample.

    Args:
      sources: names; a source's number is its place here.
      stages: (first step, {source: weight}), the first at step 0; a source that is not named has weight 0, and the
        weights of a stage are divided by their sum.
      batch_sizes: samples of each step.
      seed: of the order within a block.

    Raises:
      SmoljaxError: steps do not rise from 0, a source is unknown, or weights are negative or all zero.
    """

    sources: Sequence[str]
    stages: Sequence[tuple[int, Mapping[str, float]]]
    batch_sizes: BatchSizes
    seed: int

    def __post_init__(self):
        _check_stages(self.sources, self.stages)
        starts = [self.batch_sizes.before(step) for step, _ in self.stages]
        shares = [
            [Fraction(weights.get(name, 0)) for name in self.sources] for _, weights in self.stages
        ]
        before = [(0,) * len(self.sources)]
        for stage in range(len(starts) - 1):
            taken = apportion(shares[stage], starts[stage + 1] - starts[stage])
            before.append(tuple(a + b for a, b in zip(before[-1], taken, strict=True)))
        object.__setattr__(self, "_starts", starts)
        object.__setattr__(self, "_shares", shares)
        object.__setattr__(self, "_before", before)

    def stage_of(self, sample: int) -> int:
        """The stage that a sample (`batch_sizes.before(step) + row`) belongs to."""
        return bisect.bisect_right(self._starts, sample) - 1

    def block_of(self, sample: int) -> tuple[int, int]:
        """The stage of a sample, and the block of samples inside the stage; blocks begin anew with a stage."""
        stage = self.stage_of(sample)
        return stage, (sample - self._starts[stage]) // BLOCK_SAMPLES

    def block_span(self, stage: int, block: int) -> tuple[int, int]:
        """First sample of a block, and the one after its last."""
        begin = self._starts[stage] + block * BLOCK_SAMPLES
        end = begin + BLOCK_SAMPLES
        return begin, min(end, self._starts[stage + 1]) if stage + 1 < len(self._starts) else end

    def counts(self, sample: int) -> tuple[int, ...]:
        """How many of the samples before this one each source gives."""
        stage = self.stage_of(sample)
        taken = apportion(self._shares[stage], sample - self._starts[stage])
        return tuple(a + b for a, b in zip(self._before[stage], taken, strict=True))

    def block(self, stage: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of every sample of a block (int64), and the sample's number within its source (int64)."""
        begin, end = self.block_span(stage, block)
        first = np.array(self.counts(begin), np.int64)
        taken = apportion(self._shares[stage], end - self._starts[stage])
        after = np.array([a + b for a, b in zip(self._before[stage], taken, strict=True)], np.int64)
        grouped = np.repeat(np.arange(len(self.sources)), after - first)
        key = key_of("mixture", self.seed, stage, block)
        order = np.argsort(
            hash_integers(np.arange(end - begin, dtype=np.uint64), key), kind="stable"
        )
        source = grouped[order]
        # Samples of one source are numbered in the order in which they come.
        by_source = np.argsort(source, kind="stable")
        ordinal = np.empty_like(source)
        starts = np.cumsum(after - first) - (after - first)
        ordinal[by_source] = np.arange(end - begin) + np.repeat(first - starts, after - first)
        return source, ordinal


def apportion(weights: Sequence[Fraction], total: int) -> tuple[int, ...]:
    """Divides `total` whole samples by weight (method of Sainte-Lague; ties go to the earlier source).

    The counts sum to `total`, and none falls when `total` grows.
    """
    weight_sum = sum(weights)
    counts = [math.floor(total * w / weight_sum + Fraction(1, 2)) if w else 0 for w in weights]
    places = [i for i, w in enumerate(weights) if w]
    # Rounding each share apart may miss the total by at most half the number of sources: give or take single
    # samples in the order in which the method would have given them.
    while (missing := total - sum(counts)) != 0:
        if missing > 0:
            i = min(places, key=lambda i: (Fraction(2 * counts[i] + 1) / weights[i], i))
            counts[i] += 1
        else:
            i = max(
                (i for i in places if counts[i]),
                key=lambda i: (Fraction(2 * counts[i] - 1) / weights[i], i),
            )
            counts[i] -= 1
    return tuple(counts)


def _check_stages(
    sources: Sequence[str], stages: Sequence[tuple[int, Mapping[str, float]]]
) -> None:
    steps = [step for step, _ in stages]
    if not steps or steps[0] != 0 or any(a >= b for a, b in itertools.pairwise(steps)):
        raise SmoljaxError(
            f"mixture stages start at steps {steps}; expected 0 first, then rising numbers"
        )
    for step, weights in stages:
        for name, weight in weights.items():
            if name not in sources:
                raise SmoljaxError(
                    f"mixture stage at step {step} gives a weight to {name!r}, which is not a source; "
                    f"sources are {', '.join(sources)}"
                )
            if not (math.isfinite(weight) and weight >= 0):
                raise SmoljaxError(
                    f"mixture stage at step {step} gives {name!r} the weight {weight}, expected 0 or more"
                )
        if not sum(weights.values()) > 0:
            raise SmoljaxError(
                f"mixture stage at step {step} has no positive weight: give at least one source a weight"
            )

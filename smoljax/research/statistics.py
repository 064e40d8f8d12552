"""What a handful of seeds can say: means with their intervals."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean over runs.

    Attributes:
      mean: of the runs.
      half_width: of its 95% interval; infinite for a single run, which says nothing about the spread.
      count: runs.
    """

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.half_width:.4f}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95% interval by Student's t, which takes the runs for independent and normal.

    Of differences between runs of equal seed (paired), it is the interval of the paired test.
    """
    count = len(values)
    mean = statistics.fmean(values)
    if count < 2:
        return Estimate(mean, math.inf, count)
    from scipy.special import stdtrit

    quantile = float(stdtrit(count - 1, 0.975))
    return Estimate(mean, quantile * statistics.stdev(values) / math.sqrt(count), count)

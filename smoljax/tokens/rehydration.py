"""How often a document is repeated for the copies that deduplication took away (FineWeb2, "rehydration").

What was copied a few times is better than what nobody copied, and what was copied thousands of times is worse; so
documents come back by the size of their cluster of near-duplicates, but not as often as they were found.
"""

import numpy as np

# (least size of a cluster, how often its document is read), as FineWeb2 was published.
_WEIGHTS = ((1, 1), (2, 2), (3, 3), (5, 5), (100, 8), (1000, 1))


def rehydration_weights(cluster_sizes: np.ndarray) -> np.ndarray:
    """Of sizes of clusters (integers, from 1), int64 of the same shape: how often their documents are read.

    1, 2 and 3 copies count as they are, 4 as 3, 5 to 99 as 5, 100 to 999 as 8, and more as 1 (boilerplate).
    """
    least, weights = np.array(_WEIGHTS).T
    return weights[np.searchsorted(least, cluster_sizes, side="right") - 1]

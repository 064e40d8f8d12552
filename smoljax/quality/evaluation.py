"""What a head is worth: its scores of annotated documents that it was not fitted to, beside the annotators'.

N documents
"""

import numpy as np
from scipy.stats import rankdata

from smoljax.quality.config import MAX_SCORE, Rule, int_scores


def evaluate(scores_N: np.ndarray, labels_N: np.ndarray, rule: Rule) -> dict:
    """Compares scores with annotations.

    Args:
      scores_N: that the head gives, f32.
      labels_N: of the annotators, 0 to 5.
      rule: what is kept; it is asked about scores and about annotations apart, so that a fraction means the best tenth of
        each.

    Returns:
      JSON-able: `documents`; as a classifier of what is kept, `precision`, `recall`, `f1` (FineWeb-Edu reports 0.82 at 3) and
      beside it `f1_if_all_are_kept`, which needs no head; `mse` beside `mse_of_the_mean`; `spearman`, the correlation of
      ranks; `confusion`, rows annotations 0 to 5, columns scores, both rounded. A ratio of nothing is null.
    """
    wanted_N, kept_N = labels_N >= rule.cutoff(labels_N), scores_N >= rule.cutoff(scores_N)
    both, wanted, kept = (int(x.sum()) for x in (wanted_N & kept_N, wanted_N, kept_N))
    total = len(labels_N)
    confusion = np.zeros((MAX_SCORE + 1, MAX_SCORE + 1), int)
    np.add.at(confusion, (int_scores(labels_N), int_scores(scores_N)), 1)
    return {
        "documents": total,
        "wanted": wanted,
        "kept": kept,
        "precision": _ratio(both, kept),
        "recall": _ratio(both, wanted),
        "f1": _ratio(2 * both, wanted + kept),
        "f1_if_all_are_kept": _ratio(2 * wanted, wanted + total),
        "mse": float(np.square(scores_N - labels_N).mean()),
        "mse_of_the_mean": float(np.var(labels_N)),
        "spearman": _spearman(scores_N, labels_N),
        "confusion": confusion.tolist(),
    }


def table(result: dict) -> str:
    """The result of `evaluate` as Markdown."""
    lines = [
        "| held-out annotations | head | keeping all |",
        "|---|---|---|",
        f"| F1 | {_show(result['f1'])} | {_show(result['f1_if_all_are_kept'])} |",
        f"| precision | {_show(result['precision'])} | {_show(result['wanted'] / result['documents'])} |",
        f"| recall | {_show(result['recall'])} | 1.000 |",
        f"| squared error | {_show(result['mse'])} | {_show(result['mse_of_the_mean'])} (the mean) |",
        f"| rank correlation | {_show(result['spearman'])} | - |",
        "",
        "| annotated \\ head | " + " | ".join(map(str, range(MAX_SCORE + 1))) + " |",
        "|---" * (MAX_SCORE + 2) + "|",
    ]
    for score, row in enumerate(result["confusion"]):
        lines.append(f"| {score} | " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines) + "\n"


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _spearman(left_N: np.ndarray, right_N: np.ndarray) -> float | None:
    """Pearson's correlation of the ranks, ties sharing their mean rank."""
    left, right = (rankdata(values) - (len(values) + 1) / 2 for values in (left_N, right_N))
    return _ratio(float(left @ right), float(np.sqrt((left @ left) * (right @ right))))


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

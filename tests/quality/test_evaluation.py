"""The figures of an evaluation, counted by hand and by scipy."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from smoljax.quality import evaluation
from smoljax.quality.config import PRESETS, Rule

LABELS = np.array([0, 1, 2, 3, 3, 4, 5, 2, 3, 1], np.float32)
SCORES = np.array([0.2, 2.6, 2.5, 2.51, 3.4, 2.4, 4.8, 1.9, 6.0, -1.0], np.float32)


def test_counts_by_hand():
    """Wanted are the 5 of 3 and more; kept 2.6, 2.51, 3.4, 4.8 and 6.0 (2.5 is rounded to 2), of which 4 are wanted."""
    found = evaluation.evaluate(SCORES, LABELS, PRESETS["fineweb_edu"])
    assert (found["documents"], found["wanted"], found["kept"]) == (10, 5, 5)
    assert found["precision"] == found["recall"] == found["f1"] == pytest.approx(4 / 5)
    assert found["f1_if_all_are_kept"] == pytest.approx(2 / 3)
    assert found["mse"] == pytest.approx(np.mean((SCORES - LABELS) ** 2))
    assert found["mse_of_the_mean"] == pytest.approx(2.04)
    assert found["spearman"] == pytest.approx(spearmanr(SCORES, LABELS).statistic)
    confusion = np.array(found["confusion"])
    assert confusion.sum() == 10
    assert confusion[3].tolist() == [0, 0, 0, 2, 0, 1]  # 6.0 is clipped to 5.
    assert confusion[1].tolist() == [1, 0, 0, 1, 0, 0]  # -1.0 to 0.


def test_another_threshold_counts_otherwise():
    found = evaluation.evaluate(SCORES, LABELS, PRESETS["fineweb_edu_score_2"])
    assert (found["wanted"], found["kept"]) == (7, 8)
    found = evaluation.evaluate(SCORES, LABELS, Rule(score=4.5))
    assert (found["wanted"], found["kept"], found["f1"]) == (1, 2, pytest.approx(2 / 3))


def test_a_fraction_is_of_each_side():
    found = evaluation.evaluate(SCORES, LABELS, Rule(fraction=0.2))
    assert (found["wanted"], found["kept"]) == (2, 2)  # Labels 5 and 4, scores 6.0 and 4.8.
    assert found["f1"] == pytest.approx(1 / 2)


def test_perfect_and_useless_scores():
    perfect = evaluation.evaluate(LABELS, LABELS, PRESETS["fineweb_edu"])
    assert perfect["f1"] == perfect["spearman"] == pytest.approx(1)
    assert np.array_equal(np.array(perfect["confusion"]), np.diag([1, 2, 2, 3, 1, 1]))
    useless = evaluation.evaluate(np.zeros(10, np.float32), LABELS, PRESETS["fineweb_edu"])
    assert (useless["precision"], useless["spearman"], useless["f1"]) == (None, None, 0)


def test_the_table_says_what_was_measured():
    text = evaluation.table(evaluation.evaluate(SCORES, LABELS, PRESETS["fineweb_edu"]))
    assert "| F1 | 0.800 | 0.667 |" in text
    assert "| 3 | 0 | 0 | 0 | 2 | 0 | 1 |" in text
    assert "| precision | - |" in evaluation.table(
        evaluation.evaluate(np.zeros(10, np.float32), LABELS, PRESETS["fineweb_edu"])
    )

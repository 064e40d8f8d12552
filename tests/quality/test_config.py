"""Which scores are kept: FineWeb-Edu's rounding, to the last bit of a float32, and shares of a corpus."""

import numpy as np
import pytest

from smoljax.errors import SmoljaxError
from smoljax.quality.config import PRESETS, QualityConfig, Rule, int_scores


def test_scores_are_rounded_as_python_rounds():
    """The published classifier's example has int(round(max(0, min(score, 5)))), so halves go to the even number."""
    scores = np.array([-0.4, 0.5, 1.5, 2.5, 2.51, 3.5, 4.5, 5.5, 7], np.float32)
    expected = [round(max(0, min(float(score), 5))) for score in scores]
    assert int_scores(scores).tolist() == expected == [0, 0, 2, 2, 3, 4, 4, 5, 5]


@pytest.mark.parametrize("int_score", [1, 2, 3, 4, 5])
def test_the_cutoff_of_a_rounded_score_is_exact(int_score):
    cutoff = Rule(int_score=int_score).cutoff(np.array([], np.float32))
    below = np.nextafter(cutoff, np.float32(-1))
    assert int_scores(np.array([below, cutoff])).tolist() == [int_score - 1, int_score]


def test_a_fraction_keeps_the_best_and_what_equals_them():
    scores = np.arange(100, dtype=np.float32)
    assert (scores >= Rule(fraction=0.1).cutoff(scores)).sum() == 10
    assert (scores >= Rule(fraction=0.001).cutoff(scores)).sum() == 1
    tied = np.repeat(np.float32([1, 2]), 50)
    assert (tied >= Rule(fraction=0.1).cutoff(tied)).sum() == 50


def test_presets_and_fields_say_what_is_kept():
    assert QualityConfig("e").rule == PRESETS["fineweb_edu"] == Rule(int_score=3)
    assert QualityConfig("e", preset="finepdfs_edu").rule == Rule(fraction=0.1)
    assert QualityConfig("e", threshold=1.5).rule == Rule(score=1.5)
    assert QualityConfig("e", keep_fraction=0.5).rule == Rule(fraction=0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embedder": ""}, "embedder is"),
        ({"preset": "fineweb"}, "preset is 'fineweb': set it to one of fineweb_edu, "),
        ({"preset": "fineweb_edu", "threshold": 2.0}, "has preset and threshold: give one"),
        ({"chunks": "end"}, "chunks is 'end'"),
        ({"keep_fraction": 1.0}, "keep_fraction is 1.0: it must be above 0 and below 1"),
        ({"heldout_fraction": 0.0}, "heldout_fraction is 0.0"),
        ({"requests": 0}, "requests is 0: it must be at least 1"),
        ({"max_tokens": 4}, "max_tokens is 4: it must be at least 8"),
    ],
)
def test_a_wrong_field_is_named(fields, message):
    with pytest.raises(SmoljaxError, match=f"config.quality.*{message}"):
        QualityConfig(**{"embedder": "e"} | fields)

"""A run's score in words."""

from __future__ import annotations

from fastvim_jax.analysis.headline import Headline
from fastvim_jax.training.detection.evaluation import HEADLINE


def test_a_score_of_nothing_is_unknown_instead_of_minus_100_percent():
    scores = {"raw_bbox_ap": -1.0, "ema_bbox_ap": 0.125, "count": 3}
    assert (
        HEADLINE.in_words(scores)
        == "raw box AP unknown (nothing to count); ema box AP 12.50 % on 3 images"
    )
    error = Headline("error", label="error", title="Error", percent=False)
    assert error.in_words({"raw_error": -0.5}) == "raw error -0.5000"

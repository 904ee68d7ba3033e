"""Are two sides equal within a margin? Paired differences, two one-sided t tests (S10.4)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t

MARGIN = 0.01
"""One point of accuracy: three standard errors, sqrt(0.9 * 0.1 / 10,000) = 0.003, of one reading of 10,000 examples at
90 %."""
ALPHA = 0.05


def tost(differences: Sequence[float], margin: float) -> float:
    """Return the p value of the hypothesis that the mean difference is `margin` or more, either way (Schuirmann 1987).

    It is the larger one of the two one-sided paired t tests'; below 0.05 exactly when the 90 % interval of the mean
    lies inside (-margin, margin). Raises ValueError for fewer than two differences.
    """
    mean, error = _mean_and_error(differences)
    if error == 0:
        return 0.0 if abs(mean) < margin else 1.0
    return float(t.sf((margin - abs(mean)) / error, len(differences) - 1))


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean difference and the ends of its 90 % interval: mean -+ t(0.95, m - 1) sd / sqrt(m)."""
    mean, error = _mean_and_error(differences)
    half = float(t.ppf(1 - ALPHA, len(differences) - 1)) * error
    return mean, mean - half, mean + half


def _mean_and_error(differences: Sequence[float]) -> tuple[float, float]:
    if len(differences) < 2:
        raise ValueError(f"{len(differences)} differences have no standard deviation; give two at least")
    return statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))

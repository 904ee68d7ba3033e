"""Accuracy over seeds (S10): run each recipe on both sides, keep the figures, hold README and the recipes to them.

`python -m spec_tests.accuracy` is the command, `results/accuracy.json` and `results/experiments.json` what it keeps.
"""

from spec_tests.accuracy.claims import CLAIMS, EXPERIMENTS, claims_table
from spec_tests.accuracy.equivalence import MARGIN, interval, tost
from spec_tests.accuracy.publish import publish
from spec_tests.accuracy.results import FRAMEWORKS, load_experiments, load_results
from spec_tests.accuracy.tables import differences, expected, table

__all__ = [
    "CLAIMS",
    "EXPERIMENTS",
    "FRAMEWORKS",
    "MARGIN",
    "claims_table",
    "differences",
    "expected",
    "interval",
    "load_experiments",
    "load_results",
    "publish",
    "table",
    "tost",
]

"""README's table of accuracies, and the recipes' `expected`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from spec.markdown import markdown_table
from spec_tests.accuracy.equivalence import MARGIN, interval, tost
from spec_tests.accuracy.results import FRAMEWORKS, Results

PACKAGES = {"jax": ("jax", "flax", "optax"), "torch": ("torch",)}
LESSON = {
    "softmax-regression": "train 0.853 to 0.864",
    "sigmoid-mlp": "47 % (cumulative train)",
    "mlp512": "87.60 %",
    "mnist-mlp512": "97.45 %",
    "deep-mlp": "about 87 %",
    "cnn": "91.53 %",
    "mlp128": "middling",
    "mlp128-batchnorm": "up 5 % at once",
    "mnist-mlp256": "curves only",
}


def table(results: Results) -> str:
    """Return both sides' test accuracies as a Markdown table: mean +- standard deviation, and their difference."""
    heading = ["recipe", "lesson", "JAX", "torch", "JAX - torch (90 % interval)", "TOST p", "seeds", "epochs x steps"]
    return markdown_table(heading, [_row(key, result) for key, result in sorted(results.items())])


def _row(key: str, result: Mapping[str, dict]) -> list[str]:
    blocks = [result[framework] for framework in FRAMEWORKS if framework in result]
    figures = [mean_sd(result[name]["test_accuracy"]) if name in result else "-" for name in FRAMEWORKS]
    apart = differences(result)
    compared = [signed(*interval(apart)), p_value(tost(apart, MARGIN))] if len(apart) > 1 else ["-", "-"]
    seeds = " / ".join(dict.fromkeys(str(len(block["seeds"])) for block in blocks))
    epochs, steps = blocks[0]["epochs"], blocks[0]["steps"]
    return [f"`{key}`", LESSON.get(key, "-"), *figures, *compared, seeds, f"{epochs} x {steps // epochs}"]


def differences(result: Mapping[str, dict]) -> list[float]:
    """Return jax - torch of the test accuracy, seed by seed, for the seeds that both sides ran (S10.3)."""
    if not all(framework in result and has_test_split(result[framework]) for framework in FRAMEWORKS):
        return []
    return paired(result["jax"], result["torch"], "test_accuracy")


def paired(first: Mapping, second: Mapping, figure: str) -> list[float]:
    """Return first - second of a figure, seed by seed, for the seeds that both have."""
    one, other = (dict(zip(block["seeds"], block[figure], strict=True)) for block in (first, second))
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def expected(result: Mapping[str, dict]) -> dict:
    """Return what a recipe's section `expected` holds: over the runs of both sides, the mean test accuracy and three
    standard deviations, the number of runs, their dates and versions."""
    blocks = {framework: result[framework] for framework in FRAMEWORKS if framework in result}
    values = [value for block in blocks.values() for value in block["test_accuracy"]]
    return {
        "test_accuracy": round(statistics.mean(values), 4),
        "margin": round(3 * statistics.stdev(values), 4),
        "runs": len(values),
        "measured": "; ".join(_measured(block, PACKAGES[framework]) for framework, block in blocks.items()),
    }


def _measured(block: Mapping, packages: Sequence[str]) -> str:
    return ", ".join([block["date"], *(f"{name} {block['versions'][name]}" for name in packages)])


def has_test_split(block: Mapping) -> bool:
    """Has the recipe a test split?"""
    return None not in block["test_accuracy"]


def mean_sd(values: Sequence[float | None]) -> str:
    """Return `mean +- standard deviation`; a dash where a figure is missing."""
    if None in values:
        return "-"
    return f"{statistics.mean(values):.4f} +- {statistics.stdev(values):.4f}"


def signed(mean: float, low: float, high: float) -> str:
    """Return `mean (low to high)` with signs; what rounds to zero is +0.0000."""
    mean, low, high = (round(value, 4) + 0.0 for value in (mean, low, high))
    return f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"


def p_value(p: float) -> str:
    """Return a p value with one significant digit more than it deserves, and no row of zeros."""
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"

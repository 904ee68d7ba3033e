"""S10: accuracies over seeds, their bands, and the equivalence of the two sides."""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path

import pytest

from spec import recipe
from spec_tests import accuracy
from spec_tests.accuracy import results as kept
from spec_tests.accuracy.publish import replace_table, with_expected
from spec_tests.accuracy.results import Run, settings_of_flags
from spec_tests.accuracy.runs import train
from spec_tests.accuracy.tables import has_test_split
from spec_tests.tolerances import ROUNDED_MEAN, SEVEN_DIGITS

ROOT = Path(__file__).parents[1]
RESULTS = accuracy.load_results(ROOT)
EXPERIMENTS = accuracy.load_experiments(ROOT)
FEW_SEEDS = {"cnn": 3}
SEEDS = 10
IDX = [name for name in recipe.recipe_names() if recipe.load(name).data.name in ("fashion_mnist", "mnist")]

# What the lessons' own programs gave, with the margin they were asked for: recipes.md's figures.
BANDS = {
    "mlp128": {"test_accuracy": (0.862, 0.015), "cumulative_train_accuracy": (0.852, 0.005)},
    "mlp128-plain": {"test_accuracy": (0.865, 0.015), "cumulative_train_accuracy": (0.856, 0.005)},
    "sigmoid-mlp": {"test_accuracy": (0.67, 0.06), "cumulative_train_accuracy": (0.48, 0.05)},
    "softmax-regression, 10 epochs": {"test_accuracy": (0.832, 0.01), "train_accuracy": (0.8475, 0.004)},
    "mlp512": {"test_accuracy": (0.873, 0.008)},
    "mnist-mlp512": {"test_accuracy": (0.975, 0.004)},
    "deep-mlp": {"test_accuracy": (0.874, 0.012)},
    "cnn": {"test_accuracy": (0.914, 0.008)},
    "mlp128-batchnorm": {"test_accuracy": (0.877, 0.015)},
    "mnist-mlp256": {"test_accuracy": (0.975, 0.005)},
    "mnist-mlp256-logits": {"test_accuracy": (0.977, 0.005)},
}


# The kept figures


@pytest.mark.parametrize("framework", accuracy.FRAMEWORKS)
@pytest.mark.parametrize("key", sorted({*IDX, *BANDS, "digits"}))
def test_every_kept_accuracy_has_ten_seeds_a_date_and_versions(key, framework):
    block = RESULTS[key][framework]
    assert len(block["seeds"]) >= FEW_SEEDS.get(key, SEEDS)
    assert block["seeds"] == list(range(len(block["seeds"])))
    assert {len(block[figure]) for figure in kept.FIGURES[kept.RESULTS]} == {len(block["seeds"])}
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", block["date"])
    assert block["versions"].keys() >= {"python", "numpy", framework}
    assert block["machine"]


@pytest.mark.parametrize("key", sorted(RESULTS))
def test_both_sides_ran_the_same_seeds(key):
    assert RESULTS[key]["jax"]["seeds"] == RESULTS[key]["torch"]["seeds"]
    assert RESULTS[key]["jax"]["steps"] == RESULTS[key]["torch"]["steps"]


@pytest.mark.parametrize("framework", accuracy.FRAMEWORKS)
@pytest.mark.parametrize("key", BANDS)
def test_the_kept_accuracies_lie_in_the_bands_asked_for(key, framework):
    for figure, (middle, margin) in BANDS[key].items():
        assert abs(statistics.mean(RESULTS[key][framework][figure]) - middle) <= margin


@pytest.mark.parametrize("key", sorted(RESULTS))
def test_the_two_sides_are_equivalent_within_the_stated_margin(key):
    if all(has_test_split(block) for block in RESULTS[key].values()):
        assert accuracy.tost(accuracy.differences(RESULTS[key]), accuracy.MARGIN) < 0.05


@pytest.mark.parametrize("name", recipe.recipe_names())
def test_expected_accuracies_are_those_of_the_results(name):
    text = (recipe.RECIPES / f"{name}.toml").read_text("utf-8")
    assert text == with_expected(text, name, RESULTS)
    result = RESULTS.get(name, {"": {"test_accuracy": [None]}})
    measured = all(has_test_split(block) for block in result.values())
    assert recipe.to_mapping(recipe.load(name)).get("expected") == (accuracy.expected(result) if measured else None)


def test_the_readmes_tables_are_those_of_the_results():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert readme == replace_table(readme, "accuracy", accuracy.table(RESULTS))
    assert readme == replace_table(readme, "claims", accuracy.claims_table(RESULTS, EXPERIMENTS))


# Fresh runs


@pytest.mark.parametrize("framework", accuracy.FRAMEWORKS)
def test_a_fresh_run_of_each_side_lies_in_the_recipes_band(framework):
    assert_lands_in_its_band("digits", framework)


@pytest.mark.slow(minutes=1)
@pytest.mark.parametrize("framework", accuracy.FRAMEWORKS)
def test_a_fresh_mlp128_of_each_side_lies_in_the_recipes_band(framework, fashion_mnist):
    assert_lands_in_its_band("mlp128", framework)


@pytest.mark.slow(minutes=1)
@pytest.mark.parametrize("framework", accuracy.FRAMEWORKS)
def test_a_fresh_bfloat16_run_of_each_side_lies_in_a_band_of_its_own(framework, fashion_mnist):
    flags = ("--recipe", "mlp128", "--precision", "bfloat16")
    run = Run(key="mlp128, bfloat16", framework=framework, seed=3, flags=flags)
    summary = train(run, data_dir=None, one_thread=False)
    band = accuracy.expected(RESULTS[run.key])
    assert summary["settings"] == settings_of_flags(flags)
    assert abs(summary["test_accuracy"] - band["test_accuracy"]) <= band["margin"]


def assert_lands_in_its_band(name: str, framework: str) -> None:
    run = Run(key=name, framework=framework, seed=3, flags=("--recipe", name))
    summary = train(run, data_dir=None, one_thread=False)
    band = recipe.load(name).expected
    assert (summary["framework"], summary["seed"], summary["settings"]) == (framework, 3, settings_of_flags(run.flags))
    assert abs(summary["test_accuracy"] - band.test_accuracy) <= band.margin


# The equivalence test


def test_tost_gives_the_values_computed_by_hand():
    # One degree of freedom is Cauchy's distribution: P(T > x) = 1/2 - atan(x)/pi. Here the error is 0.001, x = 1 and 9.
    assert accuracy.tost([0.0, 0.002], 0.002) == pytest.approx(0.25, rel=ROUNDED_MEAN)
    assert accuracy.tost([0.0, 0.002], 0.01) == pytest.approx(0.5 - math.atan(9) / math.pi, rel=ROUNDED_MEAN)
    # Two: P(T > x) = 1/2 - x / (2 sqrt(2 + x^2)), x = 0.002 sqrt(3) / 0.001, x^2 = 12.
    assert accuracy.tost([-0.001, 0.0, 0.001], 0.002) == pytest.approx(0.5 - math.sqrt(12 / 14) / 2, rel=ROUNDED_MEAN)


def test_tost_does_not_care_which_side_is_better():
    apart = [0.001, 0.004, -0.002, 0.003]
    assert accuracy.tost(apart, 0.01) == pytest.approx(
        accuracy.tost([-value for value in apart], 0.01), rel=ROUNDED_MEAN
    )


def test_equal_sides_are_equivalent_and_one_or_no_pair_is_no_test():
    assert accuracy.tost([0.0] * 10, 0.01) == 0
    assert accuracy.tost([0.01] * 10, 0.01) == 1
    for apart in ([], [0.0]):
        with pytest.raises(ValueError, match="give two at least"):
            accuracy.tost(apart, 0.01)


@pytest.mark.parametrize("shift", [-0.02, -0.01, 0.01, 0.02])
def test_the_equivalence_test_fails_on_a_shifted_side(shift):
    one = [0.861, 0.866, 0.858, 0.871, 0.864, 0.859, 0.868, 0.862, 0.866, 0.865]
    other = [0.862, 0.864, 0.859, 0.870, 0.866, 0.858, 0.867, 0.864, 0.865, 0.865]
    apart = [a - b for a, b in zip(one, other, strict=True)]
    assert accuracy.tost(apart, accuracy.MARGIN) < 1e-6
    assert accuracy.tost([value + shift for value in apart], accuracy.MARGIN) > 0.4


def test_a_wide_spread_is_not_equivalent_though_no_difference_is_found():
    assert accuracy.tost([0.03, -0.03, 0.02, -0.02], accuracy.MARGIN) > 0.05


def test_the_90_percent_interval_lies_within_the_margin_exactly_when_tost_rejects():
    apart = [0.001, 0.004, -0.002, 0.003]
    mean, low, high = accuracy.interval(apart)
    assert (mean, mean - low) == (pytest.approx(0.0015, rel=ROUNDED_MEAN), pytest.approx(high - mean, rel=ROUNDED_MEAN))
    # t(0.95, 3) = 2.353363, sd = sqrt(21/3) 1e-3
    assert high - mean == pytest.approx(2.353363 * math.sqrt(7) * 1e-3 / 2, rel=SEVEN_DIGITS)
    assert accuracy.tost(apart, high * 1.0001) < 0.05 < accuracy.tost(apart, high * 0.9999)


def block_of(values: list[float], **changes: object) -> dict:
    origin = {"date": "2026-01-02", "versions": {"jax": "1", "flax": "2", "optax": "3", "torch": "4"}, "steps": 8}
    return {"seeds": list(range(len(values))), "test_accuracy": values, "epochs": 2, **origin, **changes}


def test_differences_are_paired_by_seed():
    jax, torch = block_of([0.9, 0.8, 0.7], seeds=[0, 1, 2]), block_of([0.6, 0.75], seeds=[2, 0])
    assert accuracy.differences({"jax": jax, "torch": torch}) == pytest.approx([0.15, 0.1], rel=ROUNDED_MEAN)
    assert accuracy.differences({"jax": jax}) == []


def test_the_band_is_three_standard_deviations_of_both_sides_runs():
    result = {"jax": block_of([0.90, 0.92]), "torch": block_of([0.91, 0.95])}
    # mean 0.92, squares 0.0004 + 0 + 0.0001 + 0.0009, over 3
    assert accuracy.expected(result) == {
        "test_accuracy": 0.92,
        "margin": round(3 * math.sqrt(0.0014 / 3), 4),
        "runs": 4,
        "measured": "2026-01-02, jax 1, flax 2, optax 3; 2026-01-02, torch 4",
    }

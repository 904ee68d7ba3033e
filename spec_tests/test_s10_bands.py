"""S10: accuracies over seeds, their bands, and the equivalence of the two sides."""

from __future__ import annotations

import copy
import json
import math
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.numpy import save_file

from spec import params, recipe
from spec.errors import UserError, exit_status
from spec_tests import accuracy
from spec_tests.accuracy import __main__ as command
from spec_tests.accuracy import results as kept
from spec_tests.accuracy.publish import replace_table, with_expected
from spec_tests.accuracy.results import Run, settings_of_flags
from spec_tests.accuracy.runs import read, train
from spec_tests.accuracy.tables import has_test_split

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


def flags_of(key: str) -> tuple[str, ...]:
    if key in accuracy.EXPERIMENTS:
        return tuple(accuracy.EXPERIMENTS[key].split())
    name, _, epochs = key.partition(", ")
    return ("--recipe", name, *(("--epochs", epochs.split()[0]) if epochs else ()))


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


@pytest.mark.parametrize("key", sorted(RESULTS | EXPERIMENTS))
def test_kept_figures_are_of_the_recipes_as_they_are(key):
    for block in (RESULTS | EXPERIMENTS)[key].values():
        assert block["settings"] == settings_of_flags(flags_of(key))


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


@pytest.mark.parametrize("name", sorted(accuracy.EXPERIMENTS))
def test_every_experiment_has_ten_seeds(name):
    assert len(EXPERIMENTS[name]["jax"]["seeds"]) >= SEEDS


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


def test_no_claim_is_left_unmeasured():
    assert "not measured" not in accuracy.claims_table(RESULTS, EXPERIMENTS)


# Fresh runs


@pytest.mark.parametrize("framework", accuracy.FRAMEWORKS)
def test_a_fresh_run_of_each_side_lies_in_the_recipes_band(framework):
    assert_lands_in_its_band("digits", framework)


@pytest.mark.slow  # a quarter of a minute for each side
@pytest.mark.parametrize("framework", accuracy.FRAMEWORKS)
def test_a_fresh_mlp128_of_each_side_lies_in_the_recipes_band(framework, fashion_mnist):
    assert_lands_in_its_band("mlp128", framework)


def assert_lands_in_its_band(name: str, framework: str) -> None:
    run = Run(key=name, framework=framework, seed=3, flags=("--recipe", name))
    summary = train(run, data_dir=None, one_thread=False)
    band = recipe.load(name).expected
    assert (summary["framework"], summary["seed"], summary["settings"]) == (framework, 3, settings_of_flags(run.flags))
    assert abs(summary["test_accuracy"] - band.test_accuracy) <= band.margin


# The equivalence test


def test_tost_gives_the_values_computed_by_hand():
    # One degree of freedom is Cauchy's distribution: P(T > x) = 1/2 - atan(x)/pi. Here the error is 0.001, x = 1 and 9.
    assert accuracy.tost([0.0, 0.002], 0.002) == pytest.approx(0.25, rel=1e-9)
    assert accuracy.tost([0.0, 0.002], 0.01) == pytest.approx(0.5 - math.atan(9) / math.pi, rel=1e-9)
    # Two: P(T > x) = 1/2 - x / (2 sqrt(2 + x^2)), x = 0.002 sqrt(3) / 0.001, x^2 = 12.
    assert accuracy.tost([-0.001, 0.0, 0.001], 0.002) == pytest.approx(0.5 - math.sqrt(12 / 14) / 2, rel=1e-9)


def test_tost_does_not_care_which_side_is_better():
    apart = [0.001, 0.004, -0.002, 0.003]
    assert accuracy.tost(apart, 0.01) == pytest.approx(accuracy.tost([-value for value in apart], 0.01), rel=1e-12)


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
    assert (mean, mean - low) == (pytest.approx(0.0015), pytest.approx(high - mean))
    # t(0.95, 3) = 2.353363, sd = sqrt(21/3) 1e-3
    assert high - mean == pytest.approx(2.353363 * math.sqrt(7) * 1e-3 / 2, rel=1e-6)
    assert accuracy.tost(apart, high * 1.0001) < 0.05 < accuracy.tost(apart, high * 0.9999)


def block_of(values: list[float], **changes: object) -> dict:
    origin = {"date": "2026-01-02", "versions": {"jax": "1", "flax": "2", "optax": "3", "torch": "4"}, "steps": 8}
    return {"seeds": list(range(len(values))), "test_accuracy": values, "epochs": 2, **origin, **changes}


def test_differences_are_paired_by_seed():
    jax, torch = block_of([0.9, 0.8, 0.7], seeds=[0, 1, 2]), block_of([0.6, 0.75], seeds=[2, 0])
    assert accuracy.differences({"jax": jax, "torch": torch}) == pytest.approx([0.15, 0.1])
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


def test_the_table_shows_both_sides_and_a_dash_for_what_is_not_measured():
    both = {"jax": block_of([0.90, 0.92]), "torch": block_of([0.90, 0.91])}
    lines = accuracy.table({"mlp128": both, "mlp512": {"jax": both["jax"]}}).splitlines()
    apart = "+0.0050 (-0.0266 to +0.0366)"  # t(0.95, 1) = 6.3138, error 0.005
    p = 0.5 - math.atan(1) / math.pi  # (0.01 - 0.005) / 0.005 = 1
    both_sides = "0.9100 +- 0.0141 | 0.9050 +- 0.0071"
    assert lines[2] == f"| `mlp128` | middling | {both_sides} | {apart} | {p:.4f} | 2 | 2 x 4 |"
    assert lines[3] == "| `mlp512` | 87.60 % | 0.9100 +- 0.0141 | - | - | - | 2 | 2 x 4 |"


# The command


def summary_of(run: Run, **changes: object) -> dict:
    figures = dict.fromkeys([*kept.FIGURES[kept.RESULTS], "weight_change"], run.seed / 100)
    origin = {"versions": {"numpy": kept._installed("numpy")}, "settings": settings_of_flags(run.flags), "machine": "m"}
    return {"framework": run.framework, "seed": run.seed, "epochs": 1, "steps": 2, **figures, **origin, **changes}


@pytest.fixture
def accuracy_command(monkeypatch, tmp_path):
    """Return a function that runs the command in an empty directory, its runs made up, and gives the runs it made."""
    monkeypatch.chdir(tmp_path)

    def run_it(*arguments: str, failing: int | None = None, **changes: object) -> SimpleNamespace:
        made = []

        def train(run: Run, **_: object) -> dict:
            if run.seed == failing:
                raise UserError("the run failed")
            made.append((run.framework, run.seed))
            return summary_of(run, **changes)

        monkeypatch.setattr(command, "train", train)
        monkeypatch.setattr(sys, "argv", ["accuracy", *arguments])
        return SimpleNamespace(status=exit_status(command.main), made=sorted(made))

    return run_it


def test_the_command_runs_both_sides_with_every_seed_and_keeps_each(accuracy_command, capsys):
    ended = accuracy_command("digits", "--seeds", "3", "--keep", "--jobs", "2")
    assert (ended.status, ended.made) == (0, [(side, seed) for side in ("jax", "torch") for seed in range(3)])
    block = accuracy.load_results()["digits"]["torch"]
    assert (block["seeds"], block["test_accuracy"]) == ([0, 1, 2], [0.0, 0.01, 0.02])
    assert not {"seconds", "weight_change"} & block.keys()
    assert "| `digits` |" in capsys.readouterr().out


def test_the_command_goes_on_where_it_stopped(accuracy_command, capsys):
    assert accuracy_command("digits", "--seeds", "4", "--keep", "--framework", "jax", failing=2).status == 2
    assert "the run failed" in capsys.readouterr().err
    assert accuracy_command("digits", "--seeds", "4", "--framework", "jax", "--keep").made == [("jax", 2), ("jax", 3)]
    assert accuracy_command("digits", "--seeds", "4", "--framework", "jax", "--keep").made == []
    assert len(accuracy_command("digits", "--seeds", "4", "--framework", "jax", "--again").made) == 4


def test_runs_of_other_versions_or_another_recipe_begin_the_lists_anew(accuracy_command):
    accuracy_command("digits", "--seeds", "3", "--keep", "--framework", "jax", versions={"numpy": "0.1"})
    assert accuracy.load_results()["digits"]["jax"]["seeds"] == [0, 1, 2]
    assert len(accuracy_command("digits", "--seeds", "2", "--keep", "--framework", "jax").made) == 2
    assert accuracy.load_results()["digits"]["jax"]["seeds"] == [0, 1]
    accuracy_command("digits", "--seeds", "3", "--keep", "--framework", "jax", "--again", settings="another")
    assert len(accuracy_command("digits", "--seeds", "3", "--framework", "jax").made) == 3


def test_experiments_and_other_epochs_have_places_of_their_own(accuracy_command):
    accuracy_command("digits", "--epochs", "1", "--seeds", "2", "--keep")
    accuracy_command("--experiment", "mlp128-1-epoch", "--framework", "jax", "--seeds", "2", "--keep")
    assert list(accuracy.load_results()) == ["digits, 1 epochs"]
    assert accuracy.load_experiments()["mlp128-1-epoch"]["jax"]["weight_change"] == [0.0, 0.01]


@pytest.mark.parametrize(
    ("arguments", "mend"),
    [
        ("digits --seeds 1", "use two at least"),
        ("digits --jobs 0", "use one at least"),
        ("digit", "did you mean 'digits'"),
        ("--experiment mlp128-1-epok", "did you mean 'mlp128-1-epoch'"),
        ("--experiment all --epochs 3", "an experiment states its own"),
        ("digits --publish", "add --keep"),
        ("digits --epochs 0", "epochs 0"),
    ],
)
def test_a_mistake_is_refused_before_anything_runs(arguments, mend, accuracy_command, capsys):
    ended = accuracy_command(*arguments.split())
    assert (ended.status, ended.made) == (2, [])
    assert mend in capsys.readouterr().err


def test_settings_are_all_that_figures_depend_on():
    same = settings_of_flags(("--recipe", "mlp128"))
    assert settings_of_flags(("--recipe", "mlp128", "--seed", "7")) == same
    assert settings_of_flags(("--recipe", "mlp128", "--epochs", "4")) != same
    assert len({settings_of_flags(tuple(flags.split())) for flags in accuracy.EXPERIMENTS.values()} | {same}) == (
        len(accuracy.EXPERIMENTS) + 1
    )


def test_the_experiments_rates_are_those_their_claims_speak_of():
    plain, momentum, sigmoid = (recipe.load(name) for name in ("mlp128-plain", "mlp128", "sigmoid-mlp"))
    for name, flags in accuracy.EXPERIMENTS.items():
        if found := re.search(r"batch-(\d+)-rate-scaled", name):
            assert float(flags.split()[-1]) == plain.optimizer.learning_rate * int(found[1]) / plain.batch_size
    long_run = momentum.optimizer.learning_rate / (1 - momentum.optimizer.momentum)
    assert long_run == pytest.approx(0.75) == pytest.approx(5 * momentum.optimizer.learning_rate)
    assert sigmoid.optimizer.learning_rate * 10 == pytest.approx(0.1)


def test_the_change_of_the_weights_is_relative_to_the_initial_state(tmp_path):
    digits = recipe.load("digits")
    initial = params.initial_state(params.leaves(digits.model, (64,), 10), digits.init, digits.seed)
    save_file({name: 1.25 * array for name, array in initial.items()}, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"recipe": recipe.to_mapping(digits)}))
    (tmp_path / "summary.json").write_text(json.dumps({"devices": ["cpu"]}))
    summary = read(tmp_path, one_thread=True)
    assert summary["weight_change"] == pytest.approx(0.25, rel=1e-6)
    assert summary["settings"] == settings_of_flags(("--recipe", "digits"))
    assert summary["machine"].endswith(", cpu, 1 thread")


# The claims


def made_up_measurements() -> tuple[dict, dict]:
    """Return results and experiments in which every figure is near 0.8: the keys every claim needs."""
    needed = {key for claim in accuracy.CLAIMS for key in claim.needs}
    values = [0.80, 0.81, 0.79]
    figures = ("cumulative_train_accuracy", "train_accuracy", "weight_change")
    blocks = {key: {"jax": block_of(values, **{figure: list(values) for figure in figures})} for key in needed}
    return {key: block for key, block in blocks.items() if key not in accuracy.EXPERIMENTS}, {
        key: block for key, block in blocks.items() if key in accuracy.EXPERIMENTS
    }


def verdict(words: str, results: dict, experiments: dict) -> str:
    (row,) = [
        line for line in accuracy.claims_table(results, experiments).splitlines() if words in line.split(" | ")[0]
    ]
    return row.split(" | ")[-1].removesuffix(" |")


@pytest.mark.parametrize(
    ("words", "changed", "value", "before", "after"),
    [
        ("because of", "sigmoid-mlp-rate-0.1", 0.9, "not refuted", "no: the way of counting, and the learning rate"),
        ("relu", "sigmoid-mlp-relu", 0.9, "no", "it helps; ten times the learning rate helps less, +0.0 points"),
        ("BatchNorm", "mlp128-batchnorm", 0.86, "no: +0.0 points in the end", "yes"),
        ("wider and deeper", "deep-mlp", 0.9, "yes: equal within 1.0 points", "not shown"),
        ("the CNN", "cnn", 0.95, "no", "yes"),
        ("99 %", "cnn", 0.995, "no", "yes"),
        ("momentum", "mlp128-1-epoch", 0.9, "no", "yes"),
        ("lr 0.001", "mlp128-rate-0.001-1-epoch", 0.0, "no: a small change, and it learns", "yes"),
        (
            "small batches",
            "mlp128-plain-batch-32",
            0.7,
            "same rate: no difference seen; rate in proportion: no difference seen",
            "same rate: no, worse; rate in proportion: no difference seen",
        ),
    ],
)  # fmt: skip
def test_a_claims_verdict_follows_the_figures(words, changed, value, before, after):
    results, experiments = made_up_measurements()
    assert verdict(words, results, experiments) == before
    block = copy.deepcopy(results | experiments)[changed]["jax"]
    for figure in ("test_accuracy", "cumulative_train_accuracy", "weight_change"):
        block[figure] = [value, value + 0.001, value - 0.001] if value else [value] * 3
    (experiments if changed in accuracy.EXPERIMENTS else results)[changed] = {"jax": block}
    assert verdict(words, results, experiments) == after


def test_a_claim_without_its_runs_says_which_are_missing():
    results, experiments = made_up_measurements()
    del experiments["mlp128-rate-0.001-1-epoch"]
    row = [line for line in accuracy.claims_table(results, experiments).splitlines() if "lr 0.001" in line]
    assert row == ['| "lr 0.001 shows no change in w" | not measured yet: mlp128-rate-0.001-1-epoch | - |']


def test_publishing_writes_the_tables_and_the_recipes_and_nothing_else(tmp_path):
    (tmp_path / "results").mkdir()
    results, experiments = made_up_measurements()
    for file, figures in (("accuracy", results), ("experiments", experiments)):
        (tmp_path / "results" / f"{file}.json").write_text(json.dumps(figures))
    (tmp_path / "spec" / "recipes").mkdir(parents=True)
    (tmp_path / "spec" / "recipes" / "cnn.toml").write_text('name = "cnn"\n\n[expected]\nruns = 1\n')
    (tmp_path / "spec" / "recipes" / "csv.toml").write_text('name = "csv"\n')
    (tmp_path / "README.md").write_text(
        "a\n<!-- accuracy: x -->\n<!-- /accuracy -->\nb\n<!-- claims: y -->\nold\n<!-- /claims -->\nc\n"
    )
    accuracy.publish(tmp_path)
    tables = accuracy.table(results), accuracy.claims_table(results, experiments)
    assert (tmp_path / "README.md").read_text() == (
        f"a\n<!-- accuracy: x -->\n\n{tables[0]}\n\n<!-- /accuracy -->\n"
        f"b\n<!-- claims: y -->\n\n{tables[1]}\n\n<!-- /claims -->\nc\n"
    )
    assert (tmp_path / "spec" / "recipes" / "csv.toml").read_text() == 'name = "csv"\n'
    written = (tmp_path / "spec" / "recipes" / "cnn.toml").read_text()
    assert written.startswith('name = "cnn"\n\n[expected]\ntest_accuracy = 0.8\nmargin = 0.03\nruns = 3\n')

"""`python -m spec_tests.accuracy`: what it runs and keeps, the claims, what it publishes."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.numpy import save_file

from spec import params, recipe
from spec.errors import UserError, exit_status
from spec_tests import accuracy
from spec_tests.accuracy import __main__ as command
from spec_tests.accuracy import claims, together
from spec_tests.accuracy import results as kept
from spec_tests.accuracy.results import Run, settings_of_flags
from spec_tests.accuracy.runs import read
from spec_tests.tolerances import ROUNDED_MEAN, SEVEN_DIGITS

ROOT = Path(__file__).parents[1]
RESULTS = accuracy.load_results(ROOT)
EXPERIMENTS = accuracy.load_experiments(ROOT)


def flags_of(key: str) -> tuple[str, ...]:
    if key in accuracy.EXPERIMENTS:
        return tuple(accuracy.EXPERIMENTS[key].split())
    name, *changes = key.split(", ")
    flags = ["--recipe", name]
    for change in changes:
        flags += ["--precision", "bfloat16"] if change == "bfloat16" else ["--epochs", change.removesuffix(" epochs")]
    return tuple(flags)


@pytest.mark.parametrize("key", sorted(RESULTS | EXPERIMENTS))
def test_kept_figures_are_of_the_recipes_as_they_are(key):
    for block in (RESULTS | EXPERIMENTS)[key].values():
        assert block["settings"] == settings_of_flags(flags_of(key))


@pytest.mark.parametrize("name", sorted(accuracy.EXPERIMENTS))
def test_every_experiment_has_five_seeds(name):
    assert len(EXPERIMENTS[name]["jax"]["seeds"]) >= 5


def test_no_claim_is_left_unmeasured():
    assert "not measured" not in accuracy.claims_table(RESULTS, EXPERIMENTS)


def test_the_table_shows_both_sides_and_a_dash_for_what_is_not_measured():
    both = {"jax": block_of([0.90, 0.92]), "torch": block_of([0.90, 0.91])}
    lines = accuracy.table({"mlp128": both, "mlp512": {"jax": both["jax"]}}).splitlines()
    apart = "+0.0050 (-0.0266 to +0.0366)"  # t(0.95, 1) = 6.3138, error 0.005
    p = 0.5 - math.atan(1) / math.pi  # (0.01 - 0.005) / 0.005 = 1
    both_sides = "0.9100 +- 0.0141 | 0.9050 +- 0.0071"
    assert lines[2] == f"| `mlp128` | middling | {both_sides} | {apart} | {p:.4f} | 2 | 2 x 4 |"
    assert lines[3] == "| `mlp512` | 87.60 % | 0.9100 +- 0.0141 | - | - | - | 2 | 2 x 4 |"


def block_of(values: list[float], **changes: object) -> dict:
    origin = {"date": "2026-01-02", "versions": {"jax": "1", "flax": "2", "optax": "3", "torch": "4"}, "steps": 8}
    return {"seeds": list(range(len(values))), "test_accuracy": values, "epochs": 2, **origin, **changes}


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
    expected = 5 * momentum.optimizer.learning_rate
    assert long_run == pytest.approx(0.75, rel=ROUNDED_MEAN) == pytest.approx(expected, rel=ROUNDED_MEAN)
    assert sigmoid.optimizer.learning_rate * 10 == pytest.approx(0.1, rel=ROUNDED_MEAN)


def test_the_change_of_the_weights_is_relative_to_the_initial_state(tmp_path):
    digits = recipe.load("digits")
    initial = params.initial_state(params.leaves(digits.model, (64,), 10), digits.init, digits.seed)
    save_file({name: 1.25 * array for name, array in initial.items()}, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"recipe": recipe.to_mapping(digits)}))
    (tmp_path / "summary.json").write_text(json.dumps({"devices": ["cpu"]}))
    summary = read(tmp_path, one_thread=True)
    assert summary["weight_change"] == pytest.approx(0.25, rel=SEVEN_DIGITS)
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


def test_a_claims_row_is_over_the_seeds_that_all_its_runs_have():
    results, experiments = made_up_measurements()
    before = [line for line in accuracy.claims_table(results, experiments).splitlines() if "because of" in line]
    longer = results["sigmoid-mlp"]["jax"]
    for name, values in longer.items():
        if isinstance(values, list):
            longer[name] = [*values, 3 if name == "seeds" else 0.1]
    after = [line for line in accuracy.claims_table(results, experiments).splitlines() if "because of" in line]
    assert after == before
    assert after[0].split(" | ")[2] == "3"


def test_runs_that_are_kept_are_not_made_again_and_only_what_was_asked_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(command.kept, "has", lambda results, run: True)
    monkeypatch.setattr(command, "train", None)
    printed = {}
    experiment = "--experiment mlp128-1-epoch --framework jax --seeds 3"
    for asked in ("digits --seeds 2", experiment, f"digits {experiment}", ""):
        monkeypatch.setattr(sys, "argv", ["accuracy", *asked.split()])
        command.main()
        printed[asked] = capsys.readouterr()
    digits, experiment, both, all_ = printed.values()
    assert "4 of 4 runs are kept in results/accuracy.json and not made again; --again makes them" in digits.err
    assert "3 of 3 runs are kept in results/experiments.json" in experiment.err
    assert digits.out.strip() == accuracy.table({"digits": RESULTS["digits"]})
    assert experiment.out.strip() == accuracy.claims_table(RESULTS, EXPERIMENTS)
    assert both.out.strip() == digits.out.strip() + "\n\n" + experiment.out.strip()
    assert all_.out.strip() == accuracy.table(RESULTS) + "\n\n" + accuracy.claims_table(RESULTS, EXPERIMENTS)


def test_a_claim_without_its_runs_says_which_are_missing():
    results, experiments = made_up_measurements()
    del experiments["mlp128-rate-0.001-1-epoch"]
    row = [line for line in accuracy.claims_table(results, experiments).splitlines() if "lr 0.001" in line]
    assert row == ['| "lr 0.001 shows no change in w" | not measured yet: mlp128-rate-0.001-1-epoch | - | - |']


def test_a_claim_says_of_how_many_sides_its_runs_are():
    results, experiments = made_up_measurements()
    said, block = [], results["cnn"]["jax"]
    for blocks in ({"jax": block, "torch": block}, {"jax": block}):
        results["cnn"] = blocks
        said += [line for line in accuracy.claims_table(results, experiments).splitlines() if "passes 90 %" in line]
    assert "in 6 runs of both sides" in said[0]
    assert "in 3 runs of one side" in said[1]


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


def test_a_claim_is_answered_by_the_runs_that_it_needs_and_none_is_made_twice(tmp_path, monkeypatch):
    def mean(measured):
        return f"{measured.mean('digits'):.4f}", "yes" if measured.mean("slow") < measured.mean("digits") else "no"

    claim = claims.Claim("digits are learned", mean, ("digits", "slow"))
    monkeypatch.setattr(together, "CLAIMS", (claim,))
    flags = {"digits": "--recipe digits --epochs 1", "slow": "--recipe digits --epochs 1 --learning-rate 1e-4"}
    monkeypatch.setattr(together, "EXPERIMENTS", flags)
    assert "not measured yet: digits, slow" in together.answered(claim.words, tmp_path, seeds=2, trains=False)
    (tmp_path / "digits" / "seed-0").mkdir(parents=True)
    (tmp_path / "digits" / "seed-0" / "config.json").write_text("of a cell that was interrupted")
    table = together.answered(claim.words, tmp_path, seeds=2)
    reached = json.loads((tmp_path / "digits" / "summary.json").read_text())["settings"][0]["accuracies"]
    assert table.splitlines()[2] == f'| "digits are learned" | {sum(reached) / 2:.4f} | 2 | yes |'
    monkeypatch.setattr(together.jax_impl.train, "main", lambda arguments: pytest.fail(f"trained {arguments}"))
    assert together.answered(claim.words, tmp_path, seeds=2) == table
    with pytest.raises(KeyError):
        together.answered("nobody says so", tmp_path, seeds=2)

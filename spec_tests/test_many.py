"""Many runs in one program, `--seeds` and `--sweep`: each is the run that it would be alone (S2, S6, S9)."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_impl import optim
from jax_impl.many import ManyTrainer, program_key
from jax_impl.parallel import place
from jax_impl.trainer import Trainer
from spec import recipe as recipes
from spec import sweep
from spec.errors import RecipeError
from spec.recipe import Optimizer
from spec_tests.assertions import assert_within
from spec_tests.conftest import made_up_images
from spec_tests.tolerances import ROUNDED_MEAN, SEVEN_DIGITS, run_bound

CPU = place("cpu")
MLP128, CNN = recipes.load("mlp128"), recipes.load("cnn")
SMALL_MLP = dataclasses.replace(
    MLP128, model=dataclasses.replace(MLP128.model, hidden_sizes=(6,)), batch_size=5, epochs=2, last_batch="keep"
)
SMALL_CNN = dataclasses.replace(
    CNN, model=dataclasses.replace(CNN.model, channels=(3,), hidden_sizes=(4,)), batch_size=5, epochs=2
)
PIXELS = 28 * 28
SGD = dataclasses.replace(MLP128.optimizer, weight_decay=0.01, dampening=0.2)
ADAM = Optimizer(name="adam", learning_rate=0.01, weight_decay=0.0, betas=(0.9, 0.999), epsilon=1e-8)


def alone(recipe, dataset):
    trainer = Trainer(recipe, dataset, CPU)
    return trainer, list(trainer.events())


@pytest.mark.parametrize("small", [SMALL_MLP, SMALL_CNN], ids=["mlp", "cnn"])
def test_seeds_trained_together_are_the_runs_they_would_be_alone(small):
    # Orders, initial states and dropout are each seed's own; a short last batch is a step of each.
    small = dataclasses.replace(small, precision="float64")
    dataset = made_up_images(13, 3)
    runs = [dataclasses.replace(small, seed=seed) for seed in (0, 7)]
    together = ManyTrainer(runs, dataset, CPU)
    events = list(together.events())
    for run, recipe in enumerate(runs):
        one, expected = alone(recipe, dataset)
        bound = run_bound(one.leaves, recipe.batch_size * PIXELS, one.counts.steps, np.float64)
        assert_within(together.state(run), one.state(), bound=bound, item=f"seed {recipe.seed}", relative_to_layer=True)
        own = [event for index, event in events if index == run]
        assert [event.epoch for event in own] == [event.epoch for event in expected] == [1, 1, 2, 2]
        for mine, theirs in zip(own, expected, strict=True):
            if hasattr(mine, "losses"):
                assert mine.num_correct.tolist() == theirs.num_correct.tolist()
                assert_within({"losses": mine.losses}, {"losses": theirs.losses}, bound=bound, item="losses")
            else:
                assert mine.test_correct.tolist() == theirs.test_correct.tolist()


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_runs_that_differ_in_the_optimisers_numbers_are_trained_by_one_program(name):
    numbers = {"sgd": SGD, "adam": ADAM}[name]
    base = dataclasses.replace(SMALL_MLP, precision="float64", optimizer=numbers)
    runs = [
        base,
        dataclasses.replace(
            base, seed=3, optimizer=dataclasses.replace(numbers, learning_rate=0.2 if name == "sgd" else 0.002)
        ),
    ]
    if name == "sgd":
        other = dataclasses.replace(numbers, momentum=0.5, dampening=0.1, weight_decay=0.002)
        runs.append(dataclasses.replace(base, optimizer=other))
    assert len({program_key(run) for run in runs}) == 1
    dataset = made_up_images(13, 3)
    together = ManyTrainer(runs, dataset, CPU)
    for _ in together.events():
        pass
    for run, recipe in enumerate(runs):
        one, _ = alone(recipe, dataset)
        bound = run_bound(one.leaves, recipe.batch_size * PIXELS, one.counts.steps, np.float64)
        assert_within(together.state(run), one.state(), bound=bound, item=str(run), relative_to_layer=True)


def test_what_changes_the_program_keeps_recipes_apart():
    changes = [
        {"batch_size": 4},
        {"epochs": 3},
        {"last_batch": "drop"},
        {"optimizer": ADAM},
        {"optimizer": dataclasses.replace(SMALL_MLP.optimizer, momentum=0.0)},
        {"optimizer": dataclasses.replace(SMALL_MLP.optimizer, nesterov=True)},
        {"model": dataclasses.replace(SMALL_MLP.model, hidden_sizes=(7,))},
    ]
    keys = {program_key(dataclasses.replace(SMALL_MLP, **change)) for change in ({}, *changes)}
    assert len(keys) == 1 + len(changes)


def test_the_grid_holds_every_combination_that_says_something_once():
    found = sweep.settings(MLP128, ["learning_rate=0.1,0.01", "optimizer=sgd,adam", "momentum=0,0.9"])
    assert [setting.values for setting in found] == [
        {"learning_rate": rate, **rest}
        for rate in (0.1, 0.01)
        for rest in ({"optimizer": "sgd", "momentum": 0}, {"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "adam"})
    ]
    adam = found[2].recipe.optimizer
    assert adam == dataclasses.replace(ADAM, learning_rate=0.1, weight_decay=MLP128.optimizer.weight_decay)
    assert found[1].recipe.optimizer == dataclasses.replace(MLP128.optimizer, learning_rate=0.1, momentum=0.9)
    assert found[1].name == "learning_rate-0.1_optimizer-sgd_momentum-0.9"
    assert all(setting.recipe.expected is None for setting in found)


def test_a_field_can_be_named_by_its_path_and_hold_lists_and_a_schedule_brings_the_lessons():
    (one, two) = sweep.settings(MLP128, ["model.hidden_sizes=[32],[64]", "schedule=step"])
    assert (one.recipe.model.hidden_sizes, two.recipe.model.hidden_sizes) == ((32,), (64,))
    assert (one.recipe.schedule.step_epochs, one.recipe.schedule.gamma) == (10, 0.1)


def test_words_stand_in_lists_as_they_do_alone_and_spaces_are_nothing():
    found = sweep.settings(MLP128, ["hidden_sizes = [8,8], [9,9]", "model.activations=[relu, tanh],[tanh,tanh]"])
    assert [(setting.recipe.model.hidden_sizes, setting.recipe.model.activations) for setting in found] == [
        ((8, 8), ("relu", "tanh")),
        ((8, 8), ("tanh", "tanh")),
        ((9, 9), ("relu", "tanh")),
        ((9, 9), ("tanh", "tanh")),
    ]
    (one, two) = sweep.settings(MLP128, ["learning_rate = .5, 1e5"])
    assert (one.recipe.optimizer.learning_rate, two.recipe.optimizer.learning_rate) == (0.5, 100_000)


def test_numbers_are_named_as_one_writes_them():
    names = [setting.name for setting in sweep.settings(MLP128, ["learning_rate=1e5,1e6,1e-6,0.1"])]
    assert names == ["learning_rate-100000", "learning_rate-1e6", "learning_rate-1e-06", "learning_rate-0.1"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("learning_rat=0.1", "did you mean 'learning_rate'?"),
        ("learning_rate", "must be FIELD=VALUE,VALUE"),
        ("learning_rate=", "must be FIELD=VALUE,VALUE"),
        ("learning_rate=0.1,", "none empty"),
        ("learning_rate=0.1,x", "optimizer.learning_rate 'x'"),
        ("learning_rate=" + "[" * 20_000, "optimizer.learning_rate"),
        ('optimizer=["sgd"]', "optimizer.name"),
        ("betas=[0.9,0.99]", "uses that field"),
        ("data.path=a,b", "uses that field"),
        ("learning_rate=-1", "optimizer.learning_rate -1: must be greater than 0"),
        ("batch_size=0.5", "batch_size 0.5"),
        ("optimizer=sdg", "optimizer.name 'sdg'"),
        ("std=1", "which one: preprocessing.std, init.std?"),
        ("name=sgd", "changes nothing that is learned; leave it out"),
        ("seed=1,2", "--seeds N trains several seeds"),
        ("seeds=1,2", "--seeds N trains several seeds"),
        ("=1", "must be FIELD=VALUE,VALUE"),
        ("nam=x", "a recipe has no such field; --help lists them"),
        ("learning_rate=0.1,nan", "optimizer.learning_rate nan: must be a finite number"),
        ("learning_rate=0.1,1e-1", "--sweep learning_rate: 0.1 is there 2 times; leave it once"),
        ("hidden_sizes=32,64", "each value of hidden_sizes is a list; write [32],[64] for 2 of them, [32,64] for one"),
        ("hidden_sizes=32", "each value of hidden_sizes is a list; write [32]"),
        ("activations=[relu,]", "model.activations"),
        ("learning_rate=" + "[" * 20_000 + "]" * 20_000, "optimizer.learning_rate"),
        ("optimizer.name.x=1", "no such field"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_naming_the_field_and_the_value(asked, said):
    with pytest.raises(RecipeError) as refused:
        sweep.settings(MLP128, [asked])
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("first", "again"), [("batch_size", "batch_size"), ("learning_rate", "optimizer.learning_rate")]
)
def test_a_field_given_twice_is_refused_by_whatever_name(first, again):
    with pytest.raises(RecipeError, match="there already"):
        sweep.settings(MLP128, [f"{first}=1,2", f"{again}=3"])


def test_a_sweep_over_data_trains_each_setting_on_its_own(trainer_command, tmp_path):
    flags = ["--recipe", "digits", "--epochs", 1, "--sweep", "data=digits,breast_cancer", "--out", tmp_path / "out"]
    ended = trainer_command(*flags)
    assert ended.status == 0, ended.err
    for name, features in (("digits", 64), ("breast_cancer", 30)):
        weights = load_file(tmp_path / "out" / f"data-{name}_seed-0" / "weights.safetensors")
        assert weights["linear1.weight"].shape[1] == features


def test_a_point_of_the_grid_that_does_not_fit_the_data_is_found_before_anything_is_trained(trainer_command, tmp_path):
    flags = ["--recipe", "digits", "--sweep", "batch_size=32,1600", "--out", tmp_path / "out"]
    ended = trainer_command(*flags)
    assert ended.status == 2
    assert "batch_size 1600 is larger than the training split" in ended.err
    assert not (tmp_path / "out").exists()


def test_the_command_writes_each_run_as_if_alone_and_mean_and_deviation_of_all(trainer_command, tmp_path):
    many_out, one_out = tmp_path / "many", tmp_path / "one"
    flags = ["--recipe", "digits", "--epochs", 2]
    ended = trainer_command(*flags, "--seeds", 3, "--seed", 4, "--out", many_out)
    assert ended.status == 0, ended.err
    assert trainer_command(*flags, "--seed", 5, "--checkpoint-every", "never", "--out", one_out).status == 0
    own = many_out / "seed-5"
    assert sorted(path.name for path in own.iterdir()) == sorted(path.name for path in one_out.iterdir())
    assert (
        json.loads((own / "config.json").read_text())["recipe"]
        == json.loads((one_out / "config.json").read_text())["recipe"]
    )
    accuracies = [
        json.loads((many_out / f"seed-{seed}" / "summary.json").read_text())["test_accuracy"] for seed in (4, 5, 6)
    ]
    kept, single = (json.loads((path / "summary.json").read_text()) for path in (own, one_out))
    times = {"seconds": 0, "compile_seconds": 0}
    figures = {name for name, value in single.items() if isinstance(value, float)} - times.keys()
    assert {name: kept[name] for name in figures} == pytest.approx(
        {name: single[name] for name in figures}, rel=SEVEN_DIGITS
    )
    left = times | dict.fromkeys((*figures, "lesson_metrics"))
    assert kept | left == single | left
    mine, theirs = (
        [json.loads(line) | times for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (own, one_out)
    )
    assert len(mine) == len(theirs)
    for line, expected in zip(mine, theirs, strict=True):
        for name in ("event", "lesson_metrics"):
            assert line.pop(name, None) == expected.pop(name, None)
        assert line == pytest.approx(expected, rel=SEVEN_DIGITS)
    assert accuracies[1] == json.loads((one_out / "summary.json").read_text())["test_accuracy"]
    (row,) = json.loads((many_out / "summary.json").read_text())["settings"]
    assert row["accuracies"] == accuracies
    assert row["mean"] == pytest.approx(sum(accuracies) / 3, rel=ROUNDED_MEAN)
    assert row["sd"] == pytest.approx(statistics.stdev(accuracies), rel=ROUNDED_MEAN)
    said = f"digits: test accuracy {row['mean']:.4f} +- {row['sd']:.4f} over 3 seeds"
    assert said in ended.out.splitlines()[-1]
    assert [line.split("|")[1].strip() for line in (many_out / "table.md").read_text().splitlines()[2:]] == [
        "4",
        "5",
        "6",
    ]


def test_a_run_that_diverges_leaves_the_others_alone_and_is_shown(trainer_command, tmp_path):
    flags = [
        "--recipe",
        "digits",
        "--epochs",
        2,
        "--sweep",
        "learning_rate=0.1,1e6",
        'activations=["relu"]',
        "--optimizer.weight-decay",
        10,
    ]
    ended = trainer_command(*flags, "--out", tmp_path / "sweep")
    assert ended.status == 0, ended.err
    rows = json.loads((tmp_path / "sweep" / "summary.json").read_text())["settings"]
    assert rows[1]["accuracies"] == [None]
    assert rows[0]["accuracies"][0] is not None
    assert "is out: the loss is" in ended.out
    assert "diverged" in (tmp_path / "sweep" / "table.md").read_text()
    assert (tmp_path / "sweep" / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "sweep").glob("learning_rate-1e6_*/config.json"))
    assert not list((tmp_path / "sweep").glob("learning_rate-1e6_*/summary.json"))
    assert "2 runs in 1 program on " in ended.out
    assert re.search(r"epoch 2/2 done in [0-9.]+ s  1 run, accuracy 0\.[0-9]{4}\n", ended.out)
    assert "lower learning_rate (now 1e+06)" in ended.out
    assert f"written in {tmp_path / 'sweep'}" in ended.out


def report_of(number: int, accuracies: tuple[float, ...]) -> dict:
    """Return the report of as many settings, the one of learning rate n a thousandth of n better than those."""
    rows = [
        sweep.summary_row({"learning_rate": n}, [accuracy + n / 1000 for accuracy in accuracies])
        for n in range(1, number + 1)
    ]
    return {"recipe": "digits", "seeds": list(range(len(accuracies))), "accuracy_of": "test", "settings": rows}


@pytest.mark.parametrize(
    ("number", "accuracies", "title", "first"),
    [
        (40, (0.5,), "digits, 1 seed a setting", "learning_rate 1"),
        (41, (0.5, 0.6), "digits, 2 seeds a setting; the best 40 of 41 settings", "learning_rate 2"),
    ],
)
def test_a_chart_says_what_it_shows_and_of_many_settings_shows_the_best(
    number, accuracies, title, first, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, dpi: drawn.append(figure))
    sweep.chart(report_of(number, accuracies), tmp_path / "chart.png")
    (axes,) = drawn[0].axes
    assert axes.get_title() == title
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert (len(names), names[0], names[-1]) == (40, first, f"learning_rate {number}")
    assert [line.get_ydata() for line in axes.lines if line.get_marker() == "*"] == [[39]]  # the last drawn is the best
    assert not axes.texts  # none diverged
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["a run", "mean of a setting", "the best mean"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seeds", 0], "--seeds 0 must be 1 or more"),
        (["--seeds", 2, "--seed", 2**32 - 1], "--seeds 2 from --seed 4294967295 on goes past the last"),
        (["--seeds", 300_000_000], "300,000,000 runs are asked for"),
        (["--sweep", "learning_rate=0.1", "--sweep", "batch_size=2"], "--sweep is there twice"),
        (["--sweep"], "--sweep names no field"),
        (["--list", "--sweep", "batch_sice=2"], "did you mean 'batch_size'?"),
        (["--seeds", 2, "--overwrite"], "--overwrite replaces one run"),
        (["--sweep", "learning_rate=x"], "optimizer.learning_rate 'x'"),
        (["--seeds", 2, "--print-config"], "--print-config prints one recipe"),
        (["--sweep", "batch_size=2,3", "--print-config"], "--print-config prints one recipe"),
        (
            ["--sweep", "learning_rate=0.1", "--learning-rate", 0.2],
            "optimizer.learning_rate is both swept and changed to 0.2; leave one of the two out",
        ),
        (["--sweep", "batch_size=32,64", "--batch-size", 5000], "batch_size is both swept and changed to 5000"),
        (["--sweep", "batch_size=32,5000"], "use batch_size 1438 or less"),
        (["--seeds", "x"], "--seeds: 'x' is not a whole number"),
        (["--momentum", "x"], "--optimizer.momentum: 'x' is not a number"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(flags, said, trainer_command, tmp_path):
    ended = trainer_command("--recipe", "digits", *flags, "--out", tmp_path / "out")
    assert ended.status == 2
    assert said in ended.err
    assert not (tmp_path / "out").exists()


def test_every_run_diverging_is_an_error(trainer_command, tmp_path):
    flags = ["--recipe", "digits", "--learning-rate", 1e6, "--optimizer.weight-decay", 10, "--seeds", 2]
    ended = trainer_command(*flags, "--out", tmp_path / "out")
    assert ended.status == 2
    assert "every run diverged" in ended.err
    assert ended.out.count("is out: the loss is") == 2
    assert "done in" not in ended.out  # of 20 epochs, the first was the last


def test_a_kind_can_be_swept_though_the_command_line_changes_it_for_the_sake_of_its_fields():
    other = dataclasses.replace(ADAM, betas=(0.8, 0.99))
    flags = sweep.ManyFlags(config=dataclasses.replace(MLP128, optimizer=other), sweep=("optimizer=adam,sgd",))
    sweep.check_given(["--sweep", *flags.sweep], flags)
    assert [setting.recipe.optimizer.betas for setting in sweep.plan(flags)[0]] == [(0.8, 0.99), None]


def test_a_place_that_is_taken_is_refused_without_advice_that_would_be_refused(trainer_command, tmp_path):
    (tmp_path / "seed-0").mkdir()
    ended = trainer_command("--recipe", "digits", "--seeds", 2, "--out", tmp_path)
    assert ended.status == 2
    assert (
        ended.err
        == f"error: --out {tmp_path} is not empty; name another directory; several runs at once are not gone on with\n"
    )


def test_a_directory_of_several_runs_is_no_recipe_and_says_which_are(trainer_command, tmp_path):
    for seed in (0, 1):
        (tmp_path / f"seed-{seed}").mkdir()
        (tmp_path / f"seed-{seed}" / "config.json").write_text("{}")
    ended = trainer_command("--recipe", tmp_path)
    assert ended.status == 2
    assert ended.err == f"error: {tmp_path} holds 2 runs; name one of them: {tmp_path / 'seed-0'}\n"


def test_torchs_trainer_says_that_it_has_no_seeds(trainer_command):
    ended = trainer_command("--seeds", 2, framework="torch")
    assert ended.status == 2
    assert "--seeds" in ended.err + ended.out


def test_numbers_that_are_zero_stay_out_of_the_state():
    plain = dataclasses.replace(MLP128, optimizer=dataclasses.replace(MLP128.optimizer, momentum=0.0, weight_decay=0.0))
    state = optim.tunable_optimizer(plain, 10).init({"a": np.zeros(2, np.float32)})
    assert list(state.hyperparams) == ["learning_rate"]


@pytest.mark.parametrize("rule", [optim.optimizer, optim.tunable_optimizer])
@pytest.mark.parametrize("options", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("schedule", ["constant", "step", "cosine"])
def test_the_optimisers_state_starts_as_optax_starts_it(rule, options, schedule):
    (setting,) = sweep.settings(dataclasses.replace(MLP128, optimizer=options), [f"schedule={schedule}"])
    optimizer = rule(setting.recipe, 10)
    params = {"a": {"kernel": np.ones((2, 3), np.float32)}}
    found, expected = optim.initial_state(optimizer, setting.recipe, params), optimizer.init(params)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (mine.dtype, mine.tolist()) == (theirs.dtype, theirs.tolist())

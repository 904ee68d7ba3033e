"""The benchmark: equal work before times, ratios turn by turn, operations counted by hand; no test looks at a clock."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from jax_impl import baselines as jax_baselines
from jax_impl import bench, machine, profile
from jax_impl.parallel import Placement, place, select_device
from jax_impl.trainer import Trainer
from spec import bench_worker, datasets, flops, recipe
from spec.errors import UserError, exit_status
from spec.recipe import Model, Recipe
from spec_tests.assertions import assert_identical, assert_within
from spec_tests.conftest import made_up_images
from spec_tests.tolerances import sum_bound
from torch_ref import baselines as torch_baselines
from torch_ref import data as torch_data

# Operations


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("softmax-regression", 4 * 7840),  # forward and by the weight; the images need no gradient
        ("mlp128", 4 * 784 * 128 + 6 * 128 * 10),
        ("mlp128-batchnorm", 6 * 784 * 128 + 6 * 128 * 10),  # the images' norm is trained: it needs their gradient
        ("mlp512", 4 * 784 * 512 + 6 * 512 * 512 + 6 * 512 * 10),
        (
            "cnn",
            4 * 9 * 1 * 32 * 784 + 6 * 9 * 32 * 64 * 196 + 6 * 9 * 64 * 128 * 49
            + 6 * (1152 * 512 + 512 * 512 + 512 * 10),
        ),
    ],
)  # fmt: skip
def test_the_operations_of_a_training_step_are_those_counted_by_hand(name, expected):
    assert flops.training_flops(recipe.load(name).model, (28, 28, 1), 10) == expected


def test_a_halved_image_is_halved_downwards():
    model = Model(name="cnn", channels=(2, 3), hidden_sizes=(), dropout=0.0)
    assert flops.forward_flops(model, (7, 5, 1), 4) == [2 * 9 * 2 * 35, 2 * 9 * 2 * 3 * 6, 2 * 3 * 4]


# Workers

TOY = """
import sys
from spec import bench_worker

class Toy:
    def first_losses(self, steps, run=0):
        print("a library's own words")
        return [{loss} / (step + 1) + run * {odd} for step in range(steps)]

    def train(self, steps):
        if steps > 50:
            raise MemoryError("the toy is full")

    def device(self):
        return {{"platform": "gpu", "kind": "toy GPU"}}

    def matmul_rate(self):
        return 1e9

    def profile(self, steps):
        operations = {{f"operation{{index}}": 0.5**index for index in range(12)}}
        return {{"seconds": 4.0, "operations": operations if steps > 1 else {{}}}}

bench_worker.serve(Toy)
"""


def toy(tmp_path: Path, name: str, loss: float = 1.0, odd: float = 0.0) -> list[str]:
    """Return what starts a toy of first loss `loss`; `odd` is how much more that of another run than the first is."""
    file = tmp_path / f"{name}.py"
    file.write_text(TOY.format(loss=loss, odd=odd))
    return [sys.executable, str(file)]


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Put toys in the programs' place, return which were started, where.

    `stock` does other work, `many` of 7 seeds does not train its last as the first, and `compile` does not start.
    """
    root = str(Path(bench.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", root)
    losses = {"stock": 1.01}
    started = []

    def command(name, recipe, platform, *, seeds=None):
        started.append((name, platform, seeds))
        if name == "compile":
            return [sys.executable, str(tmp_path / "no_such_file.py")]
        return toy(tmp_path, name, losses.get(name, 1.0), odd=0.5 if seeds == 7 else 0.0)

    monkeypatch.setattr(bench, "_module", lambda name, platform: toy(tmp_path, "machine"))
    monkeypatch.setattr(bench, "command", command)
    return started


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    return exit_status(bench.main)


def test_a_worker_answers_and_ends_with_its_driver(tmp_path, toys):
    with bench_worker.worker("toy", bench.command("toy", "", "cpu")) as program:
        assert program.first_losses(3) == [1.0, 1 / 2, 1 / 3]
        assert program.seconds(5) >= 0
        assert program.peak_bytes > 1_000_000
        process = program._process
    assert process.poll() is not None


def test_a_worker_that_fails_is_named_with_what_it_said(toys):
    with bench_worker.worker("toy", bench.command("toy", "", "cpu")) as program, pytest.raises(UserError) as told:
        program.seconds(51)
    assert "toy ended with status 1; it said: MemoryError: the toy is full" in str(told.value)


def test_what_a_worker_said_is_its_exception_and_not_what_a_library_said_after_it(tmp_path):
    assert bench_worker.last_words("") == "nothing"
    assert bench_worker.last_words("one\ntwo") == "two"
    fails = tmp_path / "fails.py"
    many_lines = "no room for\\n\\nclass Module:\\n    x = nnx.List()"
    fails.write_text(f"try:\n    1 / 0\nexcept ZeroDivisionError:\n    raise ValueError('{many_lines}')\n")
    with pytest.raises(UserError) as told:
        contextlib.ExitStack().enter_context(bench_worker.worker("toy", [sys.executable, str(fails)]))
    assert str(told.value) == "toy ended with status 1; it said: ValueError: no room for"


def test_a_mistake_that_a_worker_finds_is_told_in_its_own_words(tmp_path):
    told = tmp_path / "told.py"
    told.write_text("import sys\nsys.exit(print('noise\\nerror: recipe x:\\n  a: b; mend', file=sys.stderr) or 2)")
    with pytest.raises(UserError) as refused:
        contextlib.ExitStack().enter_context(bench_worker.worker("toy", [sys.executable, str(told)]))
    assert str(refused.value) == "recipe x:\n  a: b; mend"


def test_a_worker_that_does_not_start_is_named_too(tmp_path):
    gone = [sys.executable, str(tmp_path / "no_such_file.py")]
    with pytest.raises(UserError, match=r"toy ended with status 2; it said: .*no_such_file"):
        contextlib.ExitStack().enter_context(bench_worker.worker("toy", gone))


# The programs do the same work


def program(name: str, of: Recipe) -> bench_worker.Program:
    if name in bench.ON_JAX:
        return jax_baselines.PROGRAMS[name](of, select_device("cpu"))
    return torch_baselines.program(name, of, torch.device("cpu"))


def small(name: str) -> Recipe:
    """Return a recipe whose network is small where it is convolutional."""
    loaded = recipe.load(name)
    model = dataclasses.replace(loaded.model, channels=(3, 4), hidden_sizes=(6,)) if name == "cnn" else loaded.model
    return dataclasses.replace(loaded, model=model, batch_size=16)


@pytest.fixture
def few_images(monkeypatch):
    images = made_up_images(200, 10)
    monkeypatch.setattr(datasets, "load", lambda data, **options: images)
    monkeypatch.setattr(torch_data, "load", lambda data, **options: images)
    monkeypatch.setenv("KERAS_BACKEND", "jax")


SLOW = [pytest.param("cnn", name, marks=pytest.mark.slow(minutes=1)) for name in ("eager", "stock", "keras")]


@functools.cache
def our_losses(of: str) -> tuple[float, ...]:
    return tuple(program("ours", small(of)).first_losses(4))


@pytest.mark.parametrize(
    ("of", "name"),
    [
        *(("mlp128", name) for name in ("eager", "channels_last", "stock", "keras", *bench.MODES)),
        ("cnn", "channels_last"),
        *SLOW,
    ],
)
def test_every_program_gives_our_first_losses_and_trains_over_an_epochs_end(of, name, few_images):
    expected = our_losses(of)
    baseline = program(name, small(of))
    assert baseline.first_losses(4) == pytest.approx(expected, rel=bench.LOSS_TOLERANCE)
    assert len(set(expected)) == 4
    baseline.train(14)  # 12 full batches and a short one, or 12, make an epoch


def changed(of: Recipe, fields: Mapping[str, object]) -> Recipe:
    """Return the recipe with other values of some fields, by their paths."""
    mapping = recipe.to_mapping(of)
    for path, value in fields.items():
        *sections, field = path.split(".")
        owner = functools.reduce(dict.__getitem__, sections, mapping)
        owner[field] = value
        if value is None:
            del owner[field]
    return recipe.parse(mapping, source="a test")


ADAM = {"optimizer.name": "adam", "optimizer.betas": [0.9, 0.99], "optimizer.epsilon": 1e-6}
ADAM |= dict.fromkeys(("optimizer.momentum", "optimizer.dampening", "optimizer.nesterov"))
STEPS = {"schedule.name": "step", "schedule.step_epochs": 1, "schedule.gamma": 0.5}
DECAY = {"optimizer.weight_decay": 0.5}
NORMED = {"model.input_batchnorm": True, "model.batchnorm_statistics": "global"}
SUM = {"loss.reduction": "sum", "optimizer.learning_rate": 0.01}
SMOOTH = {"loss.label_smoothing": 0.3}
SLIP = {"loss.name": "cross_entropy_of_softmax"}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("eager", SUM | ADAM | SMOOTH | SLIP),
        ("eager", NORMED),
        ("stock", ADAM | NORMED),
        ("stock", DECAY | STEPS | {"optimizer.dampening": 0.5}),
        ("keras", {"optimizer.nesterov": True}),
    ],
)
def test_what_a_program_takes_it_follows(name, fields, few_images):
    of = changed(small("mlp128"), fields)
    assert bench.misfit(name, of) is None
    expected = program("ours", of).first_losses(4)
    assert expected[1:] != pytest.approx(our_losses("mlp128")[1:], rel=10 * bench.LOSS_TOLERANCE)
    assert program(name, of).first_losses(4) == pytest.approx(expected, rel=bench.LOSS_TOLERANCE)


@pytest.mark.parametrize("name", ["eager", "stock", "keras"])
def test_the_first_losses_may_be_those_of_a_whole_epoch_with_its_short_batch(name, few_images):
    of = changed(small("mlp128"), {"batch_size": 64, "last_batch": "keep"})
    expected = program("ours", of).first_losses(4)  # the last of 8 images
    assert program(name, of).first_losses(4) == pytest.approx(expected, rel=bench.LOSS_TOLERANCE)


def test_torch_in_memory_follows_the_schedule_from_epoch_to_epoch(few_images):
    eager = program("eager", changed(small("mlp128"), STEPS | {"optimizer.learning_rate": 0.125}))
    rates = []
    for steps in (1, 1, 11, 1):  # of 12 an epoch; the first two end one
        eager.train(steps)
        rates.append(eager.optimizer.param_groups[0]["lr"])
    assert rates == [0.125, 0.0625, 0.0625, 0.03125]


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("stock", SLIP, "loss.name cross_entropy_of_softmax; stock takes only cross_entropy"),
        ("keras", ADAM, "optimizer.name adam; keras takes only sgd"),
        ("keras", NORMED, "model.input_batchnorm True; keras takes only False"),
        ("keras", DECAY, "optimizer.weight_decay 0.5; keras takes only 0.0"),
        ("keras", STEPS, "schedule.name step; keras takes only constant"),
        ("keras", {"optimizer.dampening": 0.5}, "optimizer.dampening 0.5; keras takes only 0.0"),
        ("stock", SUM, "loss.reduction sum; stock takes only mean"),
        ("stock", SMOOTH, "loss.label_smoothing 0.3; stock takes only 0.0"),
        ("lesson", SMOOTH, "loss.label_smoothing 0.3; lesson takes only 0.0"),
        ("lesson", STEPS, "schedule.name step; lesson takes only constant"),
        ("lesson", {"preprocessing.divisor": 16.0}, "preprocessing.divisor 16.0; lesson takes only 255.0"),
        ("lesson", {"preprocessing.standardize": True}, "preprocessing.standardize True; lesson takes only False"),
        ("channels_last", {}, "model.name mlp; channels_last takes only cnn"),
        *(
            (name, {"precision": precision}, f"precision {precision}; {name} takes only float32")
            for precision in ("bfloat16", "float64")
            for name in bench.BASELINES
        ),
    ],
)
def test_a_program_is_not_timed_on_what_it_does_not_train(name, fields, said):
    of = changed(recipe.load("mlp128"), fields)
    assert bench.misfit(name, of) == f"mlp128 has {said}"
    assert name not in bench.default_baselines(of)
    with pytest.raises(UserError) as refused:
        bench._check_baseline(name, of, flag=f"--against {name}")
    assert str(refused.value) == f"--against {name}: mlp128 has {said}; leave it out, or take another recipe"


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        ("mlp128", {"lesson", "eager", "compile", "stock", "keras"}),
        ("cnn", set(bench.BASELINES)),
        ("breast-cancer", {"eager", "compile"}),
        ("mlp128-batchnorm", {"lesson", "eager", "compile", "stock"}),
        ("mnist-mlp256", {"eager", "compile"}),
        ("mnist-mlp256-logits", {"lesson", "eager", "compile", "stock"}),
        ("digits", {"eager", "compile", "stock", "keras"}),
    ],
)
def test_the_programs_beside_ours_are_those_that_train_the_recipe(of, expected):
    assert {name for name in bench.BASELINES if not bench.misfit(name, recipe.load(of))} == expected
    assert set(bench.default_baselines(recipe.load(of))) == expected & set(bench.installed_baselines())


def test_the_lessons_program_gives_our_first_losses(fashion_mnist):
    expected = program("ours", recipe.load("mlp128")).first_losses(3)
    assert program("lesson", recipe.load("mlp128")).first_losses(3) == pytest.approx(expected, rel=bench.LOSS_TOLERANCE)


def test_our_trainer_goes_on_where_it_stopped_as_an_unbroken_one_does(few_images):
    of = small("mlp128")
    by_parts, at_once = (Trainer(of, datasets.load(of.data), place("cpu")) for _ in range(2))
    for steps in (5, 9, 11):
        by_parts.train(steps)
    at_once.train(25)
    assert_identical(by_parts.state(), at_once.state(), item="weights")
    first_epoch = Trainer(dataclasses.replace(of, epochs=1), datasets.load(of.data), place("cpu"))
    list(first_epoch.events())
    by_parts = Trainer(of, datasets.load(of.data), place("cpu"))
    by_parts.train(first_epoch.counts.steps_per_epoch)
    assert_identical(by_parts.state(), first_epoch.state(), item="an epoch")


# The driver


def test_a_comparison_is_printed_kept_and_drawn(toys, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--recipe", "digits", "--against", "eager", "keras", "--pairs", 2, "--steps", 3]
    status = run(monkeypatch, *flags, "--json", "times.json", "--chart", "ratios.png", "--keep")
    out = capsys.readouterr().out
    assert status == 0, out
    assert "the losses of the first 20 steps are the same in all programs" in out
    assert "turn 2 of 2: ours" in out
    assert "Keras 3 on the JAX backend" in out
    assert "efficiency, floor over time" in out
    assert "digits, 2 turns of 3 steps" in out
    assert "above 1 it is slower" in out
    assert all(f"wrote {file}" in out for file in ("times.json", "ratios.png", "results/bench.json"))
    report = json.loads((tmp_path / "times.json").read_text())
    assert {name: len(seconds) for name, seconds in report["seconds"].items()} == {"ours": 2, "eager": 2, "keras": 2}
    assert report["steps"] == 3
    assert report["flops"] == 3 * 32 * flops.training_flops(recipe.load("digits").model, (64,), 10)
    assert report["matmul_flops_per_second"] == [1e9, 1e9]
    assert report["machine"].startswith("toy GPU, ")
    assert bench.load_results(tmp_path) == {"digits, gpu": report}
    assert toys == [("ours", "gpu", None), ("eager", "gpu", None), ("keras", "gpu", None)]
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")


def test_our_modes_are_timed_when_asked_for_and_kept_apart(toys, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--recipe", "digits", "--against", "sharded", "pmap", "--pairs", 1, "--steps", 3, "--keep"]
    assert run(monkeypatch, *flags) == 0
    assert "sharded: ours, --parallel sharded on one device" in capsys.readouterr().out
    assert toys == [("ours", "gpu", None), ("sharded", "gpu", None), ("pmap", "gpu", None)]
    assert list(bench.load_results(tmp_path)) == ["digits, sharded, pmap, gpu"]
    assert not set(bench.MODES) & set(bench.default_baselines(recipe.load("digits")))


@pytest.mark.parametrize("mode", bench.MODES)
def test_a_mode_is_timed_as_that_mode(mode, few_images):
    assert program(mode, small("digits")).placement == Placement(mode, (jax.devices()[0],))


def test_runs_in_one_program_take_turns_with_as_many_one_after_the_other(toys, monkeypatch, tmp_path, capsys):
    flags = ["--recipe", "digits", "--seeds", 5, "--steps", 10, "--pairs", 1, "--platform", "gpu", "--profile"]
    assert run(monkeypatch, *flags, "--json", tmp_path / "times.json") == 0
    out = capsys.readouterr().out
    assert "as many runs, one after the other" in out
    assert out.count("are the same in all programs, of the first run and of the last") == 1
    assert "digits, 5 runs, 1 turn of 10 steps" in out
    assert "all times are of 5 runs together" in out
    assert "operation9" in out
    assert "operation10" not in out
    assert "all others" in out
    assert "no operation" in out
    assert "the losses of the first 20 steps are the same in all programs" in out
    report = json.loads((tmp_path / "times.json").read_text())
    assert {name: len(seconds) for name, seconds in report["seconds"].items()} == {"ours": 1, "alone": 1}
    assert report["flops"] == 5 * 10 * 32 * flops.training_flops(recipe.load("digits").model, (64,), 10)
    assert bench.key(report) == "digits, 5 seeds, gpu"
    assert toys == [("many", "gpu", 5), ("ours", "gpu", None)]
    # The toy refuses more than 50 steps at a time: the single run makes those of all five.
    assert run(monkeypatch, *flags[:4], "--steps", 11, "--pairs", 1) == 2
    assert "ours ended with status 1; it said: MemoryError" in capsys.readouterr().err


def test_the_last_of_several_runs_must_do_equal_work_too(toys, monkeypatch, capsys):
    assert run(monkeypatch, "--recipe", "digits", "--seeds", 7, "--pairs", 1) == 2
    assert "alone does other work: its loss at step 0 is 1.000000, ours 4.000000" in capsys.readouterr().err


def test_a_profile_that_names_no_operation_loses_no_times(toys, monkeypatch, capsys, tmp_path):
    flags = ["--recipe", "digits", "--against", "eager", "--pairs", 1, "--steps", 1, "--profile"]
    assert run(monkeypatch, *flags, "--json", tmp_path / "times.json") == 0
    assert "no operation" in capsys.readouterr().out
    assert json.loads((tmp_path / "times.json").read_text())["profile"]["operations"] == {}


def test_a_program_that_nobody_asked_for_is_left_out_where_it_does_not_start(toys, monkeypatch, capsys):
    monkeypatch.setattr(bench, "default_baselines", lambda recipe: ["compile", "eager"])
    assert run(monkeypatch, "--recipe", "digits", "--pairs", 1, "--steps", 1) == 0
    assert "compile is left out: compile ended with status 2" in capsys.readouterr().out
    assert run(monkeypatch, "--recipe", "digits", "--pairs", 1, "--steps", 1, "--against", "compile") == 2
    assert "--against compile: compile ended with status 2" in capsys.readouterr().err


def test_a_program_that_does_not_train_the_recipe_is_left_out_with_the_reason(toys, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "installed_baselines", lambda: ["eager", "stock", "keras"])
    assert run(monkeypatch, "--recipe", "breast-cancer", "--pairs", 1, "--steps", 1) == 0
    out = capsys.readouterr().out
    for name in ("stock", "keras"):
        reason = f"breast-cancer has loss.name binary_cross_entropy; {name} takes only cross_entropy"
        assert f"{name} is left out: {reason}\n" in out
    assert [name for name, _, _ in toys] == ["ours", "eager"]
    narrow = tmp_path / "narrow.toml"
    narrow.write_text((recipe.RECIPES / "digits.toml").read_text().replace('"float32"', '"bfloat16"'))
    assert run(monkeypatch, "--recipe", narrow, "--pairs", 1, "--steps", 1) == 0
    out = capsys.readouterr().out
    assert "eager is left out: digits has precision bfloat16; eager takes only float32\n" in out
    assert "ours alone: no other program is timed beside it" in out
    assert "are the same in all programs" not in out
    assert run(monkeypatch, "--recipe", narrow, "--chart", tmp_path / "ratios.png") == 2
    assert "--chart draws other programs' times, and none here trains digits; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (b'{"mlp128": {"recipe"', "cannot be read: Expecting"),
        (b"\xff", "cannot be read: 'utf-8' codec"),
        (b"[1]", "must hold a table of reports"),
        (b'{"mlp128": 1}', "must hold a table of reports"),
    ],
)
def test_damaged_results_are_named_before_anything_starts(kept, said, toys, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    bench.RESULTS.parent.mkdir()
    bench.RESULTS.write_bytes(kept)
    assert run(monkeypatch, "--recipe", "digits", "--against", "eager", "--pairs", 1, "--keep") == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: results/bench.json {said}")
    assert told.endswith("mend it, or move it away to start anew\n")
    assert toys == []
    assert bench.RESULTS.read_bytes() == kept


def test_an_epoch_of_fewer_steps_is_compared_whole(toys, monkeypatch, capsys):
    assert run(monkeypatch, "--recipe", "synthetic-3class", "--against", "eager", "--pairs", 1) == 0
    assert "the losses of the first 1 step are the same in all programs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "ours",
            "digits diverges: its loss at step 1 is nan; lower its learning_rate (now 1e+06), or scale the inputs "
            "down; nothing was timed",
        ),
        ("eager", "eager does other work: its loss at step 1 is nan, ours 2.000000; nothing was timed"),
    ],
)
def test_a_recipe_that_diverges_is_told_from_other_work(name, said):
    digits = recipe.load("digits")
    fast = dataclasses.replace(digits, optimizer=dataclasses.replace(digits.optimizer, learning_rate=1e6))
    with pytest.raises(UserError) as told:
        bench.check_equal_work(fast, {"ours": [1.0, 2.0], "eager": [1.0, 2.0]} | {name: [1.0, float("nan")]})
    assert str(told.value) == said


def test_an_interrupted_comparison_shows_and_writes_the_turns_that_were_done(toys, monkeypatch, tmp_path, capsys):
    calls = []

    def interrupted_at_the_sixth(worker: bench_worker.Worker, steps: int) -> float:
        calls.append(worker.name)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return {"ours": 0.5, "eager": 2.0}[worker.name]

    monkeypatch.setattr(bench_worker.Worker, "seconds", interrupted_at_the_sixth)
    flags = ["--recipe", "digits", "--against", "eager", "--pairs", 9, "--steps", 3, "--profile"]
    assert run(monkeypatch, *flags, "--json", tmp_path / "times.json") == 130
    out = capsys.readouterr().out
    assert "9 turns in about 22.5 s" in out  # 9 (0.5 + 2.0)
    assert "interrupted: what follows is of 1 turn, not 9" in out
    assert "4.00 (4.00 to 4.00)" in out
    assert json.loads((tmp_path / "times.json").read_text())["seconds"] == {"ours": [0.5], "eager": [2.0]}


def test_an_interrupt_before_the_first_turn_is_done_shows_nothing(toys, monkeypatch, capsys):
    monkeypatch.setattr(bench_worker.Worker, "seconds", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(monkeypatch, "--recipe", "digits", "--against", "eager", "--pairs", 9, "--steps", 3) == 130
    assert "over ours" not in capsys.readouterr().out


def test_what_cannot_be_written_after_all_is_shown_and_named(toys, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "check_target", lambda path, *, flag: None)
    target = tmp_path / "gone" / "times.json"
    flags = ["--recipe", "digits", "--against", "eager", "--pairs", 1, "--steps", 3]
    assert run(monkeypatch, *flags, "--json", target) == 2
    ended = capsys.readouterr()
    assert "above 1 it is slower" in ended.out
    refused = f"error: --json: {target} cannot be written: [Errno 2] No such file or directory: '{target}'"
    assert ended.err == f"{refused}; name another place\n"


def test_a_place_that_takes_no_file_is_refused_before_anything_starts(toys, monkeypatch, capsys):
    if not Path("/proc/self").is_dir():
        pytest.skip("there is no folder that nobody may write to")
    monkeypatch.setattr(bench, "command", None)
    assert run(monkeypatch, "--recipe", "digits", "--json", "/proc/times.json") == 2
    assert "--json /proc/times.json: nothing can be written there" in capsys.readouterr().err


def test_a_program_that_does_other_work_is_not_timed(toys, monkeypatch, capsys):
    assert run(monkeypatch, "--recipe", "digits", "--against", "eager", "stock", "--pairs", 1) == 2
    ended = capsys.readouterr()
    assert "stock does other work: its loss at step 0 is 1.010000, ours 1.000000; nothing was timed" in ended.err
    assert "turn" not in ended.out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "--against egaer",
            "--against egaer: there is no such program (did you mean 'eager'?); there are lesson, eager",
        ),
        ("--pairs 0", "--pairs 0 must be 1 or more"),
        ("--steps -1", "--steps -1 must be 1 or more"),
        ("--seeds 0", "--seeds 0 must be 1 or more"),
        ("--seeds 4 --against eager", "--seeds times our runs together and one after the other; leave out --against"),
        ("--seeds 1001", "--seeds 1001 must be 1,000 or less"),
        ("--process warm --profile", "leave out --profile"),
        ("--recipe mpl128", "no recipe has the name 'mpl128'"),
        ("--json .", "--json . is a directory"),
        ("--chart ratios.gif", "--chart ratios.gif must end in one of .png, .svg, .pdf"),
        ("--chart ratios", "--chart ratios must end in one of .png, .svg, .pdf"),
        ("--against channels_last", "--against channels_last: mlp128 has model.name mlp; channels_last takes only cnn"),
        (
            "--recipe digits --process cold",
            "--process cold: digits has data.name digits; lesson takes only fashion_mnist or mnist",
        ),
        ("--chart nowhere/ratios.png", "--chart nowhere/ratios.png: its directory does not exist"),
    ],
)
def test_a_mistake_exits_2_before_anything_starts(flags, said, toys, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "command", None)
    assert run(monkeypatch, *flags.split()) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("package", "name"), [("torch", "eager"), ("keras", "keras")])
def test_a_baseline_that_is_not_installed_says_which_extra_brings_it(package, name, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda asked: None if asked == package else find(asked))
    assert run(monkeypatch, "--recipe", "digits", "--against", name) == 2
    assert f"-e '.[{package}]'" in capsys.readouterr().err


REPORT = {
    "recipe": "mlp128",
    "machine": "2 CPU cores",
    "flops": 6e9,
    "matmul_flops_per_second": [3e9, 4e9],
    "seconds": {"ours": [2.0, 4.0, 3.0], "eager": [6.0, 4.0, 3.0]},
}


def test_small_times_are_shown_with_three_figures(capsys):
    report = REPORT | {"seconds": {"ours": [0.00712], "eager": [0.016]}, "flops": 1.25e7, "precision": "bfloat16"}
    measured = {"steps": 20, "steps_per_epoch": 45, "ready_seconds": {"ours": 1.0, "eager": 2.0}}
    bench.show(report | measured | {"peak_bytes": {"ours": 4e8, "eager": 5e8}})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split("  ")[0] == "program"
    assert lines[2].split() == ["ours", "0.00712", "1", "16.0", "356.0", "1.0", "400"]
    assert lines[3].split() == ["eager", "0.0160", "2.25", "(2.25", "to", "2.25)", "36.0", "800.0", "2.0", "500"]
    assert "eager: torch, tensors in memory" in lines
    assert "0.0125 GFLOP a turn, float32 matmul at 4.00 GFLOP/s at best" in lines
    # 1.25e7 / 4e9 / 0.00712 is 0.439
    assert lines[-1] == "efficiency, floor over time: 44%; the products are bfloat16, the floor is float32's"
    assert max(map(len, lines[:4])) <= 80


@pytest.mark.parametrize(
    ("process", "title"), [("cold", "cold (nothing compiled before)"), ("warm", "warm (our programs kept)")]
)
def test_a_table_of_whole_processes_has_their_columns_alone_and_says_what_was_compiled(process, title, capsys):
    bench.show({key: REPORT[key] for key in ("recipe", "machine", "seconds")} | {"process": process})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"mlp128, whole processes, {title}, 3 turns"
    assert lines[1].split("  ")[0] == "program"
    assert lines[3].split() == ["eager", "4.00", "1.00", "(1.00", "to", "3.00)"]


def test_a_chart_says_what_was_timed_and_its_ratios_to_a_hundredth(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, dpi: drawn.append(figure))
    report = REPORT | {"steps": 20, "seeds": 32, "date": "2026-01-02"}
    bench.chart(report | {"seconds": {"ours": [1.0], "alone": [0.98]}}, tmp_path / "ratios.png")
    (figure,) = drawn
    assert figure.get_suptitle() == "mlp128, 32 runs, 1 turn of 20 steps; 2 CPU cores, 2026-01-02"
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.98"]


def test_the_cores_are_those_that_this_process_may_use():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system pins no process")
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert bench.origin({"platform": "cpu"})["machine"] == "1 CPU core"
    finally:
        os.sched_setaffinity(0, cores)


def test_a_table_says_milliseconds_an_epoch_and_microseconds_a_step():
    report = REPORT | {"steps": 100, "steps_per_epoch": 400}
    rows = bench.table({"mlp128": report}).splitlines()
    assert "| ours, ms an epoch, by that | 12,000.0 |" in rows
    assert not any(row.startswith("| as many runs") for row in rows)
    assert "| ours, us a step | 30,000.0 |" in rows


def test_a_command_names_the_platform_and_the_seeds():
    assert bench.command("many", "digits", "gpu", seeds=32)[1:] == [
        "-m", "jax_impl.baselines", "--platform", "gpu", "--seeds", "32", "many", "digits"
    ]  # fmt: skip
    assert bench.command("eager", "digits", "cpu")[1:] == [
        "-m", "torch_ref.baselines", "--platform", "cpu", "eager", "digits"
    ]  # fmt: skip


# Our own program's other answers


def test_several_seeds_at_once_give_the_losses_of_each_alone(few_images):
    of = small("mlp128")
    many, alone = (jax_baselines.Ours(of, select_device("cpu"), seeds=seeds) for seeds in (3, None))
    assert many.first_losses(4) == pytest.approx(our_losses("mlp128"), rel=bench.LOSS_TOLERANCE)
    last = alone.first_losses(4, 2)
    assert many.first_losses(4, 2) == pytest.approx(last, rel=bench.LOSS_TOLERANCE)
    assert last != pytest.approx(our_losses("mlp128"), rel=bench.LOSS_TOLERANCE)


def test_a_profile_is_by_kind_of_operation_each_without_what_ran_inside_it(few_images):
    whole = program("ours", small("mlp128")).profile(3)
    found = whole["operations"]
    assert sum(found.values()) > 0
    assert whole["seconds"] > 0
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert any(name.startswith("dot") for name in found)
    spans = [(0.0, 10e9, "while"), (1e9, 4e9, "dot"), (2e9, 1e9, "copy"), (6e9, 2e9, "dot")]
    assert profile.own_seconds(spans) == {"while": 4.0, "dot": 5.0, "copy": 1.0}
    assert [profile.kind(name) for name in ("dot", "dot.12", "copy_fusion.3.clone.1")] == ["dot", "dot", "copy_fusion"]


@pytest.mark.parametrize(
    ("seconds", "rows", "of_what"),
    [
        # 0.9 + 0.3 s in a turn of 1 s: 75% and 25% of all operations; when none ran is unknown.
        (1.0, {"dot": "75%", "copy": "25%"}, "of all operations, which ran side by side: 1.20 times the turn"),
        (2.0, {"dot": "45%", "copy": "15%", "no operation": "40%"}, "of the turn"),
    ],
)
def test_the_shares_of_a_profile_add_up_to_a_hundred(seconds, rows, of_what, capsys):
    bench._show_profile({"seconds": seconds, "operations": {"dot": 0.9, "copy": 0.3}}, 10)
    out = capsys.readouterr().out
    assert dict(re.findall(r"^\W*([a-z ]+?)\W+[\d,.]+\W+(\d+%)", out, re.MULTILINE)) == rows
    assert f"share is {of_what}\n" in out


def test_the_readmes_share_of_the_cnns_products_is_that_of_the_kept_profile():
    root = Path(bench.__file__).parents[1]
    operations = bench.load_results(root)["cnn"]["profile"]["operations"]
    products = operations["ynn_fusion"] + operations["dot"]
    said = f"{products / sum(operations.values()):.0%} of their time, taken together, is convolutions and products"
    assert said in " ".join((root / "README.md").read_text("utf-8").split())


@pytest.mark.parametrize("product", [machine.blas_product(64), machine.device_product(64, select_device("cpu"))])
def test_a_matmul_rate_is_that_of_the_fastest_product(product, monkeypatch):
    square = np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)
    found, wanted = {"product": np.asarray(product())}, {"product": square.astype(np.float64) @ square}
    largest = float((np.abs(square) @ np.abs(square)).max())
    assert_within(found, wanted, bound=sum_bound(64, largest, np.float32), item="product")
    made, taken = [], iter([0.5, 0.25, 1.0, 0.5, 0.5])
    monkeypatch.setattr(machine, "_seconds", lambda work: made.append(work()) or next(taken))
    assert machine.best_rate(product) == 2 * 64**3 / 0.25
    assert len(made) == 5


def test_a_machine_says_its_device():
    assert machine.Machine(select_device("cpu")).device()["platform"] == "cpu"


def test_real_programs_take_turns_in_processes_of_their_own(monkeypatch, capsys):
    flags = ["--recipe", "digits", "--seeds", 2, "--steps", 2, "--pairs", 1, "--platform", "cpu", "--profile"]
    assert run(monkeypatch, *flags) == 0
    out = capsys.readouterr().out
    assert "the losses of the first 20 steps are the same in all programs" in out
    assert "operation of ours" in out


@pytest.mark.slow(minutes=1)
def test_every_real_baseline_runs_in_a_process_of_its_own(monkeypatch, capsys):
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # without it the import asks for TensorFlow, and the test is skipped
    pytest.importorskip("keras")
    against = ["lesson", "eager", "compile", "stock", "keras"]
    flags = ["--recipe", "mlp128", "--against", *against, "--steps", 3, "--pairs", 1, "--platform", "cpu"]
    assert run(monkeypatch, *flags) == 0
    assert "the losses of the first 20 steps are the same in all programs" in capsys.readouterr().out


def test_ratios_are_turn_by_turn_and_efficiency_is_floor_over_the_median():
    assert bench.ratios(REPORT, "eager") == [3, 1, 1]
    assert bench.efficiency(REPORT) == 6 / 4 / 3


def test_the_table_has_a_column_a_report():
    process = {
        "recipe": "mlp128",
        "process": "cold",
        "machine": "2 CPU cores",
        "seconds": {"ours": [1.0], "lesson": [5.0]},
    }
    rows = [line.split(" | ") for line in bench.table({"mlp128": REPORT, bench.key(process): process}).splitlines()]
    assert rows[0] == ["| time over ours", "`mlp128`", "`mlp128, whole process, cold` |"]
    by_name = {row[0].removeprefix("| "): row[1:] for row in rows}
    assert by_name[bench.BASELINES["eager"]] == ["1.00 (1.00 to 3.00)", "- |"]
    assert by_name[bench.BASELINES["lesson"]] == ["-", "5.00 (5.00 to 5.00) |"]
    assert by_name["efficiency"] == ["50%", "- |"]
    assert by_name["turns"] == ["3", "1 |"]


def test_what_saving_costs_is_ours_beside_ours_that_saves_nothing(tmp_path, toys, monkeypatch):
    ran: list[tuple[str, ...]] = []

    def pretend(module: str, name: str, platform: str, compiled: str, *more: str) -> float:
        ran.append((module, name, *more))
        return float(len(ran))

    monkeypatch.setattr(bench, "_whole_process", pretend)
    monkeypatch.setattr(sys, "argv", ["bench", "--recipe", "digits", "--process", "saving", "--pairs", "2"])
    with bench_worker.worker("machine", toy(tmp_path, "machine")) as machine_of_a_gpu:
        report = bench.compare_processes(recipe.load("digits"), bench._parser().parse_args(), machine_of_a_gpu)
    ours, unsaved = ("jax_impl.train", "digits"), ("jax_impl.train", "digits", "--checkpoint-every", "never")
    assert ran == [ours, unsaved, ours, ours, unsaved]  # the first has its programs compiled; then each is once first
    assert report["seconds"] == {"ours": [3.0, 4.0], "unsaved": [2.0, 5.0]}
    assert bench.ratios(report, "unsaved") == [2 / 3, 5 / 4]


@pytest.mark.parametrize("state", ["cold", "warm"])
def test_whole_processes_take_turns_with_an_empty_or_a_filled_place_for_our_programs(
    state, tmp_path, toys, monkeypatch
):
    ran: list[tuple[str, str | None, bool]] = []

    def pretend(module: str, name: str, platform: str, compiled: str | None, *more: str) -> float:
        assert (platform, more) == ("gpu", ())
        filled = bool(compiled) and any(Path(compiled).iterdir())
        ran.append((module, name, filled))
        if compiled:
            (Path(compiled) / "program").write_text("")
        return float(len(ran))

    monkeypatch.setattr(bench, "_whole_process", pretend)
    monkeypatch.setattr(sys, "argv", ["bench", "--process", state, "--pairs", "2"])
    with bench_worker.worker("machine", toy(tmp_path, "machine")) as machine_of_a_gpu:
        report = bench.compare_processes(recipe.load("mlp128"), bench._parser().parse_args(), machine_of_a_gpu)
    lesson, ours = ("torch_ref.lesson", "mlp128", False), ("jax_impl.train", "mlp128", state == "warm")
    first = [("jax_impl.train", "mlp128", False)] if state == "warm" else []
    assert ran == [*first, lesson, ours, ours, lesson]
    start = len(first)
    assert report["seconds"] == {"lesson": [start + 1.0, start + 4.0], "ours": [start + 2.0, start + 3.0]}
    assert bench.key(report) == f"mlp128, whole process, {state}"

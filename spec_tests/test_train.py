"""The two trainers' command lines: a short run of every recipe, its run directory, repeats, precision, refusals."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import jax_impl.trainer
import torch_ref.trainer
from spec import params, recipe
from spec.datasets.catalog import IDX_SETS
from spec.run import session
from spec.run.pace import Pace
from spec_tests.assertions import assert_within
from spec_tests.conftest import FRAMEWORKS
from spec_tests.tolerances import sum_bound

SUMMARY_KEYS = {
    "recipe", "framework", "seed", "precision", "epochs", "steps", "examples_seen", "seconds", "compile_seconds",
    "train_loss", "train_accuracy", "cumulative_train_accuracy", "test_loss", "test_accuracy", "lesson_metrics",
    "devices", "versions", "weights_sha256",
}  # fmt: skip
both = pytest.mark.parametrize("framework", FRAMEWORKS)
MADE_UP = "--data.name map_style --data.path spec_tests.conftest:MadeUpImages --data.test-fraction 0.2 --data.seed 0"
CSV = "height,weight,label\n" + "".join(f"{i},{i * i},{i % 3}\n" for i in range(60))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def short_run_of(name: str, tmp_path: Path) -> list[str]:
    """Return flags for one epoch of the recipe: idx images are made up, everything else is the recipe's own."""
    if name == "csv":
        (tmp_path / "table.csv").write_text(CSV)
        return ["--data.path", str(tmp_path / "table.csv"), "--epochs", "1"]
    if name == "map-style":
        return ["--data.path", "spec_tests.conftest:MadeUpImages", "--epochs", "1"]
    if recipe.load(name).data.name in IDX_SETS:
        return [*MADE_UP.split(), "--epochs", "1", "--batch-size", "60"]
    return ["--epochs", "1"]


@both
@pytest.mark.parametrize("name", recipe.recipe_names())
def test_every_recipe_trains_and_leaves_a_whole_run_directory(name, framework, trainer_command, tmp_path):
    out = tmp_path / "run"
    ended = trainer_command("--recipe", name, "--out", out, *short_run_of(name, tmp_path), framework=framework)
    assert ended.status == 0, ended.err
    assert {path.name for path in out.iterdir()} == {
        "config.json", "metrics.jsonl", "summary.json", "weights.safetensors", "checkpoints",
    }  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == SUMMARY_KEYS
    assert (summary["recipe"], summary["framework"], summary["epochs"]) == (name, framework, 1)
    resolved = recipe.load(str(out / "config.json"))
    events = lines(out / "metrics.jsonl")
    assert [event["event"] for event in events] == ["progress"] * (len(events) - 1) + ["epoch"]
    assert events[-1]["step"] == summary["steps"] == -(-summary["examples_seen"] // resolved.batch_size)
    assert set(summary["lesson_metrics"]) == set(resolved.metrics.lesson)
    weights = load_file(out / "weights.safetensors")
    assert all(np.isfinite(array).all() for array in weights.values())
    initial = np.random.default_rng([0, *b"linear1.weight"])
    shape = weights["linear1.weight"].shape
    if resolved.init.weight == "uniform_fan_in":
        drawn = initial.uniform(-(shape[1] ** -0.5), shape[1] ** -0.5, shape).astype(np.float32)
    else:
        drawn = (resolved.init.std * initial.standard_normal(shape)).astype(np.float32)
    assert np.abs(weights["linear1.weight"] - drawn).max() > 0
    assert summary["test_accuracy"] is None or 0 <= summary["test_accuracy"] <= 1


def test_mlp128_on_real_fashion_mnist_learns_in_one_epoch(fashion_mnist, trainer_command, tmp_path):
    ended = trainer_command("--out", tmp_path / "run", "--epochs", 1, "--quiet")
    assert ended.status == 0, ended.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["examples_seen"]) == (468, 59_904)
    assert 0.78 < summary["test_accuracy"] < 0.87  # seeds 0, 1 and 2 gave 0.8152, 0.8440 and 0.8341


@both
def test_a_run_repeats_bit_for_bit_from_its_config_and_in_any_split_of_the_epoch(
    framework, trainer_command, tmp_path, monkeypatch
):
    command = functools.partial(trainer_command, framework=framework)
    first = command("--recipe", "digits", "--epochs", 3, "--seed", 5, "--out", tmp_path / "first")
    assert first.status == 0, first.err
    config = tmp_path / "first" / "config.json"
    assert command("--recipe", config, "--out", tmp_path / "again", "--quiet").status == 0
    monkeypatch.setattr(session, "Pace", functools.partial(Pace, steps=7))
    assert command("--recipe", config, "--out", tmp_path / "spans").status == 0
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("first", "again", "spans")]
    assert weights[0] == weights[1] == weights[2]
    events = [
        [event | {"seconds": None} for event in lines(tmp_path / name / "metrics.jsonl")]
        for name in ("first", "again", "spans")
    ]
    assert events[0] == events[1] == events[2]
    assert json.loads(config.read_text())["recipe"]["seed"] == 5


@both
@pytest.mark.usefixtures("compiled_once")
def test_dropout_repeats_with_the_seed_and_in_any_split_of_the_epoch(framework, trainer_command, tmp_path, monkeypatch):
    small = "--model.channels 2 3 --model.hidden-sizes 8 --epochs 2 --batch-size 60 --recipe cnn"
    flags = [*small.split(), *MADE_UP.split()]
    for name, seed, steps in (("whole", 0, None), ("spans", 0, 3), ("other", 1, None)):
        monkeypatch.setattr(session, "Pace", functools.partial(Pace, steps=steps))
        command = [*flags, "--seed", seed, "--quiet", "--out", tmp_path / name]
        assert trainer_command(*command, framework=framework).status == 0
    weights = {name: (tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "spans", "other")}
    assert weights["whole"] == weights["spans"] != weights["other"]


@both
@pytest.mark.parametrize(
    ("precision", "stored"), [("float64", np.float64), ("float32", np.float32), ("bfloat16", np.float32)]
)
def test_every_precision_trains_the_digits(precision, stored, framework, trainer_command, tmp_path):
    flags = ["--recipe", "digits", "--precision", precision, "--out", tmp_path / "run", "--quiet"]
    ended = trainer_command(*flags, framework=framework)
    assert ended.status == 0, ended.err
    assert load_file(tmp_path / "run" / "weights.safetensors")["linear1.weight"].dtype == stored
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test_accuracy"] > 0.95


def test_float64_and_float32_start_from_the_same_bits_and_part_by_rounding_alone(trainer_command, tmp_path):
    for precision in ("float32", "float64"):
        flags = ["--recipe", "synthetic-3class", "--epochs", 1, "--precision", precision]
        assert trainer_command(*flags, "--out", tmp_path / precision, "--quiet").status == 0
    single, double = (load_file(tmp_path / name / "weights.safetensors") for name in ("float32", "float64"))
    for name, array in double.items():
        # One step: the update carries a few roundings of sums of at most 500 terms.
        bound = sum_bound(2 * 500, max(1.0, float(np.abs(array).max())), np.float32)
        assert_within({name: single[name]}, {name: array}, bound=bound, item="float32")


def test_the_lessons_step_by_hand_is_plain_descent_from_the_initial_state(trainer_command, tmp_path):
    flags = "--recipe synthetic-3class --learning-rate 10 --momentum 0 --epochs 1 --precision float64 --quiet"
    assert trainer_command(*flags.split(), "--out", tmp_path / "run").status == 0
    after = load_file(tmp_path / "run" / "weights.safetensors")
    loaded = recipe.load("synthetic-3class")
    generator = np.random.default_rng([0, *b"synthetic"])
    x = generator.uniform(0, 100, (500, 20)).astype(np.float32).astype(np.float64)
    labels = generator.integers(0, 3, 500)
    leaves = params.leaves(loaded.model, (20,), 3)
    w = {name: array.astype(np.float64) for name, array in params.initial_state(leaves, loaded.init, 0).items()}
    before_relu = x @ w["linear1.weight"].T + w["linear1.bias"]
    first = np.maximum(before_relu, 0)
    second = 1 / (1 + np.exp(-(first @ w["linear2.weight"].T + w["linear2.bias"])))
    logits = second @ w["linear3.weight"].T + w["linear3.bias"]
    exps = np.exp(logits - logits.max(axis=1, keepdims=True))
    by_logits = (exps / exps.sum(axis=1, keepdims=True) - np.eye(3)[labels]) / 500
    by_second = (by_logits @ w["linear3.weight"]) * second * (1 - second)
    by_first = (by_second @ w["linear2.weight"]) * (before_relu > 0)
    for layer, (grad, inputs) in {1: (by_first, x), 2: (by_second, first), 3: (by_logits, second)}.items():
        expected = {"weight": 10 * grad.T @ inputs, "bias": 10 * grad.sum(axis=0)}
        moved = {leaf: w[f"linear{layer}.{leaf}"] - after[f"linear{layer}.{leaf}"] for leaf in expected}
        largest = max(1.0, 10 * (np.abs(grad).T @ np.abs(inputs)).max())
        assert_within(moved, expected, bound=sum_bound(500, largest, np.float64), item=f"linear{layer}")


def test_the_progress_lines_are_the_lessons(trainer_command, tmp_path):
    ended = trainer_command(
        "--recipe", "synthetic-50k", "--epochs", 2, "--out", tmp_path / "run", "--metrics.progress-every", 5
    )
    progress = [line for line in ended.out.splitlines() if "cumulative accuracy" in line]
    assert [line.split("  loss")[0] for line in progress] == [
        "epoch 1  20,000 of 100,000 (20%)",
        "epoch 1  40,000 of 100,000 (40%)",
        "epoch 1  50,000 of 100,000 (50%)",
        "epoch 2  70,000 of 100,000 (70%)",
        "epoch 2  90,000 of 100,000 (90%)",
        "epoch 2  100,000 of 100,000 (100%)",
    ]


def test_quiet_prints_the_last_line_alone(trainer_command, tmp_path):
    ended = trainer_command("--recipe", "digits", "--epochs", 1, "--quiet", "--out", tmp_path / "run")
    assert len(ended.out.splitlines()) == 1
    assert ended.out.startswith("digits: test accuracy 0.")
    assert ended.err == ""


# Refusals: exit 2, a few lines, no traceback, nothing written


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--recipe mpl128", "did you mean 'mlp128'"),
        ("--recipe nothing.toml", "nothing.toml does not exist"),
        ("--recipe", "expected one argument"),
        ("--recpie mlp128", "--recpie"),
        ("--learning-rat 0.1", "--learning-rate"),
        ("--epochs 0", "epochs 0: must be greater than or equal to 1"),
        ("--epochs ten", "ten"),
        ("--epochs 1e3", "1e3"),
        ("--batch-size -5", "-5"),
        ("--batch-size 10000000000", "batch_size 10000000000"),
        ("--recipe digits --batch-size 5000", "batch_size 5000 is larger than the training split of 1438"),
        ("--learning-rate nan", "optimizer.learning_rate nan"),
        ("--learning-rate inf", "optimizer.learning_rate inf"),
        ("--learning-rate 0", "optimizer.learning_rate 0.0"),
        ("--learning-rate -1", "optimizer.learning_rate -1.0"),
        ("--momentum 1", "optimizer.momentum 1.0"),
        ("--precision float16", "float16"),
        ("--platform abacus", "abacus"),
        ("--seed -1", "seed -1"),
        ("--data-source web", "web"),
        ("--data.name csv", "data.path is missing"),
        ("--recipe csv", "data.path is empty; name a CSV file: --data.path FILE"),
        ("--recipe map-style", "data.path is empty; name a data set with --data.path module:object"),
        ("--name a/b", "name 'a/b': must be lower-case letters, digits and hyphens"),
        ("--recipe csv --data.path nowhere.csv", "nowhere.csv does not exist"),
        ("--recipe digits --data-dir /nowhere", "leave it out"),
        ("--data-dir /nowhere", "/nowhere is not a directory"),
        ("--recipe synthetic-50k --data.num-examples 10000000 --data.num-features 60000", "the limit is 500,000,000"),
        ("--optimizer.name adam", "optimizer.momentum 0.8 is not used by adam"),
        ("--recipe cnn --model.channels 8 8 8 8 8 8", "needs images of at least 64x64"),
        ("mlp512", "mlp512"),
        ("--recipe mlp512 --data.name digits --data.test-fraction 0 --data.seed 0 --learning-rate 1e6", "it diverged"),
    ],
)  # fmt: skip
def test_a_mistake_exits_2_with_a_few_lines_and_no_summary(flags, said, trainer_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = trainer_command(*flags.split())
    assert ended.status == 2
    assert said in " ".join((ended.out + ended.err).replace("│", " ").split())
    assert len(ended.err.splitlines()) <= 16
    assert "Traceback" not in ended.err
    assert not list(tmp_path.rglob("summary.json"))
    if "diverged" not in said:
        assert list(tmp_path.iterdir()) == []


def test_a_platform_that_is_not_there_is_refused(trainer_command, tmp_path):
    missing = next(name for name in ("tpu", "gpu") if name not in {device.platform for device in jax.devices()})
    flags = ["--recipe", "digits", "--platform", missing, "--out", tmp_path / "run"]
    ended = trainer_command(*flags)
    assert ended.status == 2
    assert f"--platform {missing} is not on this machine" in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("asked", ["cuda", "tpu", "no_such"])
def test_a_platform_of_the_environment_that_is_not_there_is_refused(asked, tmp_path):
    if jax.default_backend() != "cpu":
        pytest.skip("there is an accelerator")
    command = [sys.executable, "-m", "jax_impl.train", "--recipe", "digits", "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": asked})
    assert ended.returncode == 2
    assert re.fullmatch(
        rf"error: JAX_PLATFORMS={asked} is not on this machine \(.+\); leave it out, or install .*\n", ended.stderr
    )


def test_torch_has_no_tpu(trainer_command, tmp_path):
    ended = trainer_command("--recipe", "digits", "--platform", "tpu", "--out", tmp_path / "run", framework="torch")
    assert ended.status == 2
    assert "--platform tpu is not one that torch has here" in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("framework", "module", "refusal"),
    [
        ("jax", jax_impl.trainer, jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99.\nmore")),
        ("torch", torch_ref.trainer, torch.OutOfMemoryError("RESOURCE_EXHAUSTED: Out of memory allocating 99.")),
        (
            "torch",
            torch_ref.trainer,
            RuntimeError("DefaultCPUAllocator RESOURCE_EXHAUSTED: Out of memory allocating 99."),
        ),
    ],
)
def test_too_little_memory_on_the_device_is_a_short_error(
    framework, module, refusal, trainer_command, tmp_path, monkeypatch
):
    def exhausted(*_: object) -> None:
        raise refusal

    changed = dataclasses.replace(module.IMPLEMENTATION, prepare=lambda *_, **__: exhausted)
    monkeypatch.setattr(module, "IMPLEMENTATION", changed)
    ended = trainer_command("--recipe", "digits", "--out", tmp_path / "run", framework=framework)
    assert ended.status == 2
    assert "the device has too little memory: " in ended.err
    assert "RESOURCE_EXHAUSTED: Out of memory allocating 99.; use a smaller" in ended.err
    assert not (tmp_path / "run").exists()


def test_a_used_directory_is_refused_then_replaced_when_told_to(trainer_command, tmp_path):
    out = tmp_path / "run"
    flags = ["--recipe", "synthetic-3class", "--quiet", "--out", out]
    assert trainer_command(*flags).status == 0
    before = files(out)
    refused = trainer_command(*flags, "--resume", "never")
    assert refused.status == 2
    assert "is not empty; name another directory, or add --overwrite" in refused.err
    assert files(out) == before
    assert trainer_command(*flags, "--overwrite", "--seed", 1).status == 0
    assert (out / "weights.safetensors").read_bytes() != before["weights.safetensors"]
    assert len(lines(out / "metrics.jsonl")) == len(before["metrics.jsonl"].splitlines())


def test_a_run_that_fails_leaves_the_run_it_was_to_replace(trainer_command, tmp_path):
    out = tmp_path / "run"
    flags = ["--recipe", "digits", "--epochs", 1, "--quiet", "--out", out]
    assert trainer_command(*flags).status == 0
    before = files(out)
    deep = "--recipe mlp512 --data.name digits --data.test-fraction 0 --data.seed 0 --learning-rate 1e6"
    assert trainer_command(*deep.split(), "--overwrite", "--out", out).status == 2
    assert files(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_an_update_that_ruins_the_net_in_the_last_step_is_refused_too(trainer_command, tmp_path):
    deep = "--recipe digits --epochs 1 --learning-rate 1e6 --init.weight normal --init.std 1 --batch-size 1438"
    deep += " --model.hidden-sizes" + " 64" * 8 + " --model.activations" + " relu" * 8
    ended = trainer_command(*deep.split(), "--out", tmp_path / "run")
    assert ended.status == 2
    assert "the test loss is not finite after epoch 1: it diverged; lower learning_rate (now 1e+06)" in ended.err
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "weights.safetensors").exists()


def test_runs_that_start_in_the_same_second_get_directories_of_their_own(trainer_command, tmp_path, monkeypatch):
    from spec.run import run_directory

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_directory.time, "strftime", lambda _: "20260101-000000")
    for _ in range(3):
        assert trainer_command("--recipe", "synthetic-3class", "--epochs", 1, "--quiet").status == 0
    stem = "synthetic-3class-20260101-000000"
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [stem, f"{stem}-2", f"{stem}-3"]


def test_quiet_changes_nothing_in_the_files(trainer_command, tmp_path):
    for name, more in {"loud": [], "quiet": ["--quiet"]}.items():
        flags = ["--recipe", "digits", "--epochs", 2, "--metrics.progress-every", 10, "--out", tmp_path / name]
        assert trainer_command(*flags, *more).status == 0
    loud, quiet = (
        [event | {"seconds": None} for event in lines(tmp_path / name / "metrics.jsonl")] for name in ("loud", "quiet")
    )
    assert loud == quiet
    assert len(loud) == 2 * (5 + 1)


def test_overwrite_never_touches_what_is_no_run(trainer_command, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    ended = trainer_command("--recipe", "synthetic-3class", "--out", tmp_path, "--overwrite")
    assert ended.status == 2
    assert "holds more: thesis.tex" in ended.err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_out_that_cannot_be_written_is_refused_before_anything_is_trained(trainer_command, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/lockstep"), tmp_path / ("n" * 300)):
        ended = trainer_command("--recipe", "digits", "--out", out)
        assert ended.status == 2
        assert str(out) in ended.err
        assert "epoch" not in ended.out


def test_a_changed_recipe_is_refused_when_data_and_batch_do_not_fit_and_nothing_is_left(trainer_command, tmp_path):
    ended = trainer_command("--recipe", "digits", "--batch-size", 2000, "--out", tmp_path / "run")
    assert ended.status == 2
    assert not (tmp_path / "run").exists()


# The other ways to call it


def test_list_shows_every_recipe_with_its_size_and_steps(trainer_command):
    ended = trainer_command("--list")
    assert ended.status == 0
    rows = {row.split()[0]: row.split() for row in ended.out.splitlines()[1:]}
    assert set(rows) == set(recipe.recipe_names())
    assert rows["mlp128"][1:7] == ["784-128-10", "101,632", "fashion_mnist", "5", "x", "468"]
    assert rows["cnn"][1:3] == ["cnn", "32-64-128-512-512-10"]


def test_print_config_is_a_recipe_that_can_be_run(trainer_command, tmp_path):
    printed = trainer_command("--recipe", "mlp512", "--epochs", 2, "--learning-rate", 0.02, "--print-config")
    path = tmp_path / "mine.toml"
    path.write_text(printed.out)
    loaded = recipe.load(str(path))
    assert (loaded.epochs, loaded.optimizer.learning_rate, loaded.model) == (2, 0.02, recipe.load("mlp512").model)


def test_a_changed_recipe_no_longer_expects_the_measured_accuracy(trainer_command):
    unchanged, reseeded, changed = (
        trainer_command(*flags.split(), "--print-config").out for flags in ("", "--seed 9", "--epochs 9")
    )
    assert "[expected]" in unchanged
    assert "[expected]" in reseeded
    assert "[expected]" not in changed


def test_fields_are_changed_by_their_paths_and_short_names(trainer_command):
    flags = "--optimizer.name adam --momentum None --optimizer.dampening None --optimizer.nesterov None"
    flags += " --optimizer.betas 0.8 0.9 --optimizer.epsilon 1e-7 --learning-rate 0.001 --print-config"
    ended = trainer_command(*flags.split())
    assert ended.status == 0, ended.err
    assert 'name = "adam"' in ended.out
    assert "learning_rate = 0.001" in ended.out
    assert "\nmomentum" not in ended.out


def test_a_reference_without_torch_says_what_to_install(trainer_command, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ended = trainer_command("--recipe", "digits", "--out", tmp_path / "run", framework="torch")
    assert ended.status == 2
    assert "torch is not installed" in ended.err
    assert ".[torch]" in ended.err


@pytest.mark.parametrize("package", ["jax_impl", "torch_ref"])
def test_help_needs_neither_framework(package):
    script = (
        f"import sys\nfrom {package} import train\n"
        "try:\n    train.main(['--help'])\nexcept SystemExit as left:\n    assert not left.code\n"
        "slow = {'jax', 'flax', 'optax', 'torch', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(f'imported {slow}' if slow else 0)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "--learning-rate" in ended.stdout


@pytest.mark.parametrize("package", ["jax_impl", "torch_ref"])
def test_an_interrupt_while_the_device_works_leaves_with_130(package, tmp_path):
    command = [sys.executable, "-u", "-m", f"{package}.train", "--recipe", "mlp512", "--out", str(tmp_path / "run")]
    command += [*MADE_UP.split(), "--epochs", "100000", "--batch-size", "50"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "cumulative" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(
        r"stopping; once more to leave at once\nstopped after epoch \d+, step \d+, saved in \S+; "
        r"--resume \S+ goes on\n",
        errors,
    )
    assert not (tmp_path / "run" / "summary.json").exists()


def test_output_that_has_no_room_is_a_short_error(tmp_path):
    for flags in (["--list"], ["--recipe", "synthetic-3class", "--out", str(tmp_path / "run")]):
        with Path("/dev/full").open("w") as full:
            command = [sys.executable, "-m", "jax_impl.train", *flags]
            ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert ended.returncode == 2
        assert ended.stderr.startswith("error: no space left to write output")
        assert len(ended.stderr.splitlines()) == 1


def test_a_terminal_gets_a_progress_bar(tmp_path):
    import pty

    command = [sys.executable, "-m", "jax_impl.train", "--recipe", "digits", "--epochs", "2"]
    command += ["--metrics.progress-every", "5", "--out", str(tmp_path / "run")]
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    shown = b""
    while chunk := _read(leader):
        shown += chunk
    assert process.wait() == 0, shown
    assert "━".encode() in shown
    assert b"of 28,760" not in shown
    assert b"digits: test accuracy" in shown


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # the other side is closed
        return b""

"""R2: SIGINT and SIGTERM in every phase: out within 5 s, the documented status, the last finished step saved."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import jax_impl.trainer
import spec.sweep
import torch_ref.trainer
from spec.run import checkpoints
from spec_tests.conftest import FRAMEWORKS
from spec_tests.processes import Started, started

LIMIT = 5.0  # seconds
SIGNALS = (signal.SIGINT, signal.SIGTERM)
MODULES = (jax_impl.trainer, torch_ref.trainer)
ENTERED = "--- entered ---"
SLOW_SAVE = 0.5  # seconds

LONG = shlex.split("--recipe digits --batch-size 4 --epochs 100000 --metrics.progress-every 20 --checkpoint-every 1h")
# 50 examples to train on, and 49,950 to evaluate by fives through four million weights: half a minute.
EVALUATION = shlex.split(
    "--recipe synthetic-50k --data.test-fraction 0.999 --batch-size 5 --epochs 1 --model.hidden-sizes 2048 2048 "
    "--metrics.progress-every 1"
)
SWEEP = ["--recipe", "digits", "--epochs", "1", "--sweep", "learning_rate=0.1,0.01"]


def linger(*_: object, **__: object) -> None:
    print(ENTERED, flush=True)
    time.sleep(60)


def changed(**parts: Callable) -> None:
    """Change a part of both implementations, in the process that is to be stopped."""
    for module in MODULES:
        module.IMPLEMENTATION = dataclasses.replace(module.IMPLEMENTATION, **parts)


def loading_lingers() -> None:
    changed(load=linger)


def compiling_lingers() -> None:
    jax_impl.trainer.compile_programs = linger


def plotting_lingers() -> None:
    spec.sweep.chart = linger


def saving_lingers() -> None:
    for module in MODULES:
        write = module.IMPLEMENTATION.write_state

        def slowly(snapshot: object, folder: Path, write: Callable = write) -> None:
            print(ENTERED, flush=True)
            time.sleep(SLOW_SAVE)
            write(snapshot, folder)

        module.IMPLEMENTATION = dataclasses.replace(module.IMPLEMENTATION, write_state=slowly)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase of a run: how to bring one there and keep it there, what it says then, and whether there is anything to
    save."""

    flags: list[str]
    prepare: Callable[[], None] | None
    says: str
    saves: bool


PHASES = {
    "data": Phase(LONG, loading_lingers, ENTERED, saves=False),
    "compile": Phase(LONG, compiling_lingers, ENTERED, saves=False),
    "step": Phase(LONG, None, "epoch 2 ", saves=True),
    "evaluation": Phase(EVALUATION, None, "(100%)", saves=True),
    "save": Phase([*LONG[:-1], "200"], saving_lingers, ENTERED, saves=True),
    "plot": Phase(SWEEP, plotting_lingers, ENTERED, saves=False),
}
phases, signals = pytest.mark.parametrize("phase", PHASES), pytest.mark.parametrize("number", SIGNALS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


def bring_to(phase: str, trainer: Started) -> None:
    trainer.wait_for(lambda: PHASES[phase].says in trainer.out.read_text())


def assert_left(trainer: Started, number: int, *, within: float) -> None:
    began = time.monotonic()
    status = trainer.ended()
    assert time.monotonic() - began < within
    assert status == 128 + number, trainer.err.read_text()
    assert "Traceback" not in trainer.err.read_text()


def assert_last_step_is_saved(trainer: Started, run: Path) -> None:
    """Assert that it was saved where it says that it stopped, which is no earlier than the last line it wrote."""
    said = re.search(r"stopped after epoch (\d+), step ([\d,]+), saved in (\S+); --resume ", trainer.err.read_text())
    found, mistakes = checkpoints.newest_good(run / "checkpoints")
    position = found.history()["position"]
    assert mistakes == []
    assert (said[1], said[2].replace(",", ""), said[3]) == (str(position["epoch"]), str(position["step"]), str(run))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert found.step >= json.loads(lines[-1])["step"] > 0
    assert not [path for path in run.rglob(".*") if path.is_file() or path.is_dir()]


def stop(phase: str, number: int, framework: str, tmp_path: Path, cache: Path, delay: float = 0.0) -> None:
    run, at = tmp_path / "run", PHASES[phase]
    arguments = [*at.flags, "--out", str(run)]
    with started(tmp_path, framework, arguments, cache=cache, prepare=at.prepare) as trainer:
        bring_to(phase, trainer)
        time.sleep(delay)
        trainer.send(number)
        assert_left(trainer, number, within=LIMIT)
        if at.saves:
            assert_last_step_is_saved(trainer, run)
        elif phase != "plot":
            assert not run.exists()


@signals
@phases
def test_the_first_signal_saves_the_last_finished_step_and_leaves(phase, number, tmp_path, cache, counted):
    stop(phase, number, "jax", tmp_path, cache)
    counted("R2 signals", 1)


@pytest.mark.slow(1)
@signals
@pytest.mark.parametrize("phase", ["data", "step", "evaluation", "save"])
def test_torch_does_so_too(phase, number, tmp_path, cache, counted):
    stop(phase, number, "torch", tmp_path, cache)
    counted("R2 signals", 1)


@pytest.mark.slow(1)
@signals
@pytest.mark.parametrize("delay", [0.313, 0.777])
def test_at_any_moment_of_training(delay, number, tmp_path, cache, counted):
    stop("step", number, "jax", tmp_path, cache, delay)
    counted("R2 signals", 1)


@pytest.mark.slow(1)
@signals
@phases
def test_a_second_signal_quits_at_once_and_harms_nothing(phase, number, tmp_path, cache, counted):
    run, at = tmp_path / "run", PHASES[phase]
    with started(tmp_path, "jax", [*at.flags, "--out", str(run)], cache=cache, prepare=at.prepare) as trainer:
        bring_to(phase, trainer)
        trainer.send(number)
        if at.saves:
            trainer.wait_for(lambda: "once more to leave at once" in trainer.err.read_text())
            trainer.send(number)
        assert_left(trainer, number, within=1.0)
        assert ("left at once: what was saved is there" in trainer.err.read_text()) == at.saves
    assert checkpoints.newest_good(run / "checkpoints")[1] == []
    counted("R2 signals", 1)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_run_that_was_stopped_while_it_evaluated_goes_on_with_the_evaluation(
    framework, tmp_path, cache, trainer_command
):
    run = tmp_path / "run"
    few = [*EVALUATION, "--data.num-examples", "5000", "--out", str(run)]
    with started(tmp_path, framework, few, cache=cache) as trainer:
        bring_to("evaluation", trainer)
        trainer.send(signal.SIGTERM)
        assert_left(trainer, signal.SIGTERM, within=LIMIT)
    lines = (run / "metrics.jsonl").read_text()
    assert '"event": "epoch"' not in lines
    ended = trainer_command(*few, framework=framework)
    assert ended.status == 0, ended.err
    assert (run / "metrics.jsonl").read_text().startswith(lines)
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["event"] == "epoch"

"""R1: a run killed at any moment goes on, loses at most the save that was under way, and ends as the unbroken one."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

from spec.run import checkpoints
from spec_tests.conftest import FRAMEWORKS
from spec_tests.processes import Started, started

INTERVAL = 400
STEPS_PER_EPOCH = 360  # of digits by batches of 4
FLAGS = f"--recipe digits --batch-size 4 --metrics.progress-every 20 --checkpoint-every {INTERVAL}".split()


def lines(run: Path) -> list[dict]:
    """Return the metrics but for the time they took; the last line of a killed run may be half there."""
    read = []
    for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            read.append({**json.loads(line), "seconds": None})
    return read


def is_saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(".*.new"))


def newest(run: Path) -> int:
    """Return the step of the newest checkpoint, 0 if there is none."""
    return max((int(path.name) for path in (run / "checkpoints").glob("[0-9]*")), default=0)


def kill(trainer: Started, run: Path, before: int, *, inside_a_save: bool, random_seconds: float) -> None:
    """Kill it in the middle of a save, or at a random moment after one that came to its end."""
    trainer.wait_for(lambda: "loss" in trainer.out.read_text())
    if inside_a_save:
        time.sleep(random_seconds)
        trainer.wait_for(lambda: is_saving(run), poll=0)
    else:
        trainer.wait_for(lambda: newest(run) > before)
        time.sleep(random_seconds)
    trainer.send(signal.SIGKILL)
    assert trainer.ended() == -signal.SIGKILL


def assert_little_is_lost(run: Path, before: int) -> int:
    """Assert that every checkpoint is whole, and that at most one of the saves that were due is missing; return the
    newest one's step."""
    folder = run / "checkpoints"
    named = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.exists() else []
    steps = sorted(checkpoints.verify(path).step for path in named)
    ends = {line["step"] for line in lines(run) if line["event"] == "epoch"}
    between = {line["step"] for line in lines(run) if line["step"] % STEPS_PER_EPOCH}
    due = sorted(ends | {step for step in between if step % INTERVAL == 0})
    last = steps[-1] if steps else 0
    assert last >= before
    assert last >= (due[-2] if len(due) > 1 else 0), (due[-3:], last)
    return last


@pytest.mark.parametrize(
    ("kills", "epochs"), [(10, 25), pytest.param(100, 300, marks=pytest.mark.slow(5))], ids=["some", "many"]
)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_run_that_is_killed_again_and_again_is_the_unbroken_one(framework, kills, epochs, tmp_path, counted):
    flags, chance = [*FLAGS, "--epochs", str(epochs)], random.Random(0)
    cache = tmp_path / "cache"
    with started(tmp_path, framework, [*flags, "--out", str(tmp_path / "whole")], cache=cache) as trainer:
        assert trainer.ended() == 0, trainer.err.read_text()
    run, reached, caught = tmp_path / "run", 0, 0
    for number in range(kills):
        with started(tmp_path, framework, [*flags, "--out", str(run)], cache=cache) as trainer:
            kill(trainer, run, reached, inside_a_save=number % 2 == 1, random_seconds=chance.uniform(0, 0.15))
        caught += is_saving(run)
        reached = assert_little_is_lost(run, reached)
    assert caught >= kills // 4
    counted("R1 kills", kills)
    counted("R1 kills inside a save", caught)
    with started(tmp_path, framework, [*flags, "--out", str(run)], cache=cache) as trainer:
        assert trainer.ended() == 0, trainer.err.read_text()
    assert f"going on from {run / 'checkpoints'}" in trainer.out.read_text()
    assert (run / "weights.safetensors").read_bytes() == (tmp_path / "whole" / "weights.safetensors").read_bytes()
    assert lines(run) == lines(tmp_path / "whole")
    assert not [path for path in run.rglob(".*") if path.is_file() or path.is_dir()]

"""R3: a run that stops after any step and goes on is the unbroken one, bit for bit."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from spec.run import checkpoints, session
from spec.run.checkpoints import Checkpoint
from spec.run.history import EpochDone, Event, Position
from spec.run.pace import Pace
from spec.run.recorder import Recorder
from spec_tests.conftest import FRAMEWORKS

EPOCHS, STEPS_PER_EPOCH = 5, 8
STOPS = EPOCHS * STEPS_PER_EPOCH
# 38 of 48 images by batches of 5: seven full batches and one of three; BatchNorm, dropout, momentum and a schedule.
FLAGS = (
    "--recipe cnn --data.name map_style --data.path spec_tests.test_r03_resume:FewImages --data.test-fraction 0.2 "
    f"--data.seed 0 --epochs {EPOCHS} --batch-size 5 --model.channels 3 4 --model.hidden-sizes 6 --model.dropout 0.5 "
    "--schedule.name step --schedule.step-epochs 2 --schedule.gamma 0.5 --metrics.progress-every 3 --quiet"
).split()
both = pytest.mark.parametrize("framework", FRAMEWORKS)
pytestmark = pytest.mark.usefixtures("compiled_once")


class FewImages:
    """48 noisy images of two classes, map-style."""

    classes = ("dark", "light")

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        generator = np.random.default_rng(index)
        return generator.integers(0, 128, (8, 8, 1), dtype=np.uint8) + np.uint8(100 * (index % 2)), index % 2


@pytest.fixture
def stops_after(monkeypatch):
    """Return a function that has the next runs get SIGTERM once so many of their steps are recorded; 0 for never."""
    step_by_step = functools.partial(Pace, steps=1)

    def paced(*, rests, boundary, stopped):
        return step_by_step(rests=lambda position: True, boundary=boundary, stopped=stopped)

    monkeypatch.setattr(session, "Pace", paced)
    take = Recorder.take

    def after(steps: int) -> None:
        def counted(self: Recorder, event: Event) -> None:
            take(self, event)
            if not isinstance(event, EpochDone) and self.history.step == steps:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Recorder, "take", counted)

    return after


def lines(run: Path) -> list[dict]:
    """Return the metrics, but for the time they took."""
    return [{**json.loads(line), "seconds": None} for line in (run / "metrics.jsonl").read_text().splitlines()]


def last(run: Path) -> Checkpoint:
    found, mistakes = checkpoints.newest_good(run / "checkpoints")
    assert found
    assert not mistakes
    return found


def assert_same_run(broken: Path, whole: Path, framework: str) -> None:
    """Assert equal weights, metrics, history, and all that the last checkpoint has of the state, bit for bit."""
    assert (broken / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
    assert lines(broken) == lines(whole)
    ours, theirs = last(broken), last(whole)
    assert ours.step == theirs.step == STOPS
    assert {**ours.history(), "seconds": 0} == {**theirs.history(), "seconds": 0}
    assert states(ours, framework) == states(theirs, framework)


def states(found: Checkpoint, framework: str) -> dict[str, tuple]:
    """Return all that a checkpoint has of a state, as bytes."""
    if framework == "torch":
        from safetensors.numpy import load_file

        arrays = load_file(found.path / "state.safetensors")
    else:
        import orbax.checkpoint.experimental.v1 as ocp

        arrays = ocp.load(found.path.absolute() / "state")
    assert len(arrays) > 20  # parameters, running statistics, momentum: not an empty promise
    return {name: (array.dtype, array.shape, np.asarray(array).tobytes()) for name, array in arrays.items()}


@both
def test_a_run_stopped_after_each_of_its_40_steps_is_the_unbroken_one(
    framework, trainer_command, tmp_path, stops_after, counted
):
    stops_after(0)
    assert trainer_command(*FLAGS, "--out", tmp_path / "whole", framework=framework).status == 0
    broken = tmp_path / "broken"
    for step in range(1, STOPS + 1):
        stops_after(step)
        ended = trainer_command(*FLAGS, "--out", broken, framework=framework)
        position = Position(1 + (step - 1) // STEPS_PER_EPOCH, 1 + (step - 1) % STEPS_PER_EPOCH)
        assert ended.status == 128 + signal.SIGTERM, ended.err
        assert f"stopped after epoch {position.epoch}, step {position.step}, saved in {broken}; " in ended.err
        assert last(broken).step == step
    stops_after(0)
    assert trainer_command(*FLAGS, "--out", broken, framework=framework).status == 0
    assert_same_run(broken, tmp_path / "whole", framework)
    counted("R3 stops and resumes", STOPS)


@both
def test_resume_with_the_name_of_a_run_alone_goes_on_with_it(
    framework, trainer_command, tmp_path, stops_after, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    stops_after(5)
    assert trainer_command(*FLAGS, "--out", "run", framework=framework).status == 143
    refused = trainer_command("--resume", "run", "--overwrite", framework=framework)
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "leave one of them out" in refused.err
    stops_after(0)
    ended = trainer_command("--resume", "run", framework=framework)
    assert ended.status == 0, ended.err
    assert "going on from run/checkpoints/00000005, epoch 1, step 5" in ended.out
    assert last(Path("run")).step == STOPS
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--resume", "nowhere"], "--resume nowhere is neither a run directory nor one of its checkpoints; name one"),
        (["--recipe", "digits", "--resume", "nowhere"], "is neither a run directory nor one of its checkpoints"),
        (["--recipe", "digits", "--checkpoint-every", "0"], "is no interval; use steps (500), time (30s, 5m, 1h)"),
        (["--recipe", "digits", "--checkpoint-every", "often"], "--checkpoint-every often is no interval"),
        (["--recipe", "digits", "--keep-checkpoints", "0"], "--keep-checkpoints 0 keeps none; use 1 at least"),
    ],
)
def test_what_cannot_be_resumed_or_kept_is_refused(flags, said, trainer_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = trainer_command(*flags)
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert said in refused.err
    assert list(tmp_path.iterdir()) == []


@both
def test_a_run_forked_from_an_older_checkpoint_ends_as_the_run_it_came_from(
    framework, trainer_command, tmp_path, stops_after
):
    stops_after(0)
    flags = [*FLAGS, "--checkpoint-every", "5", "--keep-checkpoints", "100"]
    assert trainer_command(*flags, "--out", tmp_path / "whole", framework=framework).status == 0
    there = sorted(int(path.name) for path in (tmp_path / "whole" / "checkpoints").iterdir())
    assert there == sorted({*range(5, STOPS + 1, 5), *range(8, STOPS + 1, 8)})
    before = {path: path.read_bytes() for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    source = tmp_path / "whole" / "checkpoints" / "00000025"
    ended = trainer_command("--resume", source, "--quiet", "--out", tmp_path / "fork", framework=framework)
    assert ended.status == 0, ended.err
    assert_same_run(tmp_path / "fork", tmp_path / "whole", framework)
    assert {path: path.read_bytes() for path in (tmp_path / "whole").rglob("*") if path.is_file()} == before


@both
def test_a_finished_run_can_be_given_more_epochs_and_is_then_the_longer_run(
    framework, trainer_command, tmp_path, stops_after
):
    stops_after(0)
    constant = [*FLAGS, "--schedule.name", "constant", "--schedule.step-epochs", "None", "--schedule.gamma", "None"]
    assert trainer_command(*constant, "--out", tmp_path / "whole", framework=framework).status == 0
    assert trainer_command(*constant, "--epochs", 3, "--out", tmp_path / "run", framework=framework).status == 0
    again = trainer_command(*constant, "--epochs", 3, "--out", tmp_path / "run", framework=framework)
    assert again.status == 0
    refused = trainer_command(*constant, "--out", tmp_path / "run", framework=framework)
    assert refused.status == 2
    assert "epochs: 3 there, 5 here" in refused.err
    longer = trainer_command(*constant, "--resume-with-changes", "--out", tmp_path / "run", framework=framework)
    assert longer.status == 0, longer.err
    # `examples` of a progress line is that of the whole run, which the first three epochs did not know of.
    ours, theirs = ([{**line, "examples": None} for line in lines(tmp_path / name)] for name in ("run", "whole"))
    assert ours == theirs
    assert states(last(tmp_path / "run"), framework) == states(last(tmp_path / "whole"), framework)


@both
def test_what_a_state_depends_on_cannot_be_changed_even_so(framework, trainer_command, tmp_path, stops_after):
    stops_after(3)
    assert trainer_command(*FLAGS, "--out", tmp_path / "run", framework=framework).status == 143
    for change, named in {
        "--batch-size 6": "batch_size",
        "--model.hidden-sizes 7": "model.hidden_sizes",
        "--precision float64": "precision",
        "--data.test-fraction 0.25": "data.test_fraction",
    }.items():
        flags = [*FLAGS, *change.split(), "--resume-with-changes", "--out", tmp_path / "run"]
        refused = trainer_command(*flags, framework=framework)
        assert refused.status == 2
        assert f"cannot go on with another {named}:" in refused.err
    assert last(tmp_path / "run").step == 3


def test_a_run_is_not_gone_on_with_by_the_other_framework(trainer_command, tmp_path, stops_after):
    stops_after(3)
    assert trainer_command(*FLAGS, "--out", tmp_path / "run").status == 143
    refused = trainer_command(*FLAGS, "--out", tmp_path / "run", framework="torch")
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "is a run of jax, and this is torch; go on with the other trainer, or name another --out" in refused.err

"""R3: a run that stops after any step and goes on is the unbroken one, bit for bit."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

import jax_impl.trainer
import torch_ref.trainer
from spec.run import checkpoints, saving, session
from spec.run.checkpoints import Checkpoint
from spec.run.history import EpochDone, Event, Position
from spec.run.pace import Pace
from spec.run.recorder import Recorder
from spec.run.run_directory import RunDirectory
from spec_tests.conftest import FRAMEWORKS

MODULES = {"jax": jax_impl.trainer, "torch": torch_ref.trainer}
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


def summary(run: Path) -> dict:
    """Return the summary, but for the time it took."""
    return {**json.loads((run / "summary.json").read_text()), "seconds": None, "compile_seconds": None}


def last(run: Path) -> Checkpoint:
    found, mistakes = checkpoints.newest_good(run / "checkpoints")
    assert found
    assert not mistakes
    return found


def assert_same_run(broken: Path, whole: Path, framework: str) -> None:
    """Assert equal weights, metrics, history, and all that the last checkpoint has of the state, bit for bit."""
    assert (broken / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
    assert lines(broken) == lines(whole)
    assert summary(broken) == summary(whole)
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
    framework, trainer_command, tmp_path, stops_after, counted, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(session, "Pace", Pace)  # the unbroken run takes as many steps at a time as any
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


@both
def test_a_run_that_is_given_more_epochs_is_no_longer_finished_while_it_trains(
    framework, trainer_command, tmp_path, stops_after
):
    run = tmp_path / "run"
    stops_after(0)
    flags = [*FLAGS, "--keep-checkpoints", "100", "--checkpoint-every", "6", "--out", run]
    assert trainer_command(*flags, "--epochs", 2, framework=framework).status == 0
    kept = len(list((run / "checkpoints").iterdir()))
    assert kept == len({6, 8, 12, 16})
    fewer = trainer_command(*FLAGS, "--resume-with-changes", "--epochs", 1, "--out", run, framework=framework)
    assert (fewer.status, fewer.err.count("\n")) == (2, 1)
    assert f"--epochs 1 is less than the 2 that {run / 'checkpoints' / '00000016'} has done" in fewer.err
    nothing = [*FLAGS, "--epochs", 2, "--resume-with-changes", "--learning-rate", 0.001, "--out", run]
    refused = trainer_command(*nothing, framework=framework)
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "has done all of --epochs 2; give it more to go on with" in refused.err
    stops_after(19)
    more = ["--resume", run, "--resume-with-changes", "--epochs", 4, "--quiet"]
    assert trainer_command(*more, framework=framework).status == 143
    assert not (run / "summary.json").exists()
    assert not (run / "weights.safetensors").exists()
    there = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    assert there == [6, 8, 12, 16, 18, 19]  # --keep-checkpoints and --checkpoint-every are the run's own
    changed = [*FLAGS, "--resume-with-changes", "--epochs", 4, "--seed", 1, "--out", run]
    assert "cannot go on with another seed:" in trainer_command(*changed, framework=framework).err


class MoreImages(FewImages):
    def __len__(self) -> int:
        return 53


class OtherImages(FewImages):
    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image, label = super().__getitem__(index)
        return image + np.uint8(index == 3), label


@both
@pytest.mark.parametrize("changed", [MoreImages, OtherImages])
def test_a_run_does_not_go_on_with_other_data_under_the_same_name(
    changed, framework, trainer_command, tmp_path, stops_after, monkeypatch
):
    stops_after(3)
    assert trainer_command(*FLAGS, "--out", tmp_path / "run", framework=framework).status == 143
    monkeypatch.setattr(sys.modules[__name__], "FewImages", changed)
    refused = trainer_command(*FLAGS, "--out", tmp_path / "run", framework=framework)
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert f"the data are not those that {tmp_path / 'run' / 'checkpoints' / '00000003'} was trained on" in refused.err
    assert last(tmp_path / "run").step == 3


@both
def test_the_last_ones_are_kept_and_the_best_and_a_stop_changes_no_score(
    framework, trainer_command, tmp_path, stops_after, monkeypatch
):
    run, evaluate = tmp_path / "run", MODULES[framework].Trainer.evaluate
    falling = {1: 2, 2: 5, 3: 4, 4: 3, 5: 1}  # right answers of ten, by epoch
    told = iter(falling.values())

    def evaluated(self, cancelled=lambda: False):
        losses, predictions = evaluate(self, cancelled)
        right = np.arange(len(predictions)) < next(told)
        return losses, np.where(right, self.test_labels, 1 - self.test_labels)

    monkeypatch.setattr(MODULES[framework].Trainer, "evaluate", evaluated)
    flags = [*FLAGS, "--keep-checkpoints", "2", "--checkpoint-every", "epoch", "--out", run]
    stops_after(19)
    assert trainer_command(*flags, framework=framework).status == 143
    assert checkpoints.verify(run / "checkpoints" / "00000019").manifest["score"] is None
    stops_after(0)
    assert trainer_command(*flags, framework=framework).status == 0
    there = {int(path.name): checkpoints.verify(path).manifest["score"] for path in (run / "checkpoints").iterdir()}
    assert there == {16: 0.5, 32: 0.3, 40: 0.1}


@both
def test_a_checkpoint_that_was_being_replaced_when_the_process_was_killed_is_put_back(
    framework, trainer_command, tmp_path, stops_after
):
    run = tmp_path / "run"
    stops_after(STEPS_PER_EPOCH)
    assert trainer_command(*FLAGS, "--out", run, framework=framework).status == 143
    (run / "checkpoints" / "00000008").rename(run / "checkpoints" / ".00000008.old")
    (run / "checkpoints" / ".00000008.new").mkdir()
    stops_after(STEPS_PER_EPOCH + 1)
    ended = trainer_command(*[flag for flag in FLAGS if flag != "--quiet"], "--out", run, framework=framework)
    assert ended.status == 143, ended.err
    assert f"going on from {run / 'checkpoints' / '00000008'}, epoch 1, step 8" in ended.out
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["00000008", "00000009"]


def test_time_alone_brings_a_checkpoint_in_the_middle_of_an_epoch(trainer_command, tmp_path, stops_after, monkeypatch):
    run, now = tmp_path / "run", itertools.count()
    stops_after(0)
    monkeypatch.setattr(session, "Pace", functools.partial(Pace, steps=1))
    monkeypatch.setattr(saving.time, "monotonic", lambda: float(next(now)))  # a second each time one looks
    flags = [*FLAGS, "--epochs", "1", "--keep-checkpoints", "100", "--checkpoint-every", "3s", "--out", run]
    assert trainer_command(*flags).status == 0
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    assert steps[-1] == STEPS_PER_EPOCH
    assert [step for step in steps if step < STEPS_PER_EPOCH]


@both
def test_a_signal_that_comes_while_the_last_is_written_is_passed_on_and_the_run_is_finished(
    framework, trainer_command, tmp_path, stops_after, monkeypatch
):
    run, write = tmp_path / "run", RunDirectory.write_weights

    def signalled(self: RunDirectory, state: dict) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return write(self, state)

    stops_after(0)
    monkeypatch.setattr(RunDirectory, "write_weights", signalled)
    ended = trainer_command(*FLAGS, "--epochs", "1", "--out", run, framework=framework)
    assert ended.status == 143
    assert "the run was at its end: it is finished" in ended.err
    again = trainer_command(*FLAGS[:-1], "--epochs", "1", "--out", run, framework=framework)
    assert (again.status, "is finished" in again.out) == (0, True)


def test_the_flags_that_a_run_keeps_are_checked_as_those_of_a_user(trainer_command, tmp_path, stops_after):
    run = tmp_path / "run"
    stops_after(3)
    assert trainer_command(*FLAGS, "--out", run, framework="torch").status == 143
    config = json.loads((run / "config.json").read_text())
    config["flags"]["keep_checkpoints"] = "few"
    (run / "config.json").write_text(json.dumps(config))
    ended = trainer_command("--resume", run, framework="torch")
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "--keep-checkpoints: 'few' is not a whole number" in ended.err
    assert trainer_command("--resume", run, "--keep-checkpoints", 2, "--quiet", framework="torch").status == 0


@pytest.mark.parametrize("interval", ["auto", "never"])
@pytest.mark.parametrize("killed_at", range(7))
def test_a_kill_while_a_run_takes_anothers_place_leaves_nothing_that_lies(
    killed_at, interval, trainer_command, tmp_path, stops_after, monkeypatch
):
    run, rename, calls = tmp_path / "run", Path.rename, itertools.count()
    stops_after(0)
    few = [*FLAGS, "--epochs", "1", "--checkpoint-every", interval, "--out", run]
    assert trainer_command(*few).status == 0

    def killed(self: Path, target: Path) -> Path:
        settling = self.parent.name == ".run.new" or (self.parent == run and Path(target).parent == run)
        if settling and Path(target).parent == run and not self.name.startswith(".") and next(calls) == killed_at:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        patch.setattr(Path, "replace", killed)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        ended = trainer_command(*few, "--seed", 3, "--overwrite")
    moves = next(calls)
    assert ended.status == (130 if moves > killed_at else 0)
    if (run / "summary.json").exists():  # then all of it is of one run
        summary_there = json.loads((run / "summary.json").read_text())
        assert json.loads((run / "config.json").read_text())["recipe"]["seed"] == summary_there["seed"]
        weights = (run / "weights.safetensors").read_bytes()
        assert hashlib.sha256(weights).hexdigest() == summary_there["weights_sha256"]
    again = trainer_command(*few, "--seed", 3)
    if again.status == 0:  # then it is the new run
        assert trainer_command(*few[:-1], tmp_path / "whole", "--seed", 3).status == 0
        whole = (tmp_path / "whole" / "weights.safetensors").read_bytes()
        assert (run / "weights.safetensors").read_bytes() == whole


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


@both
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", b"{}"),
        ("summary.json", b'{"steps": 1}'),
        ("summary.json", b"[1"),
        ("weights.safetensors", None),
    ],
)
def test_an_outcome_that_is_not_whole_is_made_again_from_the_last_checkpoint(
    name, content, framework, trainer_command, tmp_path, stops_after
):
    run = tmp_path / "run"
    stops_after(0)
    flags = [*FLAGS[:-1], "--epochs", "1", "--out", run]
    assert trainer_command(*flags, framework=framework).status == 0
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    ended = trainer_command(*flags, framework=framework)
    assert ended.status == 0, ended.err
    assert f"going on from {run / 'checkpoints' / '00000008'}, epoch 2, step 0" in ended.out
    after = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert after["weights.safetensors"] == before["weights.safetensors"]
    assert after["metrics.jsonl"] == before["metrics.jsonl"]
    assert json.loads(after["summary.json"])["test_accuracy"] == json.loads(before["summary.json"])["test_accuracy"]


@pytest.mark.parametrize("recipe", ["x", 1, None, ["mlp128"]])
def test_a_config_whose_recipe_is_no_table_is_a_short_error(recipe, trainer_command, tmp_path, stops_after):
    run = tmp_path / "run"
    stops_after(3)
    assert trainer_command(*FLAGS, "--out", run, framework="torch").status == 143
    config = json.loads((run / "config.json").read_text()) | {"recipe": recipe}
    (run / "config.json").write_text(json.dumps(config))
    ended = trainer_command(*FLAGS, "--out", run, framework="torch")
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert f"{run / 'config.json'} cannot be read: its recipe is no table; name another --out" in ended.err


def test_what_a_killed_process_left_of_a_file_goes_and_is_no_reason_to_refuse(trainer_command, tmp_path, stops_after):
    run = tmp_path / "run"
    stops_after(3)
    assert trainer_command(*FLAGS, "--out", run, framework="torch").status == 143
    left = [".weights.safetensors.z3vflau1", ".config.json.a_b_c_d_", ".metrics.jsonl.12345678", "..lock.json.abcdefgh"]
    mine = [".config.json.backup-of-mine", "notes.txt"]
    for name in [*left, *mine]:
        (run / name).write_text("cut sho")
    (run / ".checkpoints.old").mkdir()
    stops_after(0)
    assert trainer_command(*FLAGS, "--out", run, framework="torch").status == 0
    names = {path.name for path in run.iterdir()}
    assert not names & {*left, ".checkpoints.old"}
    assert names >= set(mine)
    for name in mine:
        (run / name).unlink()
    for name in left:
        (run / name).write_text("cut sho")
    assert trainer_command(*FLAGS, "--overwrite", "--out", run, framework="torch").status == 0
    assert not {path.name for path in run.iterdir()} & set(left)


@both
def test_what_is_changed_is_said_and_what_is_not_kept_is_named(framework, trainer_command, tmp_path, stops_after):
    run = tmp_path / "run"
    stops_after(3)
    assert trainer_command(*FLAGS, "--out", run, framework=framework).status == 143
    stops_after(5)
    changed = ["--resume", run, "--resume-with-changes", "--learning-rate", 0.02]
    ended = trainer_command(*changed, framework=framework)
    assert ended.status == 143, ended.err
    was = json.loads((run / "checkpoints" / "00000003" / "manifest.json").read_text())["recipe_sha256"]
    assert was != json.loads((run / "checkpoints" / "00000005" / "manifest.json").read_text())["recipe_sha256"]
    assert re.search(r"^optimizer.learning_rate: [0-9.]+ there, 0.02 here$", ended.out, re.MULTILINE)
    missing = run / "checkpoints" / "00000099"
    refused = trainer_command("--resume", missing, "--out", tmp_path / "fork", framework=framework)
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert f"--resume {missing} is not kept; there are 00000003, 00000005" in refused.err
    (run / "config.json").unlink()
    for named in (run, run / "checkpoints" / "00000003"):
        refused = trainer_command("--resume", named, framework=framework)
        assert (refused.status, refused.err.count("\n")) == (2, 1)
        assert f"{run} has checkpoints and no config.json; put that back" in refused.err

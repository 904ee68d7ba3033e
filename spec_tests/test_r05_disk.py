"""R5: when the disk refuses, the last good checkpoint is intact, and one line says which path."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import jax_impl.checkpoint
import jax_impl.step
import jax_impl.trainer
import torch_ref.trainer
from spec import files, recipe
from spec.batches import count
from spec.errors import RunDirectoryError
from spec.run import checkpoints
from spec.run.history import History
from spec.run.run_directory import RunDirectory
from spec.run.saving import Saver, parse_interval
from spec_tests.conftest import FRAMEWORKS, Ended
from spec_tests.processes import started

MODULES = {"jax": jax_impl.trainer, "torch": torch_ref.trainer}
SMALL = 200_000  # bytes that a file may have: less than a network of 1,024 units, more than a kept program
FLAGS = ["--recipe", "digits", "--epochs", "4", "--checkpoint-every", "epoch", "--quiet"]
pytestmark = pytest.mark.usefixtures("compiled_once")
ERRORS = {"disk full": errno.ENOSPC, "read-only": errno.EROFS, "permission": errno.EACCES, "input/output": errno.EIO}


def fails_the_third_time(function: Callable, number: int) -> Callable:
    """Return `function`, which the third call finds refused with the error of that number."""
    calls = []

    def refused(*arguments: object, **named: object) -> object:
        calls.append(arguments)
        if len(calls) >= 3:
            raise OSError(number, os.strerror(number), str(arguments[-1]))
        return function(*arguments, **named)

    return refused


def state_writer(monkeypatch, framework: str, number: int) -> None:
    implementation = MODULES[framework].IMPLEMENTATION
    write = fails_the_third_time(implementation.write_state, number)
    monkeypatch.setattr(MODULES[framework], "IMPLEMENTATION", dataclasses.replace(implementation, write_state=write))


def manifest_writer(monkeypatch, framework: str, number: int) -> None:
    monkeypatch.setattr(checkpoints, "write_atomic", fails_the_third_time(files.write_atomic, number))


def syncing(monkeypatch, framework: str, number: int) -> None:
    written = checkpoints.write

    def unsynced(folder: Path, *, step: int, **more: object) -> Path:
        if step > 90:
            monkeypatch.setattr(checkpoints, "_sync", fails_the_third_time(lambda path: None, number))
        return written(folder, step=step, **more)

    monkeypatch.setattr(checkpoints, "write", unsynced)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("refuse", [state_writer, manifest_writer, syncing])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_save_that_the_disk_refuses_ends_the_run_and_leaves_the_last_good_checkpoint(
    framework, refuse, error, trainer_command, tmp_path, monkeypatch, counted
):
    refuse(monkeypatch, framework, ERRORS[error])
    run = tmp_path / "run"
    ended = trainer_command(*FLAGS, "--out", run, framework=framework)
    assert_short_refusal(ended, run, os.strerror(ERRORS[error]))
    found, mistakes = checkpoints.newest_good(run / "checkpoints")
    assert (found.step, mistakes) == (90, [])
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    monkeypatch.undo()
    again = trainer_command(*FLAGS[:-1], "--out", run, framework=framework)
    assert again.status == 0, again.err
    assert "going on from" in again.out
    counted("R5 refusals of the disk", 1)


@pytest.mark.parametrize("gone", ["", "checkpoints"], ids=["the run", "its checkpoints"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_directory_that_is_removed_while_it_is_written(
    gone, framework, trainer_command, tmp_path, monkeypatch, counted
):
    run = tmp_path / "run"
    append = RunDirectory.append_metrics

    def removed_after_two(self: RunDirectory, event: str, content: dict) -> None:
        append(self, event, content)
        if event == "epoch" and content["epoch"] == 2:
            shutil.rmtree(run / gone)

    monkeypatch.setattr(RunDirectory, "append_metrics", removed_after_two)
    ended = trainer_command(*FLAGS, "--out", run, framework=framework)
    if gone:  # a folder of checkpoints is made again
        assert ended.status == 0, ended.err
        assert checkpoints.newest_good(run / "checkpoints")[0].step == 180
    else:
        assert_short_refusal(ended, run, os.strerror(errno.ENOENT))
    counted("R5 refusals of the disk", 1)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_metrics_for_which_there_is_no_room(framework, trainer_command, tmp_path, monkeypatch, counted):
    run = tmp_path / "run"
    begin = RunDirectory.begin

    def onto_a_full_device(self: RunDirectory, *arguments: object) -> None:
        begin(self, *arguments)
        (run / "metrics.jsonl").unlink()
        (run / "metrics.jsonl").symlink_to("/dev/full")

    monkeypatch.setattr(RunDirectory, "begin", onto_a_full_device)
    ended = trainer_command(*FLAGS, "--out", run, framework=framework)
    assert_short_refusal(ended, run, os.strerror(errno.ENOSPC))
    counted("R5 refusals of the disk", 1)


def files_stay_small() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, SMALL))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_checkpoint_that_does_not_fit_on_the_disk_is_one_line_whoever_writes_it(framework, tmp_path, counted):
    run = tmp_path / "run"  # no framework's own words, no threads' tracebacks
    wide = [*FLAGS, "--model.hidden-sizes", "1024", "--out", str(run)]
    with started(tmp_path, framework, wide, cache=tmp_path / "compiled", prepare=files_stay_small) as trainer:
        status = trainer.ended()
        said = Ended(status, trainer.out.read_text(), trainer.err.read_text())
    assert_short_refusal(said, run, os.strerror(errno.EFBIG))
    assert checkpoints.newest_good(run / "checkpoints") == (None, [])
    counted("R5 refusals of the disk", 1)


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("UNKNOWN: Error writing \"a\": Failed to write 9 bytes: Input/output error [os_error_code='5']", errno.EIO),
        ('RESOURCE_EXHAUSTED: Error writing "a" in OCDBT database', errno.ENOSPC),
    ],
)
def test_what_tensorstore_says_of_the_disk_is_the_error_that_it_is(said, number, tmp_path, monkeypatch):
    def refused(*_: object) -> None:
        raise ValueError(said)

    monkeypatch.setattr("orbax.checkpoint.experimental.v1.save", refused)
    state = jax_impl.step.TrainState({"a": np.zeros(3)}, {}, ())
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught:
        jax_impl.checkpoint.write(state, tmp_path)
    assert caught.value.errno == number
    said = "another mistake"
    with pytest.raises(ValueError, match="another mistake"):
        jax_impl.checkpoint.write(state, tmp_path)


def test_a_save_that_was_refused_is_heard_of_with_the_next_steps(trainer_command, tmp_path, monkeypatch):
    with RunDirectory(tmp_path / "made", "digits") as directory:
        directory.begin({})
        saver = Saver(directory, parse_interval("1"), keep=1, about=dict, write_state=refused)
        saver.check()  # nothing is being saved
        digits = recipe.load("digits")
        history = History(counts=count(digits, 1_438), metrics=digits.metrics)
        saver.save(None, history, score=None)
        saver.close()
        with pytest.raises(RunDirectoryError, match=os.strerror(errno.ENOSPC)):
            saver.check()

    def said(self: Saver) -> None:
        raise RunDirectoryError("the last save was refused")

    monkeypatch.setattr(Saver, "check", said)
    ended = trainer_command(*FLAGS, "--checkpoint-every", "never", "--out", tmp_path / "run", framework="torch")
    assert (ended.status, ended.err) == (2, "error: the last save was refused\n")


def refused(snapshot: object, folder: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def assert_short_refusal(ended: tuple, run: Path, reason: str) -> None:
    assert ended.status == 2, ended.err
    assert f"error: the run directory {run} cannot be written: " in ended.err
    assert reason in ended.err
    assert ended.err.count("\n") == 1

"""R13: one process at a time writes a run directory; another is refused and told which."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from spec.errors import RunDirectoryError
from spec.run import lock
from spec_tests.conftest import FRAMEWORKS

LONG = ["--recipe", "digits", "--epochs", "100000", "--checkpoint-every", "1h"]


@pytest.fixture
def writer(tmp_path):
    """Return a process that trains into `run`, once it writes there; it is killed in the end."""
    command = [sys.executable, "-u", "-m", "torch_ref.train", *LONG, "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "cumulative" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    yield process
    process.kill()
    process.communicate()


def test_a_second_trainer_is_refused_at_once_whatever_it_asks_for_and_then_takes_over(
    writer, trainer_command, tmp_path, counted
):
    run = tmp_path / "run"
    for framework in FRAMEWORKS:
        for flags in (LONG, [*LONG, "--overwrite"], ["--resume", run]):
            began = time.monotonic()
            ended = trainer_command(*flags, "--out", run, framework=framework)
            assert ended.status == 2
            assert f"{run} is being written by process {writer.pid} on " in ended.err
            assert "torch_ref/train.py --recipe digits" in ended.err
            assert ended.err.count("\n") == 1
            assert time.monotonic() - began < 60
            counted("R13 second trainers refused", 1)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert (run / lock.HOLDER).exists()
    after = trainer_command(*["--recipe", "digits", "--epochs", "1", "--quiet"], "--overwrite", "--out", run)
    assert after.status == 0, after.err


def test_the_lock_of_a_killed_process_is_taken_over_with_a_line_that_says_whose_it_was(
    writer, trainer_command, tmp_path
):
    writer.kill()
    writer.wait()
    flags = ["--recipe", "digits", "--epochs", 1, "--overwrite", "--out", tmp_path / "run"]
    ended = trainer_command(*flags)
    assert ended.status == 0, ended.err
    assert f"was left by process {writer.pid} on " in ended.out
    assert "which is no more: taken over" in ended.out
    assert not (tmp_path / "run" / lock.HOLDER).exists()
    assert "was left by" not in trainer_command(*flags).out


def test_a_lock_is_the_folders_own_and_given_back(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with lock.RunLock(first) as held, lock.RunLock(second):
        with pytest.raises(RunDirectoryError, match=f"{first} is being written by process [0-9]+ on "):
            lock.RunLock(first)
        held.release()
        with lock.RunLock(first) as again:
            assert again.stale is None
            held.release()  # once more, which takes nothing from the new holder
            with pytest.raises(RunDirectoryError, match="wait until it is done, or name another --out"):
                lock.RunLock(first)
    assert [*first.iterdir(), *second.iterdir()] == []


def test_a_directory_that_cannot_be_locked_is_a_short_error(trainer_command, tmp_path):
    (tmp_path / "run" / lock.LOCK).mkdir(parents=True)
    ended = trainer_command("--recipe", "digits", "--out", tmp_path / "run", framework="torch")
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert f"error: the run directory {tmp_path / 'run'} cannot be written: " in ended.err
    assert "name another --out" in ended.err


def test_a_holder_that_cannot_be_read_is_another_process(tmp_path):
    with lock.RunLock(tmp_path):
        (tmp_path / lock.HOLDER).write_bytes(b"\xff not json")
        with pytest.raises(RunDirectoryError, match="is being written by another process; wait"):
            lock.RunLock(tmp_path)


def test_who_takes_a_stale_lock_over_is_the_one_that_others_are_told_of(tmp_path):
    dead = {"process": 999_999_999, "host": "elsewhere", "since": "then", "command": "a dead one"}
    (tmp_path / lock.HOLDER).write_text(json.dumps(dead))
    with lock.RunLock(tmp_path) as held:
        assert "process 999999999 on elsewhere since then (a dead one)" in held.stale
        with pytest.raises(RunDirectoryError, match=f"is being written by process {os.getpid()} on "):
            lock.RunLock(tmp_path)

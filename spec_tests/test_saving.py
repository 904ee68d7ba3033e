"""When a run saves, how many steps a call has, and where a trainer is at rest."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec.batches import count
from spec.errors import UserError
from spec.recipe import load
from spec.run import saving
from spec.run.history import EpochDone, History, Position, StepsDone
from spec.run.pace import GROWTH, SECONDS, Pace
from spec.run.run_directory import RunDirectory
from spec.run.saving import Interval, Saver, parse_interval
from spec.run.trainer import Cancelled, Trainer


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("500", Interval(steps=500)),
        ("30s", Interval(seconds=30.0)),
        ("5m", Interval(seconds=300.0)),
        ("1h", Interval(seconds=3600.0)),
        ("epoch", Interval()),
        ("never", Interval(never=True)),
        ("auto", Interval(seconds=300.0, share=0.02)),
    ],
)
def test_an_interval_is_steps_or_time_or_a_word(text, interval):
    assert parse_interval(text) == interval


@pytest.mark.parametrize("text", ["", "0", "0s", "-5", "5 m", "1.5h", "often", "5d", "9" * 13])
def test_what_is_no_interval_is_refused(text):
    with pytest.raises(
        UserError, match=r"is no interval; use steps \(500\), time \(30s, 5m, 1h\), epoch, auto or never"
    ):
        parse_interval(text)


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that stands still: a list of one number, its seconds."""
    now = [0.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def saver_of(tmp_path):
    with RunDirectory(tmp_path / "run", "digits") as directory:
        directory.begin({})
        yield lambda text: Saver(
            directory, parse_interval(text), keep=2, about=dict, write_state=lambda snapshot, folder: None
        )


def test_steps_are_counted_from_the_runs_beginning_and_an_epochs_end_waits_for_its_evaluation(saver_of):
    saver = saver_of("10")
    due = [(epoch, step) for epoch in (1, 2, 3) for step in range(1, 9) if saver.due(Position(epoch, step), 8)]
    assert due == [(2, 2), (3, 4)]  # steps 10 and 20 of 24
    assert saver_of("8").due(Position(1, 8), 8) is False
    assert saver.due_at_epochs_end()


def test_time_runs_from_the_last_save(saver_of, clock):
    saver, history = saver_of("30s"), History(counts=count(load("digits"), 1438), metrics=load("digits").metrics)
    assert not saver.due(Position(1, 1), 45)
    clock[0] = 30.0
    assert saver.due(Position(1, 1), 45)
    history.position = Position(1, 1)
    saver.save(None, history, score=None)
    saver.wait()
    assert not saver.due(Position(1, 2), 45)
    clock[0] = 60.0
    assert saver.due(Position(1, 2), 45)


def test_unless_told_otherwise_saving_at_epochs_ends_takes_no_more_than_its_share(saver_of, clock):
    saver = saver_of("auto")
    clock[0] = saving.SECONDS_OF_A_SAVE / saving.SHARE - 0.1
    assert not saver.due_at_epochs_end()
    clock[0] += 0.2
    assert saver.due_at_epochs_end()
    assert not saver.due(Position(1, 1), 45)
    clock[0] = saving.LONGEST
    assert saver.due(Position(1, 1), 45)


def test_never_is_never(saver_of, clock):
    saver = saver_of("never")
    clock[0] = 1e9
    assert not saver.due(Position(1, 1), 45)
    assert not saver.due_at_epochs_end()


def test_a_call_grows_to_what_half_a_second_allows_and_shrinks_again():
    pace, taken = Pace(), []
    for seconds_per_step in (0.001, 0.001, 0.001, 0.001, 0.1, 2.0):
        steps = pace.stop(Position(1, 0), steps_per_epoch=10_000)
        taken.append(steps)
        pace.took(steps, steps * seconds_per_step)
    last = pace.stop(Position(1, 0), steps_per_epoch=10_000)
    assert taken == [1, GROWTH, GROWTH**2, int(SECONDS / 0.001), int(SECONDS / 0.001), int(SECONDS / 0.1)]
    assert last == 1


@given(
    step=st.integers(0, 96),
    epoch=st.integers(1, 5),
    boundary=st.integers(1, 300) | st.none(),
    steps=st.integers(1, 500),
)
def test_a_call_goes_on_but_over_no_boundary_and_no_epochs_end(step, epoch, boundary, steps):
    stop = Pace(steps=steps, boundary=boundary).stop(Position(epoch, step), steps_per_epoch=97)
    assert step < stop <= 97
    assert stop - step <= steps
    if boundary:
        before = (epoch - 1) * 97
        assert not [n for n in range(before + step + 1, before + stop) if n % boundary == 0]


class Counting(Trainer):
    """Three epochs of seven steps; notes what is launched and what is waited for."""

    def __init__(self) -> None:
        self.recipe = dataclasses.replace(load("digits"), epochs=3, batch_size=2)
        self.counts = count(self.recipe, 14)
        self.test_labels = np.array([0])
        self.notes: list[str] = []

    def launch(self, epoch, start, stop):
        self.notes.append(f"launch {epoch}:{start}-{stop}")

        def done():
            self.notes.append(f"wait {epoch}:{start}-{stop}")
            zeros = np.zeros(stop - start)
            return StepsDone(epoch=epoch, start=start, stop=stop, losses=zeros, num_correct=zeros)

        return done

    def evaluate(self, cancelled=lambda: False):
        if cancelled():
            raise Cancelled
        return np.zeros(1), np.zeros(1)

    def state(self):
        return {}

    def snapshot(self):
        return None

    def restore(self, snapshot):
        return None

    def named(self, snapshot):
        return {}


def test_a_call_is_on_its_way_before_the_last_ones_figures_are_read_and_none_at_an_epochs_end():
    trainer = Counting()
    events = list(trainer.events(pace=Pace(steps=3)))
    assert trainer.notes[:6] == [
        "launch 1:0-3", "launch 1:3-6", "wait 1:0-3", "launch 1:6-7", "wait 1:3-6", "wait 1:6-7",
    ]  # fmt: skip
    assert [event.at_rest for event in events if isinstance(event, StepsDone)] == [False, False, True] * 3
    assert [isinstance(event, EpochDone) for event in events] == [False, False, False, True] * 3


def test_nothing_is_launched_behind_what_a_checkpoint_is_made_of():
    trainer = Counting()
    pace = Pace(steps=3, rests=lambda position: position == Position(1, 3))
    rests = [event.at_rest for event in trainer.events(pace=pace) if isinstance(event, StepsDone)]
    assert rests == [True, False, True] + [False, False, True] * 2
    assert trainer.notes[:3] == ["launch 1:0-3", "wait 1:0-3", "launch 1:3-6"]


def test_a_trainer_that_is_told_to_stop_finishes_what_is_on_its_way_and_no_more():
    trainer, seen = Counting(), []
    for event in trainer.events(pace=Pace(steps=3, stopped=lambda: bool(seen))):
        seen.append((event.epoch, event.stop, event.at_rest))
    assert seen == [(1, 3, False), (1, 6, True)]


def test_events_start_where_they_are_told_to_an_evaluation_that_is_due_included():
    in_the_middle = list(Counting().events(start=Position(2, 5)))
    assert (in_the_middle[0].epoch, in_the_middle[0].start, in_the_middle[0].stop) == (2, 5, 7)
    before_the_evaluation = list(Counting().events(start=Position(3, 7)))
    assert [type(event) for event in before_the_evaluation] == [EpochDone]
    assert list(Counting().events(start=Position(4, 0))) == []


def test_a_history_goes_on_from_what_it_was():
    counts = count(dataclasses.replace(load("digits"), batch_size=4), 14)
    metrics = dataclasses.replace(load("digits").metrics, progress_every=2)
    whole, broken = (History(counts=counts, metrics=metrics) for _ in range(2))
    losses, correct = np.array([1.0, np.nan, 3.0, 4.0]), np.array([4, 3, 2, 1])
    steps = [
        StepsDone(epoch=1, start=i, stop=i + 1, losses=losses[i : i + 1], num_correct=correct[i : i + 1], seconds=1.0)
        for i in range(4)
    ]
    wanted = [line for event in steps for line in whole.progress(event)]
    found = [line for event in steps[:3] for line in broken.progress(event)]
    resumed = History(counts=counts, metrics=metrics)
    resumed.take_over(broken.to_mapping())
    found += resumed.progress(steps[3])
    assert found == wanted
    assert [line["batch_loss"] for line in wanted] == [None, 4.0]
    end = EpochDone(epoch=1, seconds=0.5, test_losses=None, test_correct=None)
    assert resumed.epoch(end) == whole.epoch(end)
    assert whole.to_mapping()["position"] == {"epoch": 2, "step": 0}


def test_one_event_over_several_progress_lines_gives_the_lines_of_several_events():
    counts = count(dataclasses.replace(load("digits"), batch_size=2), 14)
    metrics = dataclasses.replace(load("digits").metrics, progress_every=3, running_loss_every=2)
    losses, correct = np.arange(7.0), np.array([0, 1, 2, 0, 1, 2, 0])

    def lines(cuts: list[int]) -> list[dict]:
        history, made = History(counts=counts, metrics=metrics), []
        for start, stop in zip([0, *cuts], [*cuts, 7], strict=True):
            own = {"losses": losses[start:stop], "num_correct": correct[start:stop]}
            made += history.progress(StepsDone(epoch=1, start=start, stop=stop, **own))
        return made

    whole = lines([])
    assert [line["step"] for line in whole] == [3, 6, 7]
    assert [line["batch_loss"] for line in whole] == [2.0, 5.0, 6.0]
    assert [line["running_loss"] for line in whole] == [2.0, 4.5, 6.0]
    assert [line["cumulative_train_accuracy"] for line in whole] == [3 / 6, 6 / 12, 6 / 14]
    for cuts in ([1], [3], [2, 4, 5], [1, 2, 3, 4, 5, 6]):
        assert lines(cuts) == whole

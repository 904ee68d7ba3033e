"""One run in several processes: process 0 leads it, and is the one that writes; the others do what it does."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jax_impl.background import in_background
from jax_impl.distributed import Group, join
from jax_impl.parallel import Placement
from jax_impl.step import TrainState
from jax_impl.trainer import IMPLEMENTATION, Trainer, prepare
from spec import signals
from spec.datasets import Dataset
from spec.datasets.dataset import sha256
from spec.run import program
from spec.run.checkpoints import told
from spec.run.display import Display
from spec.run.history import StepsDone
from spec.run.resume import flat
from spec.run.trainer import Tested
from spec.sweep import ManyFlags

ALIKE = ("parallel", "uneven", "shard_state", "on_nonfinite")  # flags that have to be, beside the recipe
QUEUED = 2  # calls that a process which follows has on their way, as the one that leads has


class Member(Trainer):
    """A trainer that is one of several processes': what it waits for, it waits for as long as the others are there."""

    def __init__(self, group: Group, *arguments: Any, **options: Any) -> None:
        self.group = group
        super().__init__(*arguments, **options)

    def _wait(self, arrays: Sequence[jax.Array], cancelled: Callable[[], bool] = lambda: False) -> None:
        with self.group.explained():
            super()._wait(arrays, self.group.watch)  # no process gives up alone what all are at
            jax.block_until_ready(arrays)

    def gather(self) -> None:
        """Do the part of this process in the gathering of what all have."""
        with self.group.explained():
            self.placement.whole(self._state)

    def take_over(self, snapshot: TrainState | None = None) -> None:
        """Take over the snapshot, process 0's, in all."""
        snapshot = snapshot or jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._state)
        with self.group.explained():
            super().restore(jax.tree.map(_of_process_0, snapshot))


class Leader(Member):
    """The trainer of process 0: every call that all have to make is told to the others first."""

    def launch(self, epoch: int, start: int, stop: int) -> Callable[[], StepsDone]:
        """Put steps on the queue of every process's devices."""
        self.group.tell("launch", epoch, start, stop)
        return super().launch(epoch, start, stop)

    def evaluate(self, cancelled: Callable[[], bool] = lambda: False) -> Tested:
        """Return loss and predicted class of each test example, found by all processes."""
        self.group.tell("evaluate")
        return super().evaluate()

    def state(self) -> dict[str, np.ndarray]:
        """Return the present state, of which every process may have a part."""
        self.group.tell("gather")
        with self.group.explained():
            return super().state()

    def snapshot(self) -> TrainState:
        """Return the state, of which every process may have a part."""
        self.group.tell("gather")
        with self.group.explained():
            return super().snapshot()

    def restore(self, snapshot: TrainState) -> None:
        """Take over a state, in every process."""
        self.group.tell("restore")
        self.take_over(snapshot)

    def signal_elsewhere(self) -> int | None:
        """Return the number of a signal that another process was given."""
        return self.group.signalled()


def _of_process_0(leaf: np.ndarray) -> np.ndarray:
    """Return process 0's array, given that or one of its shape: its bytes, for a sum of numbers loses the sign of 0."""
    content = np.frombuffer(leaf.tobytes(), np.uint8)
    given = np.asarray(multihost_utils.broadcast_one_to_all(content))
    return np.frombuffer(given.tobytes(), leaf.dtype).reshape(leaf.shape)


def run(flags: ManyFlags) -> Mapping[str, Any]:
    """Be one process of a run, to its end; return the summary, in process 0, or an empty mapping.

    Raises what the others left for, where one did.
    """
    display = Display(quiet=flags.quiet)
    group = join(
        coordinator=flags.coordinator,
        num_processes=flags.num_processes,
        process_id=flags.process_id,
        connect=flags.connect_timeout,
        heartbeat=flags.heartbeat_timeout,
        say=display.line,
    )
    summary, signal = {}, None
    with group.parting():
        placement = IMPLEMENTATION.select_device(**flags.devices_asked())
        if group.leads:
            summary = _lead(flags, group, placement)
        else:
            signal = _follow(flags, group, placement)
    if signal:
        raise signals.Stopped(signal, program.TOO_LATE)
    return summary


def _lead(flags: ManyFlags, group: Group, placement: Placement) -> Mapping[str, Any]:
    agreed = partial(_agreed, group, flags, Leader)
    implementation = replace(IMPLEMENTATION, select_device=lambda **_: placement, prepare=agreed)
    summary = program.run(flags, implementation)
    group.tell("end")
    return summary


def _follow(flags: ManyFlags, group: Group, placement: Placement) -> int | None:
    """Do what process 0 says until it says that this is the end, and return the signal that came, if one did: it is
    process 0's to act on."""
    Display(quiet=flags.quiet).line(f"process {group.process_id} of {group.num_processes}: does what process 0 does")
    where = {"data_dir": flags.data_dir, "data_source": flags.data_source}
    dataset = group.result(in_background(lambda: IMPLEMENTATION.load(flags.config.data, **where)))
    if group.told()[0] == "end":  # the run was finished before; a compiler at work would not let this process leave
        return None
    trainer_of = _agreed(group, flags, Member, flags.config, placement, skips=flags.on_nonfinite == "skip")
    with IMPLEMENTATION.memory_explained():
        trainer = trainer_of(dataset)
        with signals.deferred() as request:
            heard = _Once(group, request)
            waiting: deque[Callable] = deque()
            while (command := group.told(heard))[0] != "end":
                _do(trainer, *command, waiting)
    return request.number


def _do(trainer: Member, command: str, numbers: Sequence[int], waiting: deque[Callable]) -> None:
    """Do what process 0 does; at most so many calls are on their way."""
    if command == "launch":
        waiting.append(trainer.launch(*numbers))
        while len(waiting) > QUEUED:
            waiting.popleft()()
    elif command == "evaluate":
        trainer.evaluate()
    elif command == "gather":
        trainer.gather()
    else:
        trainer.take_over()


class _Once:
    """Tells process 0 of a signal that came here, once."""

    def __init__(self, group: Group, request: signals.StopRequest) -> None:
        self.group, self.request, self.told = group, request, False

    def __call__(self) -> None:
        if self.request.came() and not self.told:
            self.group.signal(self.request.number)
            self.told = True


def _agreed(
    group: Group, flags: ManyFlags, kind: type[Member], recipe: Any, placement: Placement, *, skips: bool
) -> Callable[[Dataset], Trainer]:
    """Return what makes this process's trainer of a data set, once all agree on what they are to do."""
    trainer_of = prepare(recipe, placement, skips=skips, kind=partial(kind, group), result=group.result)

    def trainer(dataset: Dataset) -> Trainer:
        if group.leads:
            group.tell("begin")
        made_by = program.origin(IMPLEMENTATION, placement)
        facts = told(program.to_mapping(recipe)) | {"versions": made_by["versions"], "devices": made_by["devices"]}
        facts |= {"data_sha256": sha256(dataset), "num_processes": group.num_processes}
        facts |= {name: getattr(flags, name) for name in ALIKE}
        group.agree(dict(flat(facts)))
        return trainer_of(dataset)

    return trainer

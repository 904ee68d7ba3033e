"""How many steps a trainer does at a time, and when it comes to rest."""

from __future__ import annotations

from collections.abc import Callable

from spec.run.history import Position

SECONDS = 0.5  # so that a run that is told to stop is at rest soon: one call is under way, and one waits behind it
GROWTH = 8  # a call has at most so many times the steps of the one before, whose rate it goes by


class Pace:
    """Calls of `steps` steps; unless given, of as many as take about `SECONDS`, by the rate of the last call.

    A trainer comes to rest, with no later step on its way, at an epoch's end, where `rests` says so, and once `stopped`
    says so. A call ends at every multiple of `boundary` steps since the run began.
    """

    def __init__(
        self,
        *,
        steps: int | None = None,
        rests: Callable[[Position], bool] = lambda position: False,
        boundary: int | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.rests, self.stopped = rests, stopped
        self._fixed = steps
        self._boundary = boundary
        self._steps = steps or 1

    def stop(self, position: Position, *, steps_per_epoch: int) -> int:
        """Return the step of the epoch that a call from `position` ends at."""
        stop = min(position.step + self._steps, steps_per_epoch)
        if self._boundary is None:
            return stop
        before = (position.epoch - 1) * steps_per_epoch
        return min(stop, self._boundary - (before + position.step) % self._boundary + position.step)

    def took(self, steps: int, seconds: float) -> None:
        """Learn from a call of `steps` steps that took `seconds`."""
        if self._fixed is None:
            affordable = int(SECONDS * steps / seconds) if seconds > 0 else GROWTH * steps
            self._steps = max(1, min(affordable, GROWTH * steps))

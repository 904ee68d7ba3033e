"""A whole run: recipe and arrays -> initial state -> epochs -> events -> run directory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from jax_impl.background import in_background
from jax_impl.compile_cache import keep_compiled_programs
from jax_impl.convert import from_canonical, to_canonical
from jax_impl.parallel import select_device
from jax_impl.programs import compile_programs, precision_scope, stored_dtype
from jax_impl.step import StepMetrics
from jax_impl.stepper import Stepper, wait
from spec import datasets
from spec.datasets import Dataset
from spec.datasets.sizes import known_size, size_of
from spec.errors import UserError
from spec.history import EpochDone, Event, StepsDone
from spec.program import Implementation
from spec.recipe import Recipe


class Trainer(Stepper):
    """One run of `recipe` over `dataset`, compiled and ready on `device`."""

    def events(self, *, steps_per_call: int | None = None) -> Iterator[Event]:
        """Run every epoch, yielding what happens; `steps_per_call` steps (default: an epoch's) are one device program.

        The next program is on its way before the last one's figures are read, so that the device never waits.
        """
        for epoch in range(1, self.recipe.epochs + 1):
            start = time.perf_counter()
            yield from self._run_epoch(epoch, steps_per_call or self.counts.steps_per_epoch)
            test_losses, predictions = self.evaluate()
            correct = None if predictions is None else predictions == self._test_labels
            seconds = time.perf_counter() - start
            yield EpochDone(epoch=epoch, seconds=seconds, test_losses=test_losses, test_correct=correct)

    def evaluate(self) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
        """Return loss [n] and predicted class [n] of each test example as the state is now; None without a split."""
        metrics = self._tested()
        return (np.asarray(metrics.loss), np.asarray(metrics.prediction)) if metrics else (None, None)

    def state(self) -> dict[str, np.ndarray]:
        """Return the present parameters and running statistics, canonical names and layouts (`spec.params`)."""
        return to_canonical(self._state.params, self._state.batch_stats, self.leaves)

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over parameters and running statistics, canonical names and layouts; the optimiser stays as it is."""
        dtype = stored_dtype(self.recipe.precision)
        with precision_scope(self.recipe.precision):
            trained, batch_stats = from_canonical(state, self.leaves, dtype=dtype, device=self.device)
        self._state = self._state._replace(params=trained, batch_stats=batch_stats)

    def _run_epoch(self, epoch: int, steps_per_call: int) -> Iterator[StepsDone]:
        waiting: tuple[int, int, int, StepMetrics] | None = None
        for start in range(0, self.counts.steps_per_epoch, steps_per_call):
            stop = min(start + steps_per_call, self.counts.steps_per_epoch)
            metrics = self._run(epoch, start, stop)
            if waiting:
                yield _steps_done(*waiting)
            waiting = epoch, start, stop, metrics
        yield _steps_done(*waiting)


def prepare(recipe: Recipe, device: jax.Device) -> Callable[[Dataset], Trainer]:
    """Return what makes a trainer of a data set. Where its size is known, compilation starts now, in the background."""
    size = known_size(recipe.data)
    compiling = [in_background(compile_programs, recipe, size, device)] if size else []

    def trainer(dataset: Dataset) -> Trainer:
        # The programs' state is donated by the first trainer: a second one gets its own.
        programs = compiling.pop().result() if compiling and size_of(dataset) == size else None
        return Trainer(recipe, dataset, device, programs=programs)

    return trainer


@contextlib.contextmanager
def memory_explained() -> Iterator[None]:
    """Turn the device's refusal of memory into a UserError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"the device has too little memory: {str(error).splitlines()[0]}; use a smaller "
            "--batch-size or network, or fewer --seeds"
        ) from None


def _steps_done(epoch: int, start: int, stop: int, metrics: StepMetrics) -> StepsDone:
    wait(metrics)
    losses, num_correct = (np.asarray(leaf)[start:stop] for leaf in metrics)
    return StepsDone(epoch=epoch, start=start, stop=stop, losses=losses, num_correct=num_correct)


def _start(platform: str | None) -> jax.Device:
    keep_compiled_programs()
    return select_device(platform)


IMPLEMENTATION = Implementation(
    framework="jax",
    packages=("jax", "jaxlib", "flax", "optax"),
    select_device=_start,
    describe_device=lambda device: f"{device.platform}:{device.device_kind}:{device.id}",
    load=datasets.load,
    prepare=prepare,
    memory_explained=memory_explained,
)

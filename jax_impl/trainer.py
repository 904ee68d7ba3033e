"""A whole run: recipe and arrays -> initial state -> epochs -> events -> run directory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

import spec.run.trainer
from jax_impl import checkpoint
from jax_impl.background import in_background
from jax_impl.compile_cache import keep_compiled_programs
from jax_impl.convert import from_canonical, optimizer_to_canonical, to_canonical
from jax_impl.parallel import Mode, Placement, place
from jax_impl.programs import compile_programs, precision_scope, stored_dtype
from jax_impl.step import TrainState
from jax_impl.stepper import Stepper
from spec import datasets
from spec.datasets import Dataset
from spec.datasets.sizes import Size, known_size, size_of
from spec.errors import UserError
from spec.recipe import Recipe
from spec.run.history import StepsDone
from spec.run.trainer import Implementation, Tested


class Trainer(Stepper, spec.run.trainer.Trainer):
    """One run of `recipe` over `dataset`, compiled and ready where `placement` says."""

    def launch(self, epoch: int, start: int, stop: int) -> Callable[[], StepsDone]:
        """Put the steps [start, stop) of `epoch` on the device's queue; the returned function waits for them."""
        metrics, finite = self._run(epoch, start, stop)

        def done() -> StepsDone:
            self._wait((*metrics, finite))
            losses, num_correct = (np.asarray(leaf)[start:stop] for leaf in metrics)
            return StepsDone(
                epoch=epoch, start=start, stop=stop, losses=losses, num_correct=num_correct, finite=bool(finite)
            )

        return done

    def evaluate(self, cancelled: Callable[[], bool] = lambda: False) -> Tested:
        """Return loss [n] and predicted class [n] of each test example as the state is now; None without a split."""
        metrics = self._tested(cancelled)
        return (np.asarray(metrics.loss), np.asarray(metrics.prediction)) if metrics else (None, None)

    def state(self) -> dict[str, np.ndarray]:
        """Return the present parameters and running statistics, canonical names and layouts (`spec.params`)."""
        state = self.placement.whole(self._state)
        return to_canonical(state.params, state.batch_stats, self.leaves)

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over parameters and running statistics, canonical names and layouts; the optimiser stays as it is."""
        dtype = stored_dtype(self.recipe.precision)
        with precision_scope(self.recipe.precision):
            trained, batch_stats = from_canonical(state, self.leaves, dtype=dtype, device=self.placement.of_state)
        self._state = self._state._replace(params=trained, batch_stats=batch_stats)

    def snapshot(self) -> TrainState:
        """Return the state, its leaves NumPy arrays of their own."""
        return jax.tree.map(np.array, self.placement.whole(self._state))

    def restore(self, snapshot: TrainState) -> None:
        """Take over a state; it is copied, for the device's arrays are given to the steps to change."""
        with precision_scope(self.recipe.precision):
            self._state = self.placement.put_state(jax.tree.map(np.array, snapshot))

    def named(self, snapshot: TrainState) -> dict[str, np.ndarray]:
        """Return the arrays of a snapshot: the canonical state, then the optimiser's as `optimizer.NAME`."""
        buffers = optimizer_to_canonical(snapshot.opt_state, self.leaves, 0)
        del buffers["step"]  # a trainer keeps no count of its own
        state = to_canonical(snapshot.params, snapshot.batch_stats, self.leaves)
        return state | {f"optimizer.{name}": array for name, array in buffers.items()}


def prepare(
    recipe: Recipe,
    placement: Placement,
    *,
    skips: bool = False,
    kind: Callable[..., Trainer] = Trainer,
    result: Callable[[Future], Any] = Future.result,
) -> Callable[[Dataset], Trainer]:
    """Return what makes a trainer, of that `kind`, of a data set. Where its size is known, compilation starts now, in
    the background; `result` waits for it.

    With `skips`, steps that make a number infinite or nan are left out.
    """

    def compiling(size: Size) -> Future:
        return in_background(lambda: compile_programs(recipe, size, placement, skips=skips))

    in_background(checkpoint.preload)
    size = known_size(recipe.data)
    known = [compiling(size)] if size else []

    def trainer(dataset: Dataset) -> Trainer:
        # The programs' state is donated by the first trainer: a second one gets its own.
        programs = known.pop() if known and size_of(dataset) == size else compiling(size_of(dataset))
        return kind(recipe, dataset, placement, programs=result(programs))

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


def _start(platform: str | None, *, parallel: Mode | None = "jit", **asked: Any) -> Placement:
    """Return where a program runs: on one device, unless it is asked of how many."""
    keep_compiled_programs()
    return place(platform, parallel=parallel, **asked)


IMPLEMENTATION = Implementation(
    framework="jax",
    packages=("jax", "jaxlib", "flax", "optax"),
    select_device=_start,
    describe_devices=lambda placement: placement.described(),
    load=datasets.load,
    prepare=prepare,
    memory_explained=memory_explained,
    write_state=checkpoint.write,
    read_state=lambda trainer, folder: checkpoint.read(folder, like=trainer.snapshot()),
)

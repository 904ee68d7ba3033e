"""The state of a run on a device, or of several in one program, and the compiled programs that move it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jax_impl.epoch import DeviceSplit, Span
from jax_impl.parallel import Placement
from jax_impl.programs import Programs, compile_programs
from jax_impl.step import ExampleMetrics, StepMetrics
from spec import params
from spec.batches import count, epoch_order
from spec.datasets import Dataset, Split, preprocess
from spec.datasets.dataset import value_table
from spec.datasets.sizes import size_of
from spec.recipe import Preprocessing, Recipe
from spec.run.trainer import Cancelled

POLL_SECONDS = 0.0005


class Stepper:
    """One run of `recipe` over `dataset` (raw, as `spec.datasets.load` gives it), compiled and ready where
    `placement` says.

    Given `runs`, recipes that differ from `recipe` in seed and the optimiser's numbers alone, it is all of those, and
    every array of state, order and metrics has a leading axis of runs. `programs` are those of `compile_programs`, made
    beforehand, else they are made here. Raises RecipeError or DataError when the recipe and the data do not fit.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        placement: Placement,
        *,
        runs: Sequence[Recipe] | None = None,
        programs: Programs | None = None,
    ) -> None:
        size = size_of(dataset)
        self.recipe = recipe
        self.placement = placement
        self.counts = count(recipe, size.num_train)
        self.leaves = params.leaves(recipe.model, size.input_shape, params.num_outputs(recipe, size.num_classes))
        self.train_split, self.test_split = put(dataset, recipe.preprocessing, placement)
        self.test_labels = dataset.test.labels if dataset.test else None
        self._seeds = np.array([run.seed for run in runs] if runs else recipe.seed, np.uint32)
        self._position = (1, 0)
        self._orders: dict[int, jax.Array] = {}
        programs = programs or compile_programs(recipe, size, placement, runs=runs)
        self._state, self._run_steps, self._evaluate, self.compile_seconds = programs

    def train(self, steps: int) -> StepMetrics:
        """Train `steps` steps (1 or more) on from where the last call stopped, over the ends of epochs, without
        evaluating, and wait for the device: what a benchmark times.

        Return the metrics of the last epoch that it came to, on the device, each [steps of an epoch]: what this call
        did not make is 0.
        """
        while steps > 0:
            epoch, start = self._position
            stop = min(start + steps, self.counts.steps_per_epoch)
            metrics, _ = self._run(epoch, start, stop)
            self._position = (epoch, stop) if stop < self.counts.steps_per_epoch else (epoch + 1, 0)
            steps -= stop - start
        return jax.block_until_ready(metrics)

    def _run(self, epoch: int, start: int, stop: int) -> tuple[StepMetrics, jax.Array]:
        """Move the state by the steps [start, stop) of `epoch`; return their metrics, and whether the state is finite
        after them. Both may still be on their way.

        The next epoch's order is drawn while the device is at work.
        """
        self._draw(epoch)
        span = Span(*map(np.int32, (epoch, start, stop)))
        arguments = (self.train_split, self._orders[epoch], span, self._seeds)
        self._state, metrics, finite = self._run_steps(self._state, *arguments)
        self._draw(epoch + 1)
        return metrics, finite

    def _draw(self, epoch: int) -> None:
        """Put the order of the epoch's examples, int32 [n] or [runs, n], on the device, unless it is there."""
        self._orders = {drawn: order for drawn, order in self._orders.items() if drawn >= epoch - 1}
        if epoch not in self._orders:
            orders = [epoch_order(int(seed), epoch, self.counts.num_examples) for seed in np.atleast_1d(self._seeds)]
            order = np.stack(orders).astype(np.int32).reshape(*self._seeds.shape, -1)
            self._orders[epoch] = self.placement.put(order)

    def _tested(self, cancelled: Callable[[], bool] = lambda: False) -> ExampleMetrics | None:
        """Return what the test split's examples come to as the state is now; None without a split.

        Raises Cancelled once `cancelled` says so.
        """
        if self.test_split is None:
            return None
        metrics = self._evaluate(self._state, self.test_split)
        self._wait(metrics, cancelled)
        return metrics

    def _wait(self, arrays: Sequence[jax.Array], cancelled: Callable[[], bool] = lambda: False) -> None:
        """Wait for what the device is at. Raises Cancelled once `cancelled` says so."""
        wait(arrays, cancelled)


def put(dataset: Dataset, preprocessing: Preprocessing, placement: Placement) -> tuple[DeviceSplit, DeviceSplit | None]:
    """Return the training and the test split on the device: bytes with the table of their values, or float32 values."""
    table = value_table(preprocessing) if dataset.train.inputs.dtype == np.uint8 else None
    ready = dataset if table is not None else preprocess(dataset, preprocessing)

    def split(given: Split) -> DeviceSplit:
        arrays = (np.ascontiguousarray(given.inputs), given.labels, table)
        return DeviceSplit(*placement.put(arrays))

    return split(ready.train), split(ready.test) if ready.test else None


def wait(arrays: Sequence[jax.Array], cancelled: Callable[[], bool] = lambda: False) -> None:
    """Wait for the device in Python: an interrupt is not heard inside JAX's own waiting.

    Raises Cancelled once `cancelled` says so.
    """
    while not all(leaf.is_ready() for leaf in arrays):
        if cancelled():
            raise Cancelled
        time.sleep(POLL_SECONDS)

"""A whole run: recipe and arrays -> initial state -> epochs -> events -> run directory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jax_impl import models, optim
from jax_impl.convert import from_canonical, to_canonical
from jax_impl.epoch import DeviceSplit, Span, make_evaluate, make_run_steps
from jax_impl.parallel import select_device
from jax_impl.step import ExampleMetrics, StepMetrics, TrainState, make_eval_step, make_gradients, make_train_step
from spec import datasets, params
from spec.batches import count, epoch_order
from spec.datasets import Dataset, Split
from spec.errors import UserError
from spec.history import EpochDone, Event, StepsDone
from spec.program import Implementation
from spec.recipe import Recipe

POLL_SECONDS = 0.0005


class Trainer:
    """One run of `recipe` over `dataset` (raw, as `spec.datasets.load` gives it), compiled and ready on `device`.

    Raises RecipeError or DataError when the recipe and the data do not fit.
    """

    def __init__(self, recipe: Recipe, dataset: Dataset, device: jax.Device) -> None:
        dataset = datasets.preprocess(dataset, recipe.preprocessing)
        outputs = params.num_outputs(recipe, dataset.num_classes)
        self.recipe = recipe
        self.device = device
        self.counts = count(recipe, len(dataset.train.labels))
        self.leaves = params.leaves(recipe.model, dataset.input_shape, outputs)
        self.train_split = self._put(dataset.train)
        self.test_split = self._put(dataset.test) if dataset.test else None
        self._position = (1, 0)
        self._test_labels = dataset.test.labels if dataset.test else None
        start = time.perf_counter()
        with precision_scope(recipe.precision):
            self._compile(models.graph(recipe.model, dataset.input_shape, outputs))
        self.compile_seconds = time.perf_counter() - start

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
        if self.test_split is None:
            return None, None
        metrics = self._evaluate(self._state, self.test_split)
        _wait(metrics)
        return np.asarray(metrics.loss), np.asarray(metrics.prediction)

    def state(self) -> dict[str, np.ndarray]:
        """Return the present parameters and running statistics, canonical names and layouts (`spec.params`)."""
        return to_canonical(self._state.params, self._state.batch_stats, self.leaves)

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over parameters and running statistics, canonical names and layouts; the optimiser stays as it is."""
        stored = jnp.promote_types(jnp.dtype(self.recipe.precision), jnp.float32)
        with precision_scope(self.recipe.precision):
            trained, batch_stats = from_canonical(state, self.leaves, dtype=stored, device=self.device)
        self._state = self._state._replace(params=trained, batch_stats=batch_stats)

    def train(self, steps: int) -> None:
        """Train `steps` steps on from where the last call stopped, over the ends of epochs, without evaluating, and
        wait for the device: what a benchmark times."""
        metrics = None
        while steps > 0:
            epoch, start = self._position
            stop = min(start + steps, self.counts.steps_per_epoch)
            self._state, metrics = self._run_steps(
                self._state, self.train_split, self._order(epoch), _span(epoch, start, stop)
            )
            self._position = (epoch, stop) if stop < self.counts.steps_per_epoch else (epoch + 1, 0)
            steps -= stop - start
        if metrics:
            _wait(metrics)

    def _run_epoch(self, epoch: int, steps_per_call: int) -> Iterator[StepsDone]:
        order = self._order(epoch)
        waiting: tuple[Span, StepMetrics] | None = None
        for start in range(0, self.counts.steps_per_epoch, steps_per_call):
            span = _span(epoch, start, min(start + steps_per_call, self.counts.steps_per_epoch))
            self._state, metrics = self._run_steps(self._state, self.train_split, order, span)
            if waiting:
                yield _steps_done(*waiting)
            waiting = span, metrics
        yield _steps_done(*waiting)

    def _order(self, epoch: int) -> jax.Array:
        return self._put_array(epoch_order(self.recipe.seed, epoch, self.counts.num_examples).astype(np.int32))

    def _compile(self, graphdef: object) -> None:
        """Draw the initial state, and compile the two programs: an epoch's steps, and the evaluation."""
        recipe, counts = self.recipe, self.counts
        dtype = jnp.dtype(recipe.precision)
        optimizer = optim.optimizer(recipe, counts.steps_per_epoch)
        initial = params.initial_state(self.leaves, recipe.init, recipe.seed)
        stored = jnp.promote_types(dtype, jnp.float32)
        trained, batch_stats = from_canonical(initial, self.leaves, dtype=stored, device=self.device)
        opt_state = jax.device_put(optimizer.init(trained), self.device)
        self._state = TrainState(trained, batch_stats, opt_state)
        train_step = make_train_step(make_gradients(graphdef, recipe.loss, dtype), optimizer)
        order = self._put_array(np.zeros(counts.num_examples, np.int32))
        run_steps = make_run_steps(train_step, counts, recipe.seed)
        self._run_steps = run_steps.lower(self._state, self.train_split, order, _span(1, 0, 1)).compile()
        if self.test_split is not None:
            eval_step = make_eval_step(graphdef, recipe.loss, dtype)
            evaluate = make_evaluate(eval_step, len(self.test_split.labels), recipe.batch_size)
            self._evaluate = evaluate.lower(self._state, self.test_split).compile()

    def _put(self, split: Split) -> DeviceSplit:
        return DeviceSplit(self._put_array(split.inputs), self._put_array(split.labels))

    def _put_array(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(np.ascontiguousarray(array), self.device)


@contextlib.contextmanager
def precision_scope(precision: str) -> Iterator[None]:
    """Run the body with 64-bit types for float64, and with full-width products unless bfloat16 was asked for (S12)."""
    products = "default" if precision == "bfloat16" else "highest"
    with _enable_x64(precision == "float64"), jax.default_matmul_precision(products):
        yield


@contextlib.contextmanager
def memory_explained() -> Iterator[None]:
    """Turn the device's refusal of memory into a UserError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"the device has too little memory: {str(error).splitlines()[0]}; use a smaller --batch-size or network"
        ) from None


def _enable_x64(enabled: bool) -> contextlib.AbstractContextManager:
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(enabled)
    from jax.experimental import enable_x64  # before jax 0.8

    return enable_x64(enabled)


def _wait(metrics: StepMetrics | ExampleMetrics) -> None:
    """Wait for the device in Python: an interrupt is not heard inside JAX's own waiting."""
    while not all(leaf.is_ready() for leaf in metrics):
        time.sleep(POLL_SECONDS)


def _span(epoch: int, start: int, stop: int) -> Span:
    return Span(np.int32(epoch), np.int32(start), np.int32(stop))


def _steps_done(span: Span, metrics: StepMetrics) -> StepsDone:
    _wait(metrics)
    epoch, start, stop = map(int, span)
    losses, num_correct = (np.asarray(leaf)[start:stop] for leaf in metrics)
    return StepsDone(epoch=epoch, start=start, stop=stop, losses=losses, num_correct=num_correct)


IMPLEMENTATION = Implementation(
    framework="jax",
    packages=("jax", "jaxlib", "flax", "optax"),
    select_device=select_device,
    describe_device=lambda device: f"{device.platform}:{device.device_kind}:{device.id}",
    load=datasets.load,
    trainer=Trainer,
    memory_explained=memory_explained,
)

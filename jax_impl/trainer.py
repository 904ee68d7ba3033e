"""A whole run: recipe and arrays -> initial state -> epochs -> events -> run directory."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_impl import models, optim
from jax_impl.convert import from_canonical, to_canonical
from jax_impl.epoch import DeviceSplit, Span, make_evaluate, make_run_steps
from jax_impl.parallel import select_device
from jax_impl.step import ExampleMetrics, StepMetrics, TrainState, make_eval_step, make_train_step
from spec import datasets, params, run_directory
from spec.batches import count, epoch_order
from spec.command_line import Flags
from spec.datasets import Dataset, Split
from spec.display import Display
from spec.errors import UserError
from spec.history import EpochDone, Event, History, StepsDone
from spec.recipe import Recipe, to_mapping
from spec.recorder import record, refuse_nonfinite
from spec.run_directory import RunDirectory

POLL_SECONDS = 0.0005
PACKAGES = ("lockstep", "jax", "jaxlib", "flax", "optax", "numpy")


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
            test_losses, test_correct = self.evaluate()
            seconds = time.perf_counter() - start
            yield EpochDone(epoch=epoch, seconds=seconds, test_losses=test_losses, test_correct=test_correct)

    def evaluate(self) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
        """Return loss [n] and correctness [n] of each test example as the state is now; None without a test split."""
        if self.test_split is None:
            return None, None
        metrics = self._evaluate(self._state, self.test_split)
        _wait(metrics)
        return np.asarray(metrics.loss), np.asarray(metrics.prediction) == self._test_labels

    def state(self) -> dict[str, np.ndarray]:
        """Return the present parameters and running statistics, canonical names and layouts (`spec.params`)."""
        return to_canonical(self._state.params, self._state.batch_stats, self.leaves)

    def train_epochs(self, epochs: int) -> Iterator[None]:
        """Train without evaluating, an epoch at each `next`, and wait for the device: what `spec_tests.speed` times."""
        for epoch in range(1, epochs + 1):
            for _ in self._run_epoch(epoch, self.counts.steps_per_epoch):
                pass
            yield

    def _run_epoch(self, epoch: int, steps_per_call: int) -> Iterator[StepsDone]:
        order = self._put_array(epoch_order(self.recipe.seed, epoch, self.counts.num_examples).astype(np.int32))
        waiting: tuple[Span, StepMetrics] | None = None
        for start in range(0, self.counts.steps_per_epoch, steps_per_call):
            span = _span(epoch, start, min(start + steps_per_call, self.counts.steps_per_epoch))
            self._state, metrics = self._run_steps(self._state, self.train_split, order, span)
            if waiting:
                yield _steps_done(*waiting)
            waiting = span, metrics
        yield _steps_done(*waiting)

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
        train_step = make_train_step(graphdef, recipe.loss, optimizer, dtype)
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


def run(flags: Flags) -> dict:
    """Train as the flags say, write the run directory and print its last line; return the summary."""
    recipe = flags.config
    if flags.out:
        run_directory.check_usable(flags.out, overwrite=flags.overwrite)
    device = select_device(flags.platform)
    dataset = datasets.load(recipe.data, data_dir=flags.data_dir, data_source=flags.data_source)
    display = Display(quiet=flags.quiet)
    display.line(f"{recipe.name}: {recipe.description}")
    with memory_explained():
        with display.waiting("compiling ..."):
            trainer = Trainer(recipe, dataset, device)
        with RunDirectory(flags.out, recipe.name, overwrite=flags.overwrite) as directory:
            summary = _run(flags, trainer, directory, display)
    display.last_line(summary, directory.path)
    return summary


def _run(flags: Flags, trainer: Trainer, directory: RunDirectory, display: Display) -> dict:
    """Train and write, once everything the user gave is known to fit together; return the summary."""
    recipe, device = trainer.recipe, trainer.device
    display.line(f"{params.num_parameters(trainer.leaves):,} parameters, {trainer.counts.steps:,} steps on {device}")
    directory.write_json("config.json", {"recipe": to_mapping(recipe), **_origin(device), "flags": _given(flags)})
    history = History(counts=trainer.counts, metrics=recipe.metrics)
    start = time.perf_counter()
    with display.running(trainer.counts):
        events = trainer.events(steps_per_call=recipe.metrics.progress_every)
        epochs = record(events, recipe, history, directory, display)
    summary = summarize(trainer, epochs, time.perf_counter() - start)
    state = trainer.state()
    refuse_nonfinite(state, recipe)
    directory.write_weights(state)
    directory.write_json("summary.json", summary)
    return summary


def summarize(trainer: Trainer, epochs: list[Mapping], seconds: float) -> dict:
    """Return the summary of a finished run: counts, times, and the last epoch's figures."""
    recipe, last = trainer.recipe, epochs[-1]
    return {
        "recipe": recipe.name,
        "framework": "jax",
        "seed": recipe.seed,
        "precision": recipe.precision,
        "epochs": len(epochs),
        "steps": last["step"],
        "examples_seen": last["examples_seen"],
        "seconds": seconds,
        "compile_seconds": trainer.compile_seconds,
        **{name: last[name] for name in ("train_loss", "train_accuracy", "cumulative_train_accuracy")},
        **{name: last[name] for name in ("test_loss", "test_accuracy", "lesson_metrics")},
        **_origin(trainer.device),
    }


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


def _origin(device: jax.Device) -> dict:
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"devices": [f"{device.platform}:{device.device_kind}:{device.id}"], "versions": versions}


def _given(flags: Flags) -> dict:
    """Return the flags that are not recipe fields, paths as text."""
    names = ("recipe", "data_dir", "data_source", "platform", "quiet")
    values = {name: getattr(flags, name) for name in names}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

"""Programs that train a recipe on JAX, for the benchmark: `python -m jax_impl.baselines NAME RECIPE` serves one.

`ours` is the epoch program, `sharded` and `pmap` are the same in those modes, on one device; `many` is that of several
seeds at once. `stock` is the loop of Flax's documentation: its
modules, its optimiser and metrics, one `nnx.jit` a step, batches gathered by NumPy. `keras` is Keras 3 on the JAX
backend, `fit` on arrays in memory, with the extra keras. What the last two do not train, `bench.TAKES` says.
"""

from __future__ import annotations

if __name__ == "__main__":
    from spec.errors import run_program

    run_program(__spec__.name)

import argparse
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator

import jax
import numpy as np
import optax
from flax import nnx

from jax_impl import optim
from jax_impl.convert import from_canonical
from jax_impl.parallel import PLATFORMS, Mode, Placement, select_device
from jax_impl.profile import operation_seconds
from jax_impl.stepper import Stepper
from spec import bench_worker, datasets, params
from spec import recipe as recipes
from spec.batches import count, epoch_order
from spec.bench_worker import without_dropout
from spec.errors import require
from spec.recipe import Model, Recipe


class Ours:
    """The compiled epoch in a mode; with `seeds`, that of as many runs in one program, from the recipe's seed on."""

    def __init__(self, recipe: Recipe, device: jax.Device, *, seeds: int | None = None, parallel: Mode = "jit") -> None:
        self.recipe, self.seeds, self.placement = recipe, seeds, Placement(parallel, (device,))
        self.dataset = datasets.load(recipe.data)
        self.stepper = self._start(recipe)

    def first_losses(self, steps: int, run: int = 0) -> list[float]:
        """Return the losses of the first steps, at most an epoch's, without dropout, of the run with that seed more."""
        recipe = without_dropout(self.recipe)
        recipe = recipe if self.seeds else dataclasses.replace(recipe, seed=recipe.seed + run)
        losses = np.asarray(self._start(recipe).train(steps).loss)
        return (losses[run] if self.seeds else losses)[:steps].tolist()

    def train(self, steps: int) -> None:
        """Train `steps` more steps, of each run."""
        self.stepper.train(steps)

    def profile(self, steps: int) -> dict[str, float | dict[str, float]]:
        """Train `steps` more steps; return the seconds that took, and those of each kind of operation."""
        seconds, operations = operation_seconds(lambda: self.train(steps))
        return {"seconds": seconds, "operations": operations}

    def _start(self, recipe: Recipe) -> Stepper:
        runs = self.seeds and [dataclasses.replace(recipe, seed=recipe.seed + index) for index in range(self.seeds)]
        return Stepper(recipe, self.dataset, self.placement, runs=runs)


class Stock:
    """The documented Flax loop, in float32: the mean cross-entropy of the logits, with the recipe's rule from optax."""

    def __init__(self, recipe: Recipe, device: jax.Device) -> None:
        self.recipe, self.device = recipe, device
        dataset = datasets.load(recipe.data)
        self.shape, self.outputs = dataset.input_shape, params.num_outputs(recipe, dataset.num_classes)
        self.counts = count(recipe, len(dataset.train.labels))
        self.images, self.labels = datasets.preprocess(dataset, recipe.preprocessing).train
        self.model, self.optimizer, self.metrics = self._start(recipe)
        # The first turn, which does not count, ends an epoch: a short batch compiles then and not later.
        self.coming = itertools.islice(self._batches(), max(self.counts.steps_per_epoch - 2, 0), None)

    def first_losses(self, steps: int) -> list[float]:
        """Return the losses of the first steps, without dropout."""
        model, optimizer, metrics = self._start(without_dropout(self.recipe))
        return [
            float(stock_step(model, optimizer, metrics, *batch)) for batch in itertools.islice(self._batches(), steps)
        ]

    def train(self, steps: int) -> None:
        """Train `steps` more steps."""
        loss = None
        for batch in itertools.islice(self.coming, steps):
            loss = stock_step(self.model, self.optimizer, self.metrics, *batch)
        jax.block_until_ready((loss, nnx.state(self.model)))

    def _start(self, recipe: Recipe) -> tuple[nnx.Module, nnx.Optimizer, nnx.MultiMetric]:
        model = StockCNN(recipe.model, self.shape, self.outputs) if recipe.model.name == "cnn" else None
        model = model or StockMLP(recipe.model, self.shape, self.outputs)
        leaves = params.leaves(recipe.model, self.shape, self.outputs)
        initial = params.initial_state(leaves, recipe.init, recipe.seed)
        trained, _ = from_canonical(initial, leaves, dtype=np.float32, device=self.device)
        nnx.update(model, trained)
        optimizer = nnx.Optimizer(model, optim.optimizer(recipe, self.counts.steps_per_epoch), wrt=nnx.Param)
        return model, optimizer, nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))

    def _batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for epoch in itertools.count(1):
            order = epoch_order(self.recipe.seed, epoch, self.counts.num_examples)[: self.counts.examples_per_epoch]
            for start in range(0, len(order), self.counts.batch_size):
                batch = order[start : start + self.counts.batch_size]
                yield self.images[batch], self.labels[batch]


class StockMLP(nnx.Module):
    """Linear layers and activations of Flax, with its BatchNorm over the inputs as one channel where that is asked."""

    def __init__(self, model: Model, input_shape: tuple[int, ...], outputs: int) -> None:
        rngs = nnx.Rngs(0)
        self.activations = model.activations
        self.norm0 = nnx.BatchNorm(1, momentum=0.9, rngs=rngs) if model.input_batchnorm else None
        sizes = (int(np.prod(input_shape)), *model.hidden_sizes, outputs)
        for index, (inputs, units) in enumerate(itertools.pairwise(sizes), start=1):
            setattr(self, f"linear{index}", nnx.Linear(inputs, units, use_bias=bool(model.bias), rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits."""
        x = self.norm0(x[..., None]) if self.norm0 else x
        x = x.reshape(x.shape[0], -1)
        for index, name in enumerate(self.activations, start=1):
            x = getattr(nnx, name)(getattr(self, f"linear{index}")(x))
        return getattr(self, f"linear{len(self.activations) + 1}")(x)


class StockCNN(nnx.Module):
    """Flax's convolution, BatchNorm, max_pool, linear layers and dropout."""

    def __init__(self, model: Model, input_shape: tuple[int, ...], outputs: int) -> None:
        rngs = nnx.Rngs(0)
        height, width, inputs = input_shape
        self.convs, self.hidden = len(model.channels), len(model.hidden_sizes)
        for index, channels in enumerate(model.channels, start=1):
            setattr(self, f"conv{index}", nnx.Conv(inputs, channels, (3, 3), padding=1, rngs=rngs))
            setattr(self, f"norm{index}", nnx.BatchNorm(channels, momentum=0.9, rngs=rngs))
            height, width, inputs = height // 2, width // 2, channels
        sizes = (height * width * inputs, *model.hidden_sizes, outputs)
        for index, (ins, units) in enumerate(itertools.pairwise(sizes), start=1):
            setattr(self, f"linear{index}", nnx.Linear(ins, units, rngs=rngs))
        for index, units in enumerate(model.hidden_sizes, start=self.convs + 1):
            setattr(self, f"norm{index}", nnx.BatchNorm(units, momentum=0.9, rngs=rngs))
        self.dropout = nnx.Dropout(model.dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits."""
        for index in range(1, self.convs + 1):
            x = nnx.relu(getattr(self, f"norm{index}")(getattr(self, f"conv{index}")(x)))
            x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for index in range(1, self.hidden + 1):
            x = nnx.relu(getattr(self, f"norm{self.convs + index}")(getattr(self, f"linear{index}")(x)))
            x = self.dropout(x)
        return getattr(self, f"linear{self.hidden + 1}")(x)


@nnx.jit
def stock_step(
    model: nnx.Module, optimizer: nnx.Optimizer, metrics: nnx.MultiMetric, images: jax.Array, labels: jax.Array
) -> jax.Array:
    """Update the model by one batch, as Flax's documentation does; return the mean loss before the update."""

    def objective(model: nnx.Module) -> tuple[jax.Array, jax.Array]:
        logits = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

    (loss, logits), grads = nnx.value_and_grad(objective, has_aux=True)(model)
    metrics.update(loss=loss, logits=logits, labels=labels)
    optimizer.update(model, grads)
    return loss


class Keras:
    """Keras 3's `fit` on arrays in memory, in float32: the mean cross-entropy of the logits, with Keras's own SGD."""

    def __init__(self, recipe: Recipe, device: jax.Device) -> None:
        self.recipe, self.device = recipe, device
        dataset = datasets.load(recipe.data)
        self.shape, self.outputs = dataset.input_shape, params.num_outputs(recipe, dataset.num_classes)
        self.counts = count(recipe, len(dataset.train.labels))
        self.images, self.labels = datasets.preprocess(dataset, recipe.preprocessing).train
        self.model = self._start(recipe)

    def first_losses(self, steps: int) -> list[float]:
        """Return the losses of the first steps, without dropout."""
        model = self._start(without_dropout(self.recipe))
        order = epoch_order(self.recipe.seed, 1, self.counts.num_examples)[: self.counts.examples_per_epoch]
        size, losses = self.counts.batch_size, []
        for batch in (order[index * size : (index + 1) * size] for index in range(steps)):
            # What it returns is a running mean, so each step's is made anew.
            model.reset_metrics()
            losses.append(float(model.train_on_batch(self.images[batch], self.labels[batch])))
        return losses

    def train(self, steps: int) -> None:
        """Train `steps` more steps: epochs of `fit` that shuffle, cut short where fewer are left."""
        while steps > 0:
            now = min(steps, self.counts.steps_per_epoch)
            examples = min(now * self.counts.batch_size, self.counts.examples_per_epoch)
            self.model.fit(
                self.images[:examples],
                self.labels[:examples],
                batch_size=self.counts.batch_size,
                verbose=0,
                shuffle=True,
            )
            steps -= now

    def _start(self, recipe: Recipe) -> object:
        import keras

        model = keras.Sequential([keras.Input(self.shape), *self._layers(recipe.model)])
        leaves = params.leaves(recipe.model, self.shape, self.outputs)
        initial = params.initial_state(leaves, recipe.init, recipe.seed)
        trained, _ = from_canonical(initial, leaves, dtype=np.float32, device=self.device)
        for name, arrays in trained.items():
            own = {variable.name: variable for variable in model.get_layer(name).trainable_variables}
            for key, array in arrays.items():
                names = {"scale": "gamma", "bias": "beta"} if name.startswith("norm") else {}
                own[names.get(key, key)].assign(np.asarray(array))
        options = recipe.optimizer
        model.compile(
            optimizer=keras.optimizers.SGD(
                options.learning_rate, momentum=options.momentum, nesterov=bool(options.nesterov)
            ),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        return model

    def _layers(self, model: Model) -> Iterator[object]:
        from keras import layers

        convs = len(model.channels or ())
        for index, channels in enumerate(model.channels or (), start=1):
            yield layers.Conv2D(channels, 3, padding="same", name=f"conv{index}")
            yield layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"norm{index}")
            yield layers.ReLU()
            yield layers.MaxPooling2D(2)
        yield layers.Flatten()
        for index, units in enumerate(model.hidden_sizes, start=1):
            yield layers.Dense(units, use_bias=model.bias is not False, name=f"linear{index}")
            if model.name == "cnn":
                yield layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"norm{convs + index}")
                yield layers.ReLU()
                yield layers.Dropout(model.dropout)
            else:
                yield layers.Activation(model.activations[index - 1])
        last = f"linear{len(model.hidden_sizes) + 1}"
        yield layers.Dense(self.outputs, use_bias=model.bias is not False, name=last)


PROGRAMS = {
    "ours": Ours,
    "sharded": functools.partial(Ours, parallel="sharded"),
    "pmap": functools.partial(Ours, parallel="pmap"),
    "many": Ours,
    "stock": Stock,
    "keras": Keras,
}


def main() -> None:
    """Serve one of them."""
    parser = argparse.ArgumentParser(prog="python -m jax_impl.baselines", description=__doc__, allow_abbrev=False)
    parser.add_argument("name", choices=PROGRAMS)
    parser.add_argument("recipe", help="a recipe's name or file")
    parser.add_argument("--platform", choices=PLATFORMS)
    parser.add_argument("--seeds", type=int, help="the runs of `many`")
    arguments = parser.parse_args()
    recipe = recipes.load(arguments.recipe)
    if arguments.name == "keras":
        require("keras", extra="keras")
        os.environ["KERAS_BACKEND"] = "jax"
    options = {"seeds": arguments.seeds} if arguments.name == "many" else {}
    bench_worker.serve(lambda: PROGRAMS[arguments.name](recipe, select_device(arguments.platform), **options))

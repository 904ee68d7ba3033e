"""The compiled programs of a run, an epoch's steps and the evaluation, made from shapes alone: no data is needed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import DTypeLike

from jax_impl import models, optim
from jax_impl.convert import from_canonical
from jax_impl.epoch import DeviceSplit, Evaluate, RunSteps, Span, make_evaluate, make_run_steps
from jax_impl.parallel import Placement
from jax_impl.step import TrainState, make_eval_step, make_gradients, make_train_step, skip_nonfinite
from spec import params
from spec.batches import count
from spec.datasets.dataset import value_table
from spec.datasets.sizes import Size
from spec.params import Leaf
from spec.recipe import Recipe


class Programs(NamedTuple):
    """What a run starts from: its initial state on the device, the compiled `make_run_steps` and `make_evaluate` (None
    without a test split), and the seconds that this took."""

    state: TrainState
    run_steps: RunSteps
    evaluate: Evaluate | None
    seconds: float


def compile_programs(
    recipe: Recipe, size: Size, placement: Placement, *, runs: Sequence[Recipe] | None = None, skips: bool = False
) -> Programs:
    """Draw the initial state and compile the programs of a run over data of that size.

    Given `runs`, recipes that differ from `recipe` in seed and the optimiser's numbers alone, the programs train them
    all: state, order, seed and metrics have a leading axis of runs. With `skips` they leave out the steps that make a
    number infinite or nan. Raises RecipeError when recipe and size do not fit, UserError when batch and devices do not.
    """
    start = time.perf_counter()
    counts = count(recipe, size.num_train)
    local = recipe.model.batchnorm_statistics == "local"
    placement.check_divides(sorted(set(counts.batch_sizes().tolist())), alone=local)
    outputs = params.num_outputs(recipe, size.num_classes)
    leaves = params.leaves(recipe.model, size.input_shape, outputs)
    graphdef = models.graph(recipe.model, size.input_shape, outputs)
    dtype = jnp.dtype(recipe.precision)
    optimizer = (optim.tunable_optimizer if runs else optim.optimizer)(recipe, counts.steps_per_epoch)
    with precision_scope(recipe.precision):
        states = [_initial_state(run, leaves, optimizer, placement) for run in runs or (recipe,)]
        state = placement.put(jax.tree.map(lambda *leaves: np.stack(leaves), *states)) if runs else states[0]
        over_runs, axis = _over_runs(recipe, runs), (len(runs),) if runs else ()
        train_step = make_train_step(make_gradients(graphdef, recipe.loss, dtype), optimizer)
        train_step = skip_nonfinite(train_step) if skips else train_step
        run_steps = over_runs(make_run_steps(train_step, counts, placement.part), (0, None, 0, None, 0))
        shape = placement.shape
        order, span = shape((*axis, size.num_train), np.int32), Span(*(shape((), np.int32),) * 3)
        train_split = _split_shape(recipe, size, size.num_train, placement)
        arguments = (state, train_split, order, span, shape(axis, np.uint32))
        compiled = placement.compiled(run_steps, *arguments, donates=True)
        evaluate = None
        if size.num_test:
            eval_step = make_eval_step(graphdef, recipe.loss, dtype)
            test_split = _split_shape(recipe, size, size.num_test, placement)
            evaluate = make_evaluate(eval_step, size.num_test, recipe.batch_size, placement.part)
            evaluate = placement.compiled(over_runs(evaluate, (0, None)), state, test_split)
    return Programs(state, compiled, evaluate, time.perf_counter() - start)


def check_fits(recipe: Recipe, size: Size) -> None:
    """Raise RecipeError when the recipe cannot be trained on data of that size."""
    count(recipe, size.num_train)
    params.leaves(recipe.model, size.input_shape, params.num_outputs(recipe, size.num_classes))


@contextlib.contextmanager
def precision_scope(precision: str) -> Iterator[None]:
    """Run the body with 64-bit types for float64, and with full-width products unless bfloat16 was asked for (S12)."""
    products = "default" if precision == "bfloat16" else "highest"
    with _enable_x64(precision == "float64"), jax.default_matmul_precision(products):
        yield


def stored_dtype(precision: str) -> DTypeLike:
    """Return the dtype that parameters are kept in: float32 where the arithmetic is bfloat16."""
    return jnp.promote_types(jnp.dtype(precision), jnp.float32)


def _over_runs(recipe: Recipe, runs: Sequence[Recipe] | None) -> Callable[[Callable, tuple], Callable]:
    """Return what makes a function of one run one of all `runs`, given which of its arguments have an axis of runs.

    Matrix products of many runs are one batched product. Convolutions over many kernels are slow everywhere, so a
    network that has them runs one after the other inside the program.
    """

    def one_after_the_other(function: Callable, axes: tuple) -> Callable:
        def mapped(*arguments: object) -> object:
            def of_one(own: list) -> object:
                rest = iter(own)
                return function(
                    *(next(rest) if axis == 0 else given for given, axis in zip(arguments, axes, strict=True))
                )

            return lax.map(of_one, [given for given, axis in zip(arguments, axes, strict=True) if axis == 0])

        return mapped

    if not runs:
        return lambda function, axes: function
    return one_after_the_other if recipe.model.name == "cnn" else jax.vmap


def _initial_state(
    recipe: Recipe, leaves: Sequence[Leaf], optimizer: optax.GradientTransformation, placement: Placement
) -> TrainState:
    initial, dtype = params.initial_state(leaves, recipe.init, recipe.seed), stored_dtype(recipe.precision)
    trained, batch_stats = from_canonical(initial, leaves, dtype=dtype, device=placement.of_state)
    return TrainState(trained, batch_stats, placement.put_state(optim.initial_state(optimizer, recipe, trained)))


def _split_shape(recipe: Recipe, size: Size, num_examples: int, placement: Placement) -> DeviceSplit:
    table = value_table(recipe.preprocessing) if size.input_dtype == np.uint8 else None
    dtype = np.float32 if table is None else np.uint8
    return DeviceSplit(
        placement.shape((num_examples, *size.input_shape), dtype),
        placement.shape((num_examples,), np.int32),
        None if table is None else placement.shape(table.shape, table.dtype),
    )


def _enable_x64(enabled: bool) -> contextlib.AbstractContextManager:
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(enabled)
    from jax.experimental import enable_x64  # before jax 0.8

    return enable_x64(enabled)

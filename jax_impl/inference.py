"""A trained state at work: the evaluation of a split, and the logits of any inputs."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jax_impl import models
from jax_impl.convert import from_canonical
from jax_impl.epoch import make_evaluate
from jax_impl.parallel import Placement
from jax_impl.programs import precision_scope, stored_dtype
from jax_impl.step import TrainState, make_eval_step
from jax_impl.stepper import put, wait
from spec import params
from spec.datasets import Dataset
from spec.datasets.sizes import size_of
from spec.recipe import Recipe


def evaluate(
    recipe: Recipe, dataset: Dataset, state: Mapping[str, np.ndarray], placement: Placement
) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss [n] in nats and the predicted class [n] of each example of the raw test split, by the program
    that a run evaluates itself with."""
    size = size_of(dataset)
    outputs = params.num_outputs(recipe, size.num_classes)
    leaves = params.leaves(recipe.model, size.input_shape, outputs)
    graphdef = models.graph(recipe.model, size.input_shape, outputs)
    with precision_scope(recipe.precision):
        trained, batch_stats = from_canonical(
            state, leaves, dtype=stored_dtype(recipe.precision), device=placement.replicated
        )
        eval_step = make_eval_step(graphdef, recipe.loss, jnp.dtype(recipe.precision))
        program = jax.jit(make_evaluate(eval_step, size.num_test, recipe.batch_size))
        _, test_split = put(dataset, recipe.preprocessing, placement)
        metrics = program(TrainState(trained, batch_stats, ()), test_split)
    wait(metrics)
    return np.asarray(metrics.loss), np.asarray(metrics.prediction)


def logits(
    recipe: Recipe, inputs: np.ndarray, num_classes: int, state: Mapping[str, np.ndarray], placement: Placement
) -> np.ndarray:
    """Return the logits [n, outputs], float64, of preprocessed `inputs` [n, ...] float32, a batch at a time."""
    outputs = params.num_outputs(recipe, num_classes)
    leaves = params.leaves(recipe.model, inputs.shape[1:], outputs)
    graphdef = models.graph(recipe.model, inputs.shape[1:], outputs)
    dtype = jnp.dtype(recipe.precision)
    size = min(recipe.batch_size, len(inputs))
    padding = np.zeros((-len(inputs) % size, *inputs.shape[1:]), inputs.dtype)  # every batch has one shape
    with precision_scope(recipe.precision):
        trees = from_canonical(state, leaves, dtype=stored_dtype(recipe.precision), device=placement.replicated)
        trained = jax.tree.map(lambda leaf: leaf.astype(dtype), trees[0])
        forward = jax.jit(lambda *of: models.apply(graphdef, *of, train=False)[0])
        batches = np.concatenate([inputs, padding]).reshape(-1, size, *inputs.shape[1:])
        found = [forward(trained, trees[1], placement.put(batch).astype(dtype)) for batch in batches]
        return np.concatenate([np.asarray(one, np.float64) for one in found])[: len(inputs)]

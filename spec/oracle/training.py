"""One training step, after its forward pass: metrics, back, update (S8, S9)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from spec.oracle.losses import example_losses, loss_gradient, predictions
from spec.oracle.network import Forward, backward
from spec.oracle.optimizers import learning_rate, update
from spec.recipe import Recipe


def train_step(
    recipe: Recipe,
    state: Mapping[str, ArrayLike],
    opt_state: Mapping[str, ArrayLike],
    passed: Forward,
    labels: ArrayLike,
    *,
    epoch: int,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], float, int]:
    """Return the state and the optimiser's state after a step of `epoch` (from 1), mean loss in nats and right answers.

    `passed` is the forward pass of `state`, in training, over the batch of `labels` [batch]. The state, in the order of
    the one given, holds the moved parameters and the new running statistics, float64. Loss and right answers are those
    of that pass, before the update; the loss is a mean whatever the reduction. Nothing given is changed. Raises
    ValueError for a pass in evaluation.
    """
    grads = backward(passed, loss_gradient(passed.logits, labels, recipe.loss))
    params = {name: state[name] for name in grads}
    moved, opt_state = update(recipe.optimizer, learning_rate(recipe, epoch), params, grads, opt_state)
    after = moved | passed.batch_stats
    loss = float(example_losses(passed.logits, labels, recipe.loss).mean())
    num_correct = int((predictions(passed.logits) == np.asarray(labels)).sum())
    return {name: after[name] for name in state}, opt_state, loss, num_correct

"""One step of training, one batch of evaluation: pure functions over plain pytrees."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from jax_impl.models import NO_HOOKS, Hooks, apply
from jax_impl.objective import example_losses, predictions
from jax_impl.parallel import WHOLE, Part
from spec.recipe import Loss


class TrainState(NamedTuple):
    """What a step changes: parameters, BatchNorm statistics, and the optimiser's state, all nested dicts of arrays."""

    params: dict
    batch_stats: dict
    opt_state: optax.OptState


class StepMetrics(NamedTuple):
    """Of one batch, on the forward pass before the update (S8): mean loss in nats, and the count of right answers."""

    loss: Float[Array, "*steps"]
    num_correct: Int[Array, "*steps"]


class ExampleMetrics(NamedTuple):
    """Of each example of an evaluation: its loss in nats and the predicted class."""

    loss: Float[Array, " examples"]
    prediction: Int[Array, " examples"]


Gradients = Callable[..., tuple[dict, tuple[dict, StepMetrics]]]
TrainStep = Callable[..., tuple[TrainState, StepMetrics]]
EvalStep = Callable[[TrainState, jax.Array, jax.Array], ExampleMetrics]


def make_gradients(graphdef: nnx.GraphDef, loss: Loss, dtype: DTypeLike) -> Gradients:
    """Return the function of (params, batch_stats, images [batch, ...], labels [batch] int32, dropout key, hooks, part)
    to (grads, (batch_stats, metrics)): the gradient of the batch's objective, and what else the forward pass gave.

    `dtype` is that of the forward and backward pass; parameters keep their own. `hooks` are those of `models.apply`.
    Given images and labels that are a `part` of a batch, all that is returned is of the whole batch (S11).
    """

    summed = loss.reduction == "sum"

    def objective(
        params: dict,
        batch_stats: dict,
        images: jax.Array,
        labels: jax.Array,
        key: jax.Array,
        hooks: Hooks,
        part: Part,
    ) -> tuple[jax.Array, tuple[dict, StepMetrics]]:
        logits, batch_stats = apply(
            graphdef,
            _cast(params, dtype),
            batch_stats,
            images.astype(dtype),
            train=True,
            dropout_key=key,
            hooks=hooks,
            part=part,
        )
        losses = example_losses(_at_least_float32(logits), labels, loss)
        right = predictions(logits) == labels
        weights = part.weights(losses.dtype)
        if weights is not None:
            losses, right = losses * weights, right & (weights > 0)
        objective = losses.sum() * part.filled if summed else losses.mean()
        metrics = StepMetrics(losses.mean(), jnp.sum(right, dtype=jnp.int32))
        return objective, (batch_stats, metrics)

    def gradients(*arguments: object, hooks: Hooks = NO_HOOKS, part: Part = WHOLE) -> tuple:
        grads, (batch_stats, metrics) = jax.grad(objective, has_aux=True)(*arguments, hooks, part)
        grads = part.sum(grads) if summed else part.mean(grads)
        return grads, (batch_stats, StepMetrics(part.mean(metrics.loss), part.sum(metrics.num_correct)))

    return gradients


def make_train_step(gradients: Gradients, optimizer: optax.GradientTransformation) -> TrainStep:
    """Return the function of (state, images [batch, ...], labels [batch] int32, key, hooks, part) to (state, metrics),
    for the `gradients` that `make_gradients` gives."""

    def train_step(
        state: TrainState,
        images: Float[Array, "batch ..."],
        labels: Int[Array, " batch"],
        key: Key[Array, ""],
        *,
        hooks: Hooks = NO_HOOKS,
        part: Part = WHOLE,
    ) -> tuple[TrainState, StepMetrics]:
        arguments = (state.params, state.batch_stats, images, labels, key)
        grads, (batch_stats, metrics) = gradients(*arguments, hooks=hooks, part=part)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), batch_stats, opt_state), metrics

    return train_step


def skip_nonfinite(train_step: TrainStep) -> TrainStep:
    """Return the step that leaves the state as it was where the given one's would hold a number that is not finite, or
    its loss is none; the loss is nan then."""

    def careful_step(state: TrainState, *batch: object, **how: object) -> tuple[TrainState, StepMetrics]:
        moved, metrics = train_step(state, *batch, **how)
        sound = all_finite((moved, metrics.loss))

        def chosen(new: object, old: object) -> object:
            # A schedule goes by the steps, left out or not; all else by the updates.
            return new if _is_schedule(new) else jnp.where(sound, new, old)

        kept = jax.tree.map(chosen, moved, state, is_leaf=_is_schedule)
        return kept, metrics._replace(loss=jnp.where(sound, metrics.loss, jnp.nan))

    return careful_step


def _is_schedule(node: object) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def all_finite(tree: object) -> Bool[Array, ""]:
    """Return whether every number in `tree` is finite."""
    sound = jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree)
    return jax.tree.reduce(jnp.logical_and, sound, jnp.array(True))


def make_eval_step(graphdef: nnx.GraphDef, loss: Loss, dtype: DTypeLike) -> EvalStep:
    """Return the function of (state, images [batch, ...], labels [batch] int32) to the metrics of each example."""

    def eval_step(state: TrainState, images: Float[Array, "batch ..."], labels: Int[Array, " batch"]) -> ExampleMetrics:
        logits, _ = apply(graphdef, _cast(state.params, dtype), state.batch_stats, images.astype(dtype), train=False)
        return ExampleMetrics(example_losses(_at_least_float32(logits), labels, loss), predictions(logits))

    return eval_step


def _cast(tree: dict, dtype: DTypeLike) -> dict:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def _at_least_float32(logits: jax.Array) -> jax.Array:
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

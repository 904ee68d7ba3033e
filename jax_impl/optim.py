"""The update rules and schedules, in optax, equal to torch's (S6)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spec.recipe import Optimizer, Recipe

Number = float | jax.Array | None


class Numbers(NamedTuple):
    """The numbers of an update rule, as they are or traced; None where the rule has no such number."""

    learning_rate: Number
    weight_decay: Number
    momentum: Number
    dampening: Number
    epsilon: Number


class Updates(NamedTuple):
    """How many updates were made, int32; a step that is left out (`step.skip_nonfinite`) makes none."""

    count: jax.Array


def numbers_of(options: Optimizer) -> Numbers:
    """Return the numbers of a recipe's optimiser."""
    return Numbers(*(getattr(options, name) for name in Numbers._fields))


def optimizer(recipe: Recipe, steps_per_epoch: int, numbers: Numbers | None = None) -> optax.GradientTransformation:
    """Return the recipe's update rule, with the given `numbers` in the place of its own.

    SGD, with g' = g + wd p: b_1 = g'_1; b_t = mu b_{t-1} + (1 - d) g'_t; p -= lr_t (g'_t + mu b_t, or b_t if not
    nesterov).
    Adam: Kingma and Ba, arXiv 1412.6980, with the same coupled decay. lr_t is constant within an epoch.
    """
    options = recipe.optimizer
    numbers = numbers or numbers_of(options)
    rate = learning_rate(recipe, steps_per_epoch, numbers.learning_rate)
    decay = optax.add_decayed_weights(numbers.weight_decay) if is_used(numbers.weight_decay) else optax.identity()
    if options.name == "adam":
        first, second = options.betas
        return optax.chain(decay, optax.adam(rate, b1=first, b2=second, eps=numbers.epsilon))
    momentum = numbers.momentum if is_used(numbers.momentum) else None
    rule = optax.sgd(rate, momentum=momentum, nesterov=bool(options.nesterov))
    return optax.chain(decay, _dampen(numbers.dampening) if is_used(numbers.dampening) else optax.identity(), rule)


def tunable_optimizer(recipe: Recipe, steps_per_epoch: int) -> optax.GradientTransformation:
    """Return the same rule with its numbers in its state, so that one program serves runs that differ in them.

    Those that are not used stay out: a rule without momentum, say, has no buffers.
    """

    def rule(
        learning_rate: Number, weight_decay: Number, momentum: Number, dampening: Number, epsilon: Number
    ) -> optax.GradientTransformation:
        numbers = Numbers(learning_rate, weight_decay, momentum, dampening, epsilon)
        return optimizer(recipe, steps_per_epoch, numbers)

    numbers = numbers_of(recipe.optimizer)._asdict()
    return optax.inject_hyperparams(rule, static_args=[name for name in numbers if not is_used(numbers[name])])(
        **numbers
    )


def initial_state(optimizer: optax.GradientTransformation, recipe: Recipe, params: dict) -> optax.OptState:
    """Return what the optimiser's `init` gives for `params`, as NumPy arrays: zeros (S6), and a tunable rule's numbers.

    `init` itself would have JAX compile a small program for every shape.
    """
    shapes = jax.eval_shape(optimizer.init, params)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    if not hasattr(state, "hyperparams"):
        return state
    numbers = numbers_of(recipe.optimizer)._asdict()
    given = {name: np.asarray(numbers[name], leaf.dtype) for name, leaf in state.hyperparams.items()}
    return state._replace(hyperparams=given)


def is_used(number: Number) -> bool:
    """Return whether a number is there and not 0; a traced one is."""
    return isinstance(number, jax.Array) or bool(number)


def learning_rate(recipe: Recipe, steps_per_epoch: int, rate: Number = None) -> Number | optax.Schedule:
    """Return the learning rate, from the recipe's or the given `rate`: a number, or a function of the step (from 0)
    that changes between epochs only."""
    rate = recipe.optimizer.learning_rate if rate is None else rate
    schedule = recipe.schedule
    if schedule.name == "constant":
        return rate

    # Epochs are counted in integers, which XLA divides exactly, then made the default float: float64 in a float64 run.
    def elapsed(step: jax.Array, steps: int) -> jax.Array:
        return jnp.asarray(step // steps, jnp.result_type(float))

    if schedule.name == "step":
        return lambda step: rate * schedule.gamma ** elapsed(step, steps_per_epoch * schedule.step_epochs)
    of_epoch = optax.cosine_decay_schedule(rate, recipe.epochs, alpha=schedule.final_learning_rate / rate)
    return lambda step: of_epoch(elapsed(step, steps_per_epoch))


def _dampen(dampening: Number) -> optax.GradientTransformation:
    """Scale every gradient but the first by 1 - dampening: torch's first buffer is undamped."""

    def update(grads: object, state: Updates, params: object = None) -> tuple[object, Updates]:
        factor = jnp.where(state.count == 0, 1.0, 1.0 - dampening)
        damped = jax.tree.map(lambda grad: jnp.asarray(factor, grad.dtype) * grad, grads)
        return damped, Updates(optax.safe_increment(state.count))

    return optax.GradientTransformation(lambda params: Updates(jnp.zeros((), jnp.int32)), update)

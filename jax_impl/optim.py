"""The update rules and schedules, in optax, equal to torch's (S6)."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import optax

from spec.recipe import Recipe

NUMBERS = ("learning_rate", "weight_decay", "momentum", "dampening", "epsilon")


def optimizer(recipe: Recipe, steps_per_epoch: int) -> optax.GradientTransformation:
    """Return the recipe's update rule.

    SGD, with g' = g + wd p: b_1 = g'_1; b_t = mu b_{t-1} + (1 - d) g'_t; p -= lr_t (g'_t + mu b_t, or b_t if not
    nesterov).
    Adam: Kingma and Ba, arXiv 1412.6980, with the same coupled decay. lr_t is constant within an epoch.
    """
    options = recipe.optimizer
    rate = learning_rate(recipe, steps_per_epoch)
    decay = optax.identity() if _zero(options.weight_decay) else optax.add_decayed_weights(options.weight_decay)
    if options.name == "adam":
        first, second = options.betas
        return optax.chain(decay, optax.adam(rate, b1=first, b2=second, eps=options.epsilon))
    momentum = None if _zero(options.momentum) else options.momentum
    dampen = optax.identity() if _zero(options.dampening) else _dampen(options.dampening)
    return optax.chain(decay, dampen, optax.sgd(rate, momentum=momentum, nesterov=bool(options.nesterov)))


def tunable_optimizer(recipe: Recipe, steps_per_epoch: int) -> optax.GradientTransformation:
    """Return the same rule with its `NUMBERS` in its state, so that one program serves runs that differ in them.

    Those that are 0 stay out: a rule without momentum, say, has no buffers.
    """

    def rule(learning_rate, weight_decay, momentum, dampening, epsilon):
        numbers = dict(zip(NUMBERS, (learning_rate, weight_decay, momentum, dampening, epsilon), strict=True))
        return optimizer(replace(recipe, optimizer=replace(recipe.optimizer, **numbers)), steps_per_epoch)

    numbers = {name: getattr(recipe.optimizer, name) for name in NUMBERS}
    return optax.inject_hyperparams(rule, static_args=[name for name in NUMBERS if _zero(numbers[name])])(**numbers)


def learning_rate(recipe: Recipe, steps_per_epoch: int) -> float | optax.Schedule:
    """Return the learning rate: a number, or a function of the step (from 0) that changes between epochs only."""
    rate, schedule = recipe.optimizer.learning_rate, recipe.schedule
    if schedule.name == "constant":
        return rate

    # Epochs are counted in integers, which XLA divides exactly, then made the default float: float64 in a float64 run.
    def elapsed(step: jax.Array, steps: int) -> jax.Array:
        return jnp.asarray(step // steps, jnp.result_type(float))

    if schedule.name == "step":
        return lambda step: rate * schedule.gamma ** elapsed(step, steps_per_epoch * schedule.step_epochs)
    of_epoch = optax.cosine_decay_schedule(rate, recipe.epochs, alpha=schedule.final_learning_rate / rate)
    return lambda step: of_epoch(elapsed(step, steps_per_epoch))


def _zero(number: float | jax.Array | None) -> bool:
    """Return whether a number is 0 or not given; a traced one is neither."""
    return not isinstance(number, jax.Array) and not number


def _dampen(dampening: float) -> optax.GradientTransformation:
    """Scale every gradient but the first by 1 - dampening: torch's first buffer is undamped."""

    def factor(step: jax.Array) -> jax.Array:
        return jnp.where(step == 0, 1.0, 1.0 - dampening)

    return optax.scale_by_schedule(factor)

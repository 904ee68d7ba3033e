"""An epoch as one compiled program over data that stays on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from jax_impl.parallel import WHOLE, Part
from jax_impl.step import EvalStep, ExampleMetrics, StepMetrics, TrainState, TrainStep, all_finite
from spec.batches import Counts


class DeviceSplit(NamedTuple):
    """A split on the device: inputs [n, ...], float32 or the bytes that a data set holds; labels [n] int32; and for
    bytes the value of each, float32 [256], as the host computed it (S1)."""

    inputs: Float[Array, "examples ..."] | UInt8[Array, "examples ..."]
    labels: Int[Array, " examples"]
    table: Float[Array, " bytes"] | None = None

    def images(self, inputs: jax.Array) -> jax.Array:
        """Return the values of some of the `inputs`, float32."""
        return inputs if self.table is None else self.table[inputs]


class Span(NamedTuple):
    """The steps [start, stop) of an epoch (from 1): int32, whatever the precision in force."""

    epoch: np.int32
    start: np.int32
    stop: np.int32


RunSteps = Callable[[TrainState, DeviceSplit, jax.Array, Span, jax.Array], tuple[TrainState, StepMetrics, jax.Array]]
Evaluate = Callable[[TrainState, DeviceSplit], ExampleMetrics]


def make_run_steps(
    train_step: TrainStep, counts: Counts, part_of: Callable[[int], Part] = lambda size: WHOLE
) -> RunSteps:
    """Return the function (state, split, order [n] int32, span, seed uint32) -> (state, metrics [steps_per_epoch],
    whether every number of the state is finite after the last step, bool).

    It runs any span of an epoch's steps: the whole epoch in one call, or a part for a progress line, with the same
    values. Batch i holds examples order[i B : (i+1) B]; a short last batch is a step of its own size (S2). Metrics
    outside the span are 0. Step k of epoch e drops units by the key fold(fold(seed, e), k). `part_of` says how a batch
    of a size is divided.
    """
    full = counts.full_steps * counts.batch_size

    def run_steps(
        state: TrainState, split: DeviceSplit, order: Int[Array, " examples"], span: Span, seed: UInt32[Array, ""]
    ) -> tuple[TrainState, StepMetrics, Bool[Array, ""]]:
        epoch_key = jax.random.fold_in(jax.random.key(seed), span.epoch)
        batches = order[:full].reshape(counts.full_steps, counts.batch_size)

        def step_on(step: jax.Array, batch: jax.Array, carry: tuple[TrainState, StepMetrics]):
            state, collected = carry
            key = jax.random.fold_in(epoch_key, step)
            part = part_of(len(batch))
            rows = part.rows(batch)
            state, metrics = train_step(state, split.images(split.inputs[rows]), split.labels[rows], key, part=part)
            return state, jax.tree.map(lambda all_, one: all_.at[step].set(one), collected, metrics)

        carry = (state, _no_metrics(train_step, state, split, counts))
        carry = lax.fori_loop(
            span.start,
            jnp.minimum(span.stop, counts.full_steps),
            lambda step, carry: step_on(step, batches[step], carry),
            carry,
        )
        if counts.short_batch_size:
            last = order[full : full + counts.short_batch_size]
            carry = lax.cond(
                span.stop == counts.steps_per_epoch,
                lambda carry: step_on(jnp.int32(counts.full_steps), last, carry),
                lambda carry: carry,
                carry,
            )
        return *carry, all_finite(carry[0])

    return run_steps


def make_evaluate(
    eval_step: EvalStep, num_examples: int, batch_size: int, part_of: Callable[[int], Part] = lambda size: WHOLE
) -> Evaluate:
    """Return the function (state, split) -> metrics [num_examples]: every example once, none dropped (S8).

    `part_of` says how a batch of a size is divided.
    """
    num_batches = num_examples // batch_size
    full = num_batches * batch_size

    def evaluate(state: TrainState, split: DeviceSplit) -> ExampleMetrics:
        def of_batch(start: jax.Array, size: int = batch_size) -> ExampleMetrics:
            part = part_of(size)
            inputs, labels = (part.rows(lax.dynamic_slice_in_dim(array, start, size)) for array in split[:2])
            return jax.tree.map(part.gathered, eval_step(state, split.images(inputs), labels))

        parts = []
        if num_batches:
            stacked = lax.map(of_batch, jnp.arange(num_batches, dtype=jnp.int32) * batch_size)
            parts.append(jax.tree.map(lambda array: array.reshape(full), stacked))
        if full < num_examples:
            parts.append(of_batch(jnp.int32(full), num_examples - full))
        return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)

    return evaluate


def _no_metrics(train_step: TrainStep, state: TrainState, split: DeviceSplit, counts: Counts) -> StepMetrics:
    """Return zeros [steps_per_epoch] of the dtypes that a step's metrics have."""
    inputs, labels = (array[: counts.batch_size] for array in split[:2])
    _, metrics = jax.eval_shape(train_step, state, split.images(inputs), labels, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.zeros(counts.steps_per_epoch, leaf.dtype), metrics)

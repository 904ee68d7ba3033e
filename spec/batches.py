"""The order of the examples and the number of steps (S2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spec.errors import RecipeError
from spec.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many examples and steps a run has.

    `full_steps` batches of `batch_size` make an epoch, and one of `short_batch_size` follows unless that is 0.
    """

    num_examples: int
    batch_size: int
    full_steps: int
    short_batch_size: int
    epochs: int

    @property
    def steps_per_epoch(self) -> int:
        """Return the steps of an epoch, a short last one included."""
        return self.full_steps + (self.short_batch_size > 0)

    @property
    def examples_per_epoch(self) -> int:
        """Return the examples an epoch trains on."""
        return self.full_steps * self.batch_size + self.short_batch_size

    @property
    def steps(self) -> int:
        """Return the steps of the whole run."""
        return self.steps_per_epoch * self.epochs

    @property
    def examples_seen(self) -> int:
        """Return the examples the whole run trains on, each as often as it is seen."""
        return self.examples_per_epoch * self.epochs

    def batch_sizes(self) -> np.ndarray:
        """Return the size of each batch of an epoch, int64 [steps_per_epoch]."""
        sizes = np.full(self.steps_per_epoch, self.batch_size)
        if self.short_batch_size:
            sizes[-1] = self.short_batch_size
        return sizes


def count(recipe: Recipe, num_examples: int) -> Counts:
    """Return the counts of a run of `recipe` over `num_examples`: floor(n/B) steps, or ceil(n/B) keeping the last.

    Raises RecipeError for a batch larger than the data, and for a last batch that BatchNorm cannot normalise (S7).
    """
    if recipe.batch_size > num_examples:
        raise RecipeError(
            f"batch_size {recipe.batch_size} is larger than the training split of {num_examples} examples; "
            f"use batch_size {num_examples} or less"
        )
    full_steps, rest = divmod(num_examples, recipe.batch_size)
    short = rest if recipe.last_batch == "keep" else 0
    smallest = min(recipe.batch_size, short or recipe.batch_size)
    if smallest == 1 and recipe.model.has_batchnorm:
        raise RecipeError(
            f"batch_size {recipe.batch_size} leaves a batch of one example, whose variance BatchNorm cannot take; "
            "use another batch_size, or last_batch drop"
        )
    return Counts(
        num_examples=num_examples,
        batch_size=recipe.batch_size,
        full_steps=full_steps,
        short_batch_size=short,
        epochs=recipe.epochs,
    )


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """Return the order of `epoch` (from 1): int64 [num_examples], `default_rng([seed, epoch]).permutation(n)`.

    >>> epoch_order(0, 1, 5).tolist()
    [1, 4, 3, 0, 2]
    """
    return np.random.default_rng([seed, epoch]).permutation(num_examples)

"""A trained state at work: the evaluation of a split."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from spec.datasets import Dataset
from spec.recipe import Recipe
from torch_ref.convert import load_state
from torch_ref.trainer import Trainer


def evaluate(
    recipe: Recipe, dataset: Dataset, state: Mapping[str, np.ndarray], device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss [n] in nats and the predicted class [n] of each example of the raw test split."""
    trainer = Trainer(recipe, dataset, device)
    load_state(trainer.network, state)
    return trainer.evaluate()

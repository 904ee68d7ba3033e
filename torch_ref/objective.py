"""The losses, one value an example, and the predicted class (S4, S8)."""

from __future__ import annotations

import torch
from torch.nn import functional

from spec.recipe import Loss


def example_losses(logits: torch.Tensor, labels: torch.Tensor, loss: Loss) -> torch.Tensor:
    """Return the loss of each example, [batch], in nats, for `logits` [batch, outputs] and `labels` [batch] int64."""
    if loss.name == "binary_cross_entropy":
        return functional.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), reduction="none")
    if loss.name == "cross_entropy_of_softmax":
        logits = logits.softmax(dim=1)
    return functional.cross_entropy(logits, labels, reduction="none", label_smoothing=loss.label_smoothing)


def predictions(logits: torch.Tensor) -> torch.Tensor:
    """Return the most probable class of each example, int64 [batch]; one logit: is it over 0."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(dim=1)

"""One step of training, one batch of evaluation."""

from __future__ import annotations

import torch
from torch import nn, optim

from spec.recipe import Loss
from torch_ref.objective import example_losses, predictions


def gradients(network: nn.Module, images: torch.Tensor, labels: torch.Tensor, loss: Loss) -> tuple[float, int]:
    """Leave the gradient of the batch's objective in each parameter's `grad`, and update the running statistics.

    Returns the mean loss in nats and the count of right answers, on this forward pass (S8).
    """
    network.train()
    network.zero_grad()
    logits = network(images)
    losses = example_losses(_at_least_float32(logits), labels, loss)
    objective = losses.sum() if loss.reduction == "sum" else losses.mean()
    objective.backward()
    return losses.detach().mean().item(), (predictions(logits) == labels).sum().item()


def train_step(
    network: nn.Module, optimizer: optim.Optimizer, images: torch.Tensor, labels: torch.Tensor, loss: Loss
) -> tuple[float, int]:
    """Update `network` by one batch; return its mean loss in nats and its count of right answers before the update."""
    metrics = gradients(network, images, labels, loss)
    optimizer.step()
    return metrics


@torch.no_grad()
def eval_step(
    network: nn.Module, images: torch.Tensor, labels: torch.Tensor, loss: Loss
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss [batch] in nats and the predicted class [batch] of each example, in evaluation mode."""
    network.eval()
    logits = network(images)
    return example_losses(_at_least_float32(logits), labels, loss), predictions(logits)


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))

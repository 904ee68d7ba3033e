"""The update rules and schedules, torch's own (S6)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn, optim
from torch.optim import lr_scheduler

from spec.recipe import Recipe


def optimizer(recipe: Recipe, parameters: Iterable[nn.Parameter]) -> optim.Optimizer:
    """Return the recipe's update rule over `parameters`."""
    options = recipe.optimizer
    common = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    if options.name == "adam":
        return optim.Adam(parameters, betas=options.betas, eps=options.epsilon, **common)
    return optim.SGD(
        parameters, momentum=options.momentum, dampening=options.dampening, nesterov=options.nesterov, **common
    )


def scheduler(recipe: Recipe, optimizer: optim.Optimizer) -> lr_scheduler.LRScheduler:
    """Return the recipe's schedule; its `step` comes at the end of each epoch."""
    schedule = recipe.schedule
    if schedule.name == "step":
        return lr_scheduler.StepLR(optimizer, schedule.step_epochs, schedule.gamma)
    if schedule.name == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs, schedule.final_learning_rate)
    return lr_scheduler.ConstantLR(optimizer, factor=1.0)

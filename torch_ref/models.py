"""The lessons' networks as `nn.Sequential`s, their layers under the canonical names of `spec.params`."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import nn

from spec.params import KERNEL_SIZE
from spec.recipe import Model

ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


class OneChannelNorm(nn.BatchNorm1d):
    """BatchNorm over everything in the batch as one channel: one mean, one variance; returns [batch, features]."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` [batch, ...] normalised and flattened."""
        return super().forward(x.flatten(1)[:, None])[:, 0]


def network(model: Model, input_shape: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Return the network for examples of `input_shape` ([features] or [height, width, channels]).

    It takes [batch, features] or [batch, channels, height, width] and returns logits [batch, outputs]. Weights are as
    torch draws them.
    """
    layers = _cnn if model.name == "cnn" else _mlp
    return nn.Sequential(OrderedDict(layers(model, input_shape, outputs)))


def _mlp(model: Model, input_shape: tuple[int, ...], outputs: int) -> Iterator[tuple[str, nn.Module]]:
    if model.input_batchnorm:
        yield "norm0", OneChannelNorm()
    yield "flatten", nn.Flatten()
    sizes = (math.prod(input_shape), *model.hidden_sizes)
    for index, (inputs, units) in enumerate(itertools.pairwise(sizes), start=1):
        yield f"linear{index}", nn.Linear(inputs, units, bias=model.bias)
        kind = model.activations[index - 1]
        yield f"{kind}{index}", ACTIVATIONS[kind]()
    yield f"linear{len(sizes)}", nn.Linear(sizes[-1], outputs, bias=model.bias)


def _cnn(model: Model, input_shape: tuple[int, ...], outputs: int) -> Iterator[tuple[str, nn.Module]]:
    height, width, channels = input_shape
    convs = len(model.channels)
    for index, (inputs, units) in enumerate(itertools.pairwise((channels, *model.channels)), start=1):
        yield f"conv{index}", nn.Conv2d(inputs, units, KERNEL_SIZE, padding=KERNEL_SIZE // 2)
        yield f"norm{index}", nn.BatchNorm2d(units)
        yield f"relu{index}", nn.ReLU()
        yield f"pool{index}", nn.MaxPool2d(2)
    yield "flatten", nn.Flatten()
    sizes = ((height >> convs) * (width >> convs) * model.channels[-1], *model.hidden_sizes)
    for index, (inputs, units) in enumerate(itertools.pairwise(sizes), start=1):
        yield f"linear{index}", nn.Linear(inputs, units)
        yield f"norm{convs + index}", nn.BatchNorm1d(units)
        yield f"relu{convs + index}", nn.ReLU()
        yield f"dropout{index}", nn.Dropout(model.dropout)
    yield f"linear{len(sizes)}", nn.Linear(sizes[-1], outputs)

"""The lessons' networks as Flax NNX modules, their layers under the canonical names of `spec.params`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
from flax import nnx
from jaxtyping import Array, Float, Key

from jax_impl.layers import ACTIVATIONS, BatchNorm, Dropout, conv_general_dilated, max_pool_2x2
from jax_impl.parallel import WHOLE, Part
from spec.params import KERNEL_SIZE
from spec.recipe import Model

Hooks = Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]]
"""For some layers, by name, what torch calls a forward hook: a function of the layer's input x and output y to what the
network goes on with. Comparisons read activations through it, and hand over dropout masks and gates (S9)."""

NO_HOOKS: Hooks = MappingProxyType({})


def hooked(hooks: Hooks, name: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the output `y` of the layer `name`, or what its hook makes of it and the input `x`."""
    return hooks[name](x, y) if name in hooks else y


class MLP(nnx.Module):
    """Linear layers with an activation after each but the last; with no hidden layer, softmax regression.

    `linear1`, `linear2`, ..., and the activations `relu1`, `sigmoid2`, ... by their kind; `norm0` normalises the inputs
    as one channel first, if the recipe says so.
    """

    def __init__(self, model: Model, input_shape: tuple[int, ...], outputs: int, *, rngs: nnx.Rngs) -> None:
        if model.input_batchnorm:
            self.norm0 = _batchnorm(model, 1)
        self.activations = model.activations
        self.input_batchnorm = model.input_batchnorm
        sizes = (math.prod(input_shape), *model.hidden_sizes, outputs)
        for index, (inputs, units) in enumerate(itertools.pairwise(sizes), start=1):
            setattr(self, f"linear{index}", nnx.Linear(inputs, units, use_bias=bool(model.bias), rngs=rngs))

    def __call__(
        self,
        images: Float[Array, "batch ..."],
        *,
        train: bool,
        dropout_key: Key[Array, ""] | None = None,
        hooks: Hooks = NO_HOOKS,
        part: Part = WHOLE,
    ) -> Float[Array, "batch outputs"]:
        """Return logits [batch, outputs] for `images` [batch, ...], which are that part of a batch; `dropout_key` is
        not used."""
        if self.input_batchnorm:
            images = hooked(hooks, "norm0", images, self.norm0(images[..., None], train=train, part=part)[..., 0])
        hidden = images.reshape(images.shape[0], -1)
        for index, activation in enumerate(self.activations, start=1):
            hidden = self._linear(index, hidden, hooks)
            hidden = hooked(hooks, f"{activation}{index}", hidden, ACTIVATIONS[activation](hidden))
        return self._linear(len(self.activations) + 1, hidden, hooks)

    def _linear(self, index: int, x: jax.Array, hooks: Hooks) -> jax.Array:
        return hooked(hooks, f"linear{index}", x, getattr(self, f"linear{index}")(x))


class CNN(nnx.Module):
    """Blocks of 3x3 convolution, BatchNorm, relu, 2x2 max-pool; of linear, BatchNorm, relu, dropout; then linear.

    `conv1`, `norm1`, `relu1`, `pool1`, ..., then `linear1` with the next norm and relu and `dropout1`, and so on.
    Convolutions pad by 1 (written out, S3).
    """

    def __init__(self, model: Model, input_shape: tuple[int, ...], outputs: int, *, rngs: nnx.Rngs) -> None:
        height, width, inputs = input_shape
        self.num_convs, self.num_hidden = len(model.channels), len(model.hidden_sizes)
        for index, channels in enumerate(model.channels, start=1):
            setattr(self, f"conv{index}", _conv3x3(inputs, channels, rngs=rngs))
            setattr(self, f"norm{index}", _batchnorm(model, channels))
            height, width, inputs = height // 2, width // 2, channels
        sizes = (height * width * inputs, *model.hidden_sizes, outputs)
        for index, (ins, units) in enumerate(itertools.pairwise(sizes), start=1):
            setattr(self, f"linear{index}", nnx.Linear(ins, units, rngs=rngs))
        for index, units in enumerate(model.hidden_sizes, start=self.num_convs + 1):
            setattr(self, f"norm{index}", _batchnorm(model, units))
        self.dropout = Dropout(model.dropout)

    def __call__(
        self,
        images: Float[Array, "batch ..."],
        *,
        train: bool,
        dropout_key: Key[Array, ""] | None = None,
        hooks: Hooks = NO_HOOKS,
        part: Part = WHOLE,
    ) -> Float[Array, "batch outputs"]:
        """Return logits [batch, outputs] for `images` [batch, h, w, channels], which are that part of a batch; training
        needs `dropout_key`."""
        hidden = images
        for index in range(1, self.num_convs + 1):
            hidden = self._pooled(index, hidden, train, hooks, part)
        hidden = hidden.reshape(hidden.shape[0], -1)
        rngs = nnx.Rngs(dropout=dropout_key) if train else None
        for index in range(1, self.num_hidden + 1):
            hidden = self._normalized(f"linear{index}", self.num_convs + index, hidden, train, hooks, part)
            dropped = self.dropout(hidden, key=rngs.dropout(), part=part) if rngs else hidden
            hidden = hooked(hooks, f"dropout{index}", hidden, dropped)
        last = f"linear{self.num_hidden + 1}"
        return hooked(hooks, last, hidden, getattr(self, last)(hidden))

    def _pooled(self, index: int, x: jax.Array, train: bool, hooks: Hooks, part: Part) -> jax.Array:
        """Return pool(relu(norm(conv(x)))), in one step where nobody looks between."""
        if not train or hooks.keys() & {f"norm{index}", f"relu{index}", f"pool{index}"}:
            hidden = self._normalized(f"conv{index}", index, x, train, hooks, part)
            return hooked(hooks, f"pool{index}", hidden, max_pool_2x2(hidden))
        weighted = hooked(hooks, f"conv{index}", x, getattr(self, f"conv{index}")(x))
        return getattr(self, f"norm{index}").relu_pool(weighted, part=part)

    def _normalized(self, name: str, index: int, x: jax.Array, train: bool, hooks: Hooks, part: Part) -> jax.Array:
        """Return relu(norm(layer(x))) for the layer `name` and the norm and relu of that index."""
        weighted = hooked(hooks, name, x, getattr(self, name)(x))
        norm = getattr(self, f"norm{index}")
        normalized = hooked(hooks, f"norm{index}", weighted, norm(weighted, train=train, part=part))
        return hooked(hooks, f"relu{index}", normalized, jax.nn.relu(normalized))


def _batchnorm(model: Model, num_features: int) -> BatchNorm:
    return BatchNorm(num_features, local=model.batchnorm_statistics == "local")


def _conv3x3(inputs: int, outputs: int, *, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        inputs,
        outputs,
        (KERNEL_SIZE, KERNEL_SIZE),
        padding=KERNEL_SIZE // 2,
        conv_general_dilated=conv_general_dilated,
        rngs=rngs,
    )


MODELS = {"mlp": MLP, "cnn": CNN}


def graph(model: Model, input_shape: tuple[int, ...], outputs: int) -> nnx.GraphDef:
    """Return the static part of the network: what `nnx.merge` joins with parameters and statistics. Draws nothing."""
    abstract = nnx.eval_shape(lambda: MODELS[model.name](model, input_shape, outputs, rngs=nnx.Rngs(0)))
    graphdef, _, _ = nnx.split(abstract, nnx.Param, nnx.BatchStat)
    return graphdef


def apply(
    graphdef: nnx.GraphDef,
    params: dict,
    batch_stats: dict,
    images: Float[Array, "batch ..."],
    *,
    train: bool,
    dropout_key: Key[Array, ""] | None = None,
    hooks: Hooks = NO_HOOKS,
    part: Part = WHOLE,
) -> tuple[Float[Array, "batch outputs"], dict]:
    """Return logits [batch, outputs] and the BatchNorm statistics after the call; a pure function of plain dicts."""
    model = nnx.merge(graphdef, params, batch_stats)
    logits = model(images, train=train, dropout_key=dropout_key, hooks=hooks, part=part)
    return logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

"""One Protocol, three adapters: the oracle, JAX and torch behind flat dicts of named NumPy arrays, canonical layouts.

An adapter holds one network and its optimiser between steps. Images go in as the data sets hold them, [batch, h, w, c]
or [batch, features]; activations, gradients and states come out in torch's layouts, as copies. Decisions are what a
relu (bool, the gate), a max-pool (int8, 0 to 3, the place in the window) and dropout (bool, the mask) chose. Given,
they take the place of the network's own, so that two networks are compared with rounding as the only difference.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jax_impl.convert
import jax_impl.models
import jax_impl.optim
import jax_impl.step
import torch_ref.convert
import torch_ref.data
import torch_ref.models
import torch_ref.optim
import torch_ref.step
from jax_impl.parallel import WHOLE, Placement
from jax_impl.programs import precision_scope
from spec import oracle, params
from spec.params import Leaf
from spec.recipe import Model, Recipe

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Network:
    """What is compared: a recipe, the shape of an example, the outputs, and the steps of an epoch (for schedules)."""

    recipe: Recipe
    input_shape: tuple[int, ...]
    outputs: int
    steps_per_epoch: int = 1_000_000

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """Return the leaves of the state."""
        return params.leaves(self.recipe.model, self.input_shape, self.outputs)

    def longest_sum(self, batch_size: int) -> int:
        """Return the terms of the longest sum in a step: a layer's inputs, or a batch's examples or pixels."""
        model = self.recipe.model
        places = math.prod(self.input_shape) if model.has_batchnorm else 1
        return max(batch_size * places, *(leaf.fan_in for leaf in self.leaves))

    @property
    def trained(self) -> tuple[str, ...]:
        """Return the names of the trained leaves."""
        return tuple(leaf.name for leaf in self.leaves if leaf.trained)


@dataclass(frozen=True, kw_only=True)
class Forward:
    """A forward pass: each layer's output by name, the running statistics after it, and what was decided."""

    activations: Arrays
    batch_stats: Arrays
    decisions: Arrays

    @property
    def logits(self) -> np.ndarray:
        """Return the last activation, [batch, outputs]."""
        return list(self.activations.values())[-1]


class Adapter(Protocol):
    """One implementation's network and optimiser; starts at the specified initial state."""

    name: str
    network: Network

    def load(self, state: Mapping[str, np.ndarray], opt_state: Mapping[str, np.ndarray]) -> None:
        """Take over both states; StateError lists every missing, extra, misshapen and non-finite leaf."""

    def state(self) -> Arrays:
        """Return parameters and running statistics."""

    def opt_state(self) -> Arrays:
        """Return the optimiser's buffers and `step`, the updates made so far."""

    def forward(self, images: np.ndarray, *, train: bool, decisions: Mapping[str, np.ndarray] | None = None) -> Forward:
        """Return a forward pass; the network stays as it is."""

    def gradients(
        self, images: np.ndarray, labels: np.ndarray, *, decisions: Mapping[str, np.ndarray] | None = None
    ) -> Arrays:
        """Return the gradient of the batch's objective by every trained leaf; the network stays as it is."""

    def step(
        self, images: np.ndarray, labels: np.ndarray, *, decisions: Mapping[str, np.ndarray] | None = None
    ) -> tuple[float, int]:
        """Make one update; return mean loss in nats and right answers of the forward pass before it."""

    def evaluate(self, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the loss and the predicted class of each example, in evaluation mode."""


class OracleAdapter:
    """The specification itself, float64 whatever the recipe says; `last_activations` are those of the last step.

    With `oracle.PlainSums` it says how far rounding moves the truth.
    """

    name = "oracle"

    def __init__(self, network: Network, sums: oracle.Sums = oracle.FLOAT64) -> None:
        self.network = network
        self._sums = sums
        self.last_activations: Arrays = {}
        recipe = network.recipe
        state = params.initial_state(network.leaves, recipe.init, recipe.seed)
        trained = {name: state[name] for name in network.trained}
        self.load(state, oracle.initial_opt_state(recipe.optimizer, trained))

    def load(self, state, opt_state) -> None:
        _check(self.network, state, opt_state)
        self._state = {name: np.array(array, np.float64) for name, array in state.items()}
        self._opt_state = {name: np.array(array) for name, array in opt_state.items()}

    def state(self) -> Arrays:
        return {name: array.copy() for name, array in self._state.items()}

    def opt_state(self) -> Arrays:
        return {name: array.copy() for name, array in self._opt_state.items()}

    def forward(self, images, *, train, decisions=None) -> Forward:
        passed = self._passed(images, train=train, decisions=decisions)
        activations = _flat_norm0(passed.activations)
        return Forward(activations=activations, batch_stats=passed.batch_stats, decisions=passed.decisions)

    def gradients(self, images, labels, *, decisions=None) -> Arrays:
        passed = self._passed(images, train=True, decisions=decisions)
        return oracle.backward(passed, oracle.loss_gradient(passed.logits, labels, self.network.recipe.loss))

    def step(self, images, labels, *, decisions=None) -> tuple[float, int]:
        epoch = int(self._opt_state["step"]) // self.network.steps_per_epoch + 1
        passed = self._passed(images, train=True, decisions=decisions)
        self.last_activations = passed.activations
        self._state, self._opt_state, loss, num_correct = oracle.train_step(
            self.network.recipe, self._state, self._opt_state, passed, labels, epoch=epoch
        )
        return loss, num_correct

    def _passed(self, images, *, train, decisions) -> oracle.Forward:
        model = self.network.recipe.model
        return oracle.forward(model, self._state, images, train=train, decisions=decisions, sums=self._sums)

    def evaluate(self, images, labels) -> tuple[np.ndarray, np.ndarray]:
        logits = self.forward(images, train=False).logits
        return oracle.example_losses(logits, labels, self.network.recipe.loss), oracle.predictions(logits)


class JaxAdapter:
    """`jax_impl`'s models, step and optimiser, each call one compiled program on the CPU."""

    name = "jax"

    def __init__(self, network: Network) -> None:
        self.network = network
        recipe = network.recipe
        self._dtype = jnp.dtype(recipe.precision)
        self._device = jax.devices("cpu")[0]
        self._graph = jax_impl.models.graph(recipe.model, network.input_shape, network.outputs)
        self._optimizer = jax_impl.optim.optimizer(recipe, network.steps_per_epoch)
        gradients = jax_impl.step.make_gradients(self._graph, recipe.loss, self._dtype)
        train_step = jax_impl.step.make_train_step(gradients, self._optimizer)
        rate = recipe.model.dropout or 0.0

        def gradients_of(state, batch, key, decisions, part):
            return gradients(*state, *batch, key, hooks=_jax_hooks(decisions, rate), part=part)

        def step_of(state, batch, key, decisions, part):
            return train_step(state, *batch, key, hooks=_jax_hooks(decisions, rate), part=part)

        self._gradients, self._train_step = self._program(gradients_of), self._program(step_of)
        self._eval_step = jax.jit(jax_impl.step.make_eval_step(self._graph, recipe.loss, self._dtype))
        self._forward = {
            train: self._program(functools.partial(self._traced_forward, train=train)) for train in (True, False)
        }
        with self._scope():
            state = params.initial_state(network.leaves, recipe.init, recipe.seed)
            trained, batch_stats = self._to_flax(state)
            self._state = jax_impl.step.TrainState(trained, batch_stats, self._optimizer.init(trained))
        self._step = 0

    def load(self, state, opt_state) -> None:
        _check(self.network, state, opt_state)
        with self._scope():
            trained, batch_stats = self._to_flax(state)
            restored = jax_impl.convert.optimizer_from_canonical(
                self._optimizer.init(trained), opt_state, self.network.leaves, dtype=self._dtype, device=self._device
            )
        self._state = jax_impl.step.TrainState(trained, batch_stats, restored)
        self._step = int(opt_state["step"])

    def state(self) -> Arrays:
        return jax_impl.convert.to_canonical(self._state.params, self._state.batch_stats, self.network.leaves)

    def opt_state(self) -> Arrays:
        return jax_impl.convert.optimizer_to_canonical(self._state.opt_state, self.network.leaves, self._step)

    def forward(self, images, *, train, decisions=None) -> Forward:
        with self._scope():
            recorded, batch_stats = self._forward[train](
                self._state[:2], (self._images(images),), self._key(), _to_nhwc(decisions)
            )
            # A compiled program gives dicts back sorted by key, so the layers' order comes from the specification.
            activations, decided = (
                {name: _to_nchw(part[name]) for name in oracle.layer_names(self.network.recipe.model) if name in part}
                for part in recorded
            )
        running = [leaf for leaf in self.network.leaves if not leaf.trained]
        return Forward(
            activations=_flat_norm0(activations),
            batch_stats=jax_impl.convert.to_canonical({}, batch_stats, running),
            decisions=decided,
        )

    def gradients(self, images, labels, *, decisions=None) -> Arrays:
        with self._scope():
            grads, _ = self._gradients(self._state[:2], self._batch(images, labels), self._key(), _to_nhwc(decisions))
        trained = [leaf for leaf in self.network.leaves if leaf.trained]
        return jax_impl.convert.to_canonical(grads, {}, trained)

    def step(self, images, labels, *, decisions=None) -> tuple[float, int]:
        with self._scope():
            self._state, metrics = self._train_step(
                self._state, self._batch(images, labels), self._key(), _to_nhwc(decisions)
            )
        self._step += 1
        return float(metrics.loss), int(metrics.num_correct)

    def evaluate(self, images, labels) -> tuple[np.ndarray, np.ndarray]:
        with self._scope():
            metrics = self._eval_step(self._state, *self._batch(images, labels))
        return np.array(metrics.loss), np.array(metrics.prediction)

    def _program(self, function: Callable) -> Callable:
        """Return what runs `function` of (state, batch, key, decisions, part)."""
        return jax.jit(functools.partial(function, part=WHOLE))

    def _traced_forward(self, state, batch, key, decisions, part, *, train: bool):
        recorded: tuple[dict, dict] = ({}, {})
        hooks = _recording_hooks(self.network.recipe.model, decisions, train, recorded)
        _, batch_stats = jax_impl.models.apply(
            self._graph, *state, *batch, train=train, dropout_key=key, hooks=hooks, part=part
        )
        activations, decided = recorded
        decided = {name: array for name, array in decided.items() if array is not None}
        return jax.tree.map(part.gathered, (activations, decided)), batch_stats

    def _scope(self):
        return precision_scope(self.network.recipe.precision)

    def _to_flax(self, state: Mapping[str, np.ndarray]) -> tuple[dict, dict]:
        return jax_impl.convert.from_canonical(state, self.network.leaves, dtype=self._dtype, device=self._device)

    def _images(self, images: np.ndarray) -> jax.Array:
        return jnp.array(images, self._dtype)

    def _key(self) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.network.recipe.seed), self._step)

    def _batch(self, images: np.ndarray, labels: np.ndarray) -> tuple[jax.Array, jax.Array]:
        return self._images(images), jnp.array(labels, jnp.int32)


class DevicesAdapter(JaxAdapter):
    """`jax_impl`'s step on several devices, as `placement` divides a batch."""

    def __init__(self, network: Network, placement: Placement) -> None:
        self._placement = placement
        super().__init__(network)
        self._device = placement.replicated

    def _program(self, function: Callable) -> Callable:
        programs: dict[str, Callable] = {}

        def divided(state, batch, key, decisions):
            part = self._placement.part(len(batch[0]))
            rows = functools.partial(jax.tree.map, part.rows)
            return function(state, rows(batch), key, rows(decisions), part)

        def run(*given):
            given = self._placement.put(given)
            shapes = jax.tree.map(jnp.shape, given)
            if str(shapes) not in programs:
                programs[str(shapes)] = self._placement.compiled(divided, *given)
            return programs[str(shapes)](*given)

        return run


class TorchAdapter:
    """`torch_ref`'s network, step and optimiser, watched and led by torch's own forward hooks."""

    name = "torch"

    def __init__(self, network: Network) -> None:
        self.network = network
        recipe = network.recipe
        self._dtype = torch.float64 if recipe.precision == "float64" else torch.float32
        self.module = torch_ref.models.network(recipe.model, network.input_shape, network.outputs).to(self._dtype)
        torch_ref.convert.load_state(self.module, params.initial_state(network.leaves, recipe.init, recipe.seed))
        self.last_decisions: Arrays = {}
        self._start(0)

    def load(self, state, opt_state) -> None:
        _check(self.network, state, opt_state)
        torch_ref.convert.load_state(self.module, state)
        self._start(int(opt_state["step"]))
        torch_ref.convert.load_optimizer(self._optimizer, self.module, opt_state)

    def state(self) -> Arrays:
        return torch_ref.convert.state(self.module)

    def opt_state(self) -> Arrays:
        return torch_ref.convert.optimizer_state(self._optimizer, self.module, self._step)

    def forward(self, images, *, train, decisions=None) -> Forward:
        activations: Arrays = {}
        decided: Arrays = {}
        with self._untouched(), self._hooked(decisions, activations, decided), torch.no_grad():
            self.module.train(train)
            self.module(self._images(images))
            running = [leaf.name for leaf in self.network.leaves if not leaf.trained]
            batch_stats = {name: array for name, array in self.state().items() if name in running}
        return Forward(activations=activations, batch_stats=batch_stats, decisions=decided)

    def gradients(self, images, labels, *, decisions=None) -> Arrays:
        with self._untouched(), self._hooked(decisions, None, None):
            torch_ref.step.gradients(self.module, *self._batch(images, labels), self.network.recipe.loss)
        return {name: parameter.grad.numpy().copy() for name, parameter in self.module.named_parameters()}

    def step(self, images, labels, *, decisions=None) -> tuple[float, int]:
        """Make one update; `last_decisions` then holds what its forward pass decided."""
        decided: Arrays = {}
        with self._hooked(decisions, None, decided):
            metrics = torch_ref.step.train_step(
                self.module, self._optimizer, *self._batch(images, labels), self.network.recipe.loss
            )
        self.last_decisions = decided
        self._step += 1
        if self._step % self.network.steps_per_epoch == 0:
            self._scheduler.step()
        return metrics

    def evaluate(self, images, labels) -> tuple[np.ndarray, np.ndarray]:
        losses, predictions = torch_ref.step.eval_step(
            self.module, *self._batch(images, labels), self.network.recipe.loss
        )
        return losses.numpy(), predictions.numpy()

    def _start(self, step: int) -> None:
        recipe = self.network.recipe
        self._step = step
        self._optimizer = torch_ref.optim.optimizer(recipe, self.module.parameters())
        self._scheduler = torch_ref.optim.scheduler(recipe, self._optimizer)
        with warnings.catch_warnings():  # torch warns of a schedule that moves before the optimiser
            warnings.simplefilter("ignore", UserWarning)
            for _ in range(step // self.network.steps_per_epoch):
                self._scheduler.step()

    def _images(self, images: np.ndarray) -> torch.Tensor:
        return torch_ref.data.channels_first(torch.tensor(images, dtype=self._dtype))

    def _batch(self, images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return self._images(images), torch.tensor(labels, dtype=torch.int64)

    @contextmanager
    def _untouched(self):
        """Give the running statistics back what they held, whatever the body does to them."""
        before = self.state()
        try:
            yield
        finally:
            torch_ref.convert.load_state(self.module, before)

    @contextmanager
    def _hooked(self, given: Mapping[str, np.ndarray] | None, activations: Arrays | None, decided: Arrays | None):
        """Run the body with the `given` decisions in the lead, recording into the dicts there are."""
        tensors = {name: torch.tensor(array) for name, array in (given or {}).items()}
        with ExitStack() as stack:
            for name, layer in self.module.named_children():
                if name != "flatten":
                    hook = functools.partial(_torch_hook, name, tensors.get(name), activations, decided)
                    stack.callback(layer.register_forward_hook(hook).remove)
            yield


ADAPTERS: dict[str, Callable[[Network], Adapter]] = {
    "oracle": OracleAdapter,
    "jax": JaxAdapter,
    "torch": TorchAdapter,
}


def _check(network: Network, state: Mapping[str, np.ndarray], opt_state: Mapping[str, np.ndarray]) -> None:
    params.check_states(state, opt_state, network.leaves, network.recipe.optimizer)


def _flat_norm0(activations: Arrays) -> Arrays:
    """Return the activations with the normalised inputs as [batch, features]: they are flattened next."""
    return {name: array.reshape(len(array), -1) if name == "norm0" else array for name, array in activations.items()}


def _kind(name: str) -> str:
    return name.rstrip("0123456789")


def _jax_hooks(decisions: Mapping[str, jax.Array], rate: float) -> jax_impl.models.Hooks:
    """Return the hooks that let the given `decisions` lead; the other layers have none, as in training."""
    return {name: functools.partial(_decided, _kind(name), given, rate) for name, given in decisions.items()}


def _recording_hooks(
    model: Model, decisions: Mapping[str, jax.Array], train: bool, recorded: tuple[dict, dict]
) -> jax_impl.models.Hooks:
    """Return hooks that let the given `decisions` lead and record every layer's (activations, decisions)."""
    if not train:
        decisions = {name: given for name, given in decisions.items() if _kind(name) != "dropout"}
    leading = _jax_hooks(decisions, model.dropout or 0.0)
    activations, decided = recorded

    def record(name: str, x: jax.Array, y: jax.Array) -> jax.Array:
        activations[name] = leading[name](x, y) if name in leading else y
        decided[name] = decisions.get(name, _decision(_kind(name), x, y, train))
        return activations[name]

    return {name: functools.partial(record, name) for name in oracle.layer_names(model)}


def _decided(kind: str, given: jax.Array, rate: float, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return what a layer of that kind makes of `x` where its decision is given, channels last."""
    if kind == "relu":
        return jnp.where(given, x, 0)
    if kind == "pool":
        return jnp.take_along_axis(_jax_windows(x), given[..., None].astype(jnp.int32), -1)[..., 0]
    return jnp.where(given, x / (1 - rate), 0)


def _decision(kind: str, x: jax.Array, y: jax.Array, train: bool) -> jax.Array | None:
    """Return what a layer of that kind decided, None where it decides nothing."""
    if kind == "relu":
        return x > 0
    if kind == "pool":
        return _jax_windows(x).argmax(axis=-1).astype(jnp.int8)
    return y != 0 if kind == "dropout" and train else None


def _jax_windows(x: jax.Array) -> jax.Array:
    """Return the 2x2 windows of `x` [batch, h, w, c], row by row: [batch, h//2, w//2, c, 4]."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2].reshape(batch, height // 2, 2, width // 2, 2, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // 2, width // 2, channels, 4)


def _to_nhwc(decisions: Mapping[str, np.ndarray] | None) -> dict[str, jax.Array]:
    return {
        name: jnp.array(array.transpose(0, 2, 3, 1) if array.ndim == 4 else array)
        for name, array in (decisions or {}).items()
    }


def _to_nchw(array: jax.Array) -> np.ndarray:
    copy = np.array(array)
    return np.ascontiguousarray(copy.transpose(0, 3, 1, 2)) if copy.ndim == 4 else copy


def _torch_hook(
    name: str,
    given: torch.Tensor | None,
    activations: Arrays | None,
    decided: Arrays | None,
    layer: torch.nn.Module,
    inputs: tuple[torch.Tensor],
    output: torch.Tensor,
) -> torch.Tensor:
    """Let the `given` decision lead; record the output and the decision where there is a dict for them."""
    (x,), kind = inputs, _kind(name)
    decision = given
    if kind == "relu":
        decision = x > 0 if given is None else given
        output = output if given is None else torch.where(given, x, 0)
    elif kind == "pool":
        windows = _torch_windows(x)
        decision = windows.argmax(dim=-1).to(torch.int8) if given is None else given
        output = output if given is None else windows.gather(-1, given[..., None].long())[..., 0]
    elif kind == "dropout" and layer.training:
        decision = output != 0 if given is None else given
        output = output if given is None else torch.where(given, x / (1 - layer.p), 0)
    if decided is not None and decision is not None:
        decided[name] = decision.numpy().copy()
    if activations is not None:
        activations[name] = output.detach().numpy().copy()
    return output


def _torch_windows(x: torch.Tensor) -> torch.Tensor:
    """Return the 2x2 windows of `x` [batch, c, h, w], row by row: [batch, c, h//2, w//2, 4]."""
    return x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)

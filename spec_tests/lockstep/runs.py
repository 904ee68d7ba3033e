"""The two runs side by side: whole epochs by the two trainers, or step by step with decisions handed over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

import jax_impl.trainer
import torch_ref.trainer
from jax_impl.parallel import place
from spec import datasets, oracle, params
from spec.batches import Counts, count, epoch_order
from spec.datasets import Dataset, Split
from spec.recipe import Recipe
from spec.run.history import StepsDone
from spec_tests.adapters import Adapter, Arrays, JaxAdapter, Network, OracleAdapter, TorchAdapter
from spec_tests.assertions import error_ratios, largest_difference, times
from spec_tests.lockstep.report import Epoch, Flip, Forced
from spec_tests.tolerances import KAPPA


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A recipe on its data, ready to be run by both sides."""

    recipe: Recipe
    raw: Dataset
    counts: Counts
    network: Network
    train: Split
    scored: Split

    @classmethod
    def of(cls, recipe: Recipe, raw: Dataset) -> Pair:
        """Return the pair; what is scored is the test split, or the training split where there is none."""
        dataset = datasets.preprocess(raw, recipe.preprocessing)
        counts = count(recipe, len(raw.train.labels))
        outputs = params.num_outputs(recipe, raw.num_classes)
        network = Network(
            recipe=recipe, input_shape=raw.input_shape, outputs=outputs, steps_per_epoch=counts.steps_per_epoch
        )
        scored = dataset.test or dataset.train
        return cls(recipe=recipe, raw=raw, counts=counts, network=network, train=dataset.train, scored=scored)

    def batches(self, epoch: int) -> Iterator[np.ndarray]:
        """Return the indices of each batch of `epoch`."""
        order = epoch_order(self.recipe.seed, epoch, self.counts.num_examples)[: self.counts.examples_per_epoch]
        yield from np.split(order, np.cumsum(self.counts.batch_sizes())[:-1])


def by_epochs(pair: Pair) -> Iterator[Epoch]:
    """Run both trainers, as users run them: JAX's compiled epochs against torch's loop. Nothing is handed over.

    With Adam a twin runs along: JAX again, from weights one unit in the last place away (S9.4).
    """
    placement = place("cpu")
    ours = jax_impl.trainer.Trainer(pair.recipe, pair.raw, placement)
    theirs = torch_ref.trainer.Trainer(pair.recipe, pair.raw, torch.device("cpu"))
    twins = [jax_impl.trainer.Trainer(pair.recipe, pair.raw, placement)] if pair.recipe.optimizer.name == "adam" else []
    for twin in twins:
        twin.load_state({name: np.nextafter(array, 2 * array) for name, array in twin.state().items()})
    scorers = JaxAdapter(pair.network), TorchAdapter(pair.network)
    fresh = scorers[0].opt_state()
    difference = 0.0
    for happened, *others in zip(*(side.events() for side in (ours, theirs, *twins)), strict=True):
        if isinstance(happened, StepsDone):
            difference = float(np.abs(happened.losses - others[0].losses).max())
            continue
        for scorer, side in zip(scorers, (ours, theirs), strict=True):
            scorer.load(side.state(), fresh)
        steps = happened.epoch * pair.counts.steps_per_epoch
        compared = _compared(pair, happened.epoch, steps, difference, *scorers)
        apart = [largest_difference(ours.state(), twin.state()) for twin in twins]
        yield replace(compared, twin_difference=apart[0] if apart else None)


class StepByStep:
    """Torch leads and JAX follows, each on its own trajectory; dropout masks go over, with `share_gates` all decisions.

    With `watch`, JAX also makes every step from torch's state, both held against the float64 oracle, and `first_flip`
    is the first decision that the free runs make differently.
    """

    def __init__(self, pair: Pair, *, share_gates: bool, watch: bool) -> None:
        self.pair = pair
        self.share_gates = share_gates
        self.leader = TorchAdapter(pair.network)
        self.follower = JaxAdapter(pair.network)
        self.first_flip: Flip | None = None
        self.forcing = Forcing(pair) if watch else None

    def epochs(self, *, max_steps: int | None = None) -> Iterator[Epoch]:
        """Run, yielding at the end of each epoch, and after `max_steps`."""
        done = 0
        for epoch in range(1, self.pair.recipe.epochs + 1):
            difference = 0.0
            for step, batch in enumerate(self.pair.batches(epoch)):
                difference = max(difference, self._step(epoch, step, batch))
                done += 1
                if done == max_steps:
                    break
            forced = self.forcing.report if self.forcing else None
            yield replace(_compared(self.pair, epoch, done, difference, self.follower, self.leader), forced=forced)
            if done == max_steps:
                return

    def _step(self, epoch: int, step: int, batch: np.ndarray) -> float:
        """Make one step on both sides; return how much their losses differ."""
        images, labels = self.pair.train.inputs[batch], self.pair.train.labels[batch]
        before = (self.leader.state(), self.leader.opt_state()) if self.forcing else None
        torch_ref.trainer.seed_dropout(self.pair.recipe, epoch, step)
        theirs, _ = self.leader.step(images, labels)
        decisions = self.leader.last_decisions
        handed = decisions if self.share_gates else _masks(decisions)
        if self.forcing and self.first_flip is None and not self.share_gates:
            own = self.follower.forward(images, train=True, decisions=handed)
            if flips := list(differing(own.decisions, decisions)):
                self.first_flip = self._name(flips[0], epoch, step, batch, own.activations, before)
        ours, _ = self.follower.step(images, labels, decisions=handed)
        if self.forcing:
            self.forcing.step(images, labels, decisions, *before, after=(self.leader.state(), self.leader.opt_state()))
        return abs(ours - theirs)

    def _name(self, flip: tuple, epoch: int, step: int, batch: np.ndarray, ours: Arrays, before: tuple) -> Flip:
        """Return the flip with the values that the two sides decided on."""
        layer, place = flip
        probe = TorchAdapter(self.pair.network)
        probe.load(*before)
        theirs = probe.forward(self.pair.train.inputs[batch], train=True, decisions=_masks(self.leader.last_decisions))
        values = [decided_on(activations, layer, place) for activations in (ours, theirs.activations)]
        example, unit = int(batch[place[0]]), tuple(map(int, place[1:]))
        return Flip(epoch=epoch, step=step, layer=layer, unit=unit, example=example, jax=values[0], torch=values[1])


class Forcing:
    """Teacher-forced steps: JAX steps from torch's state, and a float64 oracle says how far each side is off (S9).

    A second oracle makes the same step with plain float32 sums and says how far rounding alone moves each result.
    Another `follower` than JAX on one device may be given, and whatever took the steps in torch's place.
    """

    def __init__(self, pair: Pair, follower: JaxAdapter | None = None) -> None:
        self.pair = pair
        self.follower = follower or JaxAdapter(pair.network)
        self.truth = OracleAdapter(pair.network)
        self.plain = OracleAdapter(pair.network, oracle.PlainSums(pair.recipe.precision))
        self.report = Forced(
            steps=0, worst_ratio=0.0, worst_leaf="", broken=0, flips=0, largest_flip=0.0, worst_flip=0.0
        )

    def step(self, images, labels, decisions: Arrays, state: Arrays, opt_state: Arrays, *, after: tuple) -> None:
        """Make the step that took torch from (state, opt_state) to `after`, and note how it compares.

        Where JAX decides otherwise, it gets torch's decisions for this step, so that rounding alone is left to compare.
        """
        self.follower.load(state, opt_state)
        own = self.follower.forward(images, train=True, decisions=_masks(decisions))
        flips = list(differing(own.decisions, decisions))
        self.follower.step(images, labels, decisions=decisions if flips else _masks(decisions))
        for side in (self.truth, self.plain):
            side.load(state, opt_state)
            side.step(images, labels, decisions=decisions)
        sides = [(side.state(), side.opt_state()) for side in (self.follower, self.truth, self.plain)]
        ours, truth, plain, theirs = (self._results(state, *side) for side in (*sides, after))
        terms = self.pair.network.longest_sum(len(labels))
        ratios = error_ratios(ours, theirs, truth, plain=plain, terms=terms, dtype=self.pair.recipe.precision)
        sizes = [abs(decided_on(own.activations, *flip)) for flip in flips]
        moved = {layer: self.moved(layer) for layer in {layer for layer, _ in flips}}
        self._note(ratios, sizes, [times(size, moved[layer]) for size, (layer, _) in zip(sizes, flips, strict=True)])

    def moved(self, layer: str) -> float:
        """Return how far rounding moves the values that `layer` decides on: the largest of the layer (S12.6)."""
        exact, plain = (_input(side.last_activations, layer) for side in (self.truth, self.plain))
        return float(np.abs(plain - exact).max())

    def _note(self, ratios: dict[str, float], sizes: list[float], flips: list[float]) -> None:
        """Add a step's error ratios, the sizes of its flips, and those over what rounding moves."""
        report = self.report
        leaf = max(ratios, key=ratios.get)
        worse = ratios[leaf] > report.worst_ratio
        self.report = Forced(
            steps=report.steps + 1,
            worst_ratio=ratios[leaf] if worse else report.worst_ratio,
            worst_leaf=leaf if worse else report.worst_leaf,
            broken=report.broken + sum(not ratio <= KAPPA for ratio in ratios.values()),
            flips=report.flips + len(flips),
            largest_flip=max([report.largest_flip, *sizes]),
            worst_flip=max([report.worst_flip, *flips]),
        )

    def _results(self, before: Arrays, state: Arrays, opt_state: Arrays) -> Arrays:
        """Return all that a step made: the state, the buffers, and with SGD what was added to each trained leaf.

        The addition is the gradient times the rate where there is no momentum: a leaf's size would hide its errors.
        With Adam that is a quotient of its moments, rounding alone where both vanish: the moments are compared instead.
        """
        buffers = {name: array for name, array in opt_state.items() if name != "step"}
        trained = self.pair.network.trained
        if self.pair.recipe.optimizer.name == "adam":
            return buffers | {name: array for name, array in state.items() if name not in trained}
        return state | buffers | {f"update.{name}": state[name].astype(np.float64) - before[name] for name in trained}


def differing(ours: Arrays, theirs: Arrays) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Return (layer, place) of every decision that differs, in the order of the layers; dropout is not a decision."""
    for layer in ours:
        if not layer.startswith("dropout"):
            for place in np.argwhere(ours[layer] != theirs[layer]):
                yield layer, tuple(place)


def decided_on(activations: Arrays, layer: str, place: tuple[int, ...]) -> float:
    """Return the value that the decision of `layer` at `place` was made on.

    For a relu the pre-activation, which is near 0 where two sides part; for a pool the gap between the two largest
    values of the window.
    """
    before = _input(activations, layer)
    if layer.startswith("relu"):
        return float(before[place])
    example, channel, row, column = place
    window = before[example, channel, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    second, first = np.sort(window, axis=None)[-2:]
    return float(first - second)


def _input(activations: Arrays, layer: str) -> np.ndarray:
    names = list(activations)
    return activations[names[names.index(layer) - 1]]


def _masks(decisions: Arrays) -> Arrays:
    return {name: array for name, array in decisions.items() if name.startswith("dropout")}


def _compared(pair: Pair, epoch: int, steps: int, loss_difference: float, ours: Adapter, theirs: Adapter) -> Epoch:
    """Return the two sides' figures as they are now."""
    predictions = [_predictions(side, pair) for side in (ours, theirs)]
    accuracies = [float((side == pair.scored.labels).mean()) for side in predictions]
    return Epoch(
        epoch=epoch,
        steps=steps,
        weight_difference=largest_difference(ours.state(), theirs.state()),
        loss_difference=loss_difference,
        equal_predictions=float((predictions[0] == predictions[1]).mean()),
        jax_accuracy=accuracies[0],
        torch_accuracy=accuracies[1],
    )


def _predictions(side: Adapter, pair: Pair) -> np.ndarray:
    """Return the predicted class of every scored example, in batches of the same shapes on both sides."""
    starts = range(0, len(pair.scored.labels), pair.recipe.batch_size)
    slices = [slice(start, start + pair.recipe.batch_size) for start in starts]
    return np.concatenate([side.evaluate(pair.scored.inputs[part], pair.scored.labels[part])[1] for part in slices])

"""What the lessons claim, and what was measured: README's table, computed from the results.

Figures are the JAX side's over the seeds that all runs compared in a row have; differences are means with 90 %
intervals, and a verdict that speaks of better or worse needs an interval that leaves out 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from spec import recipe as recipes
from spec.markdown import markdown_table
from spec_tests.accuracy.equivalence import MARGIN, interval, tost
from spec_tests.accuracy.results import Results
from spec_tests.accuracy.tables import p_value, signed

EXPERIMENTS = {
    "sigmoid-mlp-relu": "--recipe sigmoid-mlp --model.activations relu relu",
    "sigmoid-mlp-rate-0.1": "--recipe sigmoid-mlp --learning-rate 0.1",
    "sigmoid-mlp-relu-rate-0.1": "--recipe sigmoid-mlp --model.activations relu relu --learning-rate 0.1",
    "mlp128-plain-1-epoch": "--recipe mlp128-plain --epochs 1",
    "mlp128-batchnorm-1-epoch": "--recipe mlp128-batchnorm --epochs 1",
    "mlp128-momentum-0": "--recipe mlp128 --momentum 0",
    "mlp128-momentum-0-rate-0.75": "--recipe mlp128 --momentum 0 --learning-rate 0.75",
    "mlp128-1-epoch": "--recipe mlp128 --epochs 1",
    "mlp128-momentum-0-1-epoch": "--recipe mlp128 --momentum 0 --epochs 1",
    "mlp128-momentum-0-rate-0.75-1-epoch": "--recipe mlp128 --momentum 0 --learning-rate 0.75 --epochs 1",
    "mlp128-rate-0.001-1-epoch": "--recipe mlp128 --learning-rate 0.001 --epochs 1",
    "mlp128-plain-batch-32": "--recipe mlp128-plain --batch-size 32",
    "mlp128-plain-batch-64": "--recipe mlp128-plain --batch-size 64",
    "mlp128-plain-batch-512": "--recipe mlp128-plain --batch-size 512",
    "mlp128-plain-batch-32-rate-scaled": "--recipe mlp128-plain --batch-size 32 --learning-rate 0.0375",
    "mlp128-plain-batch-64-rate-scaled": "--recipe mlp128-plain --batch-size 64 --learning-rate 0.075",
    "mlp128-plain-batch-512-rate-scaled": "--recipe mlp128-plain --batch-size 512 --learning-rate 0.6",
}
"""Runs that are no recipe: the trainer's flags. Momentum 0.8 makes steps 1 / (1 - 0.8) = 5 times as long in the long
run, hence 5 x 0.15 = 0.75; a scaled rate is 0.15 x batch / 128, the same way in an epoch whatever the batch."""

RECORD, RECORD_SOURCE = 0.9691, "fine-tuned DARTS, arXiv 2006.09042"
FLOAT32_STEP = float(np.finfo(np.float32).eps)
TEST, CUMULATIVE = "test_accuracy", "cumulative_train_accuracy"


class Measured:
    """Results and experiments together, by name, and the seeds that all of `compared` have on the JAX side."""

    def __init__(self, results: Results, compared: Sequence[str]) -> None:
        self.all = results
        self.seeds = sorted(set.intersection(*(set(results[key]["jax"]["seeds"]) for key in compared)))

    def values(self, key: str, figure: str = TEST) -> list[float]:
        """Return the JAX side's figure at each of the seeds."""
        block = self.all[key]["jax"]
        by_seed = dict(zip(block["seeds"], block[figure], strict=True))
        return [by_seed[seed] for seed in self.seeds]

    def mean(self, key: str, figure: str = TEST) -> float:
        """Return the JAX side's mean over the seeds."""
        return statistics.mean(self.values(key, figure))

    def gain(self, key: str, over: str, figure: str = TEST) -> list[float]:
        """Return what the first gains over the second, seed by seed, on the JAX side."""
        return [one - other for one, other in zip(self.values(key, figure), self.values(over, figure), strict=True)]

    def every(self, data: str) -> dict[float, str]:
        """Return the test accuracy of every run on a data set, both sides, and the name of what was run."""
        return {
            accuracy: key
            for key, result in self.all.items()
            if recipes.load(recipe_of(key)).data.name == data
            for block in result.values()
            for accuracy in block[TEST]
        }


Answer = tuple[str, str]


def _sigmoid(measured: Measured) -> Answer:
    slow, fast, relu = "sigmoid-mlp", "sigmoid-mlp-rate-0.1", "sigmoid-mlp-relu-rate-0.1"
    gain = measured.gain(fast, slow)
    said = (
        f"{measured.mean(slow, CUMULATIVE):.3f} is training accuracy over all epochs together; test accuracy at the "
        f"end is {measured.mean(slow):.3f}. Sigmoid kept, learning rate 0.1: {measured.mean(fast):.3f}; relu at that "
        f"rate: {measured.mean(relu):.3f}"
    )
    verdict = "no: the way of counting, and the learning rate" if interval(gain)[1] > 0 else "not refuted"
    return said, verdict


def _relu(measured: Measured) -> Answer:
    gain = measured.gain("sigmoid-mlp-relu", "sigmoid-mlp")
    faster = measured.gain("sigmoid-mlp-rate-0.1", "sigmoid-mlp")
    said = f"test accuracy {measured.mean('sigmoid-mlp'):.3f} to {measured.mean('sigmoid-mlp-relu'):.3f}: {_gain(gain)}"
    if interval(gain)[1] <= 0:
        return said, "no"
    rival = "more" if statistics.mean(faster) > statistics.mean(gain) else "less"
    return said, f"it helps; ten times the learning rate helps {rival}, {_points(statistics.mean(faster))}"


def _batchnorm(measured: Measured) -> Answer:
    at_end = measured.gain("mlp128-batchnorm", "mlp128-plain")
    at_once = measured.gain("mlp128-batchnorm-1-epoch", "mlp128-plain-1-epoch")
    training = measured.gain("mlp128-batchnorm", "mlp128-plain", CUMULATIVE)
    said = (
        f"test accuracy: after one epoch {_gain(at_once)}, after ten {_gain(at_end)}; cumulative training accuracy "
        f"{_gain(training)}"
    )
    largest = max((at_once, at_end, training), key=statistics.mean)
    held = interval(largest)[2] >= 0.05
    return said, "yes" if held else f"no: {_points(statistics.mean(at_end))} in the end"


def _deeper(measured: Measured) -> Answer:
    gain = measured.gain("deep-mlp", "mlp512")
    p = tost(gain, MARGIN)
    said = f"{measured.mean('deep-mlp'):.4f} against {measured.mean('mlp512'):.4f}: {_gain(gain)}, TOST p {p_value(p)}"
    return said, f"yes: equal within {_points(MARGIN, sign='')}" if p < 0.05 else "not shown"


def _cnn(measured: Measured) -> Answer:
    runs = [accuracy for block in measured.all["cnn"].values() for accuracy in block[TEST]]
    verdict = "yes" if min(runs) > 0.9 else "no"
    sides = "both sides" if len(measured.all["cnn"]) > 1 else "one side"
    return f"{min(runs):.4f} to {max(runs):.4f} in {len(runs)} runs of {sides}", verdict


def _ninety_nine(measured: Measured) -> Answer:
    runs, digits = measured.every("fashion_mnist"), measured.every("mnist")
    best = max(runs)
    said = (
        f"best of all runs here {best:.4f} (`{runs[best]}`); the published record is {RECORD} ({RECORD_SOURCE}); "
        f"MNIST, here: {max(digits):.4f}"
    )
    return said, "no" if max(best, RECORD) < 0.99 else "yes"


def _momentum(measured: Measured) -> Answer:
    def gains(without: str) -> tuple[list[float], list[float]]:
        soon = measured.gain("mlp128-1-epoch", f"{without}-1-epoch", CUMULATIVE)
        return soon, measured.gain("mlp128", without)

    soon, late = gains("mlp128-momentum-0")
    soon_fair, late_fair = gains("mlp128-momentum-0-rate-0.75")
    said = (
        f"0.8 against 0 at the same rate: first epoch's training accuracy {_gain(soon)}, test accuracy after five "
        f"{_gain(late)}; against 0 at five times the rate, as long a step: {_gain(soon_fair)} and {_gain(late_fair)}"
    )
    if interval(soon)[1] <= 0:
        return said, "no"
    return said, "yes" if interval(soon_fair)[1] > 0 else "yes, as a larger learning rate does"


def _tiny_rate(measured: Measured) -> Answer:
    tiny, usual = (measured.mean(key, "weight_change") for key in ("mlp128-rate-0.001-1-epoch", "mlp128-1-epoch"))
    said = (
        f"\\|w - w0\\| / \\|w0\\| after one epoch: {tiny:.3f} at 0.001, {usual:.3f} at 0.15; test accuracy "
        f"{measured.mean('mlp128-rate-0.001-1-epoch'):.3f} and {measured.mean('mlp128-1-epoch'):.3f}"
    )
    return said, "no: a small change, and it learns" if tiny > FLOAT32_STEP else "yes"


def _small_batches(measured: Measured) -> Answer:
    def said(ending: str) -> str:
        keys = {32: f"-batch-32{ending}", 64: f"-batch-64{ending}", 128: "", 512: f"-batch-512{ending}"}
        return ", ".join(f"{size}: {measured.mean(f'mlp128-plain{key}'):.4f}" for size, key in keys.items())

    fixed, scaled = (
        measured.gain(f"mlp128-plain-batch-32{ending}", f"mlp128-plain-batch-512{ending}")
        for ending in ("", "-rate-scaled")
    )
    text = (
        f"test accuracy by batch size, ten epochs, same rate: {said('')}; 32 over 512 {_gain(fixed)}. "
        f"Rate in proportion to the batch: {said('-rate-scaled')}; 32 over 512 {_gain(scaled)}"
    )
    return text, f"same rate: {_better(fixed)}; rate in proportion: {_better(scaled)}"


@dataclass(frozen=True)
class Claim:
    """A lesson's words, the function that answers them, and the results it needs; `paired`: seed by seed."""

    words: str
    answer: Callable[[Measured], Answer]
    needs: tuple[str, ...]
    paired: bool = True


CLAIMS = (
    Claim(
        "47 % because of sigmoid",
        _sigmoid,
        ("sigmoid-mlp", "sigmoid-mlp-rate-0.1", "sigmoid-mlp-relu-rate-0.1"),
    ),
    Claim("relu instead of sigmoid fixes it", _relu, ("sigmoid-mlp", "sigmoid-mlp-relu", "sigmoid-mlp-rate-0.1")),
    Claim(
        "BatchNorm on the input gives +5 %",
        _batchnorm,
        ("mlp128-batchnorm", "mlp128-plain", "mlp128-batchnorm-1-epoch", "mlp128-plain-1-epoch"),
    ),
    Claim("wider and deeper gives nothing: 87 %", _deeper, ("deep-mlp", "mlp512")),
    Claim("the CNN passes 90 %", _cnn, ("cnn",), paired=False),
    Claim(
        "mature networks easily reach 99 % on Fashion-MNIST", _ninety_nine, ("cnn", "mnist-mlp256-logits"), paired=False
    ),
    Claim(
        "momentum speeds training",
        _momentum,
        ("mlp128", "mlp128-1-epoch", *(key for key in EXPERIMENTS if key.startswith("mlp128-momentum"))),
    ),
    Claim("lr 0.001 shows no change in w", _tiny_rate, ("mlp128-1-epoch", "mlp128-rate-0.001-1-epoch")),
    Claim(
        "small batches find better minima",
        _small_batches,
        ("mlp128-plain", *(key for key in EXPERIMENTS if "-batch-" in key)),
    ),
)


def claims_table(results: Results, experiments: Results, *, claims: Sequence[Claim] = CLAIMS) -> str:
    """Return the claims as a Markdown table: the words, what was measured, over how many seeds, the verdict."""
    rows = [[f'"{claim.words}"', *_answer(claim, results | experiments)] for claim in claims]
    return markdown_table(["the lessons say", "measured here", "seeds", "verdict"], rows)


def _answer(claim: Claim, results: Results) -> tuple[str, str, str]:
    if missing := [key for key in claim.needs if "jax" not in results.get(key, {})]:
        return "not measured yet: " + ", ".join(missing), "-", "-"
    measured = Measured(results, claim.needs)
    said, verdict = claim.answer(measured)
    return said, str(len(measured.seeds)) if claim.paired else "-", verdict


def recipe_of(key: str) -> str:
    """Return the recipe's name for a key of the results: a recipe, `recipe, N epochs` or an experiment."""
    return EXPERIMENTS[key].split()[1] if key in EXPERIMENTS else key.split(",")[0]


def _gain(gain: list[float]) -> str:
    return signed(*interval(gain))


def _better(gain: list[float]) -> str:
    _, low, high = interval(gain)
    return "yes" if low > 0 else "no, worse" if high < 0 else "no difference seen"


def _points(difference: float, sign: str = "+") -> str:
    return f"{100 * difference:{sign}.1f} points"

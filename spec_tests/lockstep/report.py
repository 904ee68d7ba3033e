"""What a full run reports: figures of each epoch, the first flip, and the bounds they must keep (S9, S12)."""

from __future__ import annotations

from dataclasses import dataclass

from spec.recipe import Recipe
from spec_tests import tolerances


@dataclass(frozen=True, kw_only=True)
class Flip:
    """A decision that came out differently: where, and the value it was made on, on both sides.

    `example` is the example's index in the training split; `unit` its place in the layer, by the layer's axes.
    """

    epoch: int
    step: int
    layer: str
    unit: tuple[int, ...]
    example: int
    jax: float
    torch: float


@dataclass(frozen=True, kw_only=True)
class Forced:
    """Steps made on each side from the same state, so far: how many, and the worst error ratio of any leaf (S12.5).

    `broken` counts the leaves, step by step, whose ratio was over what the rule allows. `flips` decisions came out
    differently; `largest_flip` is the farthest from undecided that one was, `worst_flip` the largest over how far
    rounding moves such a value (S9.6).
    """

    steps: int
    worst_ratio: float
    worst_leaf: str
    broken: int
    flips: int
    largest_flip: float
    worst_flip: float


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """The two runs at the end of an epoch.

    `weight_difference` is the largest over parameters and running statistics, `loss_difference` the largest over the
    steps of the epoch, `equal_predictions` the share of examples that both sides predict alike. `twin_difference` is
    how far one side is from itself, started one unit in the last place away: what rounding comes to in such a run.
    """

    epoch: int
    steps: int
    weight_difference: float
    loss_difference: float
    equal_predictions: float
    jax_accuracy: float
    torch_accuracy: float
    twin_difference: float | None = None
    forced: Forced | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the specification promises of a run: what was `held` against it, and what is `broken`, a line each."""

    held: list[str]
    broken: list[str]


def judge(recipe: Recipe, epochs: list[Epoch], *, share_gates: bool) -> Verdict:
    """Return what these epochs of `recipe` were held against, and what they do not keep."""
    verdict = Verdict(held=[], broken=[])
    _judge_free_run(verdict, weight_bound(recipe, epochs[-1].steps, share_gates=share_gates), epochs)
    _judge_against_twin(verdict, epochs)
    if forced := epochs[-1].forced:
        _judge_forced_steps(verdict, forced)
    return verdict


def weight_bound(recipe: Recipe, steps: int, *, share_gates: bool) -> float | None:
    """Return how far the weights of a free run may part; None where rounding may part them by any amount (S9)."""
    model, double = recipe.model, recipe.precision == "float64"
    if recipe.optimizer.name == "adam":
        return None
    if model.name == "cnn":
        few = steps <= tolerances.CNN_FEW_STEPS
        return (tolerances.CNN_FEW_STEPS_FLOAT64 if few else tolerances.CNN_RUN_FLOAT64) if double else None
    if double:
        return tolerances.BATCHNORM_RUN_FLOAT64 if model.input_batchnorm else tolerances.FREE_RUN_FLOAT64
    if share_gates or "relu" not in model.activations:
        return tolerances.walk_bound(steps, "float32")
    return tolerances.SMOOTH_RUN_FLOAT32 if "relu" not in model.activations[:1] else None


def _judge_free_run(verdict: Verdict, bound: float | None, epochs: list[Epoch]) -> None:
    if bound is None:
        return
    verdict.held.append(f"weights within {bound:.2g} and all predictions equal at every epoch")
    for epoch in epochs:
        if not epoch.weight_difference <= bound:
            verdict.broken.append(
                f"epoch {epoch.epoch}: weights differ by {epoch.weight_difference:.3g}, allowed {bound:.3g}"
            )
        if epoch.equal_predictions != 1:
            verdict.broken.append(f"epoch {epoch.epoch}: {epoch.equal_predictions:.2%} equal predictions, wanted all")


def _judge_against_twin(verdict: Verdict, epochs: list[Epoch]) -> None:
    """Hold the epochs against the twin as long as that says anything: up to a bound of `TWIN_CEILING_FLOAT64`."""
    for epoch in epochs:
        if epoch.twin_difference is None:
            return
        bound = tolerances.twin_bound(epoch.steps, epoch.twin_difference)
        if not bound <= tolerances.TWIN_CEILING_FLOAT64:
            return
        verdict.held.append(f"epoch {epoch.epoch}: weights within {bound:.2g}, by what one side is from itself")
        if not epoch.weight_difference <= bound:
            verdict.broken.append(
                f"epoch {epoch.epoch}: weights differ by {epoch.weight_difference:.3g}, allowed {bound:.3g}"
            )


def _judge_forced_steps(verdict: Verdict, forced: Forced) -> None:
    verdict.held.append(f"{forced.steps:,} steps from the same state, each leaf by the rule of S12.5")
    if forced.broken:
        verdict.broken.append(
            f"{forced.broken:,} leaves of forced steps have more than {tolerances.KAPPA} times the other side's error, "
            f"at most {forced.worst_ratio:.3g} times ({forced.worst_leaf})"
        )
    if not forced.worst_flip <= tolerances.KAPPA:
        verdict.broken.append(
            f"a decision flipped {forced.worst_flip:.3g} times as far from undecided as rounding moves it, "
            f"allowed {tolerances.KAPPA}"
        )

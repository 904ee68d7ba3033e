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

    `flips` decisions came out differently; `largest_flip` is the farthest from undecided that one was, `worst_flip` the
    largest over what rounding explains.
    """

    steps: int
    worst_ratio: float
    worst_leaf: str
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


def broken_bounds(recipe: Recipe, epochs: list[Epoch], *, share_gates: bool) -> list[str]:
    """Return what the specification promises of such a run and these epochs do not keep, a line each."""
    broken = []
    bound = weight_bound(recipe, epochs[-1].steps, share_gates=share_gates)
    for epoch in epochs:
        if bound is not None and not epoch.weight_difference <= bound:
            broken.append(f"epoch {epoch.epoch}: weights differ by {epoch.weight_difference:.3g}, allowed {bound:g}")
        if bound is not None and epoch.equal_predictions < 1:
            broken.append(f"epoch {epoch.epoch}: {epoch.equal_predictions:.2%} equal predictions, wanted all")
        if epoch.twin_difference is not None and not epoch.weight_difference <= (
            allowed := tolerances.twin_bound(epoch.steps, epoch.twin_difference)
        ):
            broken.append(
                f"epoch {epoch.epoch}: weights differ by {epoch.weight_difference:.3g}, allowed {allowed:.3g}"
            )
    forced = epochs[-1].forced
    if forced and not forced.worst_ratio <= tolerances.KAPPA:
        broken.append(
            f"a forced step's {forced.worst_leaf} has {forced.worst_ratio:.3g} times the other side's error, "
            f"allowed {tolerances.KAPPA}"
        )
    if forced and not forced.worst_flip <= 1:
        broken.append(f"a decision flipped {forced.worst_flip:.3g} times as far from undecided as rounding explains")
    return broken


def weight_bound(recipe: Recipe, steps: int, *, share_gates: bool) -> float | None:
    """Return how far the weights of a free run may part; None where rounding may part them by any amount (S9)."""
    if recipe.optimizer.name == "adam":
        return None
    if recipe.precision == "float64":
        if recipe.model.name == "cnn":
            few = steps <= tolerances.CNN_FEW_STEPS
            return tolerances.CNN_FEW_STEPS_FLOAT64 if few else tolerances.CNN_RUN_FLOAT64
        return tolerances.BATCHNORM_RUN_FLOAT64 if recipe.model.input_batchnorm else tolerances.FREE_RUN_FLOAT64
    smooth = recipe.model.name == "mlp" and "relu" not in recipe.model.activations[:1]
    return tolerances.SMOOTH_RUN_FLOAT32 if smooth and not share_gates else None

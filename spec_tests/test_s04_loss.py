"""S4: the losses on both sides, by hand and against the oracle; their stability; the gradient by the logits (S5)."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_impl.objective
import torch_ref.objective
from jax_impl.programs import precision_scope
from jax_impl.trainer import IMPLEMENTATION as JAX
from spec import oracle
from spec.datasets import cache
from spec.errors import DataError
from spec.recipe import Data, Loss
from spec_tests.assertions import assert_error_ratio, assert_within
from spec_tests.conftest import CONTENTS, idx_bytes
from spec_tests.tolerances import FOUR_DECIMALS, formula_bound
from torch_ref.trainer import IMPLEMENTATION as TORCH

CROSS_ENTROPY = Loss(name="cross_entropy", reduction="mean", label_smoothing=0.0)
OF_SOFTMAX = dataclasses.replace(CROSS_ENTROPY, name="cross_entropy_of_softmax")
BINARY = dataclasses.replace(CROSS_ENTROPY, name="binary_cross_entropy")

few = settings(deadline=None, max_examples=20)


def jax_losses(logits, labels, loss: Loss, precision: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss of each example, and the gradient of the batch's objective by the logits."""
    with precision_scope(precision):
        weight = 1 if loss.reduction == "sum" else 1 / len(labels)
        given = jnp.asarray(logits, precision), jnp.asarray(labels, jnp.int32), jnp.asarray(weight, precision)
        losses, grad = _jax_losses(*given, dataclasses.replace(loss, reduction="mean"))
        return np.asarray(losses), np.asarray(grad)


@partial(jax.jit, static_argnums=3)
def _jax_losses(logits, labels, weight, loss: Loss):
    losses, back = jax.vjp(lambda z: jax_impl.objective.example_losses(z, labels, loss), logits)
    return losses, back(jnp.full_like(losses, weight))[0]


def torch_losses(logits, labels, loss: Loss, precision: str) -> tuple[np.ndarray, np.ndarray]:
    given = torch.tensor(np.asarray(logits), dtype=getattr(torch, precision), requires_grad=True)
    losses = torch_ref.objective.example_losses(given, torch.tensor(labels), loss)
    (losses.sum() if loss.reduction == "sum" else losses.mean()).backward()
    return losses.detach().numpy(), given.grad.numpy()


SIDES = {"jax": jax_losses, "torch": torch_losses}


@pytest.fixture(params=SIDES)
def losses(request):
    """Return a side's function of logits, labels and loss to the loss of each example, float64."""
    return lambda logits, labels, loss=CROSS_ENTROPY: SIDES[request.param](logits, labels, loss, "float64")[0]


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def assert_near(found: np.ndarray, expected: np.ndarray, *, magnitude: float = 1.0, item: str = "losses") -> None:
    bound = formula_bound(magnitude, np.float64)
    assert_within({"value": found}, {"value": np.asarray(expected)}, bound=bound, item=item)


# By hand


def test_softmax_of_one_to_four_is_the_lessons_and_a_thousand_more_changes_nothing(losses):
    expected = [0.0321, 0.0871, 0.2369, 0.6439]
    for shift in (0.0, 1000.0):
        logits = np.array([[1.0, 2.0, 3.0, 4.0]]) + shift
        found = [np.exp(-losses(logits, [label]))[0] for label in range(4)]
        assert np.abs(np.array(found) - expected).max() < FOUR_DECIMALS


def test_cross_entropy_is_minus_the_natural_log_of_the_softmax_of_each_example(losses):
    logits = np.random.default_rng(0).standard_normal((5, 3))
    labels = np.array([0, 2, 1, 1, 0])
    found = losses(logits, labels)
    assert found.shape == (5,)  # one an example, not [batch, classes]
    assert_near(found, -np.log(softmax(logits)[np.arange(5), labels]))


def test_the_lessons_slip_applies_softmax_twice(losses):
    logits = np.random.default_rng(0).standard_normal((5, 3)) * 4
    labels = np.array([0, 2, 1, 1, 0])
    expected = -np.log(softmax(softmax(logits))[np.arange(5), labels])
    assert_near(losses(logits, labels, OF_SOFTMAX), expected)


def test_label_smoothing_spreads_e_over_all_classes(losses):
    loss = dataclasses.replace(CROSS_ENTROPY, label_smoothing=0.3)
    logits = np.random.default_rng(0).standard_normal((4, 3))
    targets = np.full((4, 3), 0.1)  # 0.3 / 3
    targets[np.arange(4), [0, 1, 2, 0]] += 0.7
    expected = -(targets * np.log(softmax(logits))).sum(axis=1)
    assert_near(losses(logits, [0, 1, 2, 0], loss), expected)


@pytest.mark.parametrize("side", SIDES)
def test_binary_cross_entropy_is_stable_and_its_gradient_is_sigma_minus_y(side):
    logits = np.array([[-800.0], [-1.0], [0.0], [2.0], [800.0]])
    labels = np.array([1, 0, 1, 1, 0])
    expected = np.array([800, np.log1p(np.exp(-1)), np.log(2), np.log1p(np.exp(-2)), 800])
    found, grad = SIDES[side](logits, labels, dataclasses.replace(BINARY, reduction="sum"), "float64")
    assert_near(found, expected, magnitude=800)
    sigma = np.array([0, 1 / (1 + np.e), 0.5, 1 / (1 + np.exp(-2)), 1])
    assert_near(grad[:, 0], sigma - labels, item="gradient")


@pytest.mark.parametrize("side", SIDES)
def test_the_gradient_of_cross_entropy_is_softmax_minus_one_hot(side):
    logits = np.random.default_rng(0).standard_normal((5, 3))
    labels = np.array([0, 2, 1, 1, 0])
    _, grad = SIDES[side](logits, labels, CROSS_ENTROPY, "float64")
    assert_near(grad, (softmax(logits) - np.eye(3)[labels]) / 5, item="gradient")


# Against the oracle

logits_and_loss = st.builds(
    lambda kind, reduction, smoothing, classes, spread, seed: random_losses(
        Loss(name=kind, reduction=reduction, label_smoothing=0.0 if kind == BINARY.name else smoothing),
        classes=1 if kind == BINARY.name else classes,
        batch=6,
        spread=spread,
        seed=seed,
    ),
    kind=st.sampled_from([CROSS_ENTROPY.name, OF_SOFTMAX.name, BINARY.name]),
    reduction=st.sampled_from(["mean", "sum"]),
    smoothing=st.sampled_from([0.0, 0.6]),
    classes=st.sampled_from([2, 5]),  # few shapes: each is compiled
    spread=st.sampled_from([0.1, 3.0, 300.0]),
    seed=st.integers(0, 999),
)


def random_losses(loss: Loss, *, classes: int, batch: int, spread: float, seed: int):
    generator = np.random.default_rng(seed)
    logits = spread * generator.standard_normal((batch, classes)).astype(np.float32)
    return logits, generator.integers(0, max(classes, 2), batch), loss


@few
@given(logits_and_loss)
def test_torchs_losses_are_those_of_the_oracle(case):
    agrees_with_the_oracle("torch", *case)


@few
@given(logits_and_loss)
def test_our_losses_are_those_of_the_oracle(case):
    agrees_with_the_oracle("jax", *case)


def agrees_with_the_oracle(side: str, logits, labels, loss: Loss) -> None:
    """Compare the losses, and the gradient of the mean or the sum by the logits; one logit: y = 1 pulls it up."""
    found, grad = SIDES[side](logits, labels, loss, "float64")
    magnitude = 1 + np.abs(logits).max()  # a logit of 700 is itself right to 700 u only
    assert_near(found, oracle.example_losses(logits, labels, loss), magnitude=magnitude, item=f"{side}, {loss}")
    expected = oracle.loss_gradient(logits, labels, loss)
    assert_near(grad, expected, magnitude=magnitude, item=f"{side}, gradient of {loss}")


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("loss", [CROSS_ENTROPY, OF_SOFTMAX, BINARY], ids=lambda loss: loss.name)
def test_in_float32_neither_sides_losses_err_more_than_kappa_times_the_others(loss, smoothing):
    loss = dataclasses.replace(loss, label_smoothing=0.0 if loss is BINARY else smoothing)
    logits, labels, loss = random_losses(
        loss, classes=1 if loss.name == BINARY.name else 7, batch=200, spread=3, seed=0
    )
    names = ("losses", "gradient")
    ours, theirs = (dict(zip(names, side(logits, labels, loss, "float32"), strict=True)) for side in SIDES.values())
    truth = (oracle.example_losses(logits, labels, loss), oracle.loss_gradient(logits, labels, loss))
    assert ours["losses"].dtype == theirs["losses"].dtype == np.float32
    assert_error_ratio(ours, theirs, dict(zip(names, truth, strict=True)), item=loss.name)


@few
@given(
    logits=st.lists(st.floats(-1e300, 1e300), min_size=3, max_size=3),
    loss=st.sampled_from([CROSS_ENTROPY, OF_SOFTMAX, dataclasses.replace(CROSS_ENTROPY, label_smoothing=0.5)]),
)
def test_no_finite_logit_gives_an_infinite_loss_on_either_side(logits, loss):
    for side in SIDES.values():
        found, grad = side([logits] * len(logits), range(len(logits)), loss, "float64")
        assert np.isfinite(found).all()
        assert np.isfinite(grad).all()
        assert (found >= 0).all()


@few
@given(logits=st.lists(st.floats(-1e4, 1e4), min_size=4, max_size=4))
def test_softmax_twice_never_leaves_its_bounds(logits):
    classes = len(logits)
    least, most = np.log(1 + (classes - 1) / np.e), np.log(np.e + classes - 1)
    for side in SIDES.values():
        found, _ = side([logits] * classes, range(classes), OF_SOFTMAX, "float64")
        rounding = formula_bound(most, np.float64)
        assert least - rounding <= found.min()
        assert found.max() <= most + rounding


@pytest.mark.parametrize("side", SIDES)
def test_softmax_twice_reaches_both_its_bounds(side):
    found, _ = SIDES[side]([[0.0, 1000.0, 0.0]] * 2, [1, 2], OF_SOFTMAX, "float64")
    assert_near(found, [np.log(1 + 2 / np.e), np.log(np.e + 2)])


# Bad labels


@pytest.mark.parametrize("side", [JAX, TORCH], ids=lambda side: side.framework)
def test_a_label_out_of_range_is_refused_on_both_sides(side, tiny, tmp_path):
    cache.raw_folder(tiny).mkdir(parents=True)
    cache.store(tiny, CONTENTS)
    path = cache.raw_folder(tiny) / "t10k-labels-idx1-ubyte"
    path.write_bytes(idx_bytes(np.array([5, 255], np.uint8)))
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte is damaged"):
        side.load(Data(name="fashion_mnist"))
    table = tmp_path / "table.csv"
    table.write_text("1,2,0\n3,4,0.5\n")
    with pytest.raises(DataError, match="must hold whole-number labels"):
        side.load(Data(name="csv", path=str(table), test_fraction=0.0, seed=0))


def test_torch_raises_for_a_bad_label_and_optax_gives_nan_or_an_ordinary_number():
    logits = np.array([[1.0, 2.0, 4.0]])
    for label in (-1, 3):
        with pytest.raises(IndexError, match="out of bounds"):
            torch_losses(logits, [label], CROSS_ENTROPY, "float64")
        with pytest.raises(ValueError, match="not a class"):
            oracle.example_losses(logits, [label], CROSS_ENTROPY)
    assert torch_losses(logits, [-100], CROSS_ENTROPY, "float64")[0] == 0  # its ignore_index
    assert np.isnan(jax_losses(logits, [3], CROSS_ENTROPY, "float64")[0]).all()
    last = jax_losses(logits, [2], CROSS_ENTROPY, "float64")[0]
    assert np.array_equal(jax_losses(logits, [-1], CROSS_ENTROPY, "float64")[0], last)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [([[1, 3, 2], [5, 5, 1], [7, 7, 7]], [1, 0, 0]), ([[-0.1], [0.0], [0.1]], [0, 0, 1])],
)
def test_the_prediction_is_the_largest_logit_the_first_of_equals(logits, expected):
    assert jax_impl.objective.predictions(jnp.asarray(logits, jnp.float32)).tolist() == expected
    assert torch_ref.objective.predictions(torch.tensor(logits)).tolist() == expected

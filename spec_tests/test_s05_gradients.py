"""S5: the gradient of every leaf on both sides: the oracle's, the closed forms', central differences'; zero, fresh."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spec import oracle
from spec_tests.adapters import Network
from spec_tests.assertions import assert_error_ratio, assert_identical, assert_within
from spec_tests.test_s03_models import IN_FLOAT32, NETWORKS, SIDES, Example, example, loaded_adapter, pass_bound
from spec_tests.tolerances import CENTRAL_DIFFERENCE, DIFFERENCE_STEP, chain_bound, sum_bound, unit_roundoff

Arrays = dict[str, np.ndarray]


def gradients(side: str, name: str, given: Example, *, precision: str = "float64") -> Arrays:
    adapter = loaded_adapter(side, name, given, precision=precision)
    return adapter.gradients(given.images, given.labels, decisions=given.masks)


def flat(images: np.ndarray) -> np.ndarray:
    """Return images [batch, h, w, c] as rows that run channel, row, column."""
    channels_first = images.transpose(0, 3, 1, 2) if images.ndim == 4 else images
    return channels_first.reshape(len(images), -1).astype(np.float64)


def before_batchnorm(network: Network) -> list[str]:
    """Return the biases whose layer BatchNorm follows."""
    names = oracle.layer_names(network.recipe.model)
    followed = {first for first, second in itertools.pairwise(names) if second.startswith("norm")}
    return [leaf.name for leaf in network.leaves if leaf.role == "bias" and leaf.name.split(".")[0] in followed]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("side", SIDES)
def test_every_leafs_gradient_is_the_oracles(side, name):
    given = example(NETWORKS[name])
    found, expected = (gradients(each, name, given) for each in (side, "oracle"))
    assert {array.dtype for array in found.values()} == {np.dtype(np.float64)}
    item = f"{side}, {name}"
    assert_within(found, expected, bound=pass_bound(NETWORKS[name]), item=item, relative_to_layer=True)


@pytest.mark.parametrize("side", SIDES)
@settings(deadline=None, max_examples=15)
@given(
    name=st.sampled_from(["relu without biases", "sigmoid, relu", "binary", "two softmaxes"]),
    spread=st.sampled_from([0.1, 1.0, 3.0]),
    seed=st.integers(0, 9_999),
)
def test_from_any_state_every_leafs_gradient_is_the_oracles(side, name, spread, seed):
    # The gradient p (g - p g) of a saturated softmax cancels to 1e-4 of its terms and less: nothing to be relative to.
    assume(not (name == "two softmaxes" and spread > 1))
    given = example(NETWORKS[name], seed=seed, spread=spread)
    found, expected = (gradients(each, name, given) for each in (side, "oracle"))
    item = f"{side}, {name}, {spread}, {seed}"
    bound = pass_bound(NETWORKS[name]) * max(1.0, spread) ** 3  # what three layers enlarge a rounding by
    assert_within(found, expected, bound=bound, item=item, relative_to_layer=True)


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_in_float32_neither_sides_gradients_err_more_than_kappa_times_the_others(name):
    given = example(NETWORKS[name])
    ours, theirs, truth = (gradients(side, name, given, precision="float32") for side in ("jax", "torch", "oracle"))
    assert {array.dtype for array in (*ours.values(), *theirs.values())} == {np.dtype(np.float32)}
    for bias in before_batchnorm(NETWORKS[name]):  # zero: compared absolutely, below
        for side in (ours, theirs, truth):
            del side[bias]
    assert_error_ratio(ours, theirs, truth, item=name)


# Closed forms


@pytest.mark.parametrize("side", SIDES)
def test_softmax_regressions_gradient_is_the_closed_form_on_both_sides(side):
    name = "softmax regression"
    given = example(NETWORKS[name])
    weight, bias = (given.state[leaf].astype(np.float64) for leaf in ("linear1.weight", "linear1.bias"))
    closed = oracle.softmax_regression_gradients(weight, bias, flat(given.images), given.labels)
    expected = dict(zip(("linear1.weight", "linear1.bias"), closed, strict=True))
    found = gradients(side, name, given)
    assert_within(found, expected, bound=pass_bound(NETWORKS[name]), item=side, relative_to_layer=True)


@pytest.mark.parametrize("side", SIDES)
def test_the_binary_nets_gradient_is_the_closed_form_on_both_sides(side):
    given = example(NETWORKS["binary"])
    state = {name: array.astype(np.float64) for name, array in given.state.items()}
    leaves = [array.T for array in state.values()]  # the lesson writes weights [in, out]
    closed = oracle.two_layer_binary_gradients(*leaves, flat(given.images), given.labels, "sum")
    expected = {name: grad.T for name, grad in zip(state, closed, strict=True)}
    found = gradients(side, "binary", given)
    assert_within(found, expected, bound=pass_bound(NETWORKS["binary"]), item=side, relative_to_layer=True)


# Central differences


def objective(network: Network, given: Example, state: Arrays, decisions: Arrays) -> float:
    recipe = network.recipe
    logits = oracle.forward(recipe.model, state, given.images, train=True, decisions=decisions).logits
    losses = oracle.example_losses(logits, given.labels, recipe.loss)
    return float(losses.sum() if recipe.loss.reduction == "sum" else losses.mean())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_recipes_gradient_is_that_of_central_differences(name):
    network, generator = NETWORKS[name], np.random.default_rng(1)
    given = example(network)
    # The gates and winners are held, so that no step crosses a kink; where none is crossed that changes nothing.
    passed = oracle.forward(network.recipe.model, given.state, given.images, train=True, decisions=given.masks)
    grads = {side: gradients(side, name, given) for side in SIDES}
    size = max(1.0, abs(objective(network, given, given.state, passed.decisions)))
    for leaf in network.trained:
        direction = generator.standard_normal(given.state[leaf].shape)
        direction /= np.linalg.norm(direction)
        sides = []
        for sign in (1, -1):
            moved = given.state | {leaf: given.state[leaf] + sign * DIFFERENCE_STEP * direction}
            sides.append(objective(network, given, moved, passed.decisions))
        slope = (sides[0] - sides[1]) / (2 * DIFFERENCE_STEP)
        for side, found in grads.items():
            off = abs((found[leaf] * direction).sum() - slope)
            assert off <= CENTRAL_DIFFERENCE * size, f"{side}, {name}: along {leaf} {off:.3g} off {slope:.3g}"


# A bias before BatchNorm


def terms_of_biases(network: Network, given: Example) -> dict[str, np.ndarray]:
    """Return, by bias, the gradients by its layer's outputs [batch, channels, ...], whose sums are the bias's."""
    recipe = network.recipe
    passed = oracle.forward(recipe.model, given.state, given.images, train=True, decisions=given.masks)
    grad, terms = oracle.loss_gradient(passed.logits, given.labels, recipe.loss), {}
    for layer, back in reversed(passed.tape):
        terms[f"{layer}.bias"] = grad
        grad, _ = back(grad)
    return terms


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("side", [*SIDES, "oracle"])
def test_a_bias_before_batchnorm_has_gradient_zero(side, precision):
    network = NETWORKS["cnn"]
    given = example(network)
    found, terms = gradients(side, "cnn", given, precision=precision), terms_of_biases(network, given)
    biases = before_batchnorm(network)
    assert biases == ["conv1.bias", "conv2.bias", "linear1.bias", "linear2.bias"]
    for name in biases:
        batch, channels, *image = terms[name].shape
        count = batch * int(np.prod(image))
        magnitude = np.abs(terms[name]).sum(axis=(0, *range(2, terms[name].ndim))).max()
        assert magnitude > unit_roundoff(np.float32)  # something is added up
        # Each term is itself right to what the way back allows, and adding `count` of them rounds as often.
        dtype = found[name].dtype  # the oracle's is float64, whatever the recipe's
        bound = chain_bound(network.leaves, count, dtype) + sum_bound(count, 1.0, dtype)
        relative, zero = {name: found[name] / dtype.type(magnitude)}, {name: np.zeros(channels)}
        assert_within(relative, zero, bound=bound, item=f"{side}, {precision}")


# Nothing left over, nothing left out


@pytest.mark.parametrize("name", ["relu without biases", "batchnorm of the inputs", "cnn"])
@pytest.mark.parametrize("side", SIDES)
def test_the_gradient_of_a_step_holds_nothing_of_the_one_before(side, name):
    first, second = (example(NETWORKS[name], seed=seed) for seed in (0, 1))
    adapter = loaded_adapter(side, name, second)
    fresh = adapter.gradients(second.images, second.labels, decisions=second.masks)
    adapter.gradients(first.images, first.labels, decisions=first.masks)
    again = adapter.gradients(second.images, second.labels, decisions=second.masks)
    assert_identical(again, fresh, item=f"{side}, {name}")
    kept = {leaf: array.astype(np.float64) for leaf, array in second.state.items()}
    assert_identical(adapter.state(), kept, item=f"{side}, {name}: the state after gradients")


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("side", SIDES)
def test_every_trained_leaf_of_every_recipe_gets_a_gradient_on_both_sides(side, name):
    network = NETWORKS[name]
    found = gradients(side, name, example(network))
    assert sorted(found) == sorted(network.trained)
    smallest = unit_roundoff(np.float32)
    without = [leaf for leaf, grad in found.items() if np.abs(grad).max() < smallest]
    assert set(without) <= set(before_batchnorm(network))

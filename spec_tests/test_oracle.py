"""The oracle itself: against vectors a reader checks by hand, central differences, closed forms and plain loops."""

from __future__ import annotations

import dataclasses
import itertools
import json
from importlib import resources

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spec import batches, oracle, params, recipe
from spec.oracle import layers
from spec.recipe import Loss, Model, Optimizer, Schedule
from spec_tests.tolerances import (
    CEILING_FLOAT32,
    CENTRAL_DIFFERENCE,
    DIFFERENCE_STEP,
    FOUR_DECIMALS,
    ORACLE_FORMULA,
    ORACLE_SUM,
)

GOLDEN = resources.files("spec") / "golden"
CROSS_ENTROPY = Loss(name="cross_entropy", reduction="mean", label_smoothing=0.0)
SMOOTHED_SUM = Loss(name="cross_entropy", reduction="sum", label_smoothing=0.3)
OF_SOFTMAX = Loss(name="cross_entropy_of_softmax", reduction="mean", label_smoothing=0.0)
SMOOTHED_OF_SOFTMAX_SUM = Loss(name="cross_entropy_of_softmax", reduction="sum", label_smoothing=0.2)
BINARY = Loss(name="binary_cross_entropy", reduction="mean", label_smoothing=0.0)
BINARY_SUM = dataclasses.replace(BINARY, reduction="sum")
SGD = Optimizer(name="sgd", learning_rate=0.1, weight_decay=0.0, momentum=0.0, dampening=0.0, nesterov=False)

few = settings(deadline=None, max_examples=25)


def golden(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))


def assert_near(got, wanted, *, tolerance: float) -> None:
    """Shapes are equal and no element is off by more than `tolerance` times the largest wanted value, or 1."""
    got, wanted = np.asarray(got), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape, f"shape {got.shape}, wanted {wanted.shape}"
    allowed = tolerance * max(1.0, np.abs(wanted).max(initial=0))
    apart = np.abs(got - wanted).max(initial=0)
    assert apart <= allowed, f"off by {apart}, allowed {allowed}: got {got}, wanted {wanted}"


def mlp(*hidden: tuple[int, str], bias: bool = True, input_batchnorm: bool = False) -> Model:
    sizes, activations = tuple(size for size, _ in hidden), tuple(kind for _, kind in hidden)
    return Model(name="mlp", hidden_sizes=sizes, activations=activations, bias=bias, input_batchnorm=input_batchnorm)


def cnn(*channels: int, hidden: tuple[int, ...] = (), dropout: float = 0.0) -> Model:
    return Model(name="cnn", hidden_sizes=hidden, channels=channels, dropout=dropout)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network in a random state, float64, a random batch, and a dropout mask for each layer that needs one."""

    model: Model
    state: dict[str, np.ndarray]
    inputs: np.ndarray
    labels: np.ndarray
    masks: dict[str, np.ndarray]

    def forward(self, state=None, *, train=True, decisions=None) -> oracle.Forward:
        decisions = self.masks if decisions is None else decisions
        return oracle.forward(
            self.model, self.state if state is None else state, self.inputs, train=train, decisions=decisions
        )

    def loss(self, loss: Loss, state, decisions) -> float:
        losses = oracle.example_losses(self.forward(state, decisions=decisions).logits, self.labels, loss)
        return losses.mean() if loss.reduction == "mean" else losses.sum()

    def gradients(self, loss: Loss, decisions=None) -> dict[str, np.ndarray]:
        decisions = self.masks if decisions is None else decisions
        return oracle.gradients(self.model, loss, self.state, self.inputs, self.labels, decisions=decisions)


def problem(
    model: Model, shape: tuple[int, ...], loss: Loss = CROSS_ENTROPY, *, batch: int = 5, seed: int = 0
) -> Problem:
    generator = np.random.default_rng(seed)
    outputs, classes = (1, 2) if loss.name == "binary_cross_entropy" else (3, 3)
    state = {}
    for leaf in params.leaves(model, shape, outputs):
        values = generator.standard_normal(leaf.shape)
        if leaf.role == "weight":
            values /= np.sqrt(leaf.fan_in)
        if leaf.role == "shift":
            values -= 1  # closes some gates of relu: through open ones alone the next BatchNorm takes a shift off again
        state[leaf.name] = values**2 + 0.5 if leaf.role in ("scale", "running_var") else values
    masks = {
        f"dropout{index}": generator.random((batch, units)) >= (model.dropout or 0)
        for index, units in enumerate(model.hidden_sizes, start=1)
        if model.name == "cnn"
    }
    inputs = generator.standard_normal((batch, *shape))
    return Problem(model, state, inputs, generator.integers(0, classes, batch), masks)


MIXED = mlp((6, "sigmoid"), (5, "tanh"), (7, "relu"))
SMALL_CNN = cnn(3, 4, hidden=(6, 5), dropout=0.4)


# The vectors


def test_the_helper_fails_on_another_value_another_shape_and_nan():
    for wrong in ([1.0, 2.1], [[1.0, 2.0]], [1.0, np.nan]):
        with pytest.raises(AssertionError):
            assert_near(wrong, [1.0, 2.0], tolerance=ORACLE_FORMULA)


@pytest.mark.parametrize("file", sorted(GOLDEN.iterdir(), key=str), ids=lambda file: file.name)
def test_every_golden_file_names_its_clause_and_says_how_to_check_it_by_hand(file):
    content = json.loads(file.read_text("utf-8"))
    assert content["clause"] == f"S{int(file.name[1:3])}"
    assert len(content["why"]) > 80


def test_the_golden_orders_and_counts_are_those_of_the_batches():
    for case in golden("s02_order")["orders"]:
        order = batches.epoch_order(case["seed"], case["epoch"], case["num_examples"])
        assert order[: len(case["first"])].tolist() == case["first"]
    for case in golden("s02_order")["counts"]:
        changed = dataclasses.replace(
            recipe.load("mlp128"), batch_size=case["batch_size"], last_batch=case["last_batch"]
        )
        sizes = batches.count(changed, case["num_examples"]).batch_sizes()
        assert (len(sizes), sizes[-1]) == (case["steps"], case["last"])


@pytest.mark.parametrize("case", golden("s03_convolution")["cases"], ids=lambda case: case["name"])
def test_a_convolution_lays_the_kernel_over_each_pixel_unturned(case):
    image, kernel, bias = (np.array(case[key], float) for key in ("image", "kernel", "bias"))
    assert layers.convolution(image[None], kernel, bias).output[0].tolist() == case["output"]


def test_a_pool_takes_the_first_of_the_largest_and_leaves_the_odd_edge_out():
    case = golden("s03_pool")
    pooled = layers.max_pool(np.array(case["image"], float)[None, None])
    assert pooled.output[0, 0].tolist() == case["output"]
    assert pooled.decision.dtype == np.int8
    assert pooled.decision[0, 0].tolist() == case["choice"]
    grad, _ = pooled.back(np.array(case["output_grad"], float)[None, None])
    assert grad[0, 0].tolist() == case["image_grad"]


def test_relu_passes_nothing_at_0_neither_forward_nor_back():
    case = golden("s03_relu")
    applied = layers.relu(np.array(case["inputs"], float))
    assert applied.output.tolist() == case["output"]
    assert applied.decision.tolist() == case["gate"]
    assert applied.back(np.array(case["output_grad"], float))[0].tolist() == case["inputs_grad"]


def test_an_image_is_flattened_channel_row_column():
    case = golden("s03_flatten")
    state = {"linear1.weight": case["weight"]}
    passed = oracle.forward(mlp(bias=False), state, [case["image_channels_last"]], train=False)
    assert passed.logits.tolist() == [case["logits"]]
    picked = oracle.forward(mlp(bias=False), {"linear1.weight": np.eye(8)}, [case["image_channels_last"]], train=False)
    assert picked.logits.tolist() == [case["flattened"]]


def test_softmax_of_one_to_four_is_the_lessons_and_a_thousand_more_changes_nothing():
    case = golden("s04_loss")["softmax_of_one_to_four"]
    logits = np.array(case["logits"])
    assert_near(oracle.softmax(logits), case["softmax"], tolerance=FOUR_DECIMALS)
    assert oracle.softmax(logits + case["shift"]).tolist() == oracle.softmax(logits).tolist()
    case = golden("s04_loss")["softmax_of_logarithms"]
    assert_near(oracle.softmax(np.log(case["exp_of_logits"])), case["softmax"], tolerance=ORACLE_FORMULA)


@pytest.mark.parametrize("case", golden("s04_loss")["cross_entropy"])
def test_cross_entropy_is_the_golden_multiple_of_ln_2(case):
    loss = dataclasses.replace(CROSS_ENTROPY, label_smoothing=case["label_smoothing"])
    logits = np.log(2) * np.array([case["logits_in_ln2"]])
    tolerance = ORACLE_FORMULA * max(1, np.abs(logits).max())  # a logit of 700 is itself only right to 700 eps
    assert_near(
        oracle.example_losses(logits, [case["label"]], loss), [case["loss_in_ln2"] * np.log(2)], tolerance=tolerance
    )


def test_a_second_softmax_gives_the_golden_losses():
    for case in golden("s04_loss")["cross_entropy_of_softmax"]:
        assert_near(
            oracle.example_losses([case["logits"]], [case["label"]], OF_SOFTMAX),
            [case["loss"]],
            tolerance=ORACLE_FORMULA,
        )


def test_binary_cross_entropy_is_golden_near_and_far():
    for case in golden("s04_loss")["binary_cross_entropy"]:
        found = oracle.example_losses([[np.log(case["exp_of_logit"])]], [case["label"]], BINARY)
        assert_near(np.exp(-found), [case["exp_of_minus_loss"]], tolerance=ORACLE_FORMULA)
    for case in golden("s04_loss")["binary_cross_entropy_far_out"]:
        assert oracle.example_losses([[case["logit"]]], [case["label"]], BINARY).tolist() == [case["loss"]]


@pytest.mark.parametrize("case", golden("s05_gradients")["by_the_logits"])
def test_the_gradient_by_the_logits_is_golden_and_a_mean_divides_it(case):
    loss = Loss(name=case["loss"], reduction="sum", label_smoothing=case["label_smoothing"])
    logits, labels = np.log(2) * np.array([case["logits_in_ln2"]] * 2), [case["label"]] * 2
    assert_near(oracle.loss_gradient(logits, labels, loss), [case["grad"]] * 2, tolerance=ORACLE_FORMULA)
    loss = dataclasses.replace(loss, reduction="mean")
    assert_near(oracle.loss_gradient(logits, labels, loss), [np.array(case["grad"]) / 2] * 2, tolerance=ORACLE_FORMULA)


def test_both_ways_back_through_softmax_regression_are_golden():
    case = {key: np.array(value) for key, value in golden("s05_gradients")["softmax_regression"].items()}
    weight, bias = oracle.softmax_regression_gradients(case["weight"], case["bias"], case["inputs"], case["labels"])
    state = {"linear1.weight": case["weight"], "linear1.bias": case["bias"]}
    grads = oracle.gradients(mlp(), CROSS_ENTROPY, state, case["inputs"], case["labels"])
    for found in (weight, grads["linear1.weight"]):
        assert found.tolist() == case["weight_grad"].tolist()
    for found in (bias, grads["linear1.bias"]):
        assert found.tolist() == case["bias_grad"].tolist()


def test_both_ways_back_through_the_two_layer_binary_net_are_golden():
    case = {key: np.array(value, float) for key, value in golden("s05_gradients")["two_layer_binary"].items()}
    b2 = np.log(case["exp_of_b2"])
    found = oracle.two_layer_binary_gradients(case["w1"], case["b1"], case["w2"], b2, case["x"], case["y"], "mean")
    state = {
        "linear1.weight": case["w1"].T,
        "linear1.bias": case["b1"],
        "linear2.weight": case["w2"].T,
        "linear2.bias": b2,
    }
    grads = oracle.gradients(mlp((2, "sigmoid")), BINARY, state, case["x"], case["y"])
    for name, closed, leaf in zip(("w1", "b1", "w2", "b2"), found, state, strict=True):
        assert_near(closed, case[f"{name}_grad"], tolerance=ORACLE_FORMULA)
        assert_near(grads[leaf].T, case[f"{name}_grad"], tolerance=ORACLE_FORMULA)


def descend(optimizer: Optimizer, start, grads, rates) -> list[np.ndarray]:
    """Return the parameter after each update."""
    parameters = {"w": np.array(start, np.float64)}
    opt_state, path = oracle.initial_opt_state(optimizer, parameters), []
    for grad, rate in zip(grads, rates, strict=True):
        parameters, opt_state = oracle.update(optimizer, rate, parameters, {"w": np.array(grad)}, opt_state)
        path.append(parameters["w"])
    assert opt_state["step"] == len(path)
    return path


@pytest.mark.parametrize("case", golden("s06_sgd")["cases"], ids=lambda case: case["name"])
def test_sgd_takes_the_golden_path(case):
    options = {key: case[key] for key in ("momentum", "dampening", "nesterov", "weight_decay")}
    path = descend(dataclasses.replace(SGD, **options), case["start"], case["grads"], case["learning_rates"])
    assert_near(path, case["path"], tolerance=ORACLE_FORMULA)


@pytest.mark.parametrize("case", golden("s06_adam")["cases"], ids=lambda case: case["name"])
def test_adam_takes_the_golden_path(case):
    options = {key: case[key] for key in ("learning_rate", "betas", "epsilon", "weight_decay")}
    rates = [case["learning_rate"]] * len(case["grads"])
    path = descend(Optimizer(name="adam", **options), case["start"], case["grads"], rates)
    assert_near(path, case["path"], tolerance=ORACLE_FORMULA)


@pytest.mark.parametrize("case", golden("s06_schedule")["cases"])
def test_the_rates_of_the_epochs_are_golden(case):
    changed = dataclasses.replace(
        recipe.load("mlp128"),
        optimizer=dataclasses.replace(SGD, learning_rate=case["learning_rate"]),
        schedule=Schedule(**case["schedule"]),
        epochs=len(case["rates"]),
    )
    found = [oracle.learning_rate(changed, epoch) for epoch in range(1, changed.epochs + 1)]
    assert found[0] == case["learning_rate"]
    assert_near(found, case["rates"], tolerance=ORACLE_FORMULA)


def test_batchnorm_trains_by_the_biased_variance_and_runs_the_unbiased_one():
    case = {key: np.array(value, float) for key, value in golden("s07_batchnorm")["training"].items()}
    plain = layers.batchnorm(case["inputs"], np.ones(1), np.zeros(1), np.zeros(1), np.ones(1))
    assert_near(plain.output, case["normalized"], tolerance=ORACLE_FORMULA)
    once = layers.batchnorm(case["inputs"], case["weight"], case["bias"], np.zeros(1), np.ones(1))
    twice = layers.batchnorm(case["inputs"], case["weight"], case["bias"], **once.batch_stats)
    assert_near(once.output, case["output"], tolerance=ORACLE_FORMULA)
    for name in ("running_mean", "running_var"):
        assert_near(once.batch_stats[name], case[name], tolerance=ORACLE_FORMULA)
        assert_near(twice.batch_stats[name], case[f"{name}_after_two"], tolerance=ORACLE_FORMULA)


def test_batchnorm_evaluates_by_the_running_statistics_and_leaves_them():
    case = {key: np.array(value, float) for key, value in golden("s07_batchnorm")["evaluation"].items()}
    found = layers.batchnorm_by_running(
        case["inputs"], case["weight"], case["bias"], case["running_mean"], case["running_var"]
    )
    assert_near(found.output, case["output"], tolerance=ORACLE_FORMULA)
    assert all(found.batch_stats[name] == case[name] for name in ("running_mean", "running_var"))


def test_dropout_scales_what_it_keeps_and_its_gradient():
    case = {key: np.array(value) for key, value in golden("s07_dropout").items()}
    found = layers.dropout(case["inputs"], float(case["rate"]), case["mask"])
    assert found.output.tolist() == case["output"].tolist()
    assert found.back(case["output_grad"])[0].tolist() == case["inputs_grad"].tolist()


def test_the_metrics_are_golden():
    cases = golden("s08_metrics")
    mean = cases["weighted_mean"]
    assert_near(oracle.weighted_mean(mean["values"], mean["sizes"]), mean["mean"], tolerance=ORACLE_FORMULA)
    assert np.mean(mean["values"]) == mean["mean_of_means"] != mean["mean"]
    for case in cases["predictions"]:
        assert oracle.predictions(case["logits"]).tolist() == case["predictions"]
    case = cases["accuracy"]
    assert oracle.accuracy(case["predictions"], case["labels"]) == case["accuracy"]


# Central differences

DIFFERENTIATED = {
    "softmax regression": (mlp(), (4,), CROSS_ENTROPY),
    "softmax regression on images": (mlp(), (3, 2, 2), SMOOTHED_SUM),
    "sigmoid, tanh, relu": (MIXED, (4,), CROSS_ENTROPY),
    "sigmoid, tanh, relu, without biases": (dataclasses.replace(MIXED, bias=False), (4,), SMOOTHED_SUM),
    "two softmaxes": (MIXED, (4,), OF_SOFTMAX),
    "two softmaxes, smoothed, sum": (MIXED, (4,), SMOOTHED_OF_SOFTMAX_SUM),
    "binary": (mlp((6, "sigmoid")), (4,), BINARY),
    "binary, sum": (MIXED, (4,), BINARY_SUM),
    "batchnorm of the features": (mlp((6, "relu"), input_batchnorm=True), (4,), CROSS_ENTROPY),
    "batchnorm of the images": (mlp((6, "relu"), bias=False, input_batchnorm=True), (3, 2, 2), SMOOTHED_SUM),
    "cnn on 7x5": (SMALL_CNN, (7, 5, 2), CROSS_ENTROPY),
    "cnn on 5x6, smoothed, sum": (cnn(2, hidden=(5,), dropout=0.5), (5, 6, 1), SMOOTHED_SUM),
    "cnn, two softmaxes": (cnn(2, hidden=(5,)), (4, 4, 1), OF_SOFTMAX),
    "cnn without hidden layers, binary": (cnn(3), (5, 4, 2), BINARY),
}


def before_batchnorm(name: str, model: Model) -> bool:
    """Say whether a leaf is a bias whose layer BatchNorm follows: it takes the mean off, so the gradient is 0."""
    layer, leaf = name.split(".")
    order = oracle.layer_names(model)
    return leaf == "bias" and layer != order[-1] and order[order.index(layer) + 1].startswith("norm")


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_the_gradient_of_every_leaf_is_its_central_difference(name):
    model, shape, loss = DIFFERENTIATED[name]
    given = problem(model, shape, loss)
    # The gates are held, so that no step crosses a kink; where none is crossed that changes nothing.
    decisions = given.forward().decisions
    grads = given.gradients(loss)
    trained = [
        leaf.name for leaf in params.leaves(model, shape, 1 if loss.name.startswith("binary") else 3) if leaf.trained
    ]
    assert list(grads) == trained
    size = max(1.0, given.loss(loss, given.state, decisions))
    for leaf, grad in grads.items():
        difference = np.empty(grad.shape)
        for place in np.ndindex(grad.shape):
            sides = []
            for sign in (1, -1):
                moved = given.state[leaf].copy()
                moved[place] += sign * DIFFERENCE_STEP
                sides.append(given.loss(loss, given.state | {leaf: moved}, decisions))
            difference[place] = (sides[0] - sides[1]) / (2 * DIFFERENCE_STEP)
        assert_near(grad, difference, tolerance=CENTRAL_DIFFERENCE * size)
        if before_batchnorm(leaf, model):
            assert_near(grad, np.zeros(grad.shape), tolerance=ORACLE_SUM * size)
        else:
            assert np.abs(grad).max() > 100 * CENTRAL_DIFFERENCE * size, f"{leaf} has no gradient to speak of"


@few
@given(
    reduction=st.sampled_from(["mean", "sum"]),
    kind=st.sampled_from(["cross_entropy", "cross_entropy_of_softmax", "binary_cross_entropy"]),
    smoothing=st.floats(0, 0.9),
    classes=st.integers(2, 6),
    batch=st.integers(1, 5),
    spread=st.floats(0.1, 5),
    seed=st.integers(0, 99),
)
def test_the_gradient_by_the_logits_is_its_central_difference(reduction, kind, smoothing, classes, batch, spread, seed):
    generator = np.random.default_rng(seed)
    binary = kind == "binary_cross_entropy"
    loss = Loss(name=kind, reduction=reduction, label_smoothing=0.0 if binary else smoothing)
    logits = spread * generator.standard_normal((batch, 1 if binary else classes))
    labels = generator.integers(0, 2 if binary else classes, batch)
    reduce = np.mean if reduction == "mean" else np.sum
    difference = np.empty(logits.shape)
    for place in np.ndindex(logits.shape):
        nudge = np.zeros(logits.shape)
        nudge[place] = DIFFERENCE_STEP
        sides = [reduce(oracle.example_losses(logits + sign * nudge, labels, loss)) for sign in (1, -1)]
        difference[place] = (sides[0] - sides[1]) / (2 * DIFFERENCE_STEP)
    size = max(1.0, np.abs(logits).max() * batch)
    assert_near(oracle.loss_gradient(logits, labels, loss), difference, tolerance=CENTRAL_DIFFERENCE * size)


hidden_layers = st.lists(st.tuples(st.integers(1, 6), st.sampled_from(["sigmoid", "tanh", "relu"])), max_size=3)
mlps = st.builds(
    lambda hidden, **options: mlp(*hidden, **options), hidden_layers, bias=st.booleans(), input_batchnorm=st.booleans()
)
cnns = st.builds(
    lambda channels, hidden, dropout: cnn(*channels, hidden=tuple(hidden), dropout=dropout),
    st.lists(st.integers(1, 4), min_size=1, max_size=2),
    st.lists(st.integers(4, 7), max_size=2),
    st.floats(0, 0.5),
)
shapes = st.tuples(st.integers(4, 7), st.integers(4, 7), st.integers(1, 3))


@few
@given(model=st.one_of(mlps, cnns), shape=shapes, batch=st.integers(6, 12), seed=st.integers(0, 99))
def test_the_slope_in_any_direction_is_the_gradient_along_it(model, shape, batch, seed):
    given = problem(model, shape, CROSS_ENTROPY, batch=batch, seed=seed)
    passed = given.forward()
    # Where a batch hardly varies, BatchNorm's third derivative is too large for central differences to be right.
    before = [first for first, second in itertools.pairwise(oracle.layer_names(model)) if second.startswith("norm")]
    for outputs in (passed.activations[name] for name in before):
        assume(outputs.reshape(batch, outputs.shape[1], -1).var(axis=(0, 2)).min() > 0.05)
    grads = given.gradients(CROSS_ENTROPY)
    generator = np.random.default_rng(seed)
    direction = {name: generator.standard_normal(grad.shape) for name, grad in grads.items()}
    length = np.sqrt(sum((values**2).sum() for values in direction.values()))
    sides = []
    for sign in (1, -1):
        moved = {
            name: given.state[name] + sign * DIFFERENCE_STEP / length * values for name, values in direction.items()
        }
        sides.append(given.loss(CROSS_ENTROPY, given.state | moved, passed.decisions))
    slope = sum((grads[name] * values).sum() for name, values in direction.items()) / length
    assert_near(
        slope, (sides[0] - sides[1]) / (2 * DIFFERENCE_STEP), tolerance=CENTRAL_DIFFERENCE * max(1.0, *map(abs, sides))
    )


# Closed forms and plain loops


@few
@given(batch=st.integers(1, 7), features=st.integers(1, 9), classes=st.integers(2, 6), seed=st.integers(0, 99))
def test_softmax_regression_on_paper_is_the_general_way_back(batch, features, classes, seed):
    generator = np.random.default_rng(seed)
    weight, bias = generator.standard_normal((classes, features)), generator.standard_normal(classes)
    inputs, labels = generator.standard_normal((batch, features)), generator.integers(0, classes, batch)
    closed = oracle.softmax_regression_gradients(weight, bias, inputs, labels)
    state = {"linear1.weight": weight, "linear1.bias": bias}
    grads = oracle.gradients(mlp(), CROSS_ENTROPY, state, inputs, labels)
    for name, wanted in zip(state, closed, strict=True):
        assert_near(grads[name], wanted, tolerance=ORACLE_SUM)


@few
@given(
    batch=st.integers(1, 7),
    features=st.integers(1, 9),
    hidden=st.integers(1, 6),
    loss=st.sampled_from([BINARY, BINARY_SUM]),
    seed=st.integers(0, 99),
)
def test_the_two_layer_binary_net_on_paper_is_the_general_way_back(batch, features, hidden, loss, seed):
    generator = np.random.default_rng(seed)
    w1, b1 = generator.standard_normal((features, hidden)), generator.standard_normal(hidden)
    w2, b2 = generator.standard_normal((hidden, 1)), generator.standard_normal(1)
    x, y = generator.standard_normal((batch, features)), generator.integers(0, 2, batch)
    closed = oracle.two_layer_binary_gradients(w1, b1, w2, b2, x, y, loss.reduction)
    state = {"linear1.weight": w1.T, "linear1.bias": b1, "linear2.weight": w2.T, "linear2.bias": b2}
    grads = oracle.gradients(mlp((hidden, "sigmoid")), loss, state, x, y)
    for name, wanted in zip(state, closed, strict=True):
        assert_near(grads[name], wanted.T, tolerance=ORACLE_SUM)


tiny = st.integers(1, 4)


@few
@given(batch=tiny, inputs=tiny, outputs=tiny, height=tiny, width=tiny, seed=st.integers(0, 99))
def test_a_convolution_is_its_sum_pixel_by_pixel_and_its_way_back_the_adjoint(
    batch, inputs, outputs, height, width, seed
):
    generator = np.random.default_rng(seed)
    x, grad = (
        generator.standard_normal((batch, inputs, height, width)),
        generator.standard_normal((batch, outputs, height, width)),
    )
    weight, bias = generator.standard_normal((outputs, inputs, 3, 3)), generator.standard_normal(outputs)
    expected = np.zeros(grad.shape)
    for n, o, r, s in np.ndindex(grad.shape):
        expected[n, o, r, s] = bias[o]
        for c, i, j in np.ndindex(inputs, 3, 3):
            if 0 <= r + i - 1 < height and 0 <= s + j - 1 < width:
                expected[n, o, r, s] += weight[o, c, i, j] * x[n, c, r + i - 1, s + j - 1]
    applied = layers.convolution(x, weight, bias)
    assert_near(applied.output, expected, tolerance=ORACLE_SUM)
    # Linear in x and in W: <g, W * x> = <dx, x> = <dW, W>.
    x_grad, own = applied.back(grad)
    product = (grad * (expected - bias[:, None, None])).sum()
    size = np.abs(grad).sum() * np.abs(expected).max()
    for found in ((x_grad * x).sum(), (own["weight"] * weight).sum()):
        assert abs(found - product) <= ORACLE_FORMULA * max(1.0, size)
    assert_near(own["bias"], grad.sum(axis=(0, 2, 3)), tolerance=ORACLE_SUM)


@few
@given(batch=tiny, channels=tiny, height=st.integers(2, 7), width=st.integers(2, 7), seed=st.integers(0, 99))
def test_a_pool_is_the_largest_of_each_window_and_its_gradient_lands_there(batch, channels, height, width, seed):
    generator = np.random.default_rng(seed)
    x = generator.integers(0, 4, (batch, channels, height, width)).astype(float)  # few values, so many ties
    pooled = layers.max_pool(x)
    grad = generator.standard_normal(pooled.output.shape)
    expected = np.zeros(x.shape)
    for n, c, r, s in np.ndindex(grad.shape):
        window = x[n, c, 2 * r : 2 * r + 2, 2 * s : 2 * s + 2].ravel().tolist()
        place = window.index(max(window))
        assert (pooled.output[n, c, r, s], pooled.decision[n, c, r, s]) == (max(window), place)
        expected[n, c, 2 * r + place // 2, 2 * s + place % 2] = grad[n, c, r, s]
    assert pooled.output.shape == (batch, channels, height // 2, width // 2)
    assert pooled.back(grad)[0].tolist() == expected.tolist()


@few
@given(
    rate=st.floats(1e-3, 1),
    momentum=st.floats(0.01, 0.95),
    dampening=st.floats(0, 1),
    nesterov=st.booleans(),
    steps=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_sgd_ends_where_its_sums_of_gradients_say(rate, momentum, dampening, nesterov, steps, seed):
    grads = np.random.default_rng(seed).standard_normal((steps, 3))
    weights = np.where(np.arange(steps) == 0, 1.0, 1 - dampening)  # the first buffer is undamped
    buffers = [
        sum(momentum ** (now - then) * weights[then] * grads[then] for then in range(now + 1)) for now in range(steps)
    ]
    directions = grads + momentum * np.array(buffers) if nesterov else np.array(buffers)
    optimizer = dataclasses.replace(SGD, momentum=momentum, dampening=dampening, nesterov=nesterov)
    path = descend(optimizer, np.ones(3), grads, [rate] * steps)
    assert_near(path, 1 - rate * directions.cumsum(axis=0), tolerance=ORACLE_SUM)


@few
@given(
    rate=st.floats(1e-4, 1),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.999)),
    epsilon=st.floats(1e-8, 1),
    grad=st.floats(0.01, 100),
    steps=st.integers(1, 8),
)
def test_adam_under_a_constant_gradient_steps_by_g_over_g_plus_epsilon(rate, betas, epsilon, grad, steps):
    optimizer = Optimizer(name="adam", learning_rate=rate, weight_decay=0.0, betas=betas, epsilon=epsilon)
    path = descend(optimizer, [0.0], [[grad]] * steps, [rate] * steps)
    wanted = -rate * grad / (grad + epsilon) * np.arange(1, steps + 1)[:, None]
    # 1 - beta^t is right to eps / (1 - beta), a thousand eps at beta 0.999.
    assert_near(path, wanted, tolerance=ORACLE_FORMULA / (1 - max(betas)))


@few
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 99))
def test_the_weighted_mean_of_batch_means_is_the_mean_over_examples(sizes, seed):
    values = np.random.default_rng(seed).standard_normal(sum(sizes))
    means = [part.mean() for part in np.split(values, np.cumsum(sizes)[:-1])]
    assert_near(oracle.weighted_mean(means, sizes), values.mean(), tolerance=ORACLE_FORMULA)


@few
@given(
    epochs=st.integers(1, 30),
    rate=st.floats(1e-4, 1),
    share=st.floats(0, 1),
    step_epochs=st.integers(1, 10),
    gamma=st.floats(0.01, 1),
)
def test_every_schedule_starts_at_the_recipes_rate_and_never_rises(epochs, rate, share, step_epochs, gamma):
    for schedule in (
        Schedule(name="constant"),
        Schedule(name="step", step_epochs=step_epochs, gamma=gamma),
        Schedule(name="cosine", final_learning_rate=share * rate),
    ):
        changed = dataclasses.replace(
            recipe.load("mlp128"),
            optimizer=dataclasses.replace(SGD, learning_rate=rate),
            schedule=schedule,
            epochs=epochs,
        )
        rates = np.array([oracle.learning_rate(changed, epoch) for epoch in range(1, epochs + 1)])
        assert_near(rates[0], rate, tolerance=ORACLE_FORMULA)
        assert (np.diff(rates) <= ORACLE_FORMULA * rate).all()
        if schedule.name == "cosine":
            assert rates.min() >= share * rate * (1 - ORACLE_FORMULA)


# Names, shapes, modes


def test_the_layers_are_named_by_kind_and_number_in_order():
    model = mlp((13, "sigmoid"), (8, "relu"), input_batchnorm=True)
    assert oracle.layer_names(model) == ("norm0", "linear1", "sigmoid1", "linear2", "relu2", "linear3")
    assert oracle.layer_names(cnn(3, 4, hidden=(6,))) == (
        *("conv1", "norm1", "relu1", "pool1", "conv2", "norm2", "relu2", "pool2"),
        *("linear1", "norm3", "relu3", "dropout1", "linear2"),
    )


def test_activations_have_torchs_layouts_and_odd_edges_go():
    passed = problem(SMALL_CNN, (7, 5, 2)).forward()
    shapes = {name: values.shape for name, values in passed.activations.items()}
    assert shapes["conv1"] == shapes["norm1"] == shapes["relu1"] == (5, 3, 7, 5)
    assert shapes["pool1"] == (5, 3, 3, 2)
    assert shapes["pool2"] == (5, 4, 1, 1)
    assert shapes["dropout1"] == (5, 6)
    assert shapes["linear3"] == passed.logits.shape == (5, 3)
    assert set(passed.decisions) == {"relu1", "pool1", "relu2", "pool2", "relu3", "dropout1", "relu4", "dropout2"}
    assert {values.dtype for values in passed.activations.values()} == {np.dtype(np.float64)}
    assert {name: values.dtype for name, values in passed.decisions.items() if name[-1] == "1"} == {
        "relu1": np.dtype(bool),
        "pool1": np.dtype(np.int8),
        "dropout1": np.dtype(bool),
    }


def test_the_input_batchnorm_is_one_channel_over_all_pixels():
    given = problem(mlp(input_batchnorm=True), (3, 2, 2))
    given.state["norm0.running_mean"][:], given.state["norm0.running_var"][:] = 0, 1
    stats = given.forward().batch_stats
    assert set(stats) == {"norm0.running_mean", "norm0.running_var"}
    assert_near(stats["norm0.running_mean"], [0.1 * given.inputs.mean()], tolerance=ORACLE_FORMULA)
    assert_near(stats["norm0.running_var"], [0.9 + 0.1 * given.inputs.var(ddof=1)], tolerance=ORACLE_FORMULA)


def test_evaluation_drops_nothing_keeps_the_statistics_and_sees_each_example_alone():
    given = problem(SMALL_CNN, (7, 5, 2))
    passed = given.forward(train=False)
    bare = oracle.forward(given.model, given.state, given.inputs, train=False)
    assert np.array_equal(passed.logits, bare.logits)
    assert np.array_equal(passed.activations["dropout1"], passed.activations["relu3"])
    assert "dropout1" not in passed.decisions
    assert all(np.array_equal(value, given.state[name]) for name, value in passed.batch_stats.items())
    alone = oracle.forward(given.model, given.state, given.inputs[:1], train=False)
    assert_near(alone.logits, passed.logits[:1], tolerance=ORACLE_SUM)
    with pytest.raises(ValueError, match="no way back; use train=True"):
        oracle.backward(passed, np.ones((5, 3)))


# Decisions


@pytest.mark.parametrize("model", [MIXED, SMALL_CNN], ids=lambda model: model.name)
def test_giving_a_pass_its_own_decisions_changes_no_bit(model):
    given = problem(model, (7, 5, 2))
    passed = given.forward()
    again = given.forward(decisions=passed.decisions)
    for kept in ("activations", "batch_stats", "decisions"):
        first, second = getattr(passed, kept), getattr(again, kept)
        assert first.keys() == second.keys()
        assert all(np.array_equal(first[name], second[name]) for name in first)
    grads = given.gradients(CROSS_ENTROPY), given.gradients(CROSS_ENTROPY, decisions=passed.decisions)
    assert all(np.array_equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_a_flipped_gate_lets_its_unit_through_or_stops_it_and_no_other():
    given = problem(mlp((6, "relu")), (4,), batch=1)
    passed = given.forward()
    before = passed.activations["linear1"][0]
    for unit in range(6):
        gate = passed.decisions["relu1"].copy()
        gate[0, unit] = not gate[0, unit]
        flipped = given.forward(decisions={"relu1": gate})
        expected = passed.activations["relu1"][0].copy()
        expected[unit] = before[unit] if gate[0, unit] else 0  # an open gate lets a negative value through
        assert flipped.activations["relu1"][0].tolist() == expected.tolist()
        assert flipped.activations["linear1"][0].tolist() == before.tolist()
        assert np.array_equal(flipped.decisions["relu1"], gate)
        rows = np.abs(given.gradients(CROSS_ENTROPY, decisions={"relu1": gate})["linear1.weight"]).max(axis=1)
        assert (rows > 0).tolist() == gate[0].tolist()  # the unit's own row of the gradient appears or goes
    assert 0 < passed.decisions["relu1"].sum() < 6  # both ways were tried


def test_another_choice_pools_that_element_and_sends_the_gradient_there():
    x = np.arange(12.0).reshape(1, 1, 2, 6)
    pooled = layers.max_pool(x, np.array([[[[0, 1, 2]]]]))
    assert pooled.output.tolist() == [[[[0, 3, 10]]]]
    assert pooled.back(np.array([[[[1.0, 2.0, 3.0]]]]))[0].tolist() == [[[[1, 0, 0, 2, 0, 0], [0, 0, 0, 0, 3, 0]]]]


def test_a_given_choice_reaches_the_pool_it_names_alone():
    given = problem(SMALL_CNN, (7, 5, 2))
    own = given.forward()
    changed = given.forward(decisions=given.masks | {"pool1": np.zeros((5, 3, 3, 2), np.int8)})
    assert np.array_equal(changed.activations["pool1"], own.activations["relu1"][:, :, :6:2, :4:2])
    assert np.array_equal(changed.activations["relu1"], own.activations["relu1"])
    assert not np.array_equal(changed.logits, own.logits)


def test_a_missing_mask_is_refused_by_the_layers_name_and_none_is_missed_without_dropout():
    given = problem(SMALL_CNN, (7, 5, 2))
    with pytest.raises(ValueError, match=r"dropout2 has no mask; in training with dropout 0\.4"):
        given.forward(decisions={"dropout1": given.masks["dropout1"]})
    plain = dataclasses.replace(given, model=dataclasses.replace(given.model, dropout=0.0), masks={})
    passed = plain.forward()
    assert np.array_equal(passed.activations["dropout1"], passed.activations["relu3"])
    assert passed.decisions["dropout1"].all()


@pytest.mark.parametrize(
    ("decisions", "message"),
    [
        ({"relu9": np.ones((5, 6), bool)}, "'relu9', which decides nothing"),
        ({"linear1": np.ones((5, 6), bool)}, "'linear1', which decides nothing"),
        ({"relu1": np.ones((5, 1), bool)}, r"relu1 has shape \(5, 1\); it must have \(5, 6\)"),
    ],
)
def test_a_decision_that_would_go_unheard_or_spread_is_refused(decisions, message):
    with pytest.raises(ValueError, match=message):
        problem(mlp((6, "relu")), (4,)).forward(decisions=decisions)


@pytest.mark.parametrize(
    ("logits", "labels", "loss", "message"),
    [
        (np.zeros((2, 3)), [0, 3], CROSS_ENTROPY, "label 3 is not a class; labels are integers from 0 to 2"),
        (np.zeros((2, 3)), [-1, 0], CROSS_ENTROPY, "label -1 is not a class"),
        (np.zeros((2, 3)), [[0], [1]], CROSS_ENTROPY, r"labels have shape \(2, 1\)"),
        (np.zeros((1, 1)), [2], BINARY, "label 2 is not a class; labels are integers from 0 to 1"),
        (np.zeros((2, 2)), [0, 1], BINARY, "takes 1 logit an example; these logits have 2"),
    ],
)
def test_labels_and_logits_that_do_not_fit_are_refused(logits, labels, loss, message):
    for function in (oracle.example_losses, oracle.loss_gradient):
        with pytest.raises(ValueError, match=message):
            function(logits, labels, loss)


def test_what_has_no_mean_no_variance_or_no_partner_is_refused():
    with pytest.raises(ValueError, match=r"both must be \[n\]"):
        oracle.accuracy([[1], [2]], [1, 2])
    with pytest.raises(ValueError, match="one value a channel has no variance"):
        problem(cnn(2, hidden=(4,)), (4, 4, 1), batch=1).forward()
    with pytest.raises(ValueError, match="must have the same names"):
        oracle.update(SGD, 0.1, {"a": np.ones(2)}, {"b": np.ones(2)}, {"step": np.array(0)})


# A step


def recipe_of(model: Model, **changes) -> recipe.Recipe:
    return dataclasses.replace(recipe.load("mlp128"), model=model, **changes)


def test_a_step_reports_the_loss_before_it_and_moves_parameters_and_statistics():
    optimizer = dataclasses.replace(SGD, momentum=0.9)
    step = Schedule(name="step", step_epochs=1, gamma=0.5)
    changed = recipe_of(SMALL_CNN, optimizer=optimizer, schedule=step, loss=SMOOTHED_SUM)
    given = problem(SMALL_CNN, (7, 5, 2))
    grads, passed = given.gradients(SMOOTHED_SUM), given.forward()
    opt_state = oracle.initial_opt_state(optimizer, grads)
    kept = {name: value.copy() for name, value in given.state.items()}
    state, after, loss, correct = oracle.train_step(changed, given.state, opt_state, passed, given.labels, epoch=2)
    assert list(state) == list(given.state)
    for name, grad in grads.items():
        assert_near(state[name], kept[name] - 0.05 * grad, tolerance=ORACLE_FORMULA)  # half of 0.1 in epoch 2
        assert np.array_equal(after[f"momentum_buffer.{name}"], grad)
    assert all(np.array_equal(state[name], value) for name, value in passed.batch_stats.items())
    assert_near(loss, oracle.example_losses(passed.logits, given.labels, SMOOTHED_SUM).mean(), tolerance=ORACLE_FORMULA)
    assert correct == (passed.logits.argmax(axis=1) == given.labels).sum()
    assert after["step"] == 1
    assert opt_state["step"] == 0
    assert all(np.array_equal(value, kept[name]) for name, value in given.state.items())
    assert not any(value.any() for value in opt_state.values())


@pytest.mark.parametrize(
    ("optimizer", "buffers"),
    [
        (SGD, []),
        (dataclasses.replace(SGD, momentum=0.9), ["momentum_buffer"]),
        (
            Optimizer(name="adam", learning_rate=0.1, weight_decay=0.0, betas=(0.9, 0.999), epsilon=1e-8),
            ["exp_avg", "exp_avg_sq"],
        ),
    ],
    ids=["sgd", "momentum", "adam"],
)
def test_the_optimisers_state_is_flat_and_keeps_its_names(optimizer, buffers):
    given = problem(mlp((4, "tanh"), input_batchnorm=True), (3,))
    names = list(given.gradients(CROSS_ENTROPY))
    opt_state = oracle.initial_opt_state(optimizer, {name: given.state[name] for name in names})
    assert list(opt_state) == ["step", *(f"{buffer}.{name}" for buffer in buffers for name in names)]
    changed = recipe_of(given.model, optimizer=optimizer)
    _, after, _, _ = oracle.train_step(changed, given.state, opt_state, given.forward(), given.labels, epoch=1)
    assert after.keys() == opt_state.keys()
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in opt_state.items()}
    assert after["step"].dtype == opt_state["step"].dtype == np.int64


def test_a_float32_state_is_taken_as_it_is_and_answered_in_float64():
    given = problem(MIXED, (4,))
    narrow = {name: value.astype(np.float32) for name, value in given.state.items()}
    wide = {name: value.astype(np.float64) for name, value in narrow.items()}
    labels = given.labels.astype(np.uint8)
    first = oracle.gradients(MIXED, CROSS_ENTROPY, narrow, given.inputs.astype(np.float32), labels)
    second = oracle.gradients(MIXED, CROSS_ENTROPY, wide, given.inputs.astype(np.float32).astype(np.float64), labels)
    assert all(first[name].dtype == np.float64 and np.array_equal(first[name], second[name]) for name in second)


def test_a_plain_total_adds_one_term_after_another():
    large = 2.0**24  # the next float32 is larger by 2
    terms = np.array([[[large, 1.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, large]]])
    plain = oracle.PlainSums("float32")
    assert plain.total(terms, axis=(0, 1, 2)).tolist() == 2 * large  # 1 after 2^24 is lost, each time
    assert plain.total(terms[:, ::-1, ::-1], axis=(0, 1, 2)).tolist() == 2 * large + 4
    assert plain.total(terms, axis=(0, 2)).tolist() == [large, large + 4]
    assert plain.total(terms[0], axis=0).tolist() == [large, 2.0]
    assert oracle.FLOAT64.total(terms, axis=(0, 2)).tolist() == [large + 3, large + 3]
    assert plain.total(terms, axis=0).dtype == np.float64


def test_a_plain_product_is_made_in_the_narrower_format():
    left, right = np.array([[2.0**-13 + 1, 1.0]]), np.array([[2.0**-13 + 1], [-1.0]])
    assert oracle.FLOAT64.product(left, right).tolist() == [[2.0**-12 + 2.0**-26]]
    assert oracle.PlainSums("float32").product(left, right).tolist() in ([[2.0**-12]], [[2.0**-12 + 2.0**-26]])  # fused
    narrow = np.array([[1 + 2.0**-25]])
    assert oracle.PlainSums("float32").product(narrow, np.ones((1, 1))).tolist() == [[1.0]]


def test_every_sum_of_a_pass_and_of_the_way_back_is_made_by_the_sums_given():
    model = dataclasses.replace(recipe.load("cnn").model, channels=(2,), hidden_sizes=(5,), dropout=0.0)
    generator = np.random.default_rng(0)
    state = {leaf.name: generator.uniform(0.1, 1, leaf.shape) for leaf in params.leaves(model, (4, 4, 1), 4)}
    images, labels = generator.uniform(-1, 1, (6, 4, 4, 1)), generator.integers(0, 4, 6)

    def made(sums: oracle.Sums) -> dict[str, np.ndarray]:
        passed = oracle.forward(model, state, images, train=True, sums=sums)
        return oracle.backward(passed, oracle.loss_gradient(passed.logits, labels, CROSS_ENTROPY)) | passed.batch_stats

    class Counted(oracle.Sums):
        products = totals = 0

        def product(self, left, right):
            self.products += 1
            return super().product(left, right)

        def total(self, terms, axis):
            self.totals += 1
            return super().total(terms, axis)

    exact, counted, plain = made(oracle.FLOAT64), Counted(), made(oracle.PlainSums("float32"))
    assert all(np.array_equal(array, exact[name]) for name, array in made(counted).items())
    assert counted.products == 3 * 3  # a convolution and two linear layers: forward, by the weights, by the input
    assert counted.totals == 3 + 2 * 4  # three biases; of two BatchNorms mean, variance and two gradients
    assert all(0 < np.abs(plain[name] - exact[name]).max() <= CEILING_FLOAT32 for name in exact)

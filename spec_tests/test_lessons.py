"""The lessons' facts (`spec.lessons`) by hand and by the frameworks, and the pictures of them (`spec.plots`)."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch

from spec import batches, oracle, params
from spec.datasets import Split
from spec.errors import UserError
from spec.lessons import activations, augmentation, backpropagation, descent, minibatches
from spec.plots import activations as activation_pictures
from spec.plots import backpropagation as backpropagation_pictures
from spec.plots import descent as descent_pictures
from spec.plots import style
from spec.plots.differences import differences_picture
from spec.recipe import Init, Model
from spec_tests.tolerances import (
    CENTRAL_DIFFERENCE,
    DEVIATIONS,
    FOUR_DECIMALS,
    FREE_RUN_FLOAT64,
    ORACLE_FORMULA,
    ORACLE_SUM,
    unit_roundoff,
)
from torch_ref import models as torch_models

CURVATURES = (12 - math.sqrt(128), 12 + math.sqrt(128))  # t^2 - 24 t + 16 = 0: trace and determinant of the Hessian
MU = 0.8


# Descent


def test_the_surface_is_0_at_1_1_and_its_gradient_by_hand_is_torchs():
    assert descent.surface(np.array(descent.MINIMUM)) == 0
    assert descent.surface(np.array([3.0, -1.0])) == (2 - 3 + 1) ** 2 + (4 - 9 + 1) ** 2
    weights = torch.tensor([3.0, -1.0], dtype=torch.float64, requires_grad=True)
    descent.surface(weights).backward()
    assert descent.surface_gradient([3.0, -1.0]).tolist() == weights.grad.tolist() == [24, 8]


def test_a_path_is_the_lessons_step_and_then_momentums():
    constant = np.array([5.0, 5.0])
    path = descent.path(lambda _: constant, [10.0, 7.5], descent.plain(1.0, momentum=0.5), steps=2)
    assert path.tolist() == [[10, 7.5], [5, 2.5], [-2.5, -5]]  # the second step is 5 + 0.5 * 5


def test_a_path_asks_for_the_gradient_where_it_stands():
    path = descent.path(lambda here: here, [8.0], descent.plain(0.5), steps=3)
    assert path.ravel().tolist() == [8, 4, 2, 1]


@pytest.mark.parametrize("momentum", [0.0, MU])
def test_above_the_largest_stable_rate_and_only_there_the_distance_grows(momentum):
    limit = descent.largest_stable_rate(CURVATURES[1], momentum=momentum)
    assert limit == pytest.approx((1 + momentum) * 2 / CURVATURES[1], rel=ORACLE_FORMULA)
    for rate, grows in ((0.99 * limit, False), (1.01 * limit, True)):
        factors = [descent.shrinkage(rate, curvature, momentum=momentum) for curvature in CURVATURES]
        assert (max(factors) > 1) == grows
        path = descent.path(descent.surface_gradient, [0.0, 2.5], descent.plain(rate, momentum=momentum), steps=2_000)
        assert (np.linalg.norm(path[-1] - 1) > np.linalg.norm(path[0] - 1)) == grows


@pytest.mark.parametrize("curvature", CURVATURES)
def test_without_momentum_the_distance_is_multiplied_by_1_minus_rate_times_curvature(curvature):
    rate = 0.07
    eigenvector = np.array([curvature - 4, 8.0])  # 8 (c - 4) + 4 * 8 = 8 c, the Hessian's second row
    start = np.array(descent.MINIMUM) + eigenvector
    path = descent.path(descent.surface_gradient, start, descent.plain(rate), steps=1)
    assert np.abs(path[1] - 1 - (1 - rate * curvature) * eigenvector).max() <= ORACLE_FORMULA * np.abs(start).max()
    assert descent.shrinkage(rate, curvature) == pytest.approx(abs(1 - rate * curvature), abs=ORACLE_SUM)


GRADS = np.array([[1.0], [2.0], [4.0]])


def test_a_rule_has_the_options_that_it_was_given():
    rule = descent.plain(0.1, momentum=0.2, dampening=0.3)
    assert (rule.name, rule.learning_rate, rule.momentum, rule.dampening, rule.nesterov) == (
        "sgd",
        0.1,
        0.2,
        0.3,
        False,
    )
    assert (rule.weight_decay, descent.plain(0.1, momentum=0.2, nesterov=True).nesterov) == (0, True)


def test_the_average_starts_from_zero_and_torch_adds_from_the_first_gradient():
    assert descent.averaged(GRADS, momentum=0.25).ravel().tolist() == [0.75, 1.6875, 3.421875]
    assert descent.buffers(GRADS, momentum=0.25).ravel().tolist() == [1, 2.25, 4.5625]
    assert descent.buffers(GRADS, momentum=0.25, dampening=0.5).ravel().tolist() == [1, 1.25, 2.3125]


@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_the_buffers_are_those_that_torchs_own_optimizer_keeps(dampening):
    weights = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    rule = torch.optim.SGD([weights], lr=0.1, momentum=MU, dampening=dampening)
    for grad, buffer in zip(GRADS, descent.buffers(GRADS, momentum=MU, dampening=dampening), strict=True):
        weights.grad = torch.tensor(grad)
        rule.step()
        kept = rule.state[weights]["momentum_buffer"].numpy()
        assert np.abs(kept - buffer).max() <= ORACLE_FORMULA * np.abs(buffer).max()


def test_a_rate_inside_the_buffer_is_torchs_step_until_the_rate_changes():
    steps = descent.rate_inside(GRADS, [1.0, 1.0, 0.5], momentum=0.5)
    assert steps.ravel().tolist() == [-1, -2.5, -(0.5 * 2.5 + 0.5 * 4)]
    assert -0.5 * descent.buffers(GRADS, momentum=0.5)[2] == -2.625


# Mini-batches


def tiny() -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(0)
    weight, bias, inputs = (generator.standard_normal(shape) for shape in ((3, 4), (3,), (60, 4)))
    return weight, bias, inputs, generator.integers(0, 3, 60)


def test_the_spread_is_that_of_the_gradients_of_every_single_example():
    weight, bias, inputs, labels = tiny()
    rows = [minibatches.flat_gradient(weight, bias, inputs[row : row + 1], labels[row : row + 1]) for row in range(60)]
    assert minibatches.spread(*tiny()) == pytest.approx(math.sqrt(np.var(rows, axis=0).sum()), rel=ORACLE_SUM)


@pytest.mark.parametrize("batch_size", [1, 7, 30])
def test_a_batchs_gradient_is_as_far_off_as_statistics_say(batch_size):
    squares = minibatches.squared_distances(*tiny(), batch_size=batch_size, draws=2_000, seed=0)
    expected = minibatches.expected_deviation(minibatches.spread(*tiny()), batch_size, 60) ** 2
    assert abs(squares.mean() - expected) <= DEVIATIONS * squares.std() / math.sqrt(len(squares))


def test_a_batch_of_everything_is_not_off():
    assert minibatches.squared_distances(*tiny(), batch_size=60, draws=2, seed=0).max() <= ORACLE_SUM
    assert minibatches.expected_deviation(3.0, 60, 60) == 0


def test_the_mean_of_two_of_three_values_is_off_as_the_third_is():
    deviation = np.std([0.0, 0.0, 3.0])
    means = [0.0, 1.5, 1.5]  # of the three pairs
    assert minibatches.expected_deviation(deviation, 2, 3) == pytest.approx(np.std(means), rel=ORACLE_FORMULA)


# Backpropagation


def net(examples: int = 20) -> tuple[backpropagation.Weights, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    weights = tuple(generator.standard_normal(shape) for shape in ((4, 3), (3,), (3, 1), (1,)))
    return weights, generator.standard_normal((examples, 4)), generator.integers(0, 2, examples)


def test_a_net_of_ones_by_hand():
    weights = tuple(np.ones(shape) for shape in ((1, 1), (1,), (1, 1), (1,)))
    passed = backpropagation.forward(weights, np.array([[1.0]]))
    hidden = 1 / (1 + math.exp(-2))
    assert passed.hidden.item() == pytest.approx(hidden, rel=ORACLE_FORMULA)
    assert passed.logits.item() == pytest.approx(hidden + 1, rel=ORACLE_FORMULA)
    sigma = 1 / (1 + math.exp(-hidden - 1))
    assert passed.sigma.item() == pytest.approx(sigma, rel=ORACLE_FORMULA)
    for label, expected in ((1, -math.log(sigma)), (0, -math.log(1 - sigma))):
        found = backpropagation.loss(weights, np.array([[1.0]]), np.array([label]), "sum")
        assert found == pytest.approx(expected, rel=ORACLE_FORMULA)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_numerical_differentiation_is_the_right_derivative_and_not_the_printed_one(reduction):
    weights, x, y = net()
    numerical = backpropagation.numerical_gradients(weights, x, y, reduction)
    right = oracle.two_layer_binary_gradients(*weights, x, y, reduction)
    printed = backpropagation.slipped_gradients(*weights, x, y, reduction)
    assert max(backpropagation.relative_errors(numerical, right)) <= CENTRAL_DIFFERENCE
    errors = backpropagation.relative_errors(printed, right)
    assert min(errors[:2]) > 0.01
    assert max(errors[2:]) <= ORACLE_SUM


def test_with_one_unit_of_the_outputs_own_value_the_printed_derivative_is_right_by_luck():
    weights = (np.zeros((2, 1)), np.zeros(1), np.zeros((1, 1)), np.zeros(1))  # h and sigma are 1/2 both
    weights = (*weights[:2], np.full((1, 1), 2.0), np.full(1, -1.0))
    x, y = np.array([[1.0, -2.0]]), np.array([1])
    printed = backpropagation.slipped_gradients(*weights, x, y, "sum")
    assert printed[0].ravel().tolist() == [-0.25, 0.5]  # (1/2 - 1) * 2 * 1/4 times the inputs
    assert all(map(np.array_equal, printed, oracle.two_layer_binary_gradients(*weights, x, y, "sum")))


def test_relative_errors_are_of_each_arrays_largest():
    wanted = [np.array([1.0, -4.0]), np.array([0.5])]
    assert backpropagation.relative_errors([np.array([2.0, -8.0]), np.array([0.5])], wanted) == [1.0, 0.0]


def test_the_step_of_numerical_differentiation_is_near_the_cube_root_of_a_rounding():
    step = inspect.signature(backpropagation.numerical_gradients).parameters["step"].default
    assert 1 / 2 < step / unit_roundoff("float64") ** (1 / 3) < 2


def test_training_steps_down_once_for_each_batch_in_the_epochs_order():
    weights, x, y = net(5)
    trained, losses = backpropagation.train(
        oracle.two_layer_binary_gradients, weights, x, y, rate=0.5, batch_size=3, epochs=2
    )
    expected, seen = weights, [weights]
    second = batches.epoch_order(0, 2, 5).tolist()
    assert second != [1, 4, 3, 0, 2]
    for epoch in ([1, 4, 3], [0, 2]), (second[:3], second[3:]):  # the first as the doctest of `epoch_order` has it
        for rows in epoch:
            grads = oracle.two_layer_binary_gradients(*expected, x[rows], y[rows], "mean")
            expected = tuple(weight - 0.5 * grad for weight, grad in zip(expected, grads, strict=True))
        seen.append(expected)
    assert all(map(np.array_equal, trained, expected))
    assert losses.tolist() == [backpropagation.loss(each, x, y, "mean") for each in seen]


# Augmentation


def test_every_image_comes_twice_the_second_time_moved_or_mirrored_with_its_label():
    corner = np.zeros((400, 5, 5, 1), np.uint8)
    corner[:, 2, 1] = 7
    images = Split(corner, np.arange(400, dtype=np.int32))
    more = augmentation.with_moved(images, pixels=1, seed=0)
    assert (more.inputs.dtype, more.labels.dtype, more.inputs.shape) == (np.uint8, np.int32, (800, 5, 5, 1))
    assert np.array_equal(more.inputs[:400], corner)
    assert np.array_equal(more.labels, np.tile(images.labels, 2))
    assert (more.inputs.reshape(800, -1).sum(axis=1) == 7).all()
    _, rows, columns, _ = np.nonzero(more.inputs[400:])
    # Column 1 mirrored is column 3; a pixel either way of both gives 0 to 4, and twice as often 2.
    for found, chances in ((rows - 1, np.full(3, 1 / 3)), (columns, np.array([1, 1, 2, 1, 1]) / 6)):
        off = np.bincount(found, minlength=len(chances)) - 400 * chances
        assert np.abs(off / np.sqrt(400 * chances * (1 - chances))).max() <= DEVIATIONS
    assert not np.array_equal(augmentation.with_moved(images, pixels=1, seed=1).inputs, more.inputs)


def test_what_leaves_the_edge_is_lost_and_zeros_come_in():
    ones = Split(np.ones((200, 2, 3, 2), np.uint8), np.zeros(200, np.int32))
    moved = augmentation.with_moved(ones, pixels=2, seed=0).inputs[200:]
    left = moved.reshape(200, -1).sum(axis=1) / 2  # of 2 x 3 pixels, those of (2 - |down|) rows, (3 - |right|) columns
    assert set(left.tolist()) == {0, 1, 2, 3, 4, 6}


# Activations


TORCHS = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "leaky relu": torch.nn.functional.leaky_relu,
}


@pytest.mark.parametrize("name", activations.ACTIVATIONS)
def test_an_activation_and_its_derivative_are_torchs(name):
    x = torch.linspace(-6, 6, 100, dtype=torch.float64, requires_grad=True)  # 0 is not among them
    y = TORCHS[name](x)
    y.sum().backward()
    ours, points = activations.ACTIVATIONS[name], x.detach().numpy()
    assert np.abs(ours.value(points) - y.detach().numpy()).max() <= ORACLE_FORMULA
    assert np.abs(ours.derivative(points) - x.grad.numpy()).max() <= ORACLE_FORMULA


def test_softmaxs_jacobian_is_torchs():
    logits = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(lambda z: z.softmax(0), logits).numpy()
    assert np.abs(activations.softmax_jacobian(logits.numpy()) - expected).max() <= ORACLE_FORMULA


def test_derivatives_multiply_to_a_quarter_a_layer_of_sigmoids_and_1_of_tanh():
    assert activations.derivative_products("sigmoid", [0, 1, 5]).tolist() == [1, 1 / 4, 1 / 1024]
    assert activations.derivative_products("tanh", 7) == 1


def test_the_sizes_of_gradients_are_torchs_at_its_own_initial_weights():
    ours = activations.gradient_sizes("tanh", layers=2, width=4, examples=8, seed=3)
    drawn = np.random.default_rng(3)
    inputs, labels = torch.from_numpy(drawn.standard_normal((8, 4))), torch.from_numpy(drawn.integers(0, 10, 8))
    model = Model(name="mlp", hidden_sizes=(4, 4), activations=("tanh", "tanh"), bias=True, input_batchnorm=False)
    net = torch_models.network(model, (4,), 10).double()
    initial = params.initial_state(
        params.leaves(model, (4,), 10), Init(weight="uniform_fan_in", bias="uniform_fan_in"), 3
    )
    net.load_state_dict({name: torch.from_numpy(array) for name, array in initial.items()})
    torch.nn.functional.cross_entropy(net(inputs), labels).backward()
    sizes = [weight.grad.square().mean().sqrt().item() for weight in net.parameters() if weight.ndim == 2]
    assert ours.tolist() == pytest.approx(sizes, rel=ORACLE_FORMULA)


def test_gradients_fade_towards_the_first_layer_most_with_sigmoids():
    first_to_last = {}
    for kind in ("sigmoid", "tanh"):
        sizes = activations.gradient_sizes(kind, layers=5, width=16, examples=32, seed=0)
        assert sizes.shape == (6,)
        first_to_last[kind] = sizes[0] / sizes[-1]
    assert first_to_last["sigmoid"] < 0.25**5 < first_to_last["tanh"]


# Pictures


def test_a_path_is_drawn_to_where_it_leaves_the_picture():
    path = np.array([[0.0, 0.0], [1.0, 1.0], [9.0, 1.0], [1.0, 1.0]])
    assert descent_pictures.until_it_leaves(path).tolist() == path[:3].tolist()
    assert descent_pictures.until_it_leaves(path[:2]).tolist() == path[:2].tolist()


def drawn(figure, panel: int) -> list[list[list[float]]]:
    return [line.get_xydata().tolist() for line in figure.axes[panel].lines]


def test_paths_are_drawn_from_their_start_over_the_minimum_a_panel_each():
    path = np.array([[0.0, 2.0], [1.0, 1.5]])
    figure = descent_pictures.paths_picture(
        {"plain": {"slow": path, "fast": path + 1}, "other": {"a": path, "b": path}}
    )
    assert [axes.get_title() for axes in figure.axes] == ["plain: slow", "plain: fast", "other: a", "other: b"]
    assert drawn(figure, 1) == [[[1, 1]], [[1, 3], [2, 2.5]], [[1, 3]]]


def test_the_surface_that_turns_has_the_surfaces_heights_and_its_minimum():
    whole, best = descent_pictures.turnable_surface(11).data
    first, second = np.meshgrid(whole.x[0], np.array(whole.y)[:, 0])
    assert np.array_equal(whole.z, (2 - first - second) ** 2 + (4 - 3 * first - second) ** 2)
    assert (best.x, best.y, best.z) == ((1.0,), (1.0,), (0.0,))


def test_the_surface_that_stands_still_is_seen_from_the_side_and_from_above():
    side, above = descent_pictures.surface_picture().axes
    assert side.name == "3d"
    assert [line.get_xydata().tolist() for line in above.lines] == [[[1, 1]]]


def test_losses_are_drawn_as_the_surfaces_height_along_the_path():
    figure = descent_pictures.losses_picture({"plain": {"a, rate 1": np.array([[0.0, 0.0], [1.0, 2.0]])}})
    assert drawn(figure, 0) == [[[0, 20], [1, 2]]]
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == "a"


def test_the_noise_and_the_cost_of_batches_are_drawn_beside_what_is_expected():
    figure = descent_pictures.noise_picture([1, 4], [3.0, 1.4], [3.0, 1.5], [0.001, 0.002])
    assert drawn(figure, 0) == [[[1, 3], [4, 1.4]], [[1, 3], [4, 1.5]]]
    assert drawn(figure, 1) == [[[1, 1], [4, 2]], [[1, 0.5], [4, 2]]]


def test_velocities_losses_and_sizes_are_drawn_by_name():
    values = {"one": np.array([1.0, 2.0]), "two": np.array([3.0, 4.0])}
    for figure in (descent_pictures.buffers_picture(values), backpropagation_pictures.losses_picture(values)):
        assert drawn(figure, 0) == [[[0, 1], [1, 2]], [[0, 3], [1, 4]]]
        assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["one", "two"]
    sizes = {"sigmoid": np.array([1.0, 2.0]), "tanh": np.array([3.0, 4.0])}
    figure = activation_pictures.vanishing_picture(sizes)
    assert drawn(figure, 0) == [[[0, 1], [1, 0.25]], [[0, 1], [1, 1]]]
    assert drawn(figure, 1) == [[[1, 1], [2, 2]], [[1, 3], [2, 4]]]


def test_a_gradients_entries_are_drawn_against_the_witnesss():
    figure = backpropagation_pictures.entries_picture(np.array([[1.0, 3.0]]), {"right": np.array([[1.0, 2.0]])})
    assert drawn(figure, 0) == [[[1, 1], [3, 3]], [[1, 1], [3, 2]]]


def test_five_activations_are_drawn_with_their_derivatives():
    figure = activation_pictures.activations_picture()
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:4] == ["sigmoid", "tanh", "relu", "leaky relu"]
    for axes, (value, slope) in zip(figure.axes, ((0.5, 0.25), (0, 1)), strict=False):
        middle = [line.get_ydata()[200] for line in axes.lines[:2]]  # of 401 points from -5 to 5: at 0
        assert np.abs(np.subtract(middle, (value, slope))).max() <= ORACLE_FORMULA
    z, probability = figure.axes[4].lines[0].get_data()
    assert np.interp(1, z, probability) == pytest.approx(
        0.0321, abs=FOUR_DECIMALS
    )  # the lesson's softmax([1, 2, 3, 4])

    slope = figure.axes[4].lines[1].get_ydata()
    assert np.abs(slope - probability * (1 - probability)).max() <= ORACLE_FORMULA  # dp/dz of its own logit


def test_how_far_runs_are_apart_is_drawn_under_its_bound():
    axes = differences_picture({50: 1e-16, 100: 2e-16}, bound=FREE_RUN_FLOAT64, title="a against b").axes[0]
    apart, bound = axes.lines
    assert [apart.get_xdata().tolist(), apart.get_ydata().tolist()] == [[50, 100], [1e-16, 2e-16]]
    assert (set(bound.get_ydata()), axes.get_yscale()) == ({FREE_RUN_FLOAT64}, "log")


def test_lines_differ_in_colour_dash_and_marker():
    looks = [style.line(index) for index in range(5)]
    for what in ("color", "linestyle", "marker"):
        assert len({look[what] for look in looks}) == 5
    assert style.line(5) == style.line(0)
    assert style.line(0, marker="")["marker"] == ""


@pytest.mark.parametrize(
    ("package", "draw"),
    [("matplotlib", descent_pictures.surface_picture), ("plotly", descent_pictures.turnable_surface)],
)
def test_a_missing_library_is_named_with_the_extra_that_brings_it(package, draw, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{package} is not installed.*pip install"):
        draw()

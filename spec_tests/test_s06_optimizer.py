"""S6: SGD in all its variants, Adam and the schedules: both implementations against the oracle, and from one to the
other in mid-run."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_impl.optim
import jax_impl.trainer
import torch_ref.optim
import torch_ref.trainer
from jax_impl.parallel import place
from jax_impl.programs import precision_scope
from spec import datasets, oracle, params, recipe
from spec.batches import epoch_order
from spec.recipe import Optimizer, Recipe, Schedule
from spec_tests.adapters import ADAPTERS, Adapter, Network
from spec_tests.assertions import assert_error_ratio, assert_identical, assert_within
from spec_tests.conftest import made_up_images
from spec_tests.tolerances import path_bound, run_bound, unit_roundoff

MLP128 = recipe.load("mlp128")
CONSTANT = Schedule(name="constant")
DROPS = Schedule(name="step", step_epochs=1, gamma=0.25)
COSINE = Schedule(name="cosine", final_learning_rate=0.02)
ONE_EPOCH = 1_000_000


def sgd(**changes: object) -> Optimizer:
    plain = {"learning_rate": 0.1, "weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False}
    return Optimizer(name="sgd", **plain | changes)


def adam(**changes: object) -> Optimizer:
    options = {"learning_rate": 0.1, "weight_decay": 0.0, "betas": (0.9, 0.99), "epsilon": 1e-2}
    return Optimizer(name="adam", **options | changes)


def with_optimizer(optimizer: Optimizer, schedule: Schedule = CONSTANT, epochs: int = 4) -> Recipe:
    return dataclasses.replace(MLP128, optimizer=optimizer, schedule=schedule, epochs=epochs, precision="float64")


# One array, given gradients: the path of the parameter, in float64, by each side's own update rule.


def jax_path(changed: Recipe, start: np.ndarray, grads: np.ndarray, *, steps_per_epoch: int = ONE_EPOCH) -> np.ndarray:
    with precision_scope("float64"):
        rule = jax_impl.optim.optimizer(changed, steps_per_epoch)
        parameter = jnp.asarray(start, jnp.float64)
        state, path = rule.init(parameter), []
        for grad in grads:
            updates, state = rule.update(jnp.asarray(grad, jnp.float64), state, parameter)
            parameter = optax.apply_updates(parameter, updates)
            path.append(np.asarray(parameter))
    return np.array(path)


def torch_path(
    changed: Recipe, start: np.ndarray, grads: np.ndarray, *, steps_per_epoch: int = ONE_EPOCH
) -> np.ndarray:
    parameter = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    rule = torch_ref.optim.optimizer(changed, [parameter])
    scheduler = torch_ref.optim.scheduler(changed, rule)
    path = []
    for step, grad in enumerate(grads, start=1):
        parameter.grad = torch.tensor(grad, dtype=torch.float64)
        rule.step()
        if step % steps_per_epoch == 0:
            scheduler.step()
        path.append(parameter.detach().numpy().copy())
    return np.array(path)


def oracle_path(
    changed: Recipe, start: np.ndarray, grads: np.ndarray, *, steps_per_epoch: int = ONE_EPOCH
) -> np.ndarray:
    parameter = {"w": np.asarray(start, np.float64)}
    state, path = oracle.initial_opt_state(changed.optimizer, parameter), []
    for step, grad in enumerate(grads):
        rate = oracle.learning_rate(changed, step // steps_per_epoch + 1)
        parameter, state = oracle.update(changed.optimizer, rate, parameter, {"w": grad}, state)
        path.append(parameter["w"])
    return np.array(path)


PATHS: dict[str, Callable[..., np.ndarray]] = {"jax": jax_path, "torch": torch_path}


@pytest.fixture(params=PATHS)
def path(request) -> Callable[..., np.ndarray]:
    return PATHS[request.param]


def random_grads(steps: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((steps, 3))


def assert_same_path(found: np.ndarray, expected: np.ndarray, *, momentum: float = 0.0, item: str = "path") -> None:
    size = max(1.0, float(np.abs(expected).max()))
    bound = path_bound(len(expected), size, np.float64, momentum=momentum)
    assert_within({"path": found}, {"path": expected}, bound=bound, item=item)


def test_the_lessons_step_goes_from_10_and_7_5_to_5_and_2_5(path):
    moved = path(with_optimizer(sgd(learning_rate=1.0)), np.array([10, 7.5]), np.array([[5.0, 5.0]]))
    assert moved.tolist() == [[5, 2.5]]


def test_second_step_adds_mu_times_first_gradient(path):
    moved = path(with_optimizer(sgd(learning_rate=0.5, momentum=0.5)), np.array([0.0]), np.array([[2.0], [4.0]]))
    assert moved.ravel().tolist() == [-1, -1 - 0.5 * (0.5 * 2 + 4)]  # the first step is plain


def test_nesterovs_first_step_is_one_plus_mu_times_the_gradient(path):
    rule = with_optimizer(sgd(learning_rate=1.0, momentum=0.5, nesterov=True))
    moved = path(rule, np.array([0.0]), np.array([[2.0], [4.0]]))
    assert moved.ravel().tolist() == [-1.5 * 2, -3 - (4 + 0.5 * (0.5 * 2 + 4))]


def test_the_first_buffer_is_not_damped(path):
    rule = with_optimizer(sgd(learning_rate=1.0, momentum=0.5, dampening=0.25))
    moved = path(rule, np.array([0.0]), np.array([[2.0], [4.0]]))
    assert moved.ravel().tolist() == [-2, -2 - (0.5 * 2 + 0.75 * 4)]


def test_all_gradients_damped_give_the_same_path_from_a_first_buffer_of_d_over_mu():
    mu, d, grads = 0.8, 0.3, random_grads(5)
    expected = oracle_path(with_optimizer(sgd(learning_rate=1.0, momentum=mu, dampening=d)), np.zeros(3), grads)
    paths = {}
    for name, buffer in {"from d/mu": d / mu * grads[0], "from zero": np.zeros(3)}.items():
        position, paths[name] = np.zeros(3), []
        for grad in grads:
            buffer = mu * buffer + (1 - d) * grad
            position = position - buffer
            paths[name].append(position)
    assert_same_path(np.array(paths["from d/mu"]), expected, momentum=mu)
    lost = np.abs(np.array(paths["from zero"])[0] - expected[0])
    assert_same_path(lost, d * np.abs(grads[0]))


def test_weight_decay_is_coupled_so_it_enters_the_momentum_buffer(path):
    rule = with_optimizer(sgd(learning_rate=0.5, momentum=0.5, weight_decay=0.5))
    moved = path(rule, np.array([8.0]), np.zeros((2, 1)))
    # b = 4, then 0.5 4 + 0.5 6 = 5; decoupled decay would take 0.25 of the parameter each time: 6, 4.5.
    assert moved.ravel().tolist() == [8 - 0.5 * 4, 6 - 0.5 * 5]


@settings(deadline=None, max_examples=25)
@given(
    rate=st.floats(1e-4, 1),
    momentum=st.floats(0, 0.99),
    dampening=st.floats(0, 1),
    weight_decay=st.floats(0, 0.5),
    nesterov=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sgd_is_torchs_recurrence_for_every_variant(rate, momentum, dampening, weight_decay, nesterov, seed):
    nesterov = nesterov and momentum > 0
    if nesterov or momentum == 0:
        dampening = 0.0
    options = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": weight_decay}
    changed, grads = with_optimizer(sgd(learning_rate=rate, **options)), random_grads(6, seed=seed)
    expected = oracle_path(changed, np.ones(3), grads)
    for name, side in PATHS.items():
        assert_same_path(side(changed, np.ones(3), grads), expected, momentum=momentum, item=name)


@settings(deadline=None, max_examples=12)
@given(
    rate=st.floats(1e-4, 1),
    betas=st.tuples(st.floats(0, 0.95), st.floats(0.5, 0.999)),
    epsilon=st.floats(1e-3, 1),
    weight_decay=st.floats(0, 0.5),
    seed=st.integers(0, 99),
)
def test_adam_is_its_recurrence_with_coupled_decay(rate, betas, epsilon, weight_decay, seed):
    options = {"betas": betas, "epsilon": epsilon, "weight_decay": weight_decay}
    changed, grads = with_optimizer(adam(learning_rate=rate, **options)), random_grads(5, seed=seed)
    expected = oracle_path(changed, np.ones(3), grads)
    for name, side in PATHS.items():
        # 1 / (1 - beta) is how much the correction of the first steps enlarges a rounding of 1 - beta^t.
        assert_same_path(side(changed, np.ones(3), grads), expected, momentum=max(betas), item=name)


def test_adams_moments_are_corrected_and_its_epsilon_stands_outside_the_root(path):
    # The first corrected moments are g and g^2, so the step is g / (|g| + epsilon): 3/4 and 1/2 of the rate.
    rule = with_optimizer(adam(learning_rate=1.0, betas=(0.5, 0.75), epsilon=1.0))
    assert path(rule, np.zeros(2), np.array([[3.0, -1.0]])).tolist() == [[-0.75, 0.5]]


def test_zero_gradients_coast_on_the_buffer(path):
    rule = with_optimizer(sgd(learning_rate=1.0, momentum=0.5))
    assert path(rule, np.array([0.0]), np.array([[8.0], [0.0], [0.0]])).ravel().tolist() == [-8, -12, -14]


def test_the_two_weight_surface_is_descended_to_its_minimum_at_1_1():
    def grad_of(w):  # of (2 - w0 - w1)^2 + (4 - 3 w0 - w1)^2
        first, second = 2 - w[0] - w[1], 4 - 3 * w[0] - w[1]
        return np.array([-2 * first - 6 * second, -2 * first - 2 * second])

    with precision_scope("float64"):
        rule = jax_impl.optim.optimizer(with_optimizer(sgd(learning_rate=0.02, momentum=0.8)), 1)
        weights = jnp.zeros(2)
        state = rule.init(weights)
        for _ in range(600):
            updates, state = rule.update(jnp.asarray(grad_of(np.asarray(weights))), state, weights)
            weights = optax.apply_updates(weights, updates)
    # Contracting: the roundings of the last 1 / (1 - 0.8) steps are left, divided by the surface's curvature.
    assert np.abs(np.asarray(weights) - 1).max() <= path_bound(10, 1.0, np.float64, momentum=0.8)


# The forms of S6.5, which are not ours.


def textbook_path(rates: np.ndarray, grads: np.ndarray, *, momentum: float, mended: bool) -> np.ndarray:
    velocity, position, path = np.zeros(3), np.zeros(3), []
    for before, rate, grad in zip([rates[0], *rates], rates, grads, strict=False):
        velocity = momentum * velocity * (rate / before if mended else 1) - rate * grad
        position = position + velocity
        path.append(position)
    return np.array(path)


def test_the_textbook_form_parts_at_the_first_new_rate_and_is_mended_by_rescaling(path):
    rates, grads = np.repeat([0.1, 0.025, 0.00625], 3), random_grads(9)
    ours = path(with_optimizer(sgd(momentum=0.8), DROPS), np.zeros(3), grads, steps_per_epoch=3)
    textbook = textbook_path(rates, grads, momentum=0.8, mended=False)
    assert_same_path(ours[:3], textbook[:3], momentum=0.8)
    buffer = 0.8**3 * grads[0] + 0.8**2 * grads[1] + 0.8 * grads[2]  # of step 3, before its own gradient
    assert_same_path(ours[3] - textbook[3], (0.1 - 0.025) * buffer, momentum=0.8)
    assert_same_path(ours, textbook_path(rates, grads, momentum=0.8, mended=True), momentum=0.8)


def test_the_averaged_form_needs_the_rate_over_one_minus_mu(path):
    mu, grads = 0.8, random_grads(6)
    average, averages = np.zeros(3), []
    for grad in grads:
        average = mu * average + (1 - mu) * grad
        averages.append(average)
    ours = path(with_optimizer(sgd(momentum=mu)), np.zeros(3), grads)
    assert_same_path(ours, -0.1 / (1 - mu) * np.cumsum(averages, axis=0), momentum=mu)


# Schedules

SCHEDULES = {
    "constant": (CONSTANT, [0.4, 0.4, 0.4, 0.4]),
    "step": (Schedule(name="step", step_epochs=2, gamma=0.1), [0.4, 0.4, 0.04, 0.04]),
    "cosine": (
        Schedule(name="cosine", final_learning_rate=0.2),
        [0.4, 0.2 + 0.1 * (1 + np.sqrt(0.5)), 0.3, 0.2 + 0.1 * (1 - np.sqrt(0.5))],
    ),
}


MOST_EPOCHS = 30


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_changes_at_the_first_step_of_an_epoch_and_the_first_update_has_the_first_rate(name, path):
    schedule, rates = SCHEDULES[name]
    changed, grads = with_optimizer(sgd(learning_rate=0.4), schedule), random_grads(12)
    found = path(changed, np.zeros(3), grads, steps_per_epoch=3)
    assert_same_path(found, -np.cumsum(np.repeat(rates, 3)[:, None] * grads, axis=0))


@settings(deadline=None, max_examples=10)
@given(
    rate=st.floats(0.01, 1),
    epochs=st.integers(1, MOST_EPOCHS),
    steps_per_epoch=st.integers(1, 500),
    schedule=st.one_of(
        st.builds(Schedule, name=st.just("step"), step_epochs=st.integers(1, 7), gamma=st.floats(0.1, 1)),
        st.builds(Schedule, name=st.just("cosine"), final_learning_rate=st.floats(0, 1)),
    ),
)
def test_torchs_schedulers_give_the_same_rates(rate, epochs, steps_per_epoch, schedule):
    changed = with_optimizer(sgd(learning_rate=rate), schedule, epochs)
    expected = np.array([oracle.learning_rate(changed, epoch) for epoch in range(1, epochs + 1)])
    with precision_scope("float64"):
        steps = jnp.arange(MOST_EPOCHS) * steps_per_epoch  # one shape, compiled once
        rate_of = jax_impl.optim.learning_rate(changed, steps_per_epoch)
        first, last = (np.asarray(rate_of(steps + offset))[:epochs] for offset in (0, steps_per_epoch - 1))
    optimizer = torch_ref.optim.optimizer(changed, [torch.nn.Parameter(torch.zeros(1))])
    scheduler, torchs = torch_ref.optim.scheduler(changed, optimizer), []
    for _ in range(epochs):
        torchs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    # torch's cosine goes from each rate to the next, so its roundings add up; ours start afresh.
    bound = path_bound(epochs, max(rate, schedule.final_learning_rate or 0), np.float64)
    for name, found in {"jax, first step": first, "jax, last step": last, "torch": np.array(torchs)}.items():
        assert_within({"rates": found}, {"rates": expected}, bound=bound, item=name)


# Networks: the whole step of each adapter, over changes of the rate, against the oracle and from one to the other.

VARIANTS = {
    "plain": (sgd(weight_decay=0.2), CONSTANT),
    "momentum": (sgd(momentum=0.8), DROPS),
    "dampening": (sgd(momentum=0.8, dampening=0.3), COSINE),
    "nesterov": (sgd(momentum=0.8, nesterov=True, weight_decay=0.2), DROPS),
    "adam": (adam(weight_decay=0.2), COSINE),
}
KEEP_STATE = ["momentum", "dampening", "nesterov", "adam"]
STEPS, STEPS_PER_EPOCH, BATCH = 8, 3, 5


@functools.cache
def adapters(variant: str, precision: str = "float64") -> dict[str, Adapter]:
    """Return the three adapters of a linear network; where there is decay, BatchNorm adds the other kinds of leaf."""
    optimizer, schedule = VARIANTS[variant]
    model = dataclasses.replace(
        MLP128.model, hidden_sizes=(), activations=(), bias=True, input_batchnorm=optimizer.weight_decay > 0
    )
    changed = dataclasses.replace(with_optimizer(optimizer, schedule), model=model, precision=precision)
    network = Network(recipe=changed, input_shape=(3,), outputs=4, steps_per_epoch=STEPS_PER_EPOCH)
    return {name: make(network) for name, make in ADAPTERS.items()}


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng([7, step])
    return generator.standard_normal((BATCH, 3)).astype(np.float32), generator.integers(0, 4, BATCH)


def start(adapter: Adapter) -> None:
    """Load the initial state, and an optimiser's that has seen nothing."""
    network = adapter.network
    state = params.initial_state(network.leaves, network.recipe.init, network.recipe.seed)
    trained = {name: state[name] for name in network.trained}
    adapter.load(state, oracle.initial_opt_state(network.recipe.optimizer, trained))


def bound_after(adapter: Adapter, steps: int) -> float:
    return run_bound(adapter.network.leaves, BATCH * 3, steps, np.float64)


def assert_same_states(found: Adapter, expected: Adapter, *, steps: int, item: str) -> None:
    bound = bound_after(found, steps)
    assert_within(found.state(), expected.state(), bound=bound, item=item, relative_to_layer=True)
    assert_within(found.opt_state(), expected.opt_state(), bound=bound, item=item, relative_to_layer=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_torchs_own_optimizer_and_ours_take_the_same_path(variant):
    sides = adapters(variant)
    truth = sides["oracle"]
    for adapter in sides.values():
        start(adapter)
    for step in range(STEPS):
        loss, num_correct = truth.step(*batch(step))
        for name in ("jax", "torch"):
            found_loss, found_correct = sides[name].step(*batch(step))
            assert abs(found_loss - loss) <= bound_after(truth, step + 1) * max(1, loss)
            assert found_correct == num_correct
            assert_same_states(sides[name], truth, steps=step + 1, item=f"{variant}, {name}, step {step}")


@pytest.mark.parametrize("variant", ["nesterov", "adam"])
def test_in_float32_a_step_from_one_state_agrees_by_the_rule(variant):
    sides = adapters(variant, "float32")
    start(sides["torch"])
    for step in range(STEPS):
        given = sides["torch"].state(), sides["torch"].opt_state()
        for name in ("jax", "oracle"):
            sides[name].load(*given)
        for adapter in sides.values():
            adapter.step(*batch(step))
        for part in ("state", "opt_state"):
            ours, theirs, truth = (getattr(sides[name], part)() for name in ("jax", "torch", "oracle"))
            assert_error_ratio(ours, theirs, truth, item=f"{variant}, {part}, step {step}")


@pytest.mark.parametrize("variant", KEEP_STATE)
def test_the_optimizers_state_crosses_and_comes_back_bit_for_bit(variant):
    sides = adapters(variant)
    for giver, taker in itertools.permutations(("jax", "torch")):
        start(sides[giver])
        for step in range(STEPS_PER_EPOCH + 1):
            state, opt_state = sides[giver].state(), sides[giver].opt_state()
            sides[taker].load(state, opt_state)
            assert int(opt_state["step"]) == step
            assert_identical(sides[taker].opt_state(), opt_state, item=f"{giver} to {taker}")
            sides[giver].load(sides[taker].state(), sides[taker].opt_state())
            assert_identical(sides[giver].opt_state(), opt_state, item=f"{giver} to {taker} and back")
            assert_identical(sides[giver].state(), state, item=f"{giver} to {taker} and back")
            sides[giver].step(*batch(step))


@pytest.mark.parametrize("variant", KEEP_STATE)
@pytest.mark.parametrize("order", ["jax torch jax", "torch jax torch"])
def test_a_run_that_changes_sides_across_a_change_of_rate_ends_as_one_that_does_not(variant, order):
    sides, stayed = adapters(variant), adapters(variant)["oracle"]
    legs = order.split()
    start(stayed)
    start(sides[legs[0]])
    present = sides[legs[0]]
    for step in range(STEPS):
        if step in (0, 1, 4):  # before the first update, after it, and in the middle of the second epoch
            leg = sides[legs[(0, 1, 4).index(step)]]
            leg.load(present.state(), present.opt_state())
            present = leg
        present.step(*batch(step))
        stayed.step(*batch(step))
    assert_same_states(present, stayed, steps=STEPS, item=f"{variant}, {order}")


@pytest.mark.parametrize("name", ["jax", "torch"])
def test_an_input_of_zero_leaves_its_weights_to_coast_on_the_buffer(name):
    adapter = adapters("momentum")[name]
    start(adapter)
    adapter.step(*batch(0))
    before, buffer = adapter.state(), adapter.opt_state()["momentum_buffer.linear1.weight"]
    adapter.step(np.zeros((BATCH, 3), np.float32), batch(0)[1])
    moved = adapter.state()["linear1.weight"] - before["linear1.weight"]
    # The difference of two weights below 1 has their roundings.
    assert_within({"moved": moved}, {"moved": -0.1 * 0.8 * buffer}, bound=4 * unit_roundoff(np.float64), item=name)


@pytest.mark.parametrize("name", ["oracle", "jax", "torch"])
def test_momentum_0_keeps_no_buffer(name):
    adapter = adapters("plain")[name]
    start(adapter)
    adapter.step(*batch(0))
    assert {key: array.tolist() for key, array in adapter.opt_state().items()} == {"step": 1}


# Whole runs: what happens between the steps is the trainers' own.

DATASET = made_up_images(24, 8)
TRAINERS = {
    "jax": lambda changed: jax_impl.trainer.Trainer(changed, DATASET, place("cpu")),
    "torch": lambda changed: torch_ref.trainer.Trainer(changed, DATASET, torch.device("cpu")),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_carries_buffers_over_epochs_drops_the_rate_between_them_and_starts_each_run_afresh(name):
    model = dataclasses.replace(MLP128.model, hidden_sizes=(), activations=())
    rule = with_optimizer(sgd(learning_rate=0.05, momentum=0.8), DROPS, epochs=3)
    changed = dataclasses.replace(rule, model=model, batch_size=8)
    network = Network(recipe=changed, input_shape=(28, 28, 1), outputs=10, steps_per_epoch=3)
    truth = ADAPTERS["oracle"](network)
    prepared = datasets.preprocess(DATASET, changed.preprocessing)
    runs = []
    for _ in range(2):
        trainer = TRAINERS[name](changed)
        runs.append((list(trainer.events()), trainer.state()))
    (events, state), (_, again) = runs
    bound = run_bound(network.leaves, 8 * 784, 9, np.float64)
    for epoch, (steps, done) in enumerate(zip(events[::2], events[1::2], strict=True), start=1):
        order = epoch_order(changed.seed, epoch, 24)
        expected = [truth.step(prepared.train.inputs[part], prepared.train.labels[part]) for part in np.split(order, 3)]
        losses, num_correct = map(list, zip(*expected, strict=True))
        test_losses, predictions = truth.evaluate(prepared.test.inputs, prepared.test.labels)
        found = {"losses": steps.losses, "test": done.test_losses}
        wanted = {"losses": np.array(losses), "test": test_losses}
        assert_within(found, wanted, bound=bound, item=f"{name}, epoch {epoch}", relative_to_layer=True)
        assert steps.num_correct.tolist() == num_correct
        assert np.array_equal(done.test_correct, predictions == prepared.test.labels)
    assert_within(state, truth.state(), bound=bound, item=name, relative_to_layer=True)
    assert_identical(again, state, item=f"{name}, a second run")

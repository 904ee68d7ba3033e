"""S7: BatchNorm with torch's running variance, and dropout: both implementations against the oracle and each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import torch_ref.trainer
from jax_impl.epoch import DeviceSplit, Span, make_run_steps
from jax_impl.layers import BatchNorm, max_pool_2x2, normalize_batch, normalize_relu_pool
from jax_impl.parallel import AXIS, Part
from jax_impl.programs import precision_scope
from jax_impl.step import StepMetrics, TrainState
from spec import oracle, params, recipe
from spec.batches import Counts
from spec_tests.adapters import ADAPTERS, Adapter, Arrays, Network
from spec_tests.assertions import assert_error_ratio, assert_identical, assert_within
from spec_tests.conftest import made_up_images
from spec_tests.tolerances import (
    CENTRAL_DIFFERENCE,
    DIFFERENCE_STEP,
    chain_bound,
    run_bound,
    sum_bound,
    unit_roundoff,
)

RATE = 0.4
UNITS = 40
BATCH, SHORT_BATCH = 12, 7
OURS = ("jax", "torch")


# The layer by itself.


def jax_norm(channels: int) -> BatchNorm:
    graphdef, state = nnx.split(BatchNorm(channels))
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state))


def test_training_normalises_by_the_biased_variance_and_runs_the_unbiased_one():
    batches = np.random.default_rng(0).standard_normal((3, 4, 5, 2, 3)) * 3 + 7
    axes, count = (0, 1, 2), 4 * 5 * 2
    # Values are up to 20, the outputs, of size 1, are their differences over a deviation of 3.
    bound = sum_bound(count, 20, np.float64)
    with precision_scope("float64"):
        ours, torchs = jax_norm(3), torch.nn.BatchNorm2d(3, dtype=torch.float64)
        mean, var = np.zeros(3), np.ones(3)

        def check(batch: np.ndarray, expected: np.ndarray, *, train: bool) -> None:
            out = ours(jnp.asarray(batch), train=train)
            reference = torchs.train(train)(torch.tensor(batch.transpose(0, 3, 1, 2))).detach().numpy()
            wanted = {"output": expected, "mean": mean, "var": var}
            found = {"output": out, "mean": ours.mean[...], "var": ours.var[...]}
            assert_within(found, wanted, bound=bound, item="jax")
            found = {"output": reference.transpose(0, 2, 3, 1), "mean": torchs.running_mean, "var": torchs.running_var}
            assert_within(found, wanted, bound=bound, item="torch")

        for batch in batches:
            mean = 0.9 * mean + 0.1 * batch.mean(axes)
            var = 0.9 * var + 0.1 * batch.var(axes) * count / (count - 1)
            check(batch, (batch - batch.mean(axes)) / np.sqrt(batch.var(axes) + 1e-5), train=True)
        check(batches[0], (batches[0] - mean) / np.sqrt(var + 1e-5), train=False)


def test_the_gradient_is_that_of_the_equation_by_central_differences():
    generator = np.random.default_rng(0)
    x, weight = generator.standard_normal((2, 6, 3))
    scale, bias = generator.standard_normal((2, 3))

    def loss(x, scale, bias):
        normalized = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
        return ((normalized * scale + bias) * weight).sum()

    with precision_scope("float64"):
        grads = jax.grad(lambda *arguments: (normalize_batch(*arguments)[0] * weight).sum(), argnums=(0, 1, 2))(
            *map(jnp.asarray, (x, scale, bias))
        )
    for index, grad in enumerate(map(np.asarray, grads)):
        assert_central_differences(loss, (x, scale, bias), index, grad)


def assert_central_differences(loss: Callable, values: tuple, index: int, grad: np.ndarray) -> None:
    """Assert that `grad` is the gradient of `loss` by the value of that index, at `values`."""
    for position in np.ndindex(grad.shape):
        sides = []
        for sign in (1, -1):
            moved = values[index].copy()
            moved[position] += sign * DIFFERENCE_STEP
            sides.append(loss(*values[:index], moved, *values[index + 1 :]))
        difference = (sides[0] - sides[1]) / (2 * DIFFERENCE_STEP)
        assert grad[position] == pytest.approx(difference, abs=CENTRAL_DIFFERENCE)


def of_parts(mode: str, function: Callable, size: int, parts: int) -> Callable:
    """Return what makes of all rows what `function` (a normalize_...) makes of each part's own, in one program or in
    copies that are joined by an axis."""

    def found_apart(*given):
        normalized, *statistics = function(*given)
        return normalized, statistics

    if mode == "sharded":
        mesh = Mesh(np.array(jax.devices()[:1]), (AXIS,), axis_types=(AxisType.Auto,))
        return Part(size, parts, sharding=NamedSharding(mesh, PartitionSpec(AXIS))).each(found_apart)
    each = jax.vmap(Part(size, parts, axis=AXIS).each(found_apart), (0, None, None), (0, None), axis_name=AXIS)

    def of_all(x, scale, bias):
        normalized, statistics = each(x.reshape(parts, -1, *x.shape[1:]), scale, bias)
        return normalized.reshape(-1, *normalized.shape[2:]), statistics

    return of_all


@pytest.mark.parametrize("mode", ["sharded", "pmap"])
@pytest.mark.parametrize("function", [normalize_batch, normalize_relu_pool])
@pytest.mark.parametrize(("size", "parts"), [(8, 3), (10, 8)])  # 3, 3 and 2 rows; 2 each, and none on the last three
def test_the_gradient_of_local_statistics_is_that_of_each_parts_equation_by_central_differences(
    mode, function, size, parts
):
    own = -(-size // parts)
    generator = np.random.default_rng(0)
    x = generator.standard_normal((own * parts, 2, 2, 3))
    scale, bias = generator.standard_normal((2, 3))
    pools = function is normalize_relu_pool
    weight = generator.standard_normal((own * parts, *((1, 1) if pools else (2, 2)), 3))
    weight[size:] = 0
    bounds = [slice(start, min(start + own, size)) for start in range(0, size, own)]

    def loss(x, scale, bias):
        total = 0.0
        for rows in bounds:
            mean, var = x[rows].mean((0, 1, 2)), x[rows].var((0, 1, 2))
            y = (x[rows] - mean) / np.sqrt(var + 1e-5) * scale + bias
            y = np.maximum(y, 0).max((1, 2), keepdims=True) if pools else y
            total += (y * weight[rows]).sum()
        return total

    with precision_scope("float64"):
        leaves = [jnp.asarray(array) for array in (x, scale, bias)]
        apart = of_parts(mode, function, size, parts)
        grads = jax.grad(lambda *leaves: (apart(*leaves)[0] * weight).sum(), argnums=(0, 1, 2))(*leaves)
        value, statistics = (apart(*leaves)[0] * weight).sum(), apart(*leaves)[1]
    assert float(value) == pytest.approx(loss(x, scale, bias), abs=CENTRAL_DIFFERENCE)
    first = x[bounds[0]]
    wanted = {"mean": first.mean((0, 1, 2)), "var": first.var((0, 1, 2))}
    bound = sum_bound(first.size, float(np.abs(first).max() ** 2), np.float64)
    found = dict(zip(wanted, map(np.asarray, statistics), strict=True))
    assert_within(found, wanted, bound=bound, item="the first part")
    for index, grad in enumerate(map(np.asarray, grads)):
        assert_central_differences(loss, (x, scale, bias), index, grad)


def pooled_in_three_steps(x, scale, bias):
    normalized, mean, var = normalize_batch(x, scale, bias)
    return max_pool_2x2(jax.nn.relu(normalized)), mean, var


@settings(deadline=None, max_examples=4)
@given(
    batch=st.integers(2, 3),
    height=st.integers(2, 5),
    width=st.integers(2, 5),
    seed=st.integers(0, 999),
    ties=st.booleans(),
)
def test_normalising_and_pooling_in_one_step_is_the_same_as_in_three(batch, height, width, seed, ties):
    # Channels of a positive, a negative and no scale; whole numbers make ties, which rounding leaves ties.
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((batch, height, width, 3))
    x = np.round(x) if ties else x
    scale, bias = np.array([1.5, -0.7, 0.0]), np.array([0.2, 0.3, 0.4])
    with precision_scope("float64"):
        leaves = [jnp.asarray(array) for array in (x, scale, bias)]
        output, back = jax.vjp(lambda *leaves: normalize_relu_pool(*leaves)[0], *leaves)
        expected, expected_back = jax.vjp(lambda *leaves: pooled_in_three_steps(*leaves)[0], *leaves)
        grad = jnp.asarray(generator.standard_normal(output.shape))
        found, wanted = back(grad), expected_back(grad)
        statistics = normalize_relu_pool(*leaves)[1:], normalize_batch(*leaves)[1:]
    assert_identical({"y": np.array(output)}, {"y": np.array(expected)}, item="jax")
    for mine, theirs in zip(*statistics, strict=True):
        assert np.array_equal(mine, theirs)
    names = ("x", "scale", "bias")
    terms = x.size
    largest = max(float(np.abs(leaf).max()) for leaf in wanted)
    assert_within(
        dict(zip(names, map(np.array, found), strict=True)),
        dict(zip(names, map(np.array, wanted), strict=True)),
        bound=sum_bound(terms, terms * max(1.0, largest), np.float64),
        item="jax",
    )


def test_a_large_offset_does_not_cancel_the_variance():
    values = (1e4 + np.random.default_rng(0).standard_normal((256, 1))).astype(np.float32)
    expected = {"var": np.array([0.9 + 0.1 * values.astype(np.float64).var(ddof=1)])}
    ours, torchs = BatchNorm(1), torch.nn.BatchNorm1d(1)
    ours(jnp.asarray(values), train=True)
    torchs(torch.tensor(values))
    # A mean that is off by one rounding of 1e4, 6e-4, shows in the variance as its square; the rest is a plain sum.
    bound = sum_bound(256, 1.0, np.float32)
    for name, var in {"jax": ours.var[...], "torch": torchs.running_var}.items():
        assert_within({"var": np.asarray(var)}, expected, bound=bound, item=name)


def test_a_bfloat16_batch_keeps_float32_statistics():
    layer = BatchNorm(2)
    out = layer(jnp.ones((8, 2), jnp.bfloat16) * jnp.arange(8, dtype=jnp.bfloat16)[:, None], train=True)
    assert out.dtype == jnp.bfloat16
    assert layer.var[...].dtype == layer.mean[...].dtype == jnp.float32


@pytest.fixture(scope="module")
def on_inputs() -> dict[str, Adapter]:
    """A linear network with BatchNorm on its inputs: quick to compile for more than one size of batch."""
    changed = dataclasses.replace(recipe.load("mlp128-batchnorm"), precision="float64")
    model = dataclasses.replace(changed.model, hidden_sizes=(), activations=())
    network = Network(recipe=dataclasses.replace(changed, model=model), input_shape=(4, 6, 2), outputs=5)
    return {name: make(network) for name, make in ADAPTERS.items()}


@pytest.mark.parametrize("name", OURS)
def test_the_input_batchnorm_has_one_channel_over_all_pixels(on_inputs, name):
    images, _ = batch(0)
    start(on_inputs[name])
    passed = on_inputs[name].forward(images, train=True)
    wide = images.astype(np.float64)
    expected = {
        "norm0.running_mean": np.array([0.1 * wide.mean()]),
        "norm0.running_var": np.array([0.9 + 0.1 * wide.var(ddof=1)]),
    }
    bound = sum_bound(wide.size, float(wide.max()), np.float64)
    assert_within(passed.batch_stats, expected, bound=bound, item=name)
    normalized = (wide - wide.mean()) / np.sqrt(wide.var() + 1e-5)
    found = {"norm0": passed.activations["norm0"]}
    flat = {"norm0": normalized.transpose(0, 3, 1, 2).reshape(BATCH, -1)}
    assert_within(found, flat, bound=bound / wide.std(), item=name)


@pytest.mark.parametrize("name", OURS)
def test_each_batch_corrects_its_variance_by_its_own_size(on_inputs, name):
    adapter, mean, var = on_inputs[name], 0.0, 1.0
    start(adapter)
    for step, size in enumerate((BATCH, SHORT_BATCH, BATCH, SHORT_BATCH)):
        images, labels = batch(step, size)
        adapter.step(images, labels)
        wide = images.astype(np.float64)
        mean, var = 0.9 * mean + 0.1 * wide.mean(), 0.9 * var + 0.1 * wide.var(ddof=1)
        expected = {"norm0.running_mean": np.array([mean]), "norm0.running_var": np.array([var])}
        bound = (step + 1) * sum_bound(wide.size, float(wide.max()), np.float64)
        assert_within(of_running(adapter), expected, bound=bound, item=name)


# A small network with both, convolution and linear: the adapters.


def make_network(precision: str, *, seed: int = 0, hidden_sizes: tuple[int, ...] = (UNITS,)) -> Network:
    cnn = recipe.load("cnn")
    model = dataclasses.replace(cnn.model, channels=(3,), hidden_sizes=hidden_sizes, dropout=RATE)
    changed = dataclasses.replace(cnn, model=model, precision=precision, seed=seed)
    return Network(recipe=changed, input_shape=(4, 6, 2), outputs=5)


@pytest.fixture(scope="module")
def float64() -> dict[str, Adapter]:
    return {name: make(make_network("float64")) for name, make in ADAPTERS.items()}


@pytest.fixture(scope="module")
def float32() -> dict[str, Adapter]:
    return {name: make(make_network("float32")) for name, make in ADAPTERS.items()}


def start(adapter: Adapter, state: Arrays | None = None, *, step: int = 0) -> None:
    """Load `state`, or the initial one, and an optimiser's whose buffers are 0 at `step`."""
    network = adapter.network
    state = state or params.initial_state(network.leaves, network.recipe.init, network.recipe.seed)
    trained = {name: state[name] for name in network.trained}
    fresh = oracle.initial_opt_state(network.recipe.optimizer, trained)
    adapter.load(state, fresh | {"step": np.array(step)})


def batch(step: int, size: int = BATCH) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng([3, step])
    return generator.random((size, 4, 6, 2)).astype(np.float32) * 2 + 1, generator.integers(0, 5, size)


def mask(step: int) -> Arrays:
    return {"dropout1": np.random.default_rng([4, step]).random((BATCH, UNITS)) >= RATE}


def bound_after(adapter: Adapter, steps: int) -> float:
    return run_bound(adapter.network.leaves, BATCH * 24, steps, np.float64)


def of_running(adapter: Adapter) -> Arrays:
    return {name: array for name, array in adapter.state().items() if ".running_" in name}


@pytest.mark.parametrize("name", OURS)
def test_torchs_layer_and_ours_keep_the_same_running_statistics(float64, name):
    ours, truth = float64[name], float64["oracle"]
    start(ours)
    start(truth)
    for step in range(4):
        for adapter in (ours, truth):
            adapter.step(*batch(step), decisions=mask(step))
        bound = bound_after(truth, step + 1)
        assert_within(of_running(ours), of_running(truth), bound=bound, item=name, relative_to_layer=True)
    assert sorted(of_running(ours)) == sorted(
        f"norm{index}.running_{kind}" for index in (1, 2) for kind in ("mean", "var")
    )


@pytest.mark.parametrize("name", OURS)
def test_evaluation_normalises_by_the_running_statistics_drops_nothing_and_changes_nothing(float64, name):
    ours, truth = float64[name], float64["oracle"]
    for adapter in (ours, truth):
        start(adapter)
        adapter.step(*batch(0), decisions=mask(0))
    truth.load(ours.state(), ours.opt_state())
    before = ours.state()
    images, labels = batch(1)
    passed, expected = ours.forward(images, train=False), truth.forward(images, train=False)
    bound = chain_bound(truth.network.leaves, BATCH, np.float64)
    assert_within(passed.activations, expected.activations, bound=bound, item=name, relative_to_layer=True)
    assert_identical({"dropout1": passed.activations["dropout1"]}, {"dropout1": passed.activations["relu2"]}, item=name)
    losses, predictions = ours.evaluate(images, labels)
    expected_losses, expected_predictions = truth.evaluate(images, labels)
    assert_within({"loss": losses}, {"loss": expected_losses}, bound=bound, item=name, relative_to_layer=True)
    assert predictions.tolist() == expected_predictions.tolist()
    assert_identical(passed.batch_stats, of_running(ours), item=name)
    assert_identical(ours.state(), before, item=f"{name}, after the evaluation")


@pytest.mark.parametrize("name", OURS)
def test_training_mode_is_on_again_after_an_evaluation(float64, name):
    adapter, after = float64[name], []
    for evaluates in (False, True):
        start(adapter)
        figures = []
        for step in range(2):
            figures.append(adapter.step(*batch(step), decisions=mask(step)))
            if evaluates:
                adapter.evaluate(*batch(9))
        after.append((figures, adapter.state()))
    assert after[0][0] == after[1][0]
    assert_identical(after[1][1], after[0][1], item=name)


def test_with_one_mask_given_to_both_a_step_agrees(float64, float32):
    truth = float64["oracle"]
    for step in range(3):
        for name in OURS:
            start(float64[name])
            start(truth)
            loss, num_correct = truth.step(*batch(step), decisions=mask(step))
            found_loss, found_correct = float64[name].step(*batch(step), decisions=mask(step))
            bound = bound_after(truth, 1)
            assert abs(found_loss - loss) <= bound * max(1, loss)
            assert found_correct == num_correct
            for part in ("state", "opt_state"):
                found, expected = (getattr(adapter, part)() for adapter in (float64[name], truth))
                assert_within(found, expected, bound=bound, item=f"{name}, {part}", relative_to_layer=True)
        for adapter in float32.values():
            start(adapter)
            adapter.step(*batch(step), decisions=mask(step))
        for part in ("state", "opt_state"):
            sides = [getattr(float32[name], part)() for name in ("jax", "torch", "oracle")]
            assert_error_ratio(*map(without_zeros, sides), item=f"float32, {part}, step {step}")
            for side in sides[:2]:
                bound = chain_bound(truth.network.leaves, BATCH * 24, np.float32)
                assert_within(side, sides[2], bound=bound, item=f"float32, {part}, step {step}", relative_to_layer=True)


def without_zeros(arrays: Arrays) -> Arrays:
    """Leave out the biases before a BatchNorm: their gradients are 0, and what is computed is rounding alone (S5.4)."""
    return {name: array for name, array in arrays.items() if not name.endswith(("conv1.bias", "linear1.bias"))}


# Native dropout


def ones_before_dropout(network: Network) -> Arrays:
    """Return a state in which every unit that dropout sees is 1: a dropped one is 0, and nothing else is."""
    state = params.initial_state(network.leaves, network.recipe.init, network.recipe.seed)
    for name in [name for name in state if name.startswith("norm") and name != "norm1"]:
        if name.endswith((".weight", ".bias")):
            state[name] = np.full_like(state[name], name.endswith(".bias"))
    return state


def native_outputs(adapter: Adapter, step: int) -> Arrays:
    """Return what each dropout of `adapter` makes of ones in its `step`, by its own mask."""
    start(adapter, ones_before_dropout(adapter.network), step=step)
    torch.manual_seed(step)
    activations = adapter.forward(batch(0)[0], train=True).activations
    return {name: array for name, array in activations.items() if name.startswith("dropout")}


@pytest.mark.parametrize("name", OURS)
def test_each_native_dropout_keeps_its_share_and_scales_by_one_over_the_keeping_rate(float64, name):
    outputs = np.array([native_outputs(float64[name], step)["dropout1"] for step in range(10)])
    kept = outputs != 0
    scaled = {"kept": outputs[kept]}
    expected = {"kept": np.full(kept.sum(), 1 / (1 - RATE))}
    assert_within(scaled, expected, bound=4 * unit_roundoff(np.float64) / (1 - RATE), item=name)
    count = kept.size
    assert abs(kept.sum() - (1 - RATE) * count) <= 5 * np.sqrt(count * RATE * (1 - RATE))
    # By unit over batches and steps, and by example: a mask shared along an axis has the right share and no more.
    for axis in ((0, 1), (0, 2)):
        sizes = kept.sum(axis=axis)
        trials = count // sizes.size
        assert np.abs(sizes - (1 - RATE) * trials).max() <= 5 * np.sqrt(trials * RATE * (1 - RATE))


@pytest.mark.parametrize("name", OURS)
def test_another_step_has_another_mask_and_the_same_step_the_same(float64, name):
    first, second, again = (native_outputs(float64[name], step) for step in (0, 1, 0))
    assert not np.array_equal(first["dropout1"], second["dropout1"])
    assert_identical(again, first, item=name)


@pytest.mark.parametrize("name", OURS)
def test_two_layers_have_masks_of_their_own_in_one_step(name):
    adapter = ADAPTERS[name](make_network("float32", hidden_sizes=(UNITS, UNITS)))
    outputs = native_outputs(adapter, 0)
    assert not np.array_equal(outputs["dropout1"], outputs["dropout2"])


def test_jaxs_own_masks_given_to_torch_make_its_activations(float64):
    giver, taker = float64["jax"], float64["torch"]
    for adapter in (giver, taker):
        start(adapter)
    native = giver.forward(batch(0)[0], train=True)
    repeated = taker.forward(batch(0)[0], train=True, decisions=native.decisions)
    bound = chain_bound(giver.network.leaves, BATCH * 24, np.float64)
    assert_within(repeated.activations, native.activations, bound=bound, item="forward", relative_to_layer=True)
    assert 0 < native.decisions["dropout1"].mean() < 1


def test_torchs_own_masks_given_to_jax_make_the_same_step(float64):
    giver, taker = float64["torch"], float64["jax"]
    for adapter in (giver, taker):
        start(adapter)
    torch.manual_seed(0)
    giver.step(*batch(0))
    native = {"dropout1": giver.last_decisions["dropout1"]}
    taker.step(*batch(0), decisions=native)
    assert 0 < native["dropout1"].mean() < 1
    assert_within(taker.state(), giver.state(), bound=bound_after(giver, 1), item="step", relative_to_layer=True)


# The trainers' masks: a function of seed, epoch and step alone.


def masks_of_torchs_trainer(seed: int, *, before: int) -> list[bytes]:
    network = make_network("float32", seed=seed)
    changed = dataclasses.replace(network.recipe, batch_size=5, epochs=2, last_batch="keep")
    trainer = torch_ref.trainer.Trainer(changed, made_up_images(13, 3), torch.device("cpu"))
    masks: list[bytes] = []

    def record(layer, inputs, output):
        if layer.training:
            masks.append(torch.ones_like(output).where(output != 0, 0).numpy().tobytes())

    torch.nn.init.zeros_(trainer.network.norm2.weight)
    torch.nn.init.ones_(trainer.network.norm2.bias)  # the dropped units are the only zeros
    trainer.network.dropout1.register_forward_hook(record)
    torch.manual_seed(before)
    for event in trainer.events():
        if hasattr(event, "test_losses"):
            torch.rand(1)  # a draw of somebody else's
    return masks


def keys_of_jaxs_epochs(seed: int) -> list[float]:
    """Return a number drawn by the key of each step of two epochs of the compiled program."""
    counts = Counts(num_examples=13, batch_size=5, full_steps=2, short_batch_size=3, epochs=2)

    def draw(state, images, labels, key, **_):
        return state, StepMetrics(jax.random.uniform(key), jnp.int32(0))

    run_steps = jax.jit(make_run_steps(draw, counts))
    split, order = DeviceSplit(jnp.zeros((13, 1)), jnp.zeros(13, jnp.int32)), jnp.arange(13, dtype=jnp.int32)
    spans = [Span(*map(np.int32, (epoch, 0, 3))) for epoch in (1, 2)]
    state = TrainState({}, {}, ())
    return [value for span in spans for value in run_steps(state, split, order, span, np.uint32(seed))[1].loss.tolist()]


def test_every_step_of_both_trainers_has_a_mask_of_its_own_that_repeats_with_the_seed():
    for first, again, other in (
        (
            masks_of_torchs_trainer(0, before=1),
            masks_of_torchs_trainer(0, before=2),
            masks_of_torchs_trainer(1, before=1),
        ),
        (keys_of_jaxs_epochs(0), keys_of_jaxs_epochs(0), keys_of_jaxs_epochs(1)),
    ):
        assert len(first) == len(set(first)) == 6
        assert again == first
        assert not set(other) & set(first)

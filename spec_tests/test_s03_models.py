"""S3: shapes, names, the initial state, layouts, padding, pooling, activations."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import torch_ref.convert
import torch_ref.models
from jax_impl import layers, models
from jax_impl.convert import from_canonical, to_canonical
from jax_impl.programs import precision_scope
from spec import oracle, params, recipe
from spec.datasets.sizes import known_size
from spec.oracle import layers as oracle_layers
from spec.recipe import Init, Model, Recipe
from spec_tests.adapters import ADAPTERS, Adapter, Network
from spec_tests.assertions import (
    assert_error_ratio,
    assert_identical,
    assert_no_shared_memory,
    assert_within,
    largest_difference,
)
from spec_tests.tolerances import DEVIATIONS, chain_bound, sum_bound, unit_roundoff

CPU = jax.devices("cpu")[0]
TORCH_DEFAULT = Init(weight="uniform_fan_in", bias="uniform_fan_in")
SIDES = ("jax", "torch")
BATCH = 11


def network(name: str, input_shape: tuple[int, ...], outputs: int, *, loss: dict | None = None, **model) -> Network:
    """Return the network of the recipe `name` made small, float64, with these changes."""
    loaded = recipe.load(name)
    changed = dataclasses.replace(
        loaded,
        precision="float64",
        model=dataclasses.replace(loaded.model, **model),
        loss=dataclasses.replace(loaded.loss, **(loss or {})),
    )
    return Network(recipe=changed, input_shape=input_shape, outputs=outputs)


# Every kind of network and loss. Dimensions are unequal, so that a wrong permutation shows; those of the deep one are
# equal, so that leaves paired by position (linear10 sorts before linear2) do not show by their shapes.
NETWORKS = {
    "softmax regression": network("softmax-regression", (4, 6, 2), 5),
    "relu without biases": network("mlp128", (4, 6, 2), 5, hidden_sizes=(7,)),
    "batchnorm of the inputs": network("mlp128-batchnorm", (4, 6, 2), 5, hidden_sizes=(7,), loss={"reduction": "sum"}),
    "sigmoid, relu": network("sigmoid-mlp", (9,), 5, hidden_sizes=(7, 6), loss={"label_smoothing": 0.3}),
    "two softmaxes": network("mnist-mlp256", (4, 6, 2), 5, hidden_sizes=(7, 6)),
    "binary": network("breast-cancer", (9,), 1, hidden_sizes=(7,), loss={"reduction": "sum"}),
    "cnn": network("cnn", (9, 12, 2), 5, channels=(3, 4), hidden_sizes=(6, 7)),
    "deep": network("deep-mlp", (3,), 3, hidden_sizes=(3,) * 10, activations=("tanh",) * 10),
}
IN_FLOAT32 = ("relu without biases", "batchnorm of the inputs", "sigmoid, relu", "cnn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A random state, a batch and dropout's masks for a network; the state is float32, so every precision holds it."""

    state: dict[str, np.ndarray]
    opt_state: dict[str, np.ndarray]
    images: np.ndarray
    labels: np.ndarray
    masks: dict[str, np.ndarray]


def example(network: Network, *, seed: int = 0, spread: float = 1.0) -> Example:
    generator = np.random.default_rng(seed)
    state = {}
    for leaf in network.leaves:
        values = generator.standard_normal(leaf.shape)
        if leaf.role == "weight":
            values *= spread / math.sqrt(leaf.fan_in)
        positive = leaf.role in ("scale", "running_var")
        state[leaf.name] = (values**2 + 0.5 if positive else values).astype(np.float32)
    model = network.recipe.model
    sizes = model.hidden_sizes if model.dropout else ()
    trained = {name: state[name] for name in network.trained}
    return Example(
        state=state,
        opt_state=oracle.initial_opt_state(network.recipe.optimizer, trained),
        images=generator.standard_normal((BATCH, *network.input_shape)).astype(np.float32),
        labels=generator.integers(0, max(network.outputs, 2), BATCH),
        masks={f"dropout{i}": generator.random((BATCH, units)) > 0.4 for i, units in enumerate(sizes, start=1)},
    )


@functools.cache
def _adapter(side: str, name: str, precision: str) -> Adapter:
    small = NETWORKS[name]
    return ADAPTERS[side](dataclasses.replace(small, recipe=dataclasses.replace(small.recipe, precision=precision)))


def loaded_adapter(side: str, name: str, given: Example, *, precision: str = "float64") -> Adapter:
    """Return the network `name` on that side in the state of `given`; what it has compiled is shared by all tests."""
    adapter = _adapter(side, name, precision)
    adapter.load(given.state, given.opt_state)
    return adapter


def pass_bound(network: Network) -> float:
    """Return how far a float64 pass may be off, relative to a layer's largest value."""
    return chain_bound(network.leaves, BATCH * math.prod(network.input_shape[:2]), np.float64)


def leaves_of(name: str) -> tuple[params.Leaf, ...]:
    loaded = recipe.load(name)
    size = known_size(loaded.data)
    return params.leaves(loaded.model, size.input_shape, params.num_outputs(loaded, size.num_classes))


def test_the_cnns_names_and_shapes_are_those_of_a_torch_state_dict():
    shapes = {leaf.name: leaf.shape for leaf in leaves_of("cnn")}
    assert shapes["conv1.weight"] == (32, 1, 3, 3)
    assert shapes["conv3.weight"] == (128, 64, 3, 3)
    assert shapes["linear1.weight"] == (512, 128 * 3 * 3)
    assert shapes["linear3.weight"] == (10, 512)
    assert shapes["norm5.running_var"] == (512,)
    norms = {name.split(".")[0] for name in shapes if name.startswith("norm")}
    assert norms == {"norm1", "norm2", "norm3", "norm4", "norm5"}


@pytest.mark.parametrize("name", [name for name in recipe.recipe_names() if name not in ("csv", "map-style")])
def test_the_network_has_exactly_the_specified_leaves(name):
    loaded = recipe.load(name)
    size = known_size(loaded.data)
    outputs = params.num_outputs(loaded, size.num_classes)
    network = nnx.eval_shape(
        lambda: models.MODELS[loaded.model.name](loaded.model, size.input_shape, outputs, rngs=nnx.Rngs(0))
    )
    _, trained, statistics = nnx.split(network, nnx.Param, nnx.BatchStat)
    leaves = leaves_of(name)
    state = params.initial_state(leaves, loaded.init, 0)
    ours = from_canonical(state, leaves, dtype=jnp.float32, device=CPU)
    for tree, built in zip(ours, (trained, statistics), strict=True):
        assert jax.tree.map(jnp.shape, tree) == jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(built))


@pytest.mark.parametrize("name", [name for name in recipe.recipe_names() if name not in ("csv", "map-style")])
def test_torchs_network_has_exactly_the_specified_leaves(name):
    loaded, leaves = recipe.load(name), leaves_of(name)
    size = known_size(loaded.data)
    with torch.device("meta"):
        outputs = params.num_outputs(loaded, size.num_classes)
        module = torch_ref.models.network(loaded.model, size.input_shape, outputs)
    built = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert {name: shape for name, shape in built.items() if not name.endswith("num_batches_tracked")} == {
        leaf.name: leaf.shape for leaf in leaves
    }
    trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    assert trained == {leaf.name: True for leaf in leaves if leaf.trained}


def parts(of: Recipe) -> set[tuple[str, object]]:
    model = of.model
    own = {("model", model.name), ("loss", of.loss.name), ("bias", model.bias), ("norm0", model.input_batchnorm)}
    return own | {("activation", kind) for kind in model.activations or ()} | {("dropout", bool(model.dropout))}


def test_the_networks_compared_here_have_every_part_that_a_recipe_has():
    compared = set().union(*(parts(small.recipe) for small in NETWORKS.values()))
    assert set().union(*(parts(recipe.load(name)) for name in recipe.recipe_names())) <= compared


# The initial state


def test_uniform_weights_and_biases_fill_the_interval_of_one_over_root_fan_in():
    leaves = leaves_of("mlp512")
    state = params.initial_state(leaves, TORCH_DEFAULT, 0)
    for name, fan_in in [("linear1.weight", 784), ("linear1.bias", 784), ("linear2.weight", 512)]:
        bound = 1 / math.sqrt(fan_in)
        values = state[name].astype(np.float64)
        assert values.min() < -0.98 * bound
        assert values.max() > 0.98 * bound
        assert np.abs(values).max() <= np.float32(bound)
        deviation = bound / math.sqrt(3)
        assert abs(values.mean()) < DEVIATIONS * deviation / math.sqrt(values.size)
        assert abs(values.std() / deviation - 1) < DEVIATIONS / math.sqrt(values.size)


def test_a_convolutions_fan_in_counts_channels_and_taps():
    state = params.initial_state(leaves_of("cnn"), TORCH_DEFAULT, 0)
    assert 0.95 / 3 < np.abs(state["conv1.weight"]).max() <= 1 / 3
    assert 0.95 / math.sqrt(288) < np.abs(state["conv2.weight"]).max() <= np.float32(1 / math.sqrt(288))


def test_normal_weights_have_the_recipes_deviation_and_batchnorm_starts_at_one_and_zero():
    weight = params.initial_state(leaves_of("softmax-regression"), recipe.load("softmax-regression").init, 0)
    assert abs(weight["linear1.weight"].std() / 0.01 - 1) < DEVIATIONS / math.sqrt(2 * 7840)
    cnn = params.initial_state(leaves_of("cnn"), TORCH_DEFAULT, 0)
    for suffix, value in {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}.items():
        assert set(cnn[f"norm1.{suffix}"].tolist()) == {value}


def test_a_leaf_is_drawn_from_the_seed_and_its_name_alone():
    shallow, deep = leaves_of("mlp512"), leaves_of("mnist-mlp512")
    first, same = (params.initial_state(leaves, TORCH_DEFAULT, 7) for leaves in (shallow, deep))
    other = params.initial_state(shallow, TORCH_DEFAULT, 8)
    for name, array in first.items():
        assert array.dtype == np.float32
        assert np.array_equal(array, same[name])
        assert not np.array_equal(array, other[name])
    generator = np.random.default_rng([7, *b"linear2.bias"])
    assert np.array_equal(first["linear2.bias"], generator.uniform(-(512**-0.5), 512**-0.5, 512).astype(np.float32))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 5))
def test_a_layer_added_leaves_the_other_leaves_as_they_were(seed, sizes, added):
    mlp, cnn = recipe.load("sigmoid-mlp").model, recipe.load("cnn").model
    for short, long in (
        (with_layers(mlp, sizes), with_layers(mlp, [*sizes, added])),
        (dataclasses.replace(cnn, channels=tuple(sizes)), dataclasses.replace(cnn, channels=(*sizes, added))),
        (with_layers(mlp, sizes), dataclasses.replace(with_layers(mlp, sizes), input_batchnorm=True)),
    ):
        few, more = (params.leaves(model, (16, 17, 2), 4) for model in (short, long))
        before, after = (params.initial_state(leaves, TORCH_DEFAULT, seed) for leaves in (few, more))
        # A leaf keeps its values where it keeps its name, shape and fan-in; the last layer and its neighbour may not.
        kept = [
            leaf.name
            for leaf in few
            if (leaf.shape, leaf.fan_in) in {(o.shape, o.fan_in) for o in more if o.name == leaf.name}
        ]
        assert len(kept) >= 2
        assert_identical({name: after[name] for name in kept}, {name: before[name] for name in kept}, item="kept")


def with_layers(model: Model, sizes: list[int]) -> Model:
    return dataclasses.replace(model, hidden_sizes=tuple(sizes), activations=("tanh",) * len(sizes))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_torch_and_jax_start_from_the_same_bits(precision, name):
    small = NETWORKS[name]
    changed = dataclasses.replace(small, recipe=dataclasses.replace(small.recipe, precision=precision, seed=3))
    specified = params.initial_state(small.leaves, small.recipe.init, 3)
    for side in SIDES:
        expected = {leaf: array.astype(precision) for leaf, array in specified.items()}
        assert_identical(ADAPTERS[side](changed).state(), expected, item=f"{side}, {name}")


# Layouts: unequal dimensions, so that a wrong permutation shows


def test_weights_reach_flax_transposed_and_come_back_bit_for_bit():
    model = dataclasses.replace(recipe.load("cnn").model, channels=(2, 3), hidden_sizes=(5,))
    leaves = params.leaves(model, (8, 12, 1), 4)
    state = params.initial_state(leaves, TORCH_DEFAULT, 0)
    trained, statistics = from_canonical(state, leaves, dtype=jnp.float32, device=CPU)
    conv, linear = state["conv2.weight"], state["linear1.weight"]
    assert trained["conv2"]["kernel"].shape == (3, 3, 2, 3)
    assert trained["conv2"]["kernel"][0, 2, 1, 2] == conv[2, 1, 0, 2]
    # Flattened 2 x 3 x 3: row h, column w, channel c stands at (h 3 + w) 3 + c here, at (c 2 + h) 3 + w in torch.
    for h, w, c in [(1, 2, 0), (0, 1, 2), (1, 0, 1)]:
        assert trained["linear1"]["kernel"][(h * 3 + w) * 3 + c, 4] == linear[4, (c * 2 + h) * 3 + w]
    assert np.array_equal(trained["linear2"]["kernel"], state["linear2.weight"].T)
    back = to_canonical(trained, statistics, leaves)
    assert list(back) == list(state)
    for name, array in state.items():
        assert np.array_equal(back[name], array)
        assert back[name].flags["C_CONTIGUOUS"]


def aligned(array: np.ndarray) -> np.ndarray:
    """Return a copy that begins at a multiple of 64 bytes: JAX takes such memory over as it is when it is let."""
    room = np.empty(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def test_conversion_shares_no_memory_either_way():
    leaves = leaves_of("digits")
    state = {name: aligned(array) for name, array in params.initial_state(leaves, TORCH_DEFAULT, 0).items()}
    trained, statistics = from_canonical(state, leaves, dtype=jnp.float32, device=CPU)
    before = np.array(trained["linear1"]["bias"])
    state["linear1.bias"][:] = 99
    assert np.array_equal(trained["linear1"]["bias"], before)
    back = to_canonical(trained, statistics, leaves)
    back["linear1.bias"][:] = 99
    assert np.array_equal(trained["linear1"]["bias"], before)


small_models = st.one_of(
    st.builds(
        lambda sizes, bias, norm: Model(
            name="mlp", hidden_sizes=tuple(sizes), activations=("relu",) * len(sizes), bias=bias, input_batchnorm=norm
        ),
        st.lists(st.integers(1, 6), max_size=3),
        st.booleans(),
        st.booleans(),
    ),
    st.builds(
        lambda channels, sizes: Model(name="cnn", hidden_sizes=tuple(sizes), channels=tuple(channels), dropout=0.0),
        st.lists(st.integers(1, 4), min_size=1, max_size=2),
        st.lists(st.integers(1, 6), max_size=2),
    ),
)
small_shapes = st.tuples(st.integers(4, 7), st.integers(4, 7), st.integers(1, 3))


@settings(deadline=None, max_examples=20)
@given(small_models, small_shapes, st.integers(1, 5), st.integers(0, 99))
def test_the_state_goes_through_torch_bit_for_bit(model, shape, outputs, seed):
    through_torch(model, params.leaves(model, shape, outputs), shape, outputs, seed)


def test_the_state_of_ten_equal_layers_goes_through_torch_bit_for_bit():
    deep = NETWORKS["deep"]
    through_torch(deep.recipe.model, deep.leaves, deep.input_shape, deep.outputs, 0)


def through_torch(model, leaves, shape, outputs, seed) -> None:
    """Load a state in the wrong order, and find each leaf under its own name, in memory of its own."""
    generator = np.random.default_rng(seed)
    state = {leaf.name: generator.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves}
    # In Fortran's order, as a transposed weight is: equal values in other places of the memory.
    given = {name: np.asfortranarray(state[name]) for name in reversed(state)}
    module = torch_ref.models.network(model, shape, outputs)
    torch_ref.convert.load_state(module, given)
    back = torch_ref.convert.state(module)
    assert list(back) == list(state)
    assert_identical(back, state, item="through torch")
    held = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    assert_no_shared_memory(held, given, item="given")
    assert_no_shared_memory(held, back, item="given back")


@settings(deadline=None, max_examples=20)
@given(small_models, small_shapes, st.integers(1, 5), st.integers(0, 99))
def test_the_state_goes_through_flax_bit_for_bit(model, shape, outputs, seed):
    leaves = params.leaves(model, shape, outputs)
    generator = np.random.default_rng(seed)
    state = {leaf.name: generator.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves}
    given = {name: np.asfortranarray(state[name]) for name in reversed(state)}
    trees = from_canonical(given, leaves, dtype=jnp.float32, device=CPU)
    # What a compiled program gives back is sorted by key.
    back = to_canonical(*jax.tree.map(lambda leaf: leaf, trees), leaves)
    assert_identical(back, state, item="through Flax")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["cnn", "two softmaxes"])
def test_gradients_and_buffers_take_the_same_permutation_as_their_weight(name, side):
    small = NETWORKS[name]
    given = example(small)
    generator = np.random.default_rng(1)
    opt_state = {
        leaf: np.array(3) if leaf == "step" else generator.random(zeros.shape).astype(np.float32)
        for leaf, zeros in given.opt_state.items()
    }
    assert len(opt_state) > len(small.trained)  # momentum for the one, two moments for the other
    ours, truth = (loaded_adapter(each, name, given) for each in (side, "oracle"))
    for adapter in (ours, truth):
        adapter.load(given.state, opt_state)
        adapter.step(given.images, given.labels, decisions=given.masks)
    item, bound = f"{side}, {name}", pass_bound(small)
    assert_within(ours.opt_state(), truth.opt_state(), bound=bound, item=item, relative_to_layer=True)
    assert_within(ours.state(), truth.state(), bound=bound, item=item, relative_to_layer=True)


# The networks, layer by layer, against the oracle


@pytest.mark.parametrize("name", NETWORKS)
def test_torch_and_flax_give_the_same_logits_from_one_state(name):
    small = NETWORKS[name]
    given = example(small)
    truth = loaded_adapter("oracle", name, given)
    expected = truth.forward(given.images, train=True, decisions=given.masks)
    evaluated = truth.evaluate(given.images, given.labels)
    for side in SIDES:
        adapter, item = loaded_adapter(side, name, given), f"{side}, {name}"
        found = adapter.forward(given.images, train=True, decisions=given.masks)
        assert list(found.activations) == list(oracle.layer_names(small.recipe.model))
        for part in ("activations", "batch_stats"):
            pair = (getattr(each, part) for each in (found, expected))
            assert_within(*pair, bound=pass_bound(small), item=f"{item}, {part}", relative_to_layer=True)
        decided = ({layer: array.astype(int) for layer, array in each.decisions.items()} for each in (found, expected))
        assert_identical(*decided, item=f"{item}, decisions")
        losses, predictions = adapter.evaluate(given.images, given.labels)
        assert losses.dtype == np.float64
        assert_within(
            {"losses": losses}, {"losses": evaluated[0]}, bound=pass_bound(small), item=item, relative_to_layer=True
        )
        assert predictions.tolist() == evaluated[1].tolist()


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_in_float32_neither_sides_losses_err_more_than_kappa_times_the_others(name):
    given = example(NETWORKS[name])
    sides = {
        side: {"losses": loaded_adapter(side, name, given, precision="float32").evaluate(given.images, given.labels)[0]}
        for side in ("oracle", *SIDES)
    }
    assert sides["jax"]["losses"].dtype == sides["torch"]["losses"].dtype == np.float32
    assert_error_ratio(sides["jax"], sides["torch"], sides["oracle"], item=name)


@pytest.mark.parametrize("side", SIDES)
def test_a_unit_whose_input_is_exactly_zero_passes_no_gradient(side):
    given = example(NETWORKS["relu without biases"])
    given.state["linear1.weight"][[2, 5]] = 0
    grads = loaded_adapter(side, "relu without biases", given).gradients(given.images, given.labels)
    assert not grads["linear1.weight"][[2, 5]].any()
    assert grads["linear1.weight"][[0, 1, 3, 4, 6]].any(axis=1).all()


@pytest.mark.parametrize("side", SIDES)
def test_a_channel_whose_input_is_exactly_zero_passes_no_gradient(side):
    given = example(NETWORKS["cnn"])
    for norm in ("norm1", "norm3"):  # after a convolution, and after a linear layer
        given.state[f"{norm}.weight"][2] = given.state[f"{norm}.bias"][2] = 0
    grads = loaded_adapter(side, "cnn", given).gradients(given.images, given.labels, decisions=given.masks)
    for leaf in ("norm1.weight", "norm1.bias", "norm3.weight", "norm3.bias"):
        assert grads[leaf][2] == 0
        assert grads[leaf][:2].any()


@pytest.mark.parametrize("side", SIDES)
def test_in_a_network_the_gradient_of_a_tie_goes_to_the_first_largest(side):
    given = example(NETWORKS["cnn"])
    # With scale 0 every output of the channel is its shift, so every window is a tie, and the gradient by that scale
    # tells which of the four normalised values was taken. (Equal sums through another scale may differ in a bit.)
    given.state["norm1.weight"][1], given.state["norm1.bias"][1] = 0, 2
    adapter, truth = (loaded_adapter(each, "cnn", given) for each in (side, "oracle"))
    expected = truth.gradients(given.images, given.labels, decisions=given.masks)
    choice = truth.forward(given.images, train=True, decisions=given.masks).decisions["pool1"]
    assert not choice[:, 1].any()
    bound = pass_bound(NETWORKS["cnn"])
    for place in (1, 2, 3):
        other = choice.copy()
        other[:, 1] = place
        elsewhere = truth.gradients(given.images, given.labels, decisions=given.masks | {"pool1": other})
        assert largest_difference(elsewhere, expected) > bound / unit_roundoff(np.float32)
    grads = adapter.gradients(given.images, given.labels, decisions=given.masks)
    assert_within(grads, expected, bound=bound, item=f"{side}, ties", relative_to_layer=True)


# The layers, against NumPy in float64


def convolve(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Cross-correlation with zero padding 1, by its definition: NHWC, HWIO."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return sum(
        np.einsum("nhwi,io->nhwo", padded[:, i : i + height, j : j + width], kernel[i, j])
        for i in range(3)
        for j in range(3)
    )


def test_the_cpu_convolution_is_the_definition_and_its_gradients_are_the_stock_layers():
    with precision_scope("float64"):
        generator = np.random.default_rng(0)
        shapes = [(2, 5, 7, 3), (3, 3, 3, 4), (2, 5, 7, 4)]
        x, kernel, weight = (jnp.asarray(generator.standard_normal(shape)) for shape in shapes)
        ours = layers._conv_with_matmul_gradient

        def stock(x, kernel):
            return lax.conv_general_dilated(
                x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        terms = 5 * 7 * 2 * 4  # of the longest sum, an element of the kernel's gradient; the values are of size 1
        bound = sum_bound(terms, terms, np.float64)
        assert np.abs(ours(x, kernel) - convolve(np.asarray(x), np.asarray(kernel))).max() < bound

        def grads(function):
            return jax.grad(lambda x, kernel: (function(x, kernel) * weight).sum(), argnums=(0, 1))(x, kernel)

        for mine, theirs in zip(grads(ours), grads(stock), strict=True):
            assert np.abs(mine - theirs).max() < bound


tiny = st.integers(1, 4)


@settings(deadline=None, max_examples=4)
@given(
    batch=tiny, inputs=tiny, outputs=tiny, height=st.integers(2, 6), width=st.integers(2, 6), seed=st.integers(0, 99)
)
def test_a_convolution_of_any_shape_and_its_gradients_are_the_oracles_on_both_sides(
    batch, inputs, outputs, height, width, seed
):
    generator = np.random.default_rng(seed)
    x, grad = (generator.standard_normal((batch, channels, height, width)) for channels in (inputs, outputs))
    weight, bias = generator.standard_normal((outputs, inputs, 3, 3)), generator.standard_normal(outputs)
    applied = oracle_layers.convolution(x, weight, bias)
    x_grad, own = applied.back(grad)
    expected = {"output": applied.output, "x": x_grad, **own}
    terms = 9 * max(inputs, outputs, batch * height * width)
    bound = sum_bound(terms, terms * max(np.abs(array).max() ** 2 for array in (x, weight, grad)), np.float64)
    for side, found in (("jax", jax_convolution), ("torch", torch_convolution)):
        assert_within(found(x, weight, bias, grad), expected, bound=bound, item=side)


def jax_convolution(x, weight, bias, grad) -> dict[str, np.ndarray]:
    with precision_scope("float64"):
        conv = nnx.eval_shape(lambda: models._conv3x3(x.shape[1], len(weight), rngs=nnx.Rngs(0)))
        graphdef, _ = nnx.split(conv)

        def apply(x, weight, bias):
            leaves = {"kernel": weight.transpose(2, 3, 1, 0), "bias": bias}
            return nnx.merge(graphdef, leaves)(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)

        output, back = jax.vjp(jax.jit(apply), *map(jnp.asarray, (x, weight, bias)))
        return dict(zip(("output", "x", "weight", "bias"), map(np.asarray, (output, *back(grad))), strict=True))


def torch_convolution(x, weight, bias, grad) -> dict[str, np.ndarray]:
    model = Model(name="cnn", hidden_sizes=(), channels=(len(weight),), dropout=0.0)
    conv = torch_ref.models.network(model, (*x.shape[2:], x.shape[1]), 1).conv1.double()
    given = torch.tensor(x, requires_grad=True)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor(weight))
        conv.bias.copy_(torch.tensor(bias))
    output = conv(given)
    output.backward(torch.tensor(grad))
    found = {"output": output.detach(), "x": given.grad, "weight": conv.weight.grad, "bias": conv.bias.grad}
    return {name: tensor.numpy() for name, tensor in found.items()}


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (1, 7, 7, 2), (1, 3, 5, 1)])
def test_pooling_takes_the_maximum_of_each_window_and_leaves_an_odd_edge_out(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    _, height, width, _ = shape
    expected = np.stack(
        [
            np.stack([x[:, i : i + 2, j : j + 2].max(axis=(1, 2)) for j in range(0, width // 2 * 2, 2)], axis=1)
            for i in range(0, height // 2 * 2, 2)
        ],
        axis=1,
    )
    assert np.array_equal(layers.max_pool_2x2(jnp.asarray(x)), expected)


@pytest.mark.parametrize(
    ("window", "chosen"),
    [([3, 3, 3, 3], 0), ([1, 3, 3, 3], 1), ([1, 2, 3, 3], 2), ([1, 2, 0, 3], 3), ([3, 1, 3, 1], 0), ([1, 3, 3, 1], 1)],
)
def test_the_gradient_of_a_tie_goes_to_the_first_largest(window, chosen):
    x = jnp.asarray(window, jnp.float32).reshape(1, 2, 2, 1)
    grad = jax.grad(lambda x: layers.max_pool_2x2(x).sum())(x)
    assert grad.ravel().tolist() == [float(index == chosen) for index in range(4)]


def torchs_pool() -> torch.nn.Module:
    model = Model(name="cnn", hidden_sizes=(), channels=(1,), dropout=0.0)
    return torch_ref.models.network(model, (2, 2, 1), 1).pool1


@settings(deadline=None, max_examples=6)
@given(batch=tiny, channels=tiny, height=st.integers(2, 7), width=st.integers(2, 7), seed=st.integers(0, 99))
def test_torchs_pool_breaks_ties_as_ours(batch, channels, height, width, seed):
    generator = np.random.default_rng(seed)
    x = generator.integers(0, 3, (batch, channels, height, width)).astype(np.float32)
    applied = oracle_layers.max_pool(x)
    grad = generator.integers(1, 9, applied.output.shape).astype(np.float32)
    expected = {"output": applied.output.astype(np.float32), "x": applied.back(grad)[0].astype(np.float32)}
    given = torch.tensor(x, requires_grad=True)
    output = torchs_pool()(given)
    output.backward(torch.tensor(grad))
    assert_identical({"output": output.detach().numpy(), "x": given.grad.numpy()}, expected, item="torch")
    output, back = jax.vjp(jax.jit(layers.max_pool_2x2), jnp.asarray(x.transpose(0, 2, 3, 1)))
    found = {"output": output, "x": back(jnp.asarray(grad.transpose(0, 2, 3, 1)))[0]}
    assert_identical(
        {name: np.array(array).transpose(0, 3, 1, 2) for name, array in found.items()}, expected, item="jax"
    )


@pytest.mark.parametrize("place", range(4))
def test_pooling_passes_nan_on(place):
    window = jnp.zeros(4).at[place].set(jnp.nan).reshape(1, 2, 2, 1)
    assert jnp.isnan(layers.max_pool_2x2(window)).all()
    assert torchs_pool()(torch.tensor(np.array(window)).permute(0, 3, 1, 2)).isnan().all()


def test_the_slope_of_relu_at_zero_is_zero():
    assert jax.grad(layers.ACTIVATIONS["relu"])(0.0) == 0.0


def test_torchs_relu_has_slope_zero_at_zero_too():
    x = torch.tensor([-1.0, 0.0, -0.0, 2.0], requires_grad=True)
    torch_ref.models.ACTIVATIONS["relu"]()(x).sum().backward()
    assert x.grad.tolist() == [0, 0, 0, 1]


def test_other_ways_to_write_relu_have_another_slope_at_zero():
    assert jax.grad(lambda x: jnp.maximum(x, 0))(0.0) == 0.5
    assert jax.grad(lambda x: jnp.clip(x, 0))(0.0) == 0.5
    for written, slope in ((lambda x: torch.maximum(x, torch.zeros(())), 0.5), (lambda x: x.clamp(min=0), 1.0)):
        x = torch.zeros((), requires_grad=True)
        written(x).backward()
        assert x.grad == slope


def test_an_mlp_is_its_equation():
    model = dataclasses.replace(recipe.load("sigmoid-mlp").model, hidden_sizes=(4, 3), activations=("sigmoid", "relu"))
    leaves = params.leaves(model, (2, 3, 2), 5)
    state = {name: array.astype(np.float64) for name, array in params.initial_state(leaves, TORCH_DEFAULT, 0).items()}
    images = np.random.default_rng(1).standard_normal((7, 2, 3, 2))
    with precision_scope("float64"):
        trained, statistics = from_canonical(state, leaves, dtype=jnp.float64, device=CPU)
        logits, _ = models.apply(
            models.graph(model, (2, 3, 2), 5), trained, statistics, jnp.asarray(images), train=True
        )
    flat = images.transpose(0, 3, 1, 2).reshape(7, -1)  # canonical: channel, row, column
    hidden = 1 / (1 + np.exp(-(flat @ state["linear1.weight"].T + state["linear1.bias"])))
    hidden = np.maximum(hidden @ state["linear2.weight"].T + state["linear2.bias"], 0)
    expected = hidden @ state["linear3.weight"].T + state["linear3.bias"]
    bound = chain_bound(leaves, len(images), np.float64)
    assert_within({"logits": logits}, {"logits": expected}, bound=bound, item="the mlp", relative_to_layer=True)


def test_this_machines_jax_multiplies_right():
    # jax 0.10.2 is 0.8 % off here on CPU (jax issue 39103): a vmapped matrix-vector product, then a reduction.
    generator = np.random.default_rng(0)
    matrices = generator.standard_normal((64, 128, 96)).astype(np.float32)
    vectors = generator.standard_normal((64, 96)).astype(np.float32)
    summed = jax.jit(lambda m, v: jax.vmap(lambda m, v: m @ v)(m, v).sum(axis=1))(matrices, vectors)
    expected = np.einsum("bij,bj->b", matrices.astype(np.float64), vectors.astype(np.float64))
    magnitude = np.einsum("bij,bj->b", np.abs(matrices), np.abs(vectors))
    # 96 terms, then 128: of independent roundings no more than two stand out in a sum of that magnitude.
    assert (np.abs(summed - expected) <= 2 * unit_roundoff(np.float32) * magnitude).all()

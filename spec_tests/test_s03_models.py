"""S3: shapes, names, the initial state, layouts, padding, pooling, activations."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jax_impl import layers, models
from jax_impl.convert import from_canonical, to_canonical
from jax_impl.trainer import Trainer, precision_scope
from spec import params, recipe
from spec.datasets.sizes import known_size
from spec.recipe import Init
from spec_tests.conftest import made_up_images

CPU = jax.devices("cpu")[0]
TORCH_DEFAULT = Init(weight="uniform_fan_in", bias="uniform_fan_in")


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
    for given, built in zip(ours, (trained, statistics), strict=True):
        assert jax.tree.map(jnp.shape, given) == jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(built))


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
        assert abs(values.mean()) < 5 * deviation / math.sqrt(values.size)
        assert abs(values.std() / deviation - 1) < 5 / math.sqrt(values.size)


def test_a_convolutions_fan_in_counts_channels_and_taps():
    state = params.initial_state(leaves_of("cnn"), TORCH_DEFAULT, 0)
    assert 0.95 / 3 < np.abs(state["conv1.weight"]).max() <= 1 / 3
    assert 0.95 / math.sqrt(288) < np.abs(state["conv2.weight"]).max() <= np.float32(1 / math.sqrt(288))


def test_normal_weights_have_the_recipes_deviation_and_batchnorm_starts_at_one_and_zero():
    weight = params.initial_state(leaves_of("softmax-regression"), recipe.load("softmax-regression").init, 0)
    assert abs(weight["linear1.weight"].std() / 0.01 - 1) < 5 / math.sqrt(2 * 7840)
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


def test_conversion_shares_no_memory_either_way():
    leaves = leaves_of("digits")
    state = params.initial_state(leaves, TORCH_DEFAULT, 0)
    trained, statistics = from_canonical(state, leaves, dtype=jnp.float32, device=CPU)
    before = np.array(trained["linear1"]["bias"])
    state["linear1.bias"][:] = 99
    assert np.array_equal(trained["linear1"]["bias"], before)
    back = to_canonical(trained, statistics, leaves)
    back["linear1.bias"][:] = 99
    assert np.array_equal(trained["linear1"]["bias"], before)


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

        assert np.abs(ours(x, kernel) - convolve(np.asarray(x), np.asarray(kernel))).max() < 1e-13

        def grads(function):
            return jax.grad(lambda x, kernel: (function(x, kernel) * weight).sum(), argnums=(0, 1))(x, kernel)

        for mine, theirs in zip(grads(ours), grads(stock), strict=True):
            assert np.abs(mine - theirs).max() < 1e-13


@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
def test_the_compiled_cpu_epoch_takes_no_kernel_gradient_by_convolution(stock, monkeypatch):
    # XLA:CPU runs that one slowly inside a loop. It is the convolution whose result has the kernel's shape.
    if stock:
        monkeypatch.setattr(models, "conv_general_dilated", lax.conv_general_dilated)
    cnn = recipe.load("cnn")
    model = dataclasses.replace(cnn.model, channels=(5, 7), hidden_sizes=(4,))
    trainer = Trainer(dataclasses.replace(cnn, model=model, batch_size=6), made_up_images(15, 3), CPU)
    found = re.findall(r"f32\[3,3,(?:1,5|5,7)\]\S* convolution\(", trainer._run_steps.as_text())
    assert (len(found) > 0) == stock


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


@pytest.mark.parametrize("place", range(4))
def test_pooling_passes_nan_on(place):
    window = jnp.zeros(4).at[place].set(jnp.nan).reshape(1, 2, 2, 1)
    assert jnp.isnan(layers.max_pool_2x2(window)).all()


def test_the_slope_of_relu_at_zero_is_zero():
    assert jax.grad(layers.ACTIVATIONS["relu"])(0.0) == 0.0


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
    assert np.abs(np.asarray(logits) - expected).max() < 1e-14


def test_this_machines_jax_multiplies_right():
    # jax 0.10.2 is 0.8 % off here on CPU (jax issue 39103): a vmapped matrix-vector product, then a reduction.
    generator = np.random.default_rng(0)
    matrices = generator.standard_normal((64, 128, 96)).astype(np.float32)
    vectors = generator.standard_normal((64, 96)).astype(np.float32)
    summed = jax.jit(lambda m, v: jax.vmap(lambda m, v: m @ v)(m, v).sum(axis=1))(matrices, vectors)
    expected = np.einsum("bij,bj->b", matrices.astype(np.float64), vectors.astype(np.float64))
    bound = np.einsum("bij,bj->b", np.abs(matrices), np.abs(vectors)) * np.finfo(np.float32).eps
    assert (np.abs(summed - expected) <= bound).all()

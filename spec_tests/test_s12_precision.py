"""S12: what precision means on both sides, the flags that keep it, the rule by which two sides are compared."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_impl.step
import jax_impl.trainer
import torch_ref.data
import torch_ref.trainer
from jax_impl.parallel import place
from jax_impl.programs import precision_scope
from spec import datasets, recipe
from spec.batches import epoch_order
from spec.datasets import Dataset, Split
from spec.errors import UserError
from spec.recipe import Recipe
from spec_tests.adapters import ADAPTERS, Adapter, Arrays, Network
from spec_tests.assertions import assert_error_ratio, assert_within
from spec_tests.conftest import made_up_images
from spec_tests.tolerances import KAPPA, PLANTED_FAULT, chain_bound, formula_bound, run_bound, sum_bound, unit_roundoff

CPU = place("cpu")
DATASET = made_up_images(24, 8)
OURS = ("jax", "torch")
TRAINERS = {
    "jax": lambda changed: jax_impl.trainer.Trainer(changed, DATASET, CPU),
    "torch": lambda changed: torch_ref.trainer.Trainer(changed, DATASET, torch.device("cpu")),
}
MADE_UP = "--data.name map_style --data.path spec_tests.conftest:MadeUpImages --data.test-fraction 0.2 --data.seed 0"


def small_cnn(precision: str) -> Recipe:
    cnn = recipe.load("cnn")
    model = dataclasses.replace(cnn.model, channels=(2,), hidden_sizes=(5,), dropout=0.0)
    return dataclasses.replace(cnn, model=model, precision=precision, batch_size=8, epochs=1)


@pytest.fixture(scope="module")
def jax_trainer() -> jax_impl.trainer.Trainer:
    """A trainer of a small float64 CNN, not yet run: its compiled programs are what is looked at."""
    return TRAINERS["jax"](small_cnn("float64"))


@pytest.fixture(scope="module")
def float64() -> dict[str, Adapter]:
    changed = dataclasses.replace(recipe.load("mlp128-batchnorm"), precision="float64")
    model = dataclasses.replace(changed.model, hidden_sizes=(5,), activations=("tanh",), bias=True)
    network = Network(recipe=dataclasses.replace(changed, model=model), input_shape=(6, 4, 2), outputs=5)
    return {name: make(network) for name, make in ADAPTERS.items()}


# S12.1


@pytest.mark.parametrize("name", OURS)
def test_a_float64_run_holds_no_float32_anywhere(float64, name):
    generator = np.random.default_rng(0)
    images, labels = generator.random((8, 6, 4, 2)).astype(np.float32), generator.integers(0, 5, 8)
    ours, truth = float64[name], float64["oracle"]
    truth.load(ours.state(), ours.opt_state())
    bound = run_bound(truth.network.leaves, 8 * 24, 1, np.float64)

    def check(found: dict, expected: dict, item: str) -> None:
        assert {array.dtype for array in found.values()} <= {np.dtype(np.float64), np.dtype(np.int64)}
        assert_within(found, expected, bound=bound, item=f"{name}, {item}", relative_to_layer=True)

    passed, expected = (side.forward(images, train=True) for side in (ours, truth))
    check(passed.activations, expected.activations, "activations")
    check(passed.batch_stats, expected.batch_stats, "statistics")
    check(ours.gradients(images, labels), truth.gradients(images, labels), "gradients")
    loss, wanted = ours.step(images, labels)[0], truth.step(images, labels)[0]
    check({"loss": np.array(loss)}, {"loss": np.array(wanted)}, "loss")
    check(ours.state(), truth.state(), "state")
    check(ours.opt_state(), truth.opt_state(), "optimiser")
    losses, wanted = ours.evaluate(images, labels)[0], truth.evaluate(images, labels)[0]
    check({"losses": losses}, {"losses": wanted}, "test losses")


@pytest.mark.parametrize("name", OURS)
def test_a_trainers_figures_are_float64_to_the_last_digit(jax_trainer, name):
    changed = small_cnn("float64")
    trainer = jax_trainer if name == "jax" else TRAINERS[name](changed)
    truth = ADAPTERS["oracle"](Network(recipe=changed, input_shape=(28, 28, 1), outputs=10))
    steps, done = trainer.events()
    prepared = datasets.preprocess(DATASET, changed.preprocessing)
    order = np.split(epoch_order(changed.seed, 1, 24), 3)
    losses = [truth.step(prepared.train.inputs[batch], prepared.train.labels[batch])[0] for batch in order]
    test_losses, _ = truth.evaluate(prepared.test.inputs, prepared.test.labels)
    found = {"losses": steps.losses, "test": done.test_losses, **trainer.state()}
    expected = {"losses": np.array(losses), "test": test_losses, **truth.state()}
    assert {array.dtype for array in found.values()} == {np.dtype(np.float64)}
    bound = run_bound(truth.network.leaves, 8 * 784, 3, np.float64)
    assert_within(found, expected, bound=bound, item=name, relative_to_layer=True)


def test_the_only_float32_in_a_compiled_float64_epoch_are_the_images_it_widens(jax_trainer):
    for program in (jax_trainer._run_steps, jax_trainer._evaluate):
        shapes = re.findall(r"\bf32\[([\d,]*)\]", program.as_text())
        assert shapes
        sizes = [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]
        assert all(size % (28 * 28) == 0 or size == 256 for size in sizes)  # the images, and the table of their values


@pytest.mark.parametrize("name", OURS)
def test_a_bfloat16_run_multiplies_in_bfloat16_and_keeps_state_and_losses_in_float32(name):
    batchnorm = recipe.load("mlp128-batchnorm")
    model = dataclasses.replace(batchnorm.model, hidden_sizes=(), activations=())
    changed = dataclasses.replace(batchnorm, model=model, precision="bfloat16", batch_size=8, epochs=1)
    trainer = TRAINERS[name](changed)
    truth = ADAPTERS["oracle"](Network(recipe=changed, input_shape=(28, 28, 1), outputs=10))
    *_, done = trainer.events()
    state = trainer.state()
    assert done.test_losses.dtype == np.float32
    assert {array.dtype for array in state.values()} == {np.dtype(np.float32)}
    truth.load(state, truth.opt_state())
    prepared = datasets.preprocess(DATASET, changed.preprocessing)
    exact, _ = truth.evaluate(prepared.test.inputs, prepared.test.labels)
    assert np.abs(done.test_losses - exact).max() > chain_bound(truth.network.leaves, 8, np.float32) * exact.max()


# S12.2


def test_every_product_of_the_compiled_epoch_has_highest_precision(jax_trainer):
    for program, fewest in ((jax_trainer._run_steps, 6), (jax_trainer._evaluate, 3)):  # forward; and back, twice each
        products = re.findall(r"^.* = \S+ (?:dot|convolution)\(.*$", program.as_text(), re.MULTILINE)
        assert len(products) >= fewest
        assert all("operand_precision={highest,highest}" in line for line in products)


@pytest.mark.parametrize(
    ("precision", "products"), [("float32", "HIGHEST"), ("float64", "HIGHEST"), ("bfloat16", "DEFAULT")]
)
def test_the_scope_asks_for_full_products_unless_bfloat16_was_asked_for(precision, products):
    matrix = np.ones((2, 2), np.float32)
    outside = jax.config.jax_default_matmul_precision, jax.config.jax_enable_x64
    with precision_scope(precision):
        text = jax.jit(lambda a, b: a @ b).lower(matrix, matrix).as_text()
        assert jnp.ones(1).dtype == (np.float64 if precision == "float64" else np.float32)
    assert f"precision = [{products}, {products}]" in text
    assert (jax.config.jax_default_matmul_precision, jax.config.jax_enable_x64) == outside


@pytest.fixture
def loose_torch() -> Iterator[None]:
    """torch with every TF32 allowed, as a caller may have left it; put back afterwards."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def test_torchs_flags_forbid_tf32(loose_torch):
    assert torch_ref.trainer.select_device("cpu") == torch.device("cpu")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


# S12.4


def product_of(name: str, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    if name == "torch":
        return (torch.from_numpy(left) @ torch.from_numpy(right)).numpy()
    with precision_scope("float32"):
        return np.array(jnp.asarray(left) @ jnp.asarray(right))


def rounded_to_tf32(array: np.ndarray) -> np.ndarray:
    """Return float32 numbers with the 10 bits of fraction that TF32 has, rounded half away from 0."""
    bits = array.view(np.uint32)
    return ((bits + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("terms", [32, 784])
def test_a_product_lies_within_its_rounding_bound(name, terms):
    generator = np.random.default_rng(terms)
    left, right = (generator.standard_normal(shape).astype(np.float32) for shape in ((50, terms), (terms, 20)))
    exact = left.astype(np.float64) @ right.astype(np.float64)
    sizes = np.abs(left).astype(np.float64) @ np.abs(right).astype(np.float64)
    bounds = np.vectorize(sum_bound)(terms, sizes, np.float32)
    assert (np.abs(product_of(name, left, right) - exact) <= bounds).all()
    if terms == 32:  # the bound of a short sum tells TF32 from float32; that of a long one is too wide
        rounded = product_of(name, rounded_to_tf32(left), rounded_to_tf32(right))
        assert (np.abs(rounded - exact) > bounds).any()


# S12.5 and S12.6


LINEAR = Network(recipe=recipe.load("softmax-regression"), input_shape=(40,), outputs=7)


@functools.cache
def float32_gradients() -> tuple[Arrays, Arrays, Arrays]:
    """Return the float32 gradients of jax and of torch, and the truth."""
    generator = np.random.default_rng(0)
    images, labels = generator.standard_normal((30, 40)).astype(np.float32), generator.integers(0, 7, 30)
    ours, theirs, truth = (ADAPTERS[name](LINEAR).gradients(images, labels) for name in (*OURS, "oracle"))
    return ours, theirs, truth


def test_each_sides_error_is_at_most_kappa_times_the_others():
    ours, theirs, truth = float32_gradients()
    assert_error_ratio(ours, theirs, truth, item="gradients")
    bound = chain_bound(LINEAR.leaves, 30, np.float32)
    for side in (ours, theirs):  # a fault that both share has a ratio of 1: so each is held against the truth too
        assert_within(side, truth, bound=bound, item="gradients", relative_to_layer=True)


@pytest.mark.parametrize("side", OURS)
@pytest.mark.parametrize("leaf", ["linear1.weight", "linear1.bias"])
def test_the_tolerance_rule_fails_on_a_planted_error(side, leaf):
    *sides, truth = float32_gradients()
    faulty = sides[OURS.index(side)][leaf].copy()
    place = np.unravel_index(np.abs(faulty).argmax(), faulty.shape)
    faulty[place] *= 1 + PLANTED_FAULT
    ours, theirs = (
        arrays | {leaf: faulty} if name == side else arrays for name, arrays in zip(OURS, sides, strict=True)
    )
    with pytest.raises(AssertionError, match=f"{leaf}: one side's error .* allowed {KAPPA}"):
        assert_error_ratio(ours, theirs, truth, item="gradients")


def test_torchs_images_of_one_channel_have_torchvisions_strides_and_their_variance_is_right():
    images = np.where(np.random.default_rng(0).random((64, 28, 28, 1)) < 0.5, 0, 255).astype(np.uint8)
    preprocessing = recipe.load("cnn").preprocessing
    split = Split(images, np.zeros(64, np.int32))
    raw = Dataset(name="images", train=split, test=None, class_names=("a", "b"))
    inputs = torch_ref.data.preprocess(raw, preprocessing, dtype=torch.float32)[0].tensors[0]
    assert inputs.stride() == torch.zeros(64, 1, 28, 28).stride()
    convolved = torch.nn.Conv2d(1, 2, 3, padding=1)(inputs).detach()
    assert convolved.is_contiguous()
    norm = torch.nn.BatchNorm2d(2, momentum=1.0)
    norm(convolved)
    variance = convolved.double().var(dim=(0, 2, 3))
    assert (norm.running_var - variance).abs().max() <= formula_bound(float(variance.max()), np.float32)


def test_a_cancelling_sum_passes_by_the_leafs_largest_value_and_fails_by_ulps():
    generator = np.random.default_rng(0)
    left = generator.standard_normal((20, 784)).astype(np.float32)
    right = generator.standard_normal((784, 20)).astype(np.float32)
    last = left[:, :-1].astype(np.float64) @ right[:-1].astype(np.float64)
    left[:, -1], right[-1] = 1, 1
    left[:, -1] = -last[:, 0].astype(np.float32)  # the first column is what a rounding to float32 leaves: nearly 0
    exact = {"product": left.astype(np.float64) @ right.astype(np.float64)}
    ours, theirs = ({"product": product_of(name, left, right)} for name in OURS)
    assert_error_ratio(ours, theirs, exact, item="product")
    for side in (ours, theirs):
        ulps = np.abs(side["product"] - exact["product"]) / np.spacing(np.abs(exact["product"]).astype(np.float32))
        assert ulps[:, 0].max() > 100
        scale = float(np.abs(exact["product"]).max())
        assert_within(side, exact, bound=784 * unit_roundoff(np.float32) * scale, item="product")


# S12.7


def test_both_sides_of_a_comparison_use_the_same_batch_shapes(monkeypatch):
    changed = dataclasses.replace(recipe.load("softmax-regression"), batch_size=8, last_batch="keep", epochs=1)
    dataset = made_up_images(19, 10)
    seen: dict[str, set] = {"jax": set(), "torch": set()}
    apply = jax_impl.step.apply

    def record(graph, trained, statistics, images, *, train, **options):
        seen["jax"].add((train, len(images)))
        return apply(graph, trained, statistics, images, train=train, **options)

    monkeypatch.setattr(jax_impl.step, "apply", record)
    list(jax_impl.trainer.Trainer(changed, dataset, CPU).events())
    trainer = torch_ref.trainer.Trainer(changed, dataset, torch.device("cpu"))
    trainer.network.register_forward_pre_hook(
        lambda network, inputs: seen["torch"].add((network.training, len(inputs[0])))
    )
    list(trainer.events())
    assert seen["jax"] == seen["torch"] == {(True, 8), (True, 3), (False, 8), (False, 2)}


# S12.8


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def test_the_report_names_the_backend_and_the_versions_in_use(trainer_command, tmp_path):
    flags = [
        "--recipe",
        "softmax-regression",
        *MADE_UP.split(),
        "--epochs",
        "1",
        "--batch-size",
        "60",
        "--quiet",
        "--platform",
        "cpu",
    ]
    expected = {
        "jax": ("cpu:cpu:0", ("jax", "jaxlib", "flax", "optax")),
        "torch": ("cpu", ("torch", "torchvision")),
    }
    for framework, (device, packages) in expected.items():
        ended = trainer_command(*flags, "--out", tmp_path / framework, framework=framework)
        assert ended.status == 0, ended.err
        config = config_of(tmp_path / framework)
        summary = json.loads((tmp_path / framework / "summary.json").read_text())
        assert config["framework"] == summary["framework"] == framework
        assert config["devices"] == summary["devices"] == [device]
        assert config["recipe"]["precision"] == "float32"
        assert config["versions"] == summary["versions"]
        assert set(config["versions"]) == {"python", "lockstep", "numpy", *packages}
        for package in ("numpy", *packages):
            assert config["versions"][package] == importlib.metadata.version(package)


def test_torch_refuses_a_platform_it_does_not_have():
    with pytest.raises(UserError, match="--platform tpu is not one that torch has here"):
        torch_ref.trainer.select_device("tpu")

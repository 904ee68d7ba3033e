"""`--summary`: what it says of a network is what the Flax module and the torch module are."""

from __future__ import annotations

import math
import re

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from flax.traverse_util import flatten_dict
from torch.utils.flop_counter import FlopCounterMode

from jax_impl.models import MODELS
from spec import flops, params, recipe, summary
from spec.datasets.sizes import Size, known_size
from spec.layers import Layer, flax_array, layers
from spec.recipe import Recipe
from spec_tests.commands import changed
from spec_tests.conftest import FRAMEWORKS
from torch_ref.models import network as torch_network

BATCH = 3
NO_FILE = Size(num_train=20, num_test=5, input_shape=(7,), input_dtype=np.dtype(np.float64), num_classes=3)
IMAGES = Size(num_train=20, num_test=5, input_shape=(9, 11, 3), input_dtype=np.dtype(np.uint8), num_classes=4)
ODD = [
    (changed("cnn", model={"channels": [5], "hidden_sizes": []}), IMAGES),
    (changed("cnn", model={"channels": [5, 6, 7], "hidden_sizes": [8]}), IMAGES),
    (changed("mlp128-batchnorm", model={"hidden_sizes": [], "activations": []}), IMAGES),
]
NETWORKS = [(recipe.load(name), known_size(recipe.load(name).data) or NO_FILE) for name in recipe.recipe_names()] + ODD
every = pytest.mark.parametrize(
    ("of", "size"), NETWORKS, ids=[*recipe.recipe_names(), "one-block", "odd-images", "norm-alone"]
)


def outputs_of(of: Recipe, size: Size) -> int:
    return params.num_outputs(of, size.num_classes)


def flax_module(of: Recipe, size: Size) -> nnx.Module:
    """Return the real module, its arrays abstract."""
    return nnx.eval_shape(
        lambda: MODELS[of.model.name](of.model, size.input_shape, outputs_of(of, size), rngs=nnx.Rngs(0))
    )


def flax_outputs(of: Recipe, size: Size, names: list[str]) -> dict[str, tuple[int, ...]]:
    """Return the output shape of each layer that the Flax module has a hook for; of `flatten`, by who comes next."""
    seen: dict[str, tuple[int, ...]] = {}

    def hook(name: str):
        def keep(x: jax.Array, y: jax.Array) -> jax.Array:
            seen[name] = y.shape[1:]
            if name == "linear1":
                seen["flatten"] = x.shape[1:]
            return y

        return keep

    graphdef, state = nnx.split(flax_module(of, size))

    def forward(state: nnx.State, images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(images, train=False, hooks={name: hook(name) for name in names})

    jax.eval_shape(forward, state, jax.ShapeDtypeStruct((BATCH, *size.input_shape), np.float32))
    return seen


def torch_outputs(of: Recipe, size: Size) -> tuple[torch.nn.Module, dict[str, tuple[int, ...]]]:
    """Return the real torch module, and its children's output shapes in their order."""
    module = torch_network(of.model, size.input_shape, outputs_of(of, size))
    seen: dict[str, tuple[int, ...]] = {}
    for name, child in module.named_children():
        child.register_forward_hook(lambda _, __, y, name=name: seen.update({name: tuple(y.shape[1:])}))
    images = torch.zeros(BATCH, *size.input_shape)
    module.eval()(images.permute(0, 3, 1, 2) if images.ndim == 4 else images)
    return module, seen


def of_layers(network: tuple[Layer, ...], shape: str) -> dict[str, tuple[int, ...]]:
    return {layer.name: getattr(layer, shape) for layer in network[1:]}


@every
def test_names_and_output_shapes_are_those_of_the_torch_module_in_its_order(of, size):
    network = layers(of, size)
    assert list(of_layers(network, "torch_shape").items()) == list(torch_outputs(of, size)[1].items())


@every
def test_output_shapes_are_those_of_the_flax_module(of, size):
    network = layers(of, size)
    assert of_layers(network, "shape") == flax_outputs(of, size, [layer.name for layer in network])


@every
def test_flax_names_and_shapes_are_those_of_the_flax_module(of, size):
    state = nnx.to_pure_dict(nnx.state(flax_module(of, size), nnx.Any(nnx.Param, nnx.BatchStat)))
    real = {".".join(path): array.shape for path, array in flatten_dict(state).items()}
    listed = [(layer.name, *flax_array(leaf)) for layer in layers(of, size) for leaf in layer.leaves]
    assert {f"{layer}.{name}": shape for layer, name, shape in listed} == real
    assert len(listed) == len(real)


@every
def test_torch_names_shapes_and_counts_are_those_of_the_torch_module(of, size):
    module, _ = torch_outputs(of, size)
    network = layers(of, size)
    real = {name: tuple(array.shape) for name, array in module.state_dict().items() if "num_batches" not in name}
    assert {leaf.name: leaf.shape for layer in network for leaf in layer.leaves} == real
    counts = {name: sum(array.numel() for array in child.parameters()) for name, child in module.named_children()}
    assert {layer.name: layer.num_parameters for layer in network[1:]} == counts


@every
def test_kinds_are_those_of_the_torch_module(of, size):
    said = {
        "Linear": "linear", "Conv2d": "conv 3x3", "ReLU": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh",
        "Flatten": "flatten", "MaxPool2d": "max-pool 2x2", "BatchNorm1d": "BatchNorm", "BatchNorm2d": "BatchNorm",
        "OneChannelNorm": "BatchNorm", "Dropout": f"dropout {of.model.dropout}",
    }  # fmt: skip
    module, _ = torch_outputs(of, size)
    kinds = {name: said[type(child).__name__] for name, child in module.named_children()}
    assert {layer.name: layer.kind for layer in layers(of, size)[1:]} == kinds


def test_the_flops_of_the_cnn_by_hand():
    counts = {layer.name: layer.flops for layer in layers(recipe.load("cnn"), known_size(recipe.load("cnn").data))}
    assert counts["conv1"] == 2 * 9 * 1 * 32 * 28 * 28
    assert counts["conv3"] == 2 * 9 * 64 * 128 * 7 * 7
    assert counts["linear3"] == 2 * 512 * 10
    assert [name for name, count in counts.items() if count is not None] == [
        "conv1", "conv2", "conv3", "linear1", "linear2", "linear3",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["cnn", "mlp128", "mlp128-batchnorm", "breast-cancer"])
def test_the_flops_of_training_are_those_that_torch_counts(name):
    of = recipe.load(name)
    size = known_size(of.data)
    module = torch_network(of.model, size.input_shape, outputs_of(of, size))
    examples = torch.zeros(BATCH, *size.input_shape)
    with FlopCounterMode(display=False) as counter:
        module(examples.permute(0, 3, 1, 2) if examples.ndim == 4 else examples).sum().backward()
    counted = flops.training_flops(of.model, size.input_shape, outputs_of(of, size))
    assert BATCH * counted == counter.get_total_flops() > 0


@pytest.mark.parametrize(
    ("precision", "kept"),
    [("float32", "3,823,144"), ("float64", "7,646,288"), ("bfloat16", "3,823,144")],  # bfloat16 keeps float32
)
def test_the_summary_of_the_cnn_by_hand(precision, kept, capsys):
    of = changed("cnn", precision=precision)
    summary.show_network(of, known_size(of.data))
    lines = capsys.readouterr().out.splitlines()
    rows = [re.split(" {2,}", line) for line in lines]
    assert ["layer", "kind", "output, JAX", "output, torch", "parameters", "FLOPs"] in rows
    assert ["conv1", "conv 3x3", "[28, 28, 32]", "[32, 28, 28]", "320", "451,584"] in rows
    assert ["layer", "array, JAX", "array, torch", "numbers"] in rows
    assert ["conv1", "kernel [3, 3, 1, 32]", "weight [32, 1, 3, 3]", "288"] in rows
    assert lines[-3:] == [
        "total: 953,290 parameters (and 2,496 running statistics)",
        f"weights: {kept} bytes",
        "FLOPs an example, of products: 16,616,448 forward, 49,397,760 training",
    ]


@every
def test_the_totals_are_the_sums_and_a_line_has_80_letters_at_most(of, size, capsys):
    network = layers(of, size)
    leaves = params.leaves(of.model, size.input_shape, outputs_of(of, size))
    said = "\n".join(summary.totals(of, size, network))
    numbers = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\d|\d", said)]
    assert numbers[0] == params.num_parameters(leaves)
    assert 4 * sum(math.prod(leaf.shape) for leaf in leaves) in numbers
    forward = sum(flops.forward_flops(of.model, size.input_shape, outputs_of(of, size)))
    assert numbers[-2:] == [forward, flops.training_flops(of.model, size.input_shape, outputs_of(of, size))]
    summary.show_network(of, size)
    table = capsys.readouterr().out.split("\n\n", 1)[1]
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_command_prints_a_row_a_layer_and_trains_nothing(framework, trainer_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = trainer_command("--recipe", "mlp128", "--summary", framework=framework)
    assert (ended.status, ended.err) == (0, "")
    rows = [line.split() for line in ended.out.splitlines() if line.startswith("linear1")]
    assert rows[0] == ["linear1", "linear", "[128]", "[128]", "100,352", "200,704"]
    assert rows[1] == ["linear1", "kernel", "[784,", "128]", "weight", "[128,", "784]", "100,352"]
    assert "101,632 parameters" in ended.out
    assert list(tmp_path.iterdir()) == []


def test_a_file_says_how_large_its_network_is(trainer_command, tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("a,b,label\n" + "\n".join(f"{k},{k % 5},{k % 3}" for k in range(30)) + "\n")
    ended = trainer_command("--recipe", "csv", "--data.path", path, "--summary")
    assert ended.status == 0, ended.err
    assert re.search(r"^input +- +\[2\] +\[2\]", ended.out, re.MULTILINE)
    missing = trainer_command("--recipe", "csv", "--data.path", tmp_path / "none.csv", "--summary")
    assert missing.status == 2
    assert "none.csv does not exist" in missing.err


def test_a_network_that_cannot_be_is_refused(trainer_command):
    ended = trainer_command("--recipe", "cnn", "--model.channels", *"123456", "--summary")
    assert ended.status == 2
    assert "needs images of at least 64x64" in ended.err
    many = trainer_command("--summary", "--seeds", 2)
    assert many.status == 2
    assert "--summary prints one network" in many.err

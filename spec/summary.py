"""`--summary` of both trainers: a table of the network, layer by layer, JAX and torch side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from spec import datasets, flops, params
from spec.command_line import Flags
from spec.datasets.sizes import Size, known_size, size_of
from spec.layers import Layer, flax_array, layers
from spec.recipe import Recipe
from spec.table import print_table

LAYERS = ("layer", "kind", "output, JAX", "output, torch", "parameters", "FLOPs")
ARRAYS = ("layer", "array, JAX", "array, torch", "numbers")
BYTES = {"float32": 4, "float64": 8, "bfloat16": 4}  # of a parameter; bfloat16 keeps parameters in float32


def show(flags: Flags) -> None:
    """Print the table of the network that the flags ask for: layers, arrays, totals; read the data only where nothing
    else tells their size. Raises UserError for data or a recipe that cannot be used."""
    data = flags.config.data
    size = known_size(data)
    if size is None:
        size = size_of(datasets.load(data, data_dir=flags.data_dir, data_source=flags.data_source))
    show_network(flags.config, size)


def show_network(recipe: Recipe, size: Size) -> None:
    """Print the table of a recipe's network for data of that size."""
    network = layers(recipe, size)
    print(f"{recipe.name}: {recipe.description}")
    print("Output shapes are without the batch; FLOPs are forward, of one example.\n")
    print_table(LAYERS, layer_rows(network), right=LAYERS[4:])
    print()
    print_table(ARRAYS, array_rows(network), right=ARRAYS[3:])
    print()
    for line in totals(recipe, size, network):
        print(line)


def layer_rows(network: Sequence[Layer]) -> list[tuple[str, ...]]:
    """Return the cells of `LAYERS`, a layer a row; `-` for what a layer has not, or what does not count."""
    return [
        (
            layer.name,
            "-" if layer.kind == layer.name else layer.kind,
            str(list(layer.shape)),
            str(list(layer.torch_shape)),
            f"{layer.num_parameters:,}" if layer.leaves else "-",
            "-" if layer.flops is None else f"{layer.flops:,}",
        )
        for layer in network
    ]


def array_rows(network: Sequence[Layer]) -> list[tuple[str, ...]]:
    """Return the cells of `ARRAYS`, an array a row; parameters, and BatchNorm's running statistics."""
    rows = []
    for layer in network:
        for leaf in layer.leaves:
            name, shape = flax_array(leaf)
            ours = leaf.name.removeprefix(f"{layer.name}.")
            cells = f"{name} {list(shape)}", f"{ours} {list(leaf.shape)}", f"{math.prod(leaf.shape):,}"
            rows.append((layer.name, *cells))
    return rows


def totals(recipe: Recipe, size: Size, network: Sequence[Layer]) -> Iterator[str]:
    """Yield the lines of what all layers have and cost together."""
    outputs = params.num_outputs(recipe, size.num_classes)
    kept = sum(math.prod(leaf.shape) for layer in network for leaf in layer.leaves)
    parameters = sum(layer.num_parameters for layer in network)
    statistics = f" (and {kept - parameters:,} running statistics)" if kept > parameters else ""
    forward = sum(layer.flops or 0 for layer in network)
    training = flops.training_flops(recipe.model, size.input_shape, outputs)
    yield f"total: {parameters:,} parameters{statistics}"
    yield f"weights: {kept * BYTES[recipe.precision]:,} bytes"
    yield f"FLOPs an example, of products: {forward:,} forward, {training:,} training"

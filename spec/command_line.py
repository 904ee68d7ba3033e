"""The command line of both trainers: flags, every recipe field by its path, `--list` and `--print-config`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Annotated, Literal

import tyro

from spec import recipe as recipes
from spec.datasets import DataSource
from spec.recipe import Recipe

DEFAULT_RECIPE = "mlp128"


@dataclass(frozen=True, kw_only=True)
class Flags:
    """One call of a trainer."""

    recipe: str = DEFAULT_RECIPE
    """a recipe's name, a .toml file, or a run's config.json, which repeats that run"""
    list: bool = False
    """show the recipes, and stop"""
    print_config: bool = False
    """print the resolved recipe as TOML, and stop"""
    out: Path | None = None
    """the run directory; runs/RECIPE-DATE-TIME unless given"""
    overwrite: bool = False
    """replace the run that --out holds"""
    data_dir: Path | None = None
    """a directory that holds the idx files"""
    data_source: DataSource = "idx"
    """read the idx files, or the same examples through TFDS"""
    platform: Literal["cpu", "gpu", "tpu"] | None = None
    """where to run; an accelerator if there is one, unless given"""
    quiet: bool = False
    """print only errors and the last line"""
    config: Annotated[Recipe, tyro.conf.arg(name="")]


def parse(arguments: Sequence[str], *, program: str, description: str) -> Flags:
    """Return the flags, the recipe's fields changed as the command line says; exit with 2 on a mistake.

    Raises RecipeError when the changed recipe breaks a rule.
    """
    scanner = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    scanner.add_argument("--recipe", default=DEFAULT_RECIPE)
    name = scanner.parse_known_args(arguments)[0].recipe
    default = Flags(recipe=name, config=recipes.load(name))
    flags = tyro.cli(
        Flags,
        args=list(arguments),
        default=default,
        prog=program,
        description=description,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return replace(flags, config=recipes.parse(recipes.to_mapping(flags.config), source=name))


def print_recipe(recipe: Recipe) -> None:
    """Print the recipe as a TOML file that `--recipe FILE` takes."""
    import tomli_w

    sys.stdout.write(tomli_w.dumps(recipes.to_mapping(recipe)))


def print_recipes() -> None:
    """Print the table of recipes: model, parameters, data, steps, expected test accuracy."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("recipe", "model", "parameters", "data", "epochs x steps", "expected test accuracy"):
        table.add_column(heading, justify="right" if heading in ("parameters", "epochs x steps") else "left")
    for name in recipes.recipe_names():
        table.add_row(name, *_describe(recipes.load(name)))
    console = Console()
    console.print(table, crop=False, soft_wrap=not console.is_terminal)


def _describe(recipe: Recipe) -> tuple[str, ...]:
    from spec import batches, params
    from spec.datasets.sizes import known_size

    size = known_size(recipe.data)
    hidden = "-".join(str(units) for units in ((recipe.model.channels or ()) + recipe.model.hidden_sizes))
    expected = recipe.expected
    accuracy = f"{expected.test_accuracy:.3f} +- {expected.margin:.3f}" if expected else "-"
    if size is None:
        return (recipe.model.name, "by the file", recipe.data.name, f"{recipe.epochs} x by the file", accuracy)
    outputs = params.num_outputs(recipe, size.num_classes)
    leaves = params.leaves(recipe.model, size.input_shape, outputs)
    widths = "-".join(part for part in (str(prod(size.input_shape)), hidden, str(outputs)) if part)
    return (
        f"{recipe.model.name} {widths}",
        f"{params.num_parameters(leaves):,}",
        recipe.data.name,
        f"{recipe.epochs} x {batches.count(recipe, size.num_train).steps_per_epoch}",
        accuracy,
    )

"""The command line of both trainers: flags, every recipe field by its path, `--list` and `--print-config`."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from spec import recipe as recipes
from spec.errors import UserError, nearest, shown
from spec.files import expanded
from spec.recipe import DataSource, Recipe
from spec.run.run_directory import CONFIG, run_of

DEFAULT_RECIPE = "mlp128"
SEE_HELP = "--help lists every option"
WIDE = 200  # columns of the table: a narrow terminal wraps whole rows, and names stay whole


@dataclass(frozen=True, kw_only=True)
class Flags:
    """One call of a trainer."""

    recipe: str = DEFAULT_RECIPE
    """a recipe's name, a .toml file, or a run (its directory or config.json), which is repeated"""
    list: bool = False
    """show the recipes, and stop"""
    print_config: bool = False
    """print the resolved recipe as TOML, and stop"""
    summary: bool = False
    """print the network layer by layer, in JAX and in torch: shapes, parameters, FLOPs; and stop"""
    out: Path | None = None
    """the run directory; runs/RECIPE-DATE-TIME unless given"""
    overwrite: bool = False
    """replace the run that --out holds"""
    resume: str = "auto"
    """auto: go on with the unfinished run that --out holds; never; or a run directory, or one of its checkpoints"""
    resume_with_changes: bool = False
    """go on with a run though the recipe was changed"""
    checkpoint_every: str = "auto"
    """steps (500), time (30s, 5m, 1h), epoch, never; auto: at epochs' ends, for a fiftieth of the time, and 5m"""
    keep_checkpoints: int = 3
    """so many last checkpoints stay, and the best"""
    on_nonfinite: Literal["stop", "skip", "ignore"] = "stop"
    """what becomes of a step that makes a number nan or infinite"""
    dump_nonfinite: bool = False
    """write the batch of the step that a run stopped at, and the state before it, to nonfinite.safetensors"""
    tensorboard: bool = False
    """write the curves, the recipe and the first images for TensorBoard too, in the run's tensorboard/"""
    data_dir: Path | None = None
    """a directory that holds the idx files"""
    data_source: DataSource = "idx"
    """read the idx files, or the same examples through TFDS"""
    platform: Literal["cpu", "gpu", "tpu"] | None = None
    """where to run; an accelerator if there is one, unless given"""
    quiet: bool = False
    """print only errors and the last line"""
    config: Annotated[Recipe, tyro.conf.arg(name="")]

    def devices_asked(self) -> dict[str, Any]:
        """Return what the flags say of devices."""
        return {"platform": self.platform}


LASTING = (
    "checkpoint_every",
    "keep_checkpoints",
    "on_nonfinite",
    "data_source",
    "tensorboard",
)  # flags that a run keeps
F = TypeVar("F", bound=Flags)
T = TypeVar("T")


def parse(arguments: Sequence[str], *, program: str, description: str, kind: type[F] = Flags) -> F:
    """Return the flags, the recipe's fields changed as the command line says.

    Raises UserError for what is no option or no value of one, RecipeError when the changed recipe breaks a rule.
    """
    scanner = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    scanner.add_argument("--recipe")
    scanner.add_argument("--resume", default="auto")
    scanner.add_argument("--out")
    scanner.add_argument("--overwrite", action="store_true")
    given = scanner.parse_known_args(arguments)[0]
    name = _recipe_of(given.resume) if given.recipe is None else given.recipe
    default = kind(recipe=name, config=recipes.load(name))
    about = {"default": default, "prog": program, "description": description, "options": _options(kind)}
    flags = parsed(kind, [*_flags_of(given), *arguments], **about)
    checked = recipes.parse(recipes.to_mapping(flags.config), source=name)
    if replace(checked, seed=default.config.seed) != default.config:
        checked = replace(checked, expected=None)  # it was measured for the recipe unchanged
    paths = {name: expanded(path) for name in ("out", "data_dir") if (path := getattr(flags, name))}
    return replace(flags, config=checked, **paths)


def _recipe_of(resume: str) -> str:
    """Return the recipe that `--resume` asks for, unless `--recipe` does: that of the run it names."""
    if resume in ("auto", "never"):
        return DEFAULT_RECIPE
    return str((run_of(expanded(Path(resume))) / CONFIG).absolute())


def _flags_of(given: argparse.Namespace) -> list[str]:
    """Return the flags of the run that is gone on with, as one would give them; the last of two counts."""
    if given.overwrite or given.resume == "never" or (given.resume == "auto" and given.out is None):
        return []
    run = expanded(Path(given.out)) if given.resume == "auto" else run_of(expanded(Path(given.resume)))
    try:
        flags = json.loads((run / CONFIG).read_text("utf-8"))["flags"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [word for name in LASTING if name in flags for word in _words(f"--{name.replace('_', '-')}", flags[name])]


def _words(option: str, value: Any) -> list[str]:
    """Return an option with its value, as one would give it: what is true alone, what is false not at all."""
    return [option] * value if isinstance(value, bool) else [option, str(value)]


def parsed(kind: type[T], arguments: Sequence[str], *, options: Sequence[str] = (), **about: Any) -> T:
    """Return the flags as tyro parses them, told `about` the program. Raises UserError with what is wrong, without its
    box and its page of help; `options` are those there are, the fields of `kind` unless given."""
    if "" in arguments:
        before = arguments[: arguments.index("")]
        after = "".join([f" after {word.partition('=')[0]}" for word in before if word.startswith("--")][-1:])
        raise UserError(
            f'an argument{after} is empty (""), as that of a shell variable with no value is; give it, or leave it out'
        )
    named = [field.name.replace("_", "-") for field in fields(kind) if "Positional" not in field.type]
    options = options or [f"--{name}" for name in named]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = (tyro.conf.FlagCreatePairsOff,)
            return tyro.cli(kind, args=list(arguments), config=config, registry=_numbers(), **about)
    except SystemExit as left:
        if not left.code:  # after --help
            raise
    unknown = [name for name in map(_name, arguments) if name.startswith("--") and name not in options]
    if unknown and "Unrecognized" in said.getvalue():
        raise UserError(f"{shown(unknown[0])} is not an option{_nearest(unknown[0], options)}; {SEE_HELP}")
    raise UserError(f"{shown(_message(said.getvalue()), most=500)}; {SEE_HELP}")


def _name(argument: str) -> str:
    return argument.partition("=")[0].replace("_", "-")


def _options(kind: type[Flags]) -> list[str]:
    """Return the options as `--field` or `--section.field`, short names first."""
    flags = [(field.name,) for field in fields(kind) if field.name != "config"]
    names = [".".join(path).replace("_", "-") for path in [("help",), *flags, *recipes.paths()]]
    return [*recipes.SHORT_OPTIONS, *(f"--{name}" for name in names)]


def _nearest(option: str, options: Sequence[str]) -> str:
    """Return `` (did you mean --x?)`` for the option that `option` is near to, by its path or by its last name."""
    by_last_name = {f"--{name.rsplit('.', 1)[-1].removeprefix('--')}": name for name in reversed(options)}
    choices = by_last_name | {name: name for name in options}
    near = nearest(option, choices)
    return f" (did you mean {choices[near]}?)" if near else ""


def _message(box: str) -> str:
    """Return the sentence in tyro's box: what stands between its title and its next rule, on one line."""
    lines = [re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯├┤]", "", line).strip() for line in box.splitlines()[1:]]
    rules = [bool(line) and set(line) <= set("─-") for line in lines]
    first = rules.index(False)
    last = rules.index(True, first) if True in rules[first:] else len(lines)
    sentence = " ".join(" ".join(lines[first:last]).split())
    return sentence.removeprefix("Error parsing ").partition(" Got errors:")[0].rstrip(".")


def print_recipe(recipe: Recipe) -> None:
    """Print the recipe as a TOML file that `--recipe FILE` takes."""
    import tomli_w

    sys.stdout.write(tomli_w.dumps(recipes.to_mapping(recipe)))


def print_recipes() -> None:
    """Print the table of recipes: model, parameters, data, epochs and steps, expected test accuracy."""
    from rich.table import Table

    from spec.run.display import PlainConsole

    console = PlainConsole(highlight=False, width=WIDE)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("recipe", "model", "parameters", "data", "epochs x steps", "test accuracy"):
        justify = "right" if heading in ("parameters", "epochs x steps") else "left"
        table.add_column(heading, justify=justify, no_wrap=True)
    for name in recipes.recipe_names():
        table.add_row(name, *_describe(recipes.load(name)))
    console.print(table, soft_wrap=True)


def _describe(recipe: Recipe) -> tuple[str, ...]:
    from spec import batches, params
    from spec.datasets.sizes import known_size

    expected = recipe.expected
    accuracy = f"{expected.test_accuracy:.3f} +- {expected.margin:.3f}" if expected else "-"
    size = known_size(recipe.data)
    if size is None:
        hidden = "-".join(str(units) for units in recipe.model.hidden_sizes)
        return f"?-{hidden}-?", "by the file", recipe.data.name, f"{recipe.epochs} x ?", accuracy
    outputs = params.num_outputs(recipe, size.num_classes)
    leaves = params.leaves(recipe.model, size.input_shape, outputs)
    first = ("cnn", *recipe.model.channels) if recipe.model.channels else (prod(size.input_shape),)
    steps = batches.count(recipe, size.num_train).steps_per_epoch
    return (
        "-".join(str(width) for width in (*first, *recipe.model.hidden_sizes, outputs)).replace("cnn-", "cnn "),
        f"{params.num_parameters(leaves):,}",
        recipe.data.name,
        f"{recipe.epochs} x {steps}",
        accuracy,
    )


def _numbers() -> ConstructorRegistry:
    """Return how tyro reads a number, or a number or None: what is neither is refused in a line, without Python's own
    words and without the story of each kind that was tried."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        asked = get_args(info.type) if get_origin(info.type) in (Union, UnionType) else (info.type,)
        kinds = {get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in asked}
        for number, called in ((int, "a whole number"), (float, "a number")):
            if number in kinds and kinds <= {number, NoneType}:
                return _number(number, called, optional=NoneType in kinds)
        return None

    return registry


def _number(number: type, called: str, *, optional: bool) -> PrimitiveConstructorSpec:
    def read(words: list[str]) -> float | None:
        if optional and words == ["None"]:
            return None
        try:
            return number(words[0])
        except ValueError:
            raise ValueError(f"{words[0]!r} is not {called}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=number.__name__.upper() + ("|None" if optional else ""),
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, int | float | None if optional else int | float),
        str_from_instance=lambda value: [str(value)],
    )

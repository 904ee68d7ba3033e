"""A recipe: everything a run depends on, read from TOML into a frozen dataclass.

Fields that only some kinds of a section use (Adam's betas, a CNN's channels) are None where they do not apply; `USES`
says which kind uses which, and a recipe must state exactly those. Nothing else has a default: a recipe is complete.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from spec.errors import RecipeError, did_you_mean, shown
from spec.files import expanded

MAX_SYNTHETIC_VALUES = 500_000_000
RECIPES = resources.files("spec") / "recipes"
SHORT_OPTIONS = ("--learning-rate", "--momentum")  # without their section, which is the optimizer
SHOW_ALL = "a trainer's --list shows them all"

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Size = Annotated[int, Field(ge=1, le=65_536)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Activation = Literal["relu", "sigmoid", "tanh"]
DataSource = Literal["idx", "tfds"]  # how an idx set is read; a flag, for the examples are the same
InitName = Literal["uniform_fan_in", "normal", "zeros"]


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data set."""

    __pydantic_config__ = _STRICT

    name: Literal["fashion_mnist", "mnist", "digits", "breast_cancer", "csv", "synthetic", "map_style"]
    """which data set"""
    test_fraction: Fraction | None = None
    """share held out for testing, where the set has no test split of its own"""
    seed: Seed | None = None
    """draws the held-out share, and the values of a synthetic set"""
    path: str | None = None
    """csv: the file, label in the last column; map_style: module:object"""
    num_examples: Count | None = None
    """synthetic: rows"""
    num_features: Size | None = None
    """synthetic: columns"""
    num_classes: Annotated[int, Field(ge=2, le=65_536)] | None = None
    """synthetic: classes"""
    high: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """synthetic: values are uniform in [0, high)"""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """((x / divisor) - mean) / std in float32 on the host (S1), or columns standardised by the training split."""

    __pydantic_config__ = _STRICT

    divisor: Annotated[float, Field(gt=0, le=1e9)]
    """x / divisor comes first"""
    mean: Annotated[float, Field(ge=-1e9, le=1e9)]
    """subtracted second"""
    std: Annotated[float, Field(gt=0, le=1e9)]
    """divides third"""
    standardize: Annotated[bool, tyro.conf.FlagConversionOff]
    """then every column to mean 0 and standard deviation 1 over the training split"""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The network (S3)."""

    __pydantic_config__ = _STRICT

    name: Literal["mlp", "cnn"]
    """mlp: linear layers, none hidden is softmax regression; cnn: convolution blocks, then linear blocks"""
    hidden_sizes: Annotated[tuple[Size, ...], Field(max_length=64)]
    """units of each hidden linear layer"""
    activations: tuple[Activation, ...] | None = None
    """mlp: one for each hidden layer"""
    bias: bool | None = None
    """mlp: do the linear layers have biases"""
    input_batchnorm: bool | None = None
    """mlp: BatchNorm over the one input channel first"""
    batchnorm_statistics: Literal["global", "local"] | None = None
    """where there is BatchNorm: of the whole batch, or of each device's own rows by themselves (S11)"""
    channels: Annotated[tuple[Size, ...], Field(min_length=1, max_length=16)] | None = None
    """cnn: channels of each 3x3 convolution"""
    dropout: Fraction | None = None
    """cnn: probability that a hidden unit is dropped"""

    @property
    def has_batchnorm(self) -> bool:
        """Say whether a layer of it is BatchNorm."""
        return self.name == "cnn" or bool(self.input_batchnorm)


@dataclass(frozen=True, kw_only=True)
class Init:
    """The distribution of the initial weights and biases (S3)."""

    __pydantic_config__ = _STRICT

    weight: InitName
    """uniform_fan_in is U(-1/sqrt(fan_in), 1/sqrt(fan_in))"""
    bias: InitName
    """as for weight"""
    std: Annotated[float, Field(gt=0, le=1e3)] | None = None
    """normal: the standard deviation"""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The objective (S4)."""

    __pydantic_config__ = _STRICT

    name: Literal["cross_entropy", "cross_entropy_of_softmax", "binary_cross_entropy"]
    """cross_entropy_of_softmax is the lesson's slip: softmax, then a cross-entropy that applies it again"""
    reduction: Literal["mean", "sum"]
    """over the examples of a batch; reported losses are always means"""
    label_smoothing: Fraction
    """e of (1-e) y + e/K"""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The update rule, in torch's form (S6)."""

    __pydantic_config__ = _STRICT

    name: Literal["sgd", "adam"]
    """which rule"""
    learning_rate: Annotated[float, Field(gt=0, le=1e6), tyro.conf.arg(aliases=SHORT_OPTIONS[:1])]
    """step size"""
    weight_decay: Annotated[float, Field(ge=0, le=1e6)]
    """coupled: added to the gradient, times the parameter"""
    momentum: Annotated[Fraction | None, tyro.conf.arg(aliases=SHORT_OPTIONS[1:])] = None
    """sgd: 0 is plain descent"""
    dampening: Annotated[float, Field(ge=0, le=1)] | None = None
    """sgd: the gradient enters the momentum buffer times 1 - dampening, after the first step"""
    nesterov: bool | None = None
    """sgd: look ahead"""
    betas: tuple[Fraction, Fraction] | None = None
    """adam: decay of the first and second moment"""
    epsilon: Annotated[float, Field(gt=0, le=1)] | None = None
    """adam: added to the root of the second moment"""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate of each epoch."""

    __pydantic_config__ = _STRICT

    name: Literal["constant", "step", "cosine"]
    """constant; step: times gamma every step_epochs; cosine: down to final_learning_rate after the last epoch"""
    step_epochs: Count | None = None
    """step: epochs between two drops"""
    gamma: Annotated[float, Field(gt=0, le=1)] | None = None
    """step: factor of a drop"""
    final_learning_rate: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """cosine: where it ends"""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What is printed and which of the lesson's own figures are kept beside the standard ones (S8)."""

    __pydantic_config__ = _STRICT

    progress_every: Count
    """batches between two progress lines"""
    running_loss_every: Count
    """batches over which the running loss is averaged, then reset"""
    lesson: tuple[
        Literal[
            "cumulative_train_accuracy",
            "mean_of_batch_train_accuracies",
            "sum_of_correct_over_batch_size",
            "running_loss",
        ],
        ...,
    ]
    """the lesson's figures, under names that say what they are"""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The test accuracy measured for this recipe, unchanged (S10.2)."""

    __pydantic_config__ = _STRICT

    test_accuracy: Annotated[float, Field(ge=0, le=1)]
    """mean over the runs of both sides"""
    margin: Annotated[float, Field(ge=0, le=1)]
    """three standard deviations of those runs"""
    runs: Count
    """how many, both sides together"""
    measured: str
    """dates and versions"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, complete."""

    __pydantic_config__ = _STRICT

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=64)]
    """names the run directory"""
    description: Annotated[str, Field(max_length=500)]
    """what it is, in a line"""
    seed: Seed
    """draws the initial state, the order of the examples and dropout"""
    epochs: Annotated[int, Field(ge=1, le=1_000_000)]
    """passes over the training split"""
    batch_size: Count
    """examples a step, over all devices"""
    last_batch: Literal["keep", "drop"]
    """what happens to a short last batch in training; evaluation always keeps it"""
    precision: Literal["float32", "float64", "bfloat16"]
    """of the arithmetic; bfloat16 keeps parameters in float32"""
    data: Data
    preprocessing: Preprocessing
    model: Model
    init: Init
    loss: Loss
    optimizer: Optimizer
    schedule: Schedule
    metrics: Metrics
    expected: Annotated[Expected | None, tyro.conf.Suppress] = None


USES: dict[str, dict[str, frozenset[str]]] = {
    "data": {
        "fashion_mnist": frozenset(),
        "mnist": frozenset(),
        "digits": frozenset({"test_fraction", "seed"}),
        "breast_cancer": frozenset({"test_fraction", "seed"}),
        "csv": frozenset({"test_fraction", "seed", "path"}),
        "map_style": frozenset({"test_fraction", "seed", "path"}),
        "synthetic": frozenset({"test_fraction", "seed", "num_examples", "num_features", "num_classes", "high"}),
    },
    "model": {
        "mlp": frozenset({"activations", "bias", "input_batchnorm"}),
        "cnn": frozenset({"channels", "dropout"}),
    },
    "optimizer": {
        "sgd": frozenset({"momentum", "dampening", "nesterov"}),
        "adam": frozenset({"betas", "epsilon"}),
    },
    "schedule": {
        "constant": frozenset(),
        "step": frozenset({"step_epochs", "gamma"}),
        "cosine": frozenset({"final_learning_rate"}),
    },
}


def paths() -> Iterator[tuple[str, ...]]:
    """Yield the path of each field that a recipe states: `("epochs",)`, `("optimizer", "momentum")`."""
    hints = get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from ((field.name, inner.name) for inner in dataclasses.fields(hints[field.name]))
        elif field.name != "expected":
            yield (field.name,)


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with this package, sorted."""
    return sorted(file.name.removesuffix(".toml") for file in RECIPES.iterdir() if file.name.endswith(".toml"))


def load(name_or_path: str) -> Recipe:
    """Return the recipe of that name, of a `.toml` file, or of a run (its directory, or its `config.json`).

    Raises RecipeError when there is none, when the file cannot be read, or when it breaks a rule.
    """
    if name_or_path.endswith((".toml", ".json")) or "/" in name_or_path:
        path = expanded(name_or_path)
        return parse(_read_mapping(path / "config.json" if os.path.isdir(path) else path), source=name_or_path)
    if name_or_path not in recipe_names():
        raise RecipeError(
            f"no recipe has the name '{shown(name_or_path)}'{did_you_mean(name_or_path, recipe_names())}; {SHOW_ALL}, "
            "and a path to a .toml file or to a run (runs/NAME) works too"
        )
    return parse(tomllib.loads((RECIPES / f"{name_or_path}.toml").read_text("utf-8")), source=name_or_path)


def parse(mapping: dict[str, Any], *, source: str) -> Recipe:
    """Return the recipe that `mapping` (as TOML or JSON gives it) states; RecipeError lists every broken rule."""
    try:
        recipe = _adapter().validate_json(json.dumps(mapping, default=_as_table, ensure_ascii=False).encode())
    except ValidationError as error:
        raise RecipeError(_report(source, error.errors(include_url=False), say=_explain)) from None
    except (RecursionError, ValueError) as error:
        raise RecipeError(f"recipe {source}: {error}") from None
    if mistakes := _broken_rules(recipe):
        raise RecipeError(_report(source, mistakes))
    return recipe


def to_mapping(recipe: Recipe) -> dict[str, Any]:
    """Return `recipe` as nested dicts without the fields that do not apply: what TOML and JSON files hold."""
    return _without_none(dataclasses.asdict(recipe))


def _as_table(date: Any) -> dict[str, str]:
    """Return a date or time, which JSON has not, as a table: no field is one, and so it is refused where it stands."""
    return {type(date).__name__: str(date)}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return list(value) if isinstance(value, tuple) else value


@cache
def _adapter() -> TypeAdapter[Recipe]:
    return TypeAdapter(Recipe)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        if not os.path.isfile(path):
            if path.name == "config.json" and (runs := sorted(path.parent.glob("*/config.json"))):
                raise RecipeError(f"{path.parent} holds {len(runs)} runs; name one of them: {runs[0].parent}")
            raise RecipeError(f"recipe file {path} does not exist; recipes have names, and {SHOW_ALL}")
        if path.stat().st_size > 1_000_000:
            raise RecipeError(f"recipe file {path} has over 1,000,000 bytes; a recipe is a short TOML file")
        text = path.read_text("utf-8")
        mapping = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(
            f"recipe file {path} cannot be read: {error}; put back a good copy, or name another"
        ) from None
    if not isinstance(mapping, dict):
        raise RecipeError(f"recipe file {path} holds a {type(mapping).__name__}; it must hold a table of fields")
    inner = mapping.get("recipe")
    return inner if isinstance(inner, dict) else mapping


def _report(source: str, mistakes: Sequence[Any], *, say: Callable[[Any], str] = str, most: int = 6) -> str:
    lines = [say(mistake) for mistake in mistakes[:most]]
    if len(mistakes) > most:
        lines.append(f"and {len(mistakes) - most} more")
    return f"recipe {source}:\n" + "\n".join(f"  {line}" for line in lines)


def _explain(detail: Any) -> str:
    """Turn one of pydantic's error details into `path value: rule`, naming the nearest key for an unknown one."""
    path = ".".join(shown(str(part)) for part in detail["loc"])
    if detail["type"] == "unexpected_keyword_argument":
        known = _known_keys(detail["loc"][:-1])
        return f"{path} is not a field{did_you_mean(str(detail['loc'][-1]), known)}; fields here: {', '.join(known)}"
    if detail["type"] == "string_pattern_mismatch":
        return f"{path} {shown(repr(detail['input']))}: must be lower-case letters, digits and hyphens"
    if detail["type"] in {"missing", "missing_argument"}:
        return f"{path} is missing; a recipe states every field"
    value = shown(repr(detail["input"]))
    rule = re.sub(r"^\w+ should", "must", detail["msg"])
    return f"{path or 'recipe'} {value}: {rule}"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    sections = {name: hint for name, hint in get_type_hints(Recipe).items() if dataclasses.is_dataclass(hint)}
    owner = (sections | {"expected": Expected}).get(str(location[0]), Recipe) if location else Recipe
    return [field.name for field in dataclasses.fields(owner)]


def _broken_rules(recipe: Recipe) -> list[str]:
    """Return what is wrong with fields taken together; an empty list when nothing is."""
    return [*_unused_or_missing(recipe), *_contradictions(recipe)]


def _unused_or_missing(recipe: Recipe) -> list[str]:
    mistakes = []
    for section, kinds in USES.items():
        part = getattr(recipe, section)
        used = kinds[part.name]
        for field in sorted(frozenset().union(*kinds.values())):
            value = getattr(part, field)
            if field in used and value is None:
                option = f"--{section}.{field.replace('_', '-')}"
                mistakes.append(f"{section}.{field} is missing: {part.name} needs it; state it, or add {option}")
            elif field not in used and value is not None:
                option = f"--{section}.{field.replace('_', '-')} None"
                mistakes.append(
                    f"{section}.{field} {value!r} is not used by {part.name}; leave it out, or add {option}"
                )
    if (recipe.init.std is None) == ("normal" in (recipe.init.weight, recipe.init.bias)):
        mistakes.append(f"init.std {recipe.init.std}: a normal weight or bias needs it, and nothing else does")
    if (recipe.model.batchnorm_statistics is None) == recipe.model.has_batchnorm:
        mistakes.append(
            f"model.batchnorm_statistics {recipe.model.batchnorm_statistics}: BatchNorm needs it, global or local, and "
            "nothing else does"
        )
    return mistakes


def _contradictions(recipe: Recipe) -> list[str]:
    model, optimizer, loss = recipe.model, recipe.optimizer, recipe.loss
    mistakes = []
    if model.activations is not None and len(model.activations) != len(model.hidden_sizes):
        mistakes.append(
            f"model.activations has {len(model.activations)} names for {len(model.hidden_sizes)} hidden_sizes; "
            "give one for each hidden layer"
        )
    if optimizer.nesterov and (not optimizer.momentum or optimizer.dampening):
        mistakes.append("optimizer.nesterov true needs momentum above 0 and dampening 0")
    if optimizer.dampening and not optimizer.momentum:
        mistakes.append(f"optimizer.dampening {optimizer.dampening} has no effect at momentum 0; set it to 0")
    if (values := (recipe.data.num_examples or 0) * (recipe.data.num_features or 0)) > MAX_SYNTHETIC_VALUES:
        mistakes.append(
            f"data.num_examples times num_features is {values:,}; the limit is {MAX_SYNTHETIC_VALUES:,}; use fewer"
        )
    if loss.name == "binary_cross_entropy" and loss.label_smoothing:
        mistakes.append(f"loss.label_smoothing {loss.label_smoothing} is for cross_entropy; set it to 0")
    if optimizer.learning_rate < (recipe.schedule.final_learning_rate or 0):
        mistakes.append(
            f"schedule.final_learning_rate {recipe.schedule.final_learning_rate} is above "
            f"learning_rate {optimizer.learning_rate}; a cosine goes down"
        )
    return mistakes

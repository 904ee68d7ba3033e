"""Which runs `--seeds N` and `--sweep FIELD=VALUE,...` ask for, and the table and the picture of what they gave."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from spec import recipe as recipes
from spec.command_line import Flags
from spec.errors import RecipeError, UserError, did_you_mean
from spec.markdown import markdown_table
from spec.plots import style
from spec.recipe import Recipe

MOST_RUNS = 1_000
LONGEST_NAME = 150  # letters of a folder; a file system takes 255
NUM_SEEDS = 2**32
MOST_DRAWN = 40  # settings; a picture of more cannot be read
FIXED = ("name", "description", "seed", "metrics", "expected")  # of a recipe; --seeds is how seeds are asked for
# What a kind that the recipe does not name needs besides: torch's defaults, and the lesson's StepLR.
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "optimizer": {
        "sgd": {"momentum": 0.0, "dampening": 0.0, "nesterov": False},
        "adam": {"betas": [0.9, 0.999], "epsilon": 1e-8},
    },
    "schedule": {
        "constant": {},
        "step": {"step_epochs": 10, "gamma": 0.1},
        "cosine": {"final_learning_rate": 0.0},
    },
}


@dataclass(frozen=True, kw_only=True)
class ManyFlags(Flags):
    """One call of a trainer that can train many runs at once."""

    overwrite: bool = False
    """replace the run that --out holds; not with --seeds or --sweep"""
    seeds: int | None = None
    """train this many seeds at once, from the recipe's on"""
    sweep: tuple[str, ...] = ()
    """train every combination: learning_rate=0.1,0.01 batch_size=32,64 optimizer=sgd,adam"""
    parallel: Literal["jit", "sharded", "pmap"] | None = None
    """jit: on one device; sharded: every batch divided by the compiler; pmap: a program a device; sharded on several
    devices, unless given"""
    devices: int | None = None
    """how many devices, of each process; all of an accelerator's, one CPU, unless given"""
    uneven: Literal["pad", "refuse"] = "pad"
    """what becomes of a batch that does not divide by the devices"""
    shard_state: bool = False
    """divide parameters and optimiser state too, for a network that one device cannot hold; with sharded"""
    distributed: bool = False
    """be one of the processes of a run; Slurm, Kubernetes, Cloud TPU and Open MPI say which, or the next three do"""
    coordinator: str | None = None
    """HOST:PORT of process 0, where it takes the others' calls"""
    num_processes: int | None = None
    """how many processes the run has"""
    process_id: int | None = None
    """which of them this is, from 0; that one writes the run directory"""
    connect_timeout: int = 300
    """seconds until all processes have to be there"""
    heartbeat_timeout: int = 100
    """seconds after which a process that is not heard of is taken for dead, and the others leave"""

    def devices_asked(self) -> dict[str, Any]:
        """Return what the flags say of devices."""
        return super().devices_asked() | {
            "parallel": self.parallel,
            "devices": self.devices,
            "uneven": self.uneven,
            "shard_state": self.shard_state,
        }


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A point of the grid: the values that make it, by the names the user gave, and the recipe changed to them."""

    values: Mapping[str, Any]
    recipe: Recipe

    @property
    def name(self) -> str:
        """Return a name for files: `learning_rate-0.1_batch_size-32`, letters that a path may not have replaced."""
        said = "_".join(f"{field}-{_said(value)}" for field, value in self.values.items())
        return re.sub(r"[^A-Za-z0-9.,_-]+", "-", said)[:LONGEST_NAME]


def settings(recipe: Recipe, sweep: Sequence[str]) -> list[Setting]:
    """Return the points of the grid that `sweep`, each FIELD=VALUE,VALUE,..., spans; one point if there is none.

    A field is a recipe's by its path or by its last name alone, a section stands for its `name`: optimizer=sgd,adam. A
    value that another one makes useless (momentum with adam) is left out, and so is a point that is there already.
    Raises RecipeError naming the field or the value that cannot be.
    """
    axes = _axes(sweep)
    found: dict[Recipe, Setting] = {}
    for values in itertools.product(*axes.values()):
        setting = _setting(recipe, dict(zip(axes, values, strict=True)))
        found.setdefault(setting.recipe, setting)
    for field in axes:
        if not any(field in setting.values for setting in found.values()):
            raise RecipeError(f"--sweep {field}: nothing in this recipe, nor in what is swept with it, uses that field")
    return list(found.values())


def check_given(arguments: Sequence[str], flags: ManyFlags) -> None:
    """Raise UserError when `--sweep` is there twice, with nothing, or beside what contradicts it, or cannot be."""
    given = sum(argument == "--sweep" or argument.startswith("--sweep=") for argument in arguments)
    if given > 1:
        raise UserError(
            "--sweep is there twice; give every field after one: --sweep learning_rate=0.1,0.01 batch_size=32,64"
        )
    if given and not flags.sweep:
        raise UserError("--sweep names no field; learning_rate=0.1,0.01, say")
    if (flags.print_config or flags.summary) and (flags.sweep or flags.seeds is not None):
        prints = "--print-config prints one recipe" if flags.print_config else "--summary prints one network"
        raise UserError(f"{prints}, and --seeds and --sweep are for many runs; leave one out")
    unchanged = recipes.load(flags.recipe)
    for path in map(_path, _axes(flags.sweep)):
        value = _at(flags.config, path)
        if path[-1] != "name" and value != _at(unchanged, path):  # a kind's other fields may have to be given with it
            raise UserError(f"{'.'.join(path)} is both swept and changed to {_said(value)}; leave one of the two out")
    plan(flags)


def plan(flags: ManyFlags) -> tuple[list[Setting], range]:
    """Return the settings and the seeds that the flags ask for. Raises UserError when there are too many, or none."""
    first, number = flags.config.seed, 1 if flags.seeds is None else flags.seeds
    if number < 1:
        raise UserError(f"--seeds {number} must be 1 or more")
    if first + number > NUM_SEEDS:
        raise UserError(f"--seeds {number} from --seed {first} on goes past the last, {NUM_SEEDS - 1:,}; start lower")
    runs = number * math.prod(len(values) for values in _axes(flags.sweep).values())
    if runs > MOST_RUNS:
        raise UserError(f"{runs:,} runs are asked for, and {MOST_RUNS:,} are the most; sweep fewer values or seeds")
    return settings(flags.config, flags.sweep), range(first, first + number)


def counted(number: int, thing: str) -> str:
    """Return the number and the thing, in the plural where there are several.

    >>> counted(1, "run"), counted(1200, "run")
    ('1 run', '1,200 runs')
    """
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def summary_row(values: Mapping[str, Any], accuracies: Sequence[float | None]) -> dict[str, Any]:
    """Return what a setting gave: its values, each seed's accuracy (None: it diverged), their mean and standard
    deviation (None for fewer than one and two)."""
    reached = [accuracy for accuracy in accuracies if accuracy is not None]
    mean = statistics.fmean(reached) if reached else None
    sd = statistics.stdev(reached) if len(reached) > 1 else None
    return {"values": dict(values), "accuracies": list(accuracies), "mean": mean, "sd": sd}


def table(report: Mapping) -> tuple[list[str], list[list[str]]]:
    """Return the header and the cells: a setting a row; without a sweep, a seed a row."""
    rows = report["settings"]
    if not any(row["values"] for row in rows):
        each = zip(report["seeds"], rows[0]["accuracies"], strict=True)
        return ["seed", f"{report['accuracy_of']} accuracy"], [[str(seed), _figure(found)] for seed, found in each]
    names = list(dict.fromkeys(name for row in rows for name in row["values"]))
    header = [*names, f"{report['accuracy_of']} accuracy", "seeds"]
    return header, [[*(_said(row["values"].get(name, "-")) for name in names), *_outcome(row)] for row in rows]


def markdown(report: Mapping) -> str:
    """Return the table as Markdown."""
    return markdown_table(*table(report))


def lines(report: Mapping) -> list[str]:
    """Return the table as lines of text, its columns aligned."""
    header, rows = table(report)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]


def sentence(report: Mapping, row: Mapping) -> str:
    """Return a setting's outcome in words."""
    values = ", ".join(f"{name} {_said(value)}" for name, value in row["values"].items())
    shown, seeds = _outcome(row)
    which = f"best with {values}: " if values else ""
    return f"{which}{report['accuracy_of']} accuracy {shown}" + (f" over {seeds} seeds" if seeds != "1" else "")


def chart(report: Mapping, path: Path) -> None:
    """Draw the settings from the top down: each seed's accuracy a point, the mean a bar, the best one with a star.

    Of many settings the best are drawn.
    """
    from matplotlib.lines import Line2D

    rows = _best(report["settings"])
    figure = style.figure(10, 1.2 + 0.32 * len(rows))
    axes = figure.subplots()
    best = max(row["mean"] for row in rows if row["mean"] is not None)
    for place, row in enumerate(rows):
        colour = style.VERMILION if row["mean"] == best else style.BLUE
        accuracies = [accuracy for accuracy in row["accuracies"] if accuracy is not None]
        axes.plot(accuracies, [place] * len(accuracies), "o", color=colour, alpha=0.6)
        if accuracies:
            axes.plot([row["mean"]] * 2, [place - 0.3, place + 0.3], color=colour)
        else:
            axes.annotate("diverged", (0.02, place), xycoords=("axes fraction", "data"), va="center", color="grey")
        if row["mean"] == best:
            axes.plot([row["mean"]], [place], "*", color=colour, markersize=13, markeredgecolor="white")
    names = [", ".join(f"{name} {_said(value)}" for name, value in row["values"].items()) for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(f"{report['accuracy_of']} accuracy")
    some = (
        f"; the best {len(rows)} of {len(report['settings'])} settings" if len(rows) < len(report["settings"]) else ""
    )
    axes.set_title(f"{report['recipe']}, {counted(len(report['seeds']), 'seed')} a setting{some}", fontsize=10)
    kinds = [
        ("a run", style.BLUE, "o"),
        ("mean of a setting", style.BLUE, "|"),
        ("the best mean", style.VERMILION, "*"),
    ]
    handles = [
        Line2D([], [], color=colour, marker=marker, ms=9, mew=1.5, ls="", label=of) for of, colour, marker in kinds
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=style.DPI)


def _best(rows: Sequence[Mapping]) -> list[Mapping]:
    """Return the settings of the best means, as many as can be drawn, in the order that they have."""
    ranked = sorted(range(len(rows)), key=lambda index: -1 if rows[index]["mean"] is None else rows[index]["mean"])
    return [rows[index] for index in sorted(ranked[-MOST_DRAWN:])]


def _axes(sweep: Sequence[str]) -> dict[str, list[Any]]:
    """Return the values of each field, by the name the user gave it."""
    axes, seen = {}, {}
    for argument in sweep:
        field, _, text = (part.strip() for part in argument.partition("="))
        path = _path(field) if field else _refuse_values(argument)
        if path in seen:
            other = "" if field == seen[path] else f" as {seen[path]}"
            raise RecipeError(
                f"--sweep {field} is there already{other}; give all its values in one list: {field}=VALUE,VALUE"
            )
        axes[field], seen[path] = _values(argument, text), field
        _check_values(field, path, axes[field])
    return axes


def _values(argument: str, text: str) -> list[Any]:
    """Return the values of a list: JSON, or words and numbers as one writes them, lists of them in brackets."""
    try:
        return json.loads(f"[{text}]") if text else _refuse_values(argument)
    except (ValueError, RecursionError):
        return [_value(part) if part else _refuse_values(argument) for part in _parts(text)]


def _value(text: str) -> Any:
    value = _word(text)
    if value == text and text.startswith("[") and text.endswith("]"):
        return [_word(part) for part in _parts(text[1:-1])]
    return value


def _word(text: str) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    with contextlib.suppress(ValueError):
        return float(text)  # nan, .5: no JSON
    return text


def _parts(text: str) -> list[str]:
    """Return what stands between the commas outside brackets.

    >>> _parts("[relu,tanh], 3")
    ['[relu,tanh]', '3']
    """
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _check_values(field: str, path: Sequence[str], values: Sequence[Any]) -> None:
    """Raise RecipeError for a value that is there twice, and for one that should be a list."""
    said = [_said(value) for value in values]
    twice, times = collections.Counter(said).most_common(1)[0]
    if times > 1:
        raise RecipeError(f"--sweep {field}: {twice} is there {times} times; leave it once")
    if _takes_a_list(path) and not all(isinstance(value, list) for value in values):
        one, several = f"[{','.join(said)}]", ",".join(f"[{value}]" for value in said)
        write = one if one == several else f"{several} for {len(said)} of them, {one} for one"
        raise RecipeError(f"--sweep {field}={','.join(said)}: each value of {field} is a list; write {write}")


def _takes_a_list(path: Sequence[str]) -> bool:
    hint: Any = Recipe
    for name in path:
        hint = get_type_hints(hint)[name]
    return any(get_origin(kind) is tuple for kind in (hint, *get_args(hint)))


def _at(recipe: Recipe, path: Sequence[str]) -> Any:
    return functools.reduce(getattr, path, recipe)


def _refuse_values(argument: str) -> NoReturn:
    shown = argument if len(argument) <= 60 else argument[:57] + "..."
    raise RecipeError(f"--sweep {shown}: must be FIELD=VALUE,VALUE,..., none empty; learning_rate=0.1,0.01, say")


def _setting(recipe: Recipe, values: Mapping[str, Any]) -> Setting:
    mapping = recipes.to_mapping(recipe)
    mapping.pop("expected", None)
    paths = {field: _path(field) for field in values}
    kinds = [field for field in values if paths[field][-1] == "name"]
    for field in kinds:
        _change_kind(mapping, paths[field][0], values[field])
    used = {field: values[field] for field in values if field in kinds or _is_used(mapping, paths[field])}
    for field, value in used.items():
        *section, last = paths[field]
        (mapping[section[0]] if section else mapping)[last] = value
    said = " ".join(f"{field}={_said(value)}" for field, value in used.items())
    return Setting(values=used, recipe=recipes.parse(mapping, source=f"--sweep {said}" if said else recipe.name))


def _change_kind(mapping: dict[str, Any], section: str, kind: str) -> None:
    """Give the section of the recipe what that kind needs, and take from it what it does not."""
    fields, uses = mapping[section], recipes.USES.get(section, {})
    if not isinstance(kind, str) or kind not in uses:
        fields["name"] = kind  # the recipe's own rules refuse it
        return
    for field in set(fields) & set().union(*uses.values()) - uses[kind]:
        del fields[field]
    for field, default in DEFAULTS.get(section, {}).get(kind, {}).items():
        fields.setdefault(field, default)
    fields["name"] = kind


def _is_used(mapping: Mapping[str, Any], path: Sequence[str]) -> bool:
    section = mapping.get(path[0])
    uses = recipes.USES.get(path[0], {})
    if not isinstance(section, dict) or section.get("name") not in uses:
        return True
    return path[1] in uses[section["name"]] or path[1] not in set().union(*uses.values())


def _path(field: str) -> tuple[str, ...]:
    """Return the path of a recipe's field that the user named."""
    paths = [] if field in (*FIXED, "seeds") else list(_paths())
    matching = [path for path in paths if field in (".".join(path), path[-1])] or [
        path for path in paths if path == (field, "name")
    ]
    if len(matching) == 1:
        return matching[0]
    if not paths:
        mend = (
            "--seeds N trains several seeds"
            if field in ("seed", "seeds")
            else "it changes nothing that is learned; leave it out"
        )
        raise RecipeError(f"--sweep {field}: that is not swept; {mend}")
    known = sorted({name for path in paths for name in (".".join(path), path[-1])} - {*FIXED})
    if matching:
        choices = ", ".join(".".join(path) for path in matching)
        raise RecipeError(f"--sweep {field}: which one: {choices}?")
    raise RecipeError(f"--sweep {field}: a recipe has no such field{did_you_mean(field, known)}; --help lists them")


def _paths() -> Iterator[tuple[str, ...]]:
    return (path for path in recipes.paths() if path[0] not in FIXED)


def _outcome(row: Mapping) -> list[str]:
    reached = sum(accuracy is not None for accuracy in row["accuracies"])
    failed = len(row["accuracies"]) - reached
    spread = "" if row["sd"] is None else f" +- {row['sd']:.4f}"
    return [_figure(row["mean"]) + spread, f"{reached}, {failed} diverged" if failed else str(reached)]


def _figure(accuracy: float | None) -> str:
    return "diverged" if accuracy is None else f"{accuracy:.4f}"


def _said(value: Any) -> str:
    """Return a value as one would write it: 100000 and 1e6, not 100000.0 and 1e+06.

    >>> [_said(value) for value in (1e5, 1e6, 1e-6, 0.1, 0.123456789, [32, 64])]
    ['100000', '1e6', '1e-06', '0.1', '0.123456789', '[32,64]']
    """
    if isinstance(value, float):
        short = f"{value:g}" if float(f"{value:g}") == value else str(value)
        return short.replace("e+0", "e").replace("e+", "e")
    return json.dumps(value, separators=(",", ":")) if isinstance(value, list | tuple | bool) else str(value)

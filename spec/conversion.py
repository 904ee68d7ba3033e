"""Weights from one kind of file to another: a run, safetensors, and what an implementation can read besides."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import numpy as np
import tyro

from spec import datasets, params, weights
from spec import recipe as recipes
from spec.command_line import parsed
from spec.datasets.sizes import known_size, size_of
from spec.errors import StateError, UserError, python_command
from spec.files import check_target, write_atomic
from spec.params import Leaf
from spec.recipe import Recipe, to_mapping
from spec.run import run_reader
from spec.run.run_directory import CONFIG, WEIGHTS
from spec.weights import Foreign, Found

RUN, SAFETENSORS, STATE_DICT = "run", ".safetensors", ".pt"
CONVERTED = (CONFIG, WEIGHTS)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """One conversion."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_FILE")]
    """a run's directory, or a .safetensors file"""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """a .safetensors file, or the directory of a new run"""
    recipe: str | None = None
    """the recipe that a file's weights are for: its name, a .toml file, or a run; a run has its own"""
    overwrite: bool = False
    """replace the file, or the run that convert made"""


class StateDicts(NamedTuple):
    """How an implementation reads a state dict of its own, and writes one, as bytes."""

    read: Callable[[Path], Found]
    write: Callable[[Mapping[str, np.ndarray]], bytes]


F = TypeVar("F", bound=Flags)


def parse(
    arguments: Sequence[str],
    *,
    program: str,
    description: str,
    kind: type[F] = Flags,
    kinds: Collection[str] = (RUN, SAFETENSORS),
) -> F:
    """Return the flags; exit with 2 on a mistake.

    Raises UserError unless they name two different ones of `kinds`, a recipe for a file's weights, and a place that can
    be written to and holds nothing yet, or what may be replaced.
    """
    flags = parsed(kind, arguments, prog=program, description=description)
    flags = replace(flags, source=flags.source.expanduser(), target=flags.target.expanduser())
    given, wanted = _check_kinds(flags, kinds)
    if given == RUN and flags.recipe:
        raise UserError(f"--recipe {flags.recipe} is for a file's weights; {flags.source} has its own; leave it out")
    if given != RUN and not flags.recipe:
        raise UserError(f"{flags.source} does not say which recipe it is for; add --recipe NAME, a .toml file or a run")
    if wanted == RUN:
        _check_run_target(flags.target, overwrite=flags.overwrite)
        return flags
    check_target(flags.target, flag="OUT")
    if os.path.exists(flags.target) and not flags.overwrite:
        raise UserError(f"OUT {flags.target} is there already; name another file, or add --overwrite to replace it")
    return flags


def kind_of(path: Path) -> str:
    """Return what a path is by its name: RUN, SAFETENSORS or STATE_DICT. Raises UserError for another kind of file."""
    suffix = {".pth": STATE_DICT}.get(path.suffix.lower(), path.suffix.lower())
    if os.path.isdir(path):
        return RUN
    if suffix in (SAFETENSORS, STATE_DICT):
        return suffix
    if suffix[1:2].isalpha() or os.path.isfile(path):
        raise UserError(
            f"{path} is no kind of file that is known; name a .safetensors or .pt file, or a run's directory"
        )
    return RUN


def run(flags: Flags, *, state_dicts: StateDicts | None = None, by_order: bool = False) -> None:
    """Convert as the flags say, and print a line; `by_order`, the leaves' names are given to what the source holds.

    Raises UserError, listing every mismatch, when the weights are not those of the recipe.
    """
    of, found = _read(flags, state_dicts)
    leaves = leaves_of(of)
    what = f"{flags.source}, by the recipe {of.name},"
    mend = _mend(found, leaves, flags)
    state = weights.check(in_order(found, leaves) if by_order else found, leaves, of.precision, what=what, mend=mend)
    if kind_of(flags.target) == RUN:
        write_run(flags.target, of, state, source=flags.source)
    elif kind_of(flags.target) == SAFETENSORS:
        write_atomic(flags.target, weights.to_safetensors(state))
    else:
        write_atomic(flags.target, state_dicts.write(state))
    numbers, dtype = sum(array.size for array in state.values()), weights.stored_dtype(of.precision)
    print(f"{flags.source} -> {flags.target}: {len(state)} arrays, {numbers:,} numbers, {dtype}, for {of.name}")


def leaves_of(of: Recipe) -> tuple[Leaf, ...]:
    """Return the leaves of a recipe's network; where only the data tell their size, they are read."""
    size = known_size(of.data) or size_of(datasets.load(of.data))
    return params.leaves(of.model, size.input_shape, params.num_outputs(of, size.num_classes))


def in_order(found: Found, leaves: Sequence[Leaf]) -> dict[str, np.ndarray | Foreign]:
    """Return the arrays of `found` under the leaves' names, first to first.

    Raises StateError, listing every pair, unless there are as many and the shapes are the same.
    """
    theirs = [(weights.shown(name), array.shape) for name, array in found.items()]
    pairs = itertools.zip_longest(theirs, ((leaf.name, leaf.shape) for leaf in leaves))
    lines = [_unlike(their, our) for their, our in pairs if their is None or our is None or their[1] != our[1]]
    if lines:
        raise StateError(
            "--by-order: the shapes do not fit in order:\n"
            + "\n".join(lines[: weights.MOST_LINES])
            + "\nname the --recipe that these weights are for"
        )
    return dict(zip((leaf.name for leaf in leaves), found.values(), strict=True))


def _unlike(their: tuple[str, tuple[int, ...]] | None, our: tuple[str, tuple[int, ...]] | None) -> str:
    if their is None:
        return f"  nothing is left for {our[0]} {list(our[1])}"
    if our is None:
        return f"  {their[0]} {list(their[1])} is one too many"
    return f"  {their[0]} {list(their[1])} is not {our[0]} {list(our[1])}"


def write_run(target: Path, of: Recipe, state: Mapping[str, np.ndarray], *, source: Path) -> None:
    """Write a run of `config.json` and `weights.safetensors`, which the first verifies, whole or not at all.

    Raises UserError, naming the path, if the disk refuses.
    """
    content = weights.to_safetensors(state)
    config = {"recipe": to_mapping(of), "converted_from": str(source), run_reader.CHECKSUM: run_reader.sha256(content)}
    place = target.absolute()
    with _explained(target):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as beside:
            made = Path(beside) / "made"
            made.mkdir()
            write_atomic(made / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
            write_atomic(made / WEIGHTS, content)
            _put(made, place, aside=Path(beside) / "old")


def _put(made: Path, place: Path, *, aside: Path) -> None:
    """Rename `made` to `place`; what is there goes `aside`, and comes back when that fails."""
    if os.path.isdir(place):
        place.rename(aside)
    try:
        made.rename(place)
    except OSError:
        if os.path.isdir(aside):
            aside.rename(place)
        raise


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line of JAX's side, which needs no JAX: a run holds canonical names and layouts."""
    flags = parse(
        sys.argv[1:] if arguments is None else arguments,
        program="python -m jax_impl.convert",
        description="Convert weights: a run to .safetensors, .safetensors to a run.",
    )
    run(flags)


def _check_kinds(flags: Flags, kinds: Collection[str]) -> tuple[str, str]:
    given, wanted = found = kind_of(flags.source), kind_of(flags.target)
    if not set(found) <= set(kinds):
        raise UserError(
            f"{flags.source} -> {flags.target}: .pt files are torch's; `{python_command()} -m torch_ref.convert` "
            "takes them"
        )
    if given != RUN and not os.path.isfile(flags.source):
        raise UserError(f"{flags.source} does not exist; name a file of weights, or a run's directory")
    if given == RUN and not os.path.isdir(flags.source):
        raise UserError(f"{flags.source} does not exist; name a run's directory, or a file of weights")
    if given == wanted:
        what = "run directories" if given == RUN else f"{given} files"
        raise UserError(f"{flags.source} and {flags.target} are both {what}; nothing to convert: copy it")
    return found


def _check_run_target(target: Path, *, overwrite: bool) -> None:
    try:
        there = sorted(item.name for item in target.iterdir()) if os.path.isdir(target) else []
    except OSError as error:
        raise UserError(f"OUT {target} cannot be read: {error}; name another directory") from None
    if strangers := [name for name in there if name not in CONVERTED]:
        raise UserError(f"OUT {target} holds more than convert writes: {', '.join(strangers[:3])}; name another")
    if there and not overwrite:
        raise UserError(f"OUT {target} is there already; name another directory, or add --overwrite to replace it")
    parent = next(folder for folder in target.absolute().parents if os.path.exists(folder))
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"OUT {target} cannot be written: {parent} takes no files; name another directory")


def _read(flags: Flags, state_dicts: StateDicts | None) -> tuple[Recipe, Found]:
    kind = kind_of(flags.source)
    if kind == RUN:
        of = run_reader.read(flags.source)
        return of.recipe, of.found
    of = recipes.load(flags.recipe)
    if kind == STATE_DICT:
        return of, state_dicts.read(flags.source)
    return of, weights.from_safetensors(weights.read_file(flags.source), source=str(flags.source))


def _mend(found: Found, leaves: Sequence[Leaf], flags: Flags) -> str:
    """Say what may be done about names or shapes that do not fit."""
    if kind_of(flags.source) == RUN:
        return "put back the two files of the run that belong together"
    mend = "name the --recipe that these weights are for, or give them its names, shapes and dtypes"
    fits = [array.shape for array in found.values()] == [leaf.shape for leaf in leaves]
    return f"{mend}; in order the shapes fit: --by-order" if fits and kind_of(flags.source) == STATE_DICT else mend


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"OUT {target} cannot be written: {error}; name another place") from None

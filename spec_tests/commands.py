"""Commands called in this process, and runs that no trainer made."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from spec import conversion, params, recipe
from spec.errors import exit_status
from spec.recipe import Recipe
from spec_tests.conftest import Ended


def call(main: Callable[[list[str]], None], *arguments: object) -> Ended:
    """Call a program's `main` with its arguments; return how it ended."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = exit_status(lambda: main([str(argument) for argument in arguments]))
        except SystemExit as left:
            status = left.code or 0
    return Ended(status, out.getvalue(), err.getvalue())


def changed(name: str, **sections: object) -> Recipe:
    """Return a recipe with some of its fields, or of its sections' fields, given as dicts, changed."""
    of = recipe.load(name)
    mapping = recipe.to_mapping(dataclasses.replace(of, expected=None))
    for section, value in sections.items():
        mapping[section] = mapping[section] | value if isinstance(value, dict) else value
    return recipe.parse(mapping, source=name)


def random_state(of: Recipe, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Return a canonical state of random numbers, running statistics too, in the dtype that the recipe keeps."""
    generator = np.random.default_rng(seed)
    dtype = np.float64 if of.precision == "float64" else np.float32
    return {
        leaf.name: (
            generator.uniform(0.5, 2, leaf.shape)
            if leaf.role == "running_var"
            else generator.standard_normal(leaf.shape) / np.sqrt(leaf.fan_in)
        ).astype(dtype)
        for leaf in conversion.leaves_of(of)
    }


def made_run(path: Path, of: Recipe, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Write a run of that recipe with random weights, as a conversion would; return them."""
    state = random_state(of, seed=seed)
    conversion.write_run(path, of, state, source=Path("random"))
    assert set(state) == set(params.state_shapes(conversion.leaves_of(of)))
    return state

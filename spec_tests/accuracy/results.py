"""The kept figures: by recipe (or experiment) and framework, lists over the seeds, and where they come from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from spec import command_line
from spec.files import write_atomic
from spec.recipe import Recipe, to_mapping

FRAMEWORKS = ("jax", "torch")
RESULTS = Path("results") / "accuracy.json"
EXPERIMENTS = Path("results") / "experiments.json"
FIGURES = {
    RESULTS: ("test_accuracy", "train_accuracy", "cumulative_train_accuracy", "lesson_metrics"),
    EXPERIMENTS: ("test_accuracy", "train_accuracy", "cumulative_train_accuracy", "weight_change"),
}
Results = dict[str, dict[str, dict]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run to make: `key` names it in the results, `flags` are the trainer's own."""

    key: str
    framework: str
    seed: int
    flags: tuple[str, ...]


def load_results(root: Path = Path()) -> Results:
    """Return the recipes' figures."""
    return _load(root / RESULTS)


def load_experiments(root: Path = Path()) -> Results:
    """Return the figures of the experiments, `claims.EXPERIMENTS`."""
    return _load(root / EXPERIMENTS)


def save(results: Results, file: Path, root: Path = Path()) -> None:
    """Write all figures, recipes in alphabetical order."""
    (root / file).parent.mkdir(exist_ok=True)
    write_atomic(root / file, (json.dumps(dict(sorted(results.items())), indent=1) + "\n").encode())


def add(results: Results, key: str, summary: Mapping, file: Path, *, date: str | None = None) -> None:
    """Put a run's figures into its place, ordered by seed; `summary` also holds `settings` and `machine`.

    Runs of other versions or another recipe are not comparable: the first run of new ones begins the lists anew.
    """
    figures = FIGURES[file]
    kept = results.setdefault(key, {}).get(summary["framework"])
    runs = {summary["seed"]: [summary[name] for name in figures]}
    if kept is not None and all(kept[name] == summary[name] for name in ("versions", "settings")):
        before = zip(*(kept[name] for name in figures), strict=True)
        runs = dict(zip(kept["seeds"], map(list, before), strict=True)) | runs
    seeds = sorted(runs)
    results[key][summary["framework"]] = {
        "seeds": seeds,
        "epochs": summary["epochs"],
        "steps": summary["steps"],
        **{name: [runs[seed][place] for seed in seeds] for place, name in enumerate(figures)},
        "date": date or time.strftime("%Y-%m-%d"),
        "versions": summary["versions"],
        "machine": summary["machine"],
        "settings": summary["settings"],
    }


def has(results: Results, run: Run) -> bool:
    """Is this run kept, made by the versions installed here, of the recipe as it is now? Exits with 2 on a bad flag."""
    settings, kept = settings_of_flags(run.flags), results.get(run.key, {}).get(run.framework)
    if kept is None or run.seed not in kept["seeds"] or kept["settings"] != settings:
        return False
    return all(_installed(name) == version for name, version in kept["versions"].items())


def settings_of(recipe: Recipe) -> str:
    """Return a digest of all that a recipe's figures depend on but the seed."""
    mapping = {
        name: part
        for name, part in to_mapping(recipe).items()
        if name not in ("name", "description", "seed", "expected")
    }
    return hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()[:16]


@cache
def settings_of_flags(flags: tuple[str, ...]) -> str:
    """Return the digest of the recipe that a trainer's flags give; exits with 2 on a bad flag."""
    return settings_of(command_line.parse(flags, program="python -m spec_tests.accuracy", description="").config)


def _installed(name: str) -> str | None:
    if name == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _load(path: Path) -> Results:
    return json.loads(path.read_text()) if path.exists() else {}

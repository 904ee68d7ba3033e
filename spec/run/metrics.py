"""What a run has recorded: `metrics.jsonl` and its recipe, of a run that is finished, stopped, or still at work."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spec import recipe
from spec.errors import RunDirectoryError, shown
from spec.recipe import Recipe
from spec.run.run_directory import CONFIG, METRICS, SUMMARY
from spec.run.run_reader import check_is_run, read_json

FIGURES = {  # what is read of each event, None where there is nothing to say; a later version may have more
    "epoch": ("train_loss", "train_accuracy", "test_loss", "test_accuracy"),
    "progress": ("batch_loss",),
}
COUNTS = {"epoch": ("epoch",), "progress": ("step", "examples_seen", "examples")}  # from 1
MOST = 1e300  # what is larger cannot be drawn
AGAIN = "put back a good copy, or train the run again"


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A run's recipe and what it recorded so far: the figures of each epoch, its progress lines, and whether the last
    line was cut short, as a kill leaves it."""

    path: Path
    recipe: Recipe
    framework: str
    epochs: list[Mapping[str, Any]]
    progress: list[Mapping[str, Any]]
    cut: bool


def read(path: Path) -> Recorded:
    """Return what the run at `path` recorded.

    Raises RunDirectoryError for what is no run, has recorded nothing yet, or is damaged, naming the line, and
    RecipeError for a recipe of another version.
    """
    path = path.expanduser()
    check_is_run(path)
    of = recipe.load(str(path / CONFIG))
    named = read_json(path / CONFIG).get("framework")
    framework = named if isinstance(named, str) else "unknown"
    lines, cut = _lines(path / METRICS)
    events: dict[str, list] = {name: [] for name in FIGURES}
    for number, line in enumerate(lines, start=1):
        event = _event(line, f"{path / METRICS}, line {number}")
        _check_order(event, events["epoch"], of.epochs, f"{path / METRICS}, line {number}")
        events[event["event"]].append(event)
    if not any(events.values()) and (path / SUMMARY).exists():
        raise RunDirectoryError(f"{path} is finished, and its {METRICS} holds nothing; {AGAIN}")
    if not any(events.values()):
        raise RunDirectoryError(f"{path} has recorded nothing yet; wait for its first progress line, or train it")
    return Recorded(
        path=path, recipe=of, framework=framework, epochs=events["epoch"], progress=events["progress"], cut=cut
    )


def _lines(path: Path) -> tuple[list[bytes], bool]:
    """Return the whole lines of a file, and whether something follows the last of them."""
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise RunDirectoryError(f"{path.parent} has no {path.name}, where its figures would be; {AGAIN}") from None
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be read: {error.strerror}; {AGAIN}") from None
    return lines, bool(rest)


def _event(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        raise RunDirectoryError(f"{where}: that is no JSON; {AGAIN}") from None
    name = event.get("event") if isinstance(event, dict) else None
    if not isinstance(name, str) or name not in FIGURES:
        raise RunDirectoryError(f"{where}: that is no event of this version, {' or '.join(FIGURES)}; {AGAIN}")
    for key in (*COUNTS[name], *FIGURES[name]):
        if key not in event:
            raise RunDirectoryError(f"{where}: the event has no {key}, as of another version; {AGAIN}")
        if not (_is_count(event[key]) if key in COUNTS[name] else _is_figure(event[key])):
            kind = "whole number from 1" if key in COUNTS[name] else "finite number"
            raise RunDirectoryError(f"{where}: the event says {key} {shown(repr(event[key]))}, no {kind}; {AGAIN}")
    return event


def _check_order(event: Mapping[str, Any], before: Sequence[Mapping], planned: int, where: str) -> None:
    """Raise RunDirectoryError unless the event can follow on the epochs `before` it, of `planned` ones."""
    if event["event"] == "epoch" and event["epoch"] != len(before) + 1:
        found = shown(str(event["epoch"]))
        raise RunDirectoryError(f"{where}: epoch {found} where epoch {len(before) + 1} should be; {AGAIN}")
    if event["event"] == "epoch" and event["epoch"] > planned:
        raise RunDirectoryError(f"{where}: epoch {event['epoch']} of a run of {planned}; {AGAIN}")
    if event["event"] == "progress" and event["examples_seen"] > event["examples"]:
        seen, there = (shown(str(event[key])) for key in ("examples_seen", "examples"))
        raise RunDirectoryError(f"{where}: {seen} examples seen of {there}; {AGAIN}")


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value < MOST


def _is_figure(value: object) -> bool:
    return value is None or (type(value) in (int, float) and -MOST < value < MOST)

"""The full runs that are kept, and the README's table of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from spec.markdown import markdown_table

RESULTS = Path("results") / "lockstep.json"
MODES = {"float64": ("float64", False), "float32": ("float32", False), "gates shared": ("float32", True)}
HEADING = ("recipe", "steps", "float64", "float32, gates shared", "float32", "first flip at step", "forced steps")


def load_results(root: Path = Path()) -> dict[str, dict]:
    """Return the kept reports, by recipe and mode."""
    return json.loads((root / RESULTS).read_text()) if (root / RESULTS).exists() else {}


def key(report: Mapping) -> str:
    """Return the name under which a report is kept: recipe, precision, and what was shared or cut short."""
    parts = [report["recipe"], report["precision"]]
    parts += ["shared gates"] if report["share_gates"] else []
    parts += [f"{report[f'max_{what}']} {what}" for what in ("epochs", "steps") if report[f"max_{what}"]]
    return ", ".join(parts)


def longest(results: Mapping[str, dict], recipe: str) -> dict[str, dict]:
    """Return a recipe's report of each mode of MODES that was run: of its own epochs, else the longest."""
    reports = {
        mode: [
            report
            for report in results.values()
            if (report["recipe"], report["precision"], report["share_gates"]) == (recipe, *which)
        ]
        for mode, which in MODES.items()
    }
    return {mode: max(found, key=_preference) for mode, found in reports.items() if found}


def _preference(report: Mapping) -> tuple[bool, int]:
    return not (report["max_steps"] or report["max_epochs"]), report["epochs"][-1]["steps"]


def table(results: Mapping[str, dict]) -> str:
    """Return the kept reports as a Markdown table: largest weight difference at any epoch, what of the predictions is
    not equal, the first flip, and the worst of the steps from the same state. A shorter run says its steps."""
    recipes = sorted({report["recipe"] for report in results.values()})
    return markdown_table(HEADING, [_row(recipe, longest(results, recipe)) for recipe in recipes])


def _row(recipe: str, reports: Mapping[str, dict]) -> list[str]:
    steps = max(report["epochs"][-1]["steps"] for report in reports.values())
    apart = {
        mode: _apart(reports[mode]) + _of_steps(reports[mode], steps) if mode in reports else "-" for mode in MODES
    }
    flip, forced = "-", "-"
    if single := reports.get("float32"):
        flip = f"{_step_of_flip(single):,}" if single["first_flip"] else "none"
        worst = single["epochs"][-1]["forced"]
        forced = f"{worst['steps']:,}: {worst['worst_ratio']:.1f}"
    return [f"`{recipe}`", f"{steps:,}", apart["float64"], apart["gates shared"], apart["float32"], flip, forced]


def _apart(report: Mapping) -> str:
    """Return the largest difference of the weights, and the share of equal predictions if it is not all of them."""
    epochs = report["epochs"]
    parts = [f"{max(epoch['weight_difference'] for epoch in epochs):.1e}"]
    if (equal := min(epoch["equal_predictions"] for epoch in epochs)) < 1:
        parts.append(f"{equal:.1%} equal")
    if (twin := epochs[-1].get("twin_difference")) is not None:
        parts.append(f"from itself {twin:.1e}")
    return ", ".join(parts)


def _of_steps(report: Mapping, steps: int) -> str:
    return "" if report["epochs"][-1]["steps"] == steps else f" ({report['epochs'][-1]['steps']:,} steps)"


def _step_of_flip(report: Mapping) -> int:
    """Return the step of the run, from 0, at which the first decision flipped."""
    return (report["first_flip"]["epoch"] - 1) * report["epochs"][0]["steps"] + report["first_flip"]["step"]

"""`python -m jax_impl.bench`: our epoch beside other ways to train the same recipe, in turn, on this machine.

Each way is a process of its own; they take turns, so that the machine's drift meets all alike, and what is reported are
ratios, pair by pair. Before that each way must show the same first losses. Compile time is apart. The floor is the
operations of the products (`spec.flops`) over the machine's own float32 matmul peak, measured beside; efficiency is
floor over time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from spec import datasets, flops, params
from spec import recipe as recipes
from spec.batches import count
from spec.bench_worker import Worker, worker
from spec.errors import UserError, did_you_mean, require, run_program
from spec.files import write_atomic

WAYS = {
    "lesson": ("torch_ref.baselines", "the lesson's torch program: torchvision, DataLoader"),
    "eager": ("torch_ref.baselines", "torch, tensors in memory"),
    "channels_last": ("torch_ref.baselines", "the same, channels last"),
    "compile": ("torch_ref.baselines", "the same through torch.compile"),
    "stock": ("jax_impl.baselines", "the loop of Flax's documentation"),
    "keras": ("jax_impl.baselines", "Keras 3 on the JAX backend, fit"),
}
NEEDS = {"torch_ref.baselines": ("torch", "torch"), "keras": ("keras", "keras")}
CHECKED_STEPS = 20
# Losses of size 1 over 20 steps: relu networks have not parted yet (S9.6), a CNN may have by a pool's tie.
LOSS_TOLERANCE = 1e-3
PACKAGES = ("jax", "flax", "torch", "keras")
WIDTH = 170  # of the table where no terminal says how wide it is
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """The times of one way beside ours: seconds a turn, (theirs, ours); what starting took; the most memory, bytes."""

    way: str
    pairs: list[tuple[float, float]]
    ready_seconds: float
    peak_bytes: int

    @property
    def ratios(self) -> list[float]:
        """Their time over ours, turn by turn."""
        return [theirs / ours for theirs, ours in self.pairs]


def main() -> None:
    """Run the command line."""
    flags = _parser().parse_args()
    recipe, ways = recipes.load(flags.recipe), flags.against or _ways_here()
    _check(flags, ways)
    dataset = datasets.load(recipe.data)
    counts = count(recipe, len(dataset.train.labels))
    steps = flags.steps or counts.steps_per_epoch
    examples = steps * recipe.batch_size
    operations = flops.training_flops(
        recipe.model, dataset.input_shape, params.num_outputs(recipe, dataset.num_classes)
    )
    console.print(
        f"{recipe.name}: {flags.pairs} turns of {steps:,} steps, {operations * examples / 1e9:,.1f} GFLOP each"
    )
    with contextlib.ExitStack() as stack:
        ours, *others = (stack.enter_context(worker(way, command(way, flags.recipe))) for way in ("ours", *ways))
        check_equal_work(ours, others)
        measured, peaks = interleave(ours, others, steps, flags.pairs)
    report = {
        "recipe": recipe.name,
        "steps": steps,
        "flops": operations * examples,
        "peak_flops_per_second": peaks,
        "ours": {"ready_seconds": ours.ready_seconds, "peak_bytes": ours.peak_bytes},
        "ways": [dataclasses.asdict(one) for one in measured],
        **_origin(),
    }
    show(report)
    if flags.json:
        write_atomic(flags.json, (json.dumps(report, indent=1) + "\n").encode())
    if flags.chart:
        chart(report, flags.chart)


def command(way: str, recipe: str) -> list[str]:
    """Return the command that starts a way's worker."""
    module = "jax_impl.baselines" if way == "ours" else WAYS[way][0]
    return [sys.executable, "-m", module, way, recipe]


def check_equal_work(ours: Worker, others: Sequence[Worker]) -> None:
    """Raise UserError unless every way gives our first losses, each within float32's rounding over so many steps."""
    expected = ours.first_losses(CHECKED_STEPS)
    for other in others:
        found = other.first_losses(CHECKED_STEPS)
        for step, (one, two) in enumerate(zip(expected, found, strict=True)):
            if not math.isclose(one, two, rel_tol=LOSS_TOLERANCE):
                raise UserError(f"{other.name} does other work: its loss at step {step} is {two:.6f}, ours {one:.6f}")
        console.print(f"{other.name}: the first {CHECKED_STEPS} losses are ours")


def interleave(ours: Worker, others: Sequence[Worker], steps: int, turns: int) -> tuple[list[Measured], list[float]]:
    """Return each way's times beside ours, and the matmul peak at every turn, FLOP/s. One turn first is not counted."""
    times: dict[str, list[float]] = {one.name: [] for one in (ours, *others)}
    peaks = []
    for turn in range(turns + 1):
        taken = {one.name: one.seconds(steps) for one in (ours, *others)}
        if turn:
            peaks.append(matmul_peak())
            for name, seconds in taken.items():
                times[name].append(seconds)
        said = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in taken.items())
        console.print(f"turn {turn} of {turns}: {said}" + ("" if turn else " (not counted)"))
    measured = [
        Measured(
            way=other.name,
            pairs=list(zip(times[other.name], times[ours.name], strict=True)),
            ready_seconds=other.ready_seconds,
            peak_bytes=other.peak_bytes,
        )
        for other in others
    ]
    return measured, peaks


def matmul_peak(size: int = 2048) -> float:
    """Return the machine's float32 matmul rate, FLOP/s: the best of five products of [size, size]."""
    one = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        one @ one
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def efficiency(report: Mapping) -> float:
    """Return floor over time: the operations' time at the machine's best matmul rate, over our median turn."""
    ours = statistics.median(pair[1] for way in report["ways"] for pair in way["pairs"])
    return report["flops"] / max(report["peak_flops_per_second"]) / ours


def show(report: Mapping) -> None:
    """Print the table: medians (smallest to largest)."""
    table = Table("way", "what", "theirs, s", "ours, s", "ratio", "ready in, s", "memory, MB")
    for way in report["ways"]:
        theirs, ours = zip(*way["pairs"], strict=True)
        ratios = [one / other for one, other in way["pairs"]]
        figures = [_range(theirs, 3), _range(ours, 3), f"[bold]{_range(ratios, 2)}[/]", f"{way['ready_seconds']:.1f}"]
        table.add_row(way["way"], WAYS[way["way"]][1], *figures, f"{way['peak_bytes'] / 1e6:,.0f}")
    own = report["ours"]
    table.add_row(
        "ours", "the epoch program", "", "", "", f"{own['ready_seconds']:.1f}", f"{own['peak_bytes'] / 1e6:,.0f}"
    )
    console.print(table)
    rate = max(report["peak_flops_per_second"]) / 1e9
    console.print(f"float32 matmul peak {rate:,.0f} GFLOP/s; efficiency (floor over time) {efficiency(report):.0%}")


def chart(report: Mapping, path: Path) -> None:
    """Draw the ratios as bars, with their ranges."""
    from matplotlib.figure import Figure

    ways = sorted(report["ways"], key=lambda way: statistics.median(a / b for a, b in way["pairs"]))
    ratios = [[one / other for one, other in way["pairs"]] for way in ways]
    medians = [statistics.median(one) for one in ratios]
    below = [median - min(one) for median, one in zip(medians, ratios, strict=True)]
    above = [max(one) - median for median, one in zip(medians, ratios, strict=True)]
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(ways)), layout="constrained")
    axes = figure.subplots()
    axes.barh([WAYS[way["way"]][1] for way in ways], medians, xerr=[below, above], color="#4878a8", capsize=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("their time over ours, median and range")
    axes.set_title(f"{report['recipe']}: {report['steps']:,} steps, {report['machine']}")
    for index, median in enumerate(medians):
        axes.annotate(f"{median:.1f}", (median, index), xytext=(4, 8), textcoords="offset points")
    figure.savefig(path, dpi=150)


def _ways_here() -> list[str]:
    """Return the ways whose packages are installed."""
    return [way for way in WAYS if all(importlib.util.find_spec(package) for package, _ in _needs(way))]


def _needs(way: str) -> list[tuple[str, str]]:
    return [NEEDS[key] for key in (WAYS[way][0], way) if key in NEEDS]


def _check(flags: argparse.Namespace, ways: Sequence[str]) -> None:
    """Raise UserError for flags that cannot be, before anything starts."""
    for name in ("pairs", "steps"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise UserError(f"--{name} {getattr(flags, name)} must be 1 or more")
    for way in ways:
        if way not in WAYS:
            raise UserError(f"--against {way}: there is no such way{did_you_mean(way, WAYS)}; ways: {', '.join(WAYS)}")
        for package, extra in _needs(way):
            require(package, extra=extra)
    for name in ("json", "chart"):
        path = getattr(flags, name)
        if path and not path.absolute().parent.is_dir():
            raise UserError(f"--{name} {path}: its directory does not exist; make it first")
    if flags.chart:
        require("matplotlib", extra="plot")


def _origin() -> dict:
    there = [name for name in PACKAGES if importlib.util.find_spec(name)]
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in there}
    return {"date": time.strftime("%Y-%m-%d"), "machine": f"{os.cpu_count()} cores, CPU", "versions": versions}


def _range(values: Sequence[float], digits: int) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jax_impl.bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--recipe", default="mlp128", help="a recipe on idx data (default: mlp128)")
    parser.add_argument("--against", nargs="+", metavar="WAY", help=f"of {', '.join(WAYS)} (default: all installed)")
    parser.add_argument("--pairs", type=int, default=7, help="turns (default: 7)")
    parser.add_argument("--steps", type=int, help="steps a turn (default: an epoch's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times to this file")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the ratios (.png, .svg; needs the extra plot)")
    return parser


if __name__ == "__main__":
    run_program(main)

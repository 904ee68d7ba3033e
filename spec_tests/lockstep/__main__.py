"""`python -m spec_tests.lockstep --recipe NAME`: train on both sides; say, epoch by epoch, how far apart they are."""

from __future__ import annotations

if __name__ == "__main__":
    from spec.errors import run_program

    run_program(__spec__.name)

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

from rich.console import Console

from spec import recipe as recipes
from spec.errors import UserError, require
from spec.files import check_target, write_atomic
from spec.recipe import Recipe
from spec_tests.lockstep.report import Epoch, judge
from spec_tests.lockstep.results import RESULTS, key, load_results
from spec_tests.tolerances import KAPPA

console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line; exit with 1 when a bound of the specification is broken."""
    arguments = _parser().parse_args()
    recipe = _recipe(arguments)
    require("torch", extra="torch")
    from spec import datasets
    from spec_tests.lockstep.runs import Pair, StepByStep, by_epochs

    pair = Pair.of(recipe, datasets.load(recipe.data, data_dir=arguments.data_dir))
    shared, double = arguments.share_gates, recipe.precision == "float64"
    console.print(f"{recipe.name}, {recipe.precision}: {recipe.description}", markup=False)
    console.print(
        f"{_extent(arguments.steps, pair.counts.steps)}{', gates shared' if shared else ''}; {backends()}", markup=False
    )
    start = time.perf_counter()
    steps = None
    if shared or arguments.steps or recipe.model.dropout or not double:
        watch = not shared and (not double or recipe.optimizer.name == "adam")
        steps = StepByStep(pair, share_gates=shared, watch=watch)
    epochs = []
    for epoch in steps.epochs(max_steps=arguments.steps) if steps else by_epochs(pair):
        epochs.append(epoch)
        console.print(_line(epoch, recipe), markup=False)
    flip = steps.first_flip if steps else None
    verdict = judge(recipe, epochs, share_gates=shared)
    report = {
        "recipe": recipe.name,
        "precision": recipe.precision,
        "share_gates": shared,
        "max_steps": arguments.steps,
        "max_epochs": arguments.epochs,
        "epochs": [dataclasses.asdict(epoch) for epoch in epochs],
        "first_flip": dataclasses.asdict(flip) if flip else None,
        **dataclasses.asdict(verdict),
        "seconds": time.perf_counter() - start,
        "date": time.strftime("%Y-%m-%d"),
        "backends": backends(),
    }
    _print_end(report)
    _write(report, arguments)
    if verdict.broken:
        sys.exit(1)


def backends() -> str:
    """Return what computes, and with which flags: versions, device, threads (S12)."""
    import jax
    import torch

    device = jax.devices("cpu")[0]
    return (
        f"jax {jax.__version__} on {device.platform}, products at highest precision; "
        f"torch {torch.__version__} on cpu, {torch.get_float32_matmul_precision()} precision, "
        f"{torch.get_num_threads()} threads"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m spec_tests.lockstep", description=__doc__, allow_abbrev=False)
    parser.add_argument("--recipe", default="mlp128", help="a name or a .toml file (default: mlp128)")
    parser.add_argument("--precision", choices=("float64", "float32"), default="float64")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's own")
    parser.add_argument("--steps", type=int, help="stop after so many steps")
    parser.add_argument("--share-gates", action="store_true", help="give torch's relu and pooling decisions to JAX")
    parser.add_argument("--data-dir", type=Path, help="a directory that holds the idx files")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    parser.add_argument("--keep", action="store_true", help=f"keep the report in {RESULTS}")
    return parser


def _recipe(arguments: argparse.Namespace) -> Recipe:
    if arguments.json:
        check_target(arguments.json, flag="--json")
    if arguments.keep:
        RESULTS.parent.mkdir(exist_ok=True)
        check_target(RESULTS, flag="--keep")
    for name in ("epochs", "steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} is not 1 or more; leave it out for all of the recipe's")
    loaded = recipes.load(arguments.recipe)
    return dataclasses.replace(loaded, precision=arguments.precision, epochs=arguments.epochs or loaded.epochs)


def _extent(asked: int | None, all_steps: int) -> str:
    return f"{min(asked, all_steps):,} of {all_steps:,} steps" if asked else f"{all_steps:,} steps"


def _line(epoch: Epoch, recipe: Recipe) -> str:
    line = (
        f"epoch {epoch.epoch}/{recipe.epochs}, step {epoch.steps:,}: weights differ by {epoch.weight_difference:.2e}, "
        f"losses by {epoch.loss_difference:.2e}; {epoch.equal_predictions:.2%} equal predictions; accuracy "
        f"{epoch.jax_accuracy:.4f} (JAX) {epoch.torch_accuracy:.4f} (torch)"
    )
    if epoch.twin_difference is not None:
        line += f"; JAX from itself, one unit in the last place away at the start: {epoch.twin_difference:.2e}"
    if forced := epoch.forced:
        line += f"; {forced.steps:,} forced steps, worst error ratio {forced.worst_ratio:.2f} ({forced.worst_leaf})"
        line += f", {forced.broken:,} leaves over {KAPPA}" if forced.broken else ""
        line += f", {forced.flips} flips" + (f", the largest {forced.largest_flip:.1e}" if forced.flips else "")
    return line


def _print_end(report: dict) -> None:
    if flip := report["first_flip"]:
        console.print(
            f"the free runs part at epoch {flip['epoch']}, step {flip['step']}: {flip['layer']}, unit "
            f"{', '.join(map(str, flip['unit']))}, example {flip['example']}: {flip['jax']:+.3e} in JAX, "
            f"{flip['torch']:+.3e} in torch",
            markup=False,
        )
    for what in ("held", "broken"):
        for line in report[what]:
            console.print(f"{what}: {line}", markup=False)
    outcome = "not in step" if report["broken"] else "in step" if report["held"] else "no bound applies to such a run"
    console.print(f"{outcome}, {report['seconds']:.0f} s")


def _write(report: dict, arguments: argparse.Namespace) -> None:
    if arguments.json:
        _write_json(arguments.json, report, flag="--json")
    if arguments.keep:
        _write_json(RESULTS, dict(sorted((load_results() | {key(report): report}).items())), flag="--keep")


def _write_json(path: Path, content: dict, *, flag: str) -> None:
    try:
        write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"{flag}: {path} cannot be written: {error}; name another place") from None

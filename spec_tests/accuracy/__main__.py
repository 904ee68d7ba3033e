"""`python -m spec_tests.accuracy RECIPE ...`: train with several seeds on both sides, keep and print the figures.

Each run is a process of its own, as a user starts it. With `--keep` its figures go to `results/` as soon as it ends; a
run that is kept there, by the versions installed here, is not made again.
"""

from __future__ import annotations

if __name__ == "__main__":
    from spec.errors import run_program

    run_program(__spec__.name)

import argparse
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from spec import recipe as recipes
from spec.errors import UserError, did_you_mean, python_command
from spec_tests.accuracy import results as kept
from spec_tests.accuracy.claims import EXPERIMENTS, claims_table
from spec_tests.accuracy.publish import publish
from spec_tests.accuracy.results import FRAMEWORKS, Results
from spec_tests.accuracy.runs import Run, train
from spec_tests.accuracy.tables import table


def main() -> None:
    """Make the runs that are missing, then print the table of the recipes, or the claims, or both."""
    arguments = _arguments()
    _check(arguments)
    recipe_runs, experiment_runs = list(_recipe_runs(arguments)), list(_experiment_runs(arguments))
    results, experiments = kept.load_results(), kept.load_experiments()
    _measure(arguments, recipe_runs, results, kept.RESULTS)
    _measure(arguments, experiment_runs, experiments, kept.EXPERIMENTS)
    if arguments.publish:
        publish(Path())
    named = dict.fromkeys(run.key for run in recipe_runs)
    tables = [table({key: results[key] for key in named or results})] if named or not experiment_runs else []
    tables += [claims_table(results, experiments)] if experiment_runs or not named else []
    print(*tables, sep="\n\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m spec_tests.accuracy", description=__doc__, allow_abbrev=False)
    parser.add_argument("recipes", nargs="*", help="names; with no name at all the kept figures are printed")
    parser.add_argument("--experiment", nargs="+", default=[], metavar="NAME", help=f"or all: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--framework", choices=(*FRAMEWORKS, "both"), default="both", help="which side (default: both)")
    parser.add_argument("--seeds", type=int, default=10, help="seeds 0 to N-1, two at least (default: 10)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once, of one thread each if more than one")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's own; kept as 'NAME, N epochs'")
    parser.add_argument("--bfloat16", action="store_true", help="in bfloat16; kept as 'NAME, bfloat16'")
    parser.add_argument("--data-dir", type=Path, help="a directory that holds the idx files")
    parser.add_argument("--keep", action="store_true", help="keep the figures in results/")
    parser.add_argument("--again", action="store_true", help="make the runs that are kept again")
    parser.add_argument("--publish", action="store_true", help="write the kept figures into README and the recipes")
    return parser.parse_args()


def _check(arguments: argparse.Namespace) -> None:
    """Raise UserError for what cannot be run."""
    if arguments.seeds < 2:
        raise UserError(f"--seeds {arguments.seeds} gives no standard deviation; use two at least")
    if arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs} runs nothing; use one at least")
    if arguments.experiment and (arguments.epochs is not None or arguments.bfloat16):
        flag = "--bfloat16" if arguments.epochs is None else f"--epochs {arguments.epochs}"
        raise UserError(f"{flag} is for recipes; an experiment states its own")
    if unknown := set(arguments.experiment) - {"all", *EXPERIMENTS}:
        name = min(unknown)
        raise UserError(f"--experiment {name!r} does not exist{did_you_mean(name, EXPERIMENTS)}; --help lists them all")
    if "torch" in _frameworks(arguments) and importlib.util.find_spec("torch") is None:
        raise UserError(
            f"--framework {arguments.framework} needs the extra torch: {python_command()} -m pip install "
            "-c constraints/main.txt -e '.[torch]'; or use --framework jax"
        )
    if arguments.publish and arguments.recipes + arguments.experiment and not arguments.keep:
        raise UserError("--publish writes kept figures; add --keep")


def _frameworks(arguments: argparse.Namespace) -> tuple[str, ...]:
    return FRAMEWORKS if arguments.framework == "both" else (arguments.framework,)


def _recipe_runs(arguments: argparse.Namespace) -> Iterator[Run]:
    for name in arguments.recipes:
        recipes.load(name)
        key, flags = name, ("--recipe", name)
        if arguments.epochs is not None:
            key, flags = f"{key}, {arguments.epochs} epochs", (*flags, "--epochs", str(arguments.epochs))
        if arguments.bfloat16:
            key, flags = f"{key}, bfloat16", (*flags, "--precision", "bfloat16")
        yield from _runs(arguments, key, flags)


def _experiment_runs(arguments: argparse.Namespace) -> Iterator[Run]:
    for name in EXPERIMENTS if "all" in arguments.experiment else arguments.experiment:
        yield from _runs(arguments, name, tuple(EXPERIMENTS[name].split()))


def _runs(arguments: argparse.Namespace, key: str, flags: tuple[str, ...]) -> Iterator[Run]:
    for seed in range(arguments.seeds):
        for framework in _frameworks(arguments):
            yield Run(key=key, framework=framework, seed=seed, flags=flags)


def _measure(arguments: argparse.Namespace, runs: Sequence[Run], results: Results, file: Path) -> None:
    """Make the runs that are missing, `--jobs` at once; put each into `results` as it ends, and keep it if asked to."""
    missing = [run for run in runs if not kept.has(results, run) or arguments.again]
    if there := len(runs) - len(missing):
        said = f"{there} of {len(runs)} runs are kept in {file} and not made again; --again makes them"
        print(said, file=sys.stderr)
    pool = ThreadPoolExecutor(arguments.jobs)
    try:
        started = {
            pool.submit(train, run, data_dir=arguments.data_dir, one_thread=arguments.jobs > 1): run for run in missing
        }
        for done in as_completed(started):
            run, summary = started[done], done.result()
            kept.add(results, run.key, summary, file)
            if arguments.keep:
                kept.save(results, file)
            print(f"{run.key} {run.framework} seed {run.seed}: {summary['test_accuracy']}", file=sys.stderr, flush=True)
    finally:
        pool.shutdown(cancel_futures=True)

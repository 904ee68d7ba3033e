"""`python -m spec_tests.mutants`: plant each fault of the catalogue, and show which test kills it."""

from __future__ import annotations

if __name__ == "__main__":
    from spec.errors import run_program

    run_program(__spec__.name)

import argparse
import importlib.metadata
import json
import platform
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from spec.errors import UserError, did_you_mean
from spec.files import check_target, write_atomic
from spec.markdown import markdown_table
from spec_tests.mutants.catalogue import MUTANTS, Mutant
from spec_tests.mutants.runner import Outcome, Selection, run_baseline, run_mutants

ROOT = Path(__file__).parents[2]
RESULTS = Path("results") / "mutants.json"
VERSIONS = ("pytest", "numpy", "jax", "jaxlib", "flax", "optax", "torch")
PLANTED = ("jax_impl", "torch_ref", "spec")
WIDTH = 180  # of the table where no terminal says how wide it is
COLOURS = {"killed": "green", "survived": "red", "crashed": "yellow"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the matrix as the flags say; leave with status 1 unless every mutant is killed."""
    signal.signal(signal.SIGTERM, _terminate)
    flags = _parser().parse_args(arguments)
    if flags.jobs < 1:
        raise UserError(f"--jobs {flags.jobs}: must be 1 or more")
    if flags.json:
        check_target(flags.json, flag="--json")
    chosen = choose(MUTANTS, names=flags.only, clause=flags.clause)
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)
    if flags.list:
        console.print("\n".join(f"{one.clause} {one.name}: {one.says}" for one in chosen), markup=False)
        return
    if flags.keep:
        _check_keep(chosen)
    if not baseline_passes(chosen, flags.jobs, console):
        console.print("the unmutated copy fails its own tests: mend them first")
        sys.exit(1)
    outcomes = run_matrix(chosen, flags.jobs, console)
    show(outcomes, console)
    if flags.json:
        _write(flags.json, matrix(outcomes))
    if flags.keep:
        _write(ROOT / RESULTS, matrix(outcomes, load_results(ROOT)))
    killed = sum(outcome.result == "killed" for outcome in outcomes.values())
    console.print(f"killed {killed} of {len(outcomes)}")
    sys.exit(0 if killed == len(outcomes) else 1)


def choose(mutants: Sequence[Mutant], *, names: Sequence[str] | None, clause: str | None) -> list[Mutant]:
    """Return the mutants of these names, or of this clause, or all. UserError for a name or clause there is not."""
    known = [mutant.name for mutant in mutants]
    for name in names or ():
        if name not in known:
            raise UserError(f"--only {name}: no mutant has this name{did_you_mean(name, known)}; --list shows them all")
    clauses = list(dict.fromkeys(mutant.clause for mutant in mutants))
    if clause is not None and clause not in clauses:
        raise UserError(f"--clause {clause}: no mutant is of this clause; there are {', '.join(clauses)}")
    chosen = [mutant for mutant in mutants if not names or mutant.name in names]
    chosen = [mutant for mutant in chosen if clause is None or mutant.clause == clause]
    if not chosen:
        raise UserError(f"--clause {clause}: none of {', '.join(names or ())} is of this clause; leave one of both out")
    return chosen


def baseline_passes(mutants: Sequence[Mutant], jobs: int, console: Console) -> bool:
    """Say whether the unmutated copy passes all tests that are to kill: else nothing that follows means anything."""

    def tell(selected: Selection, outcome: Outcome) -> None:
        passed = outcome.result == "survived"
        said = "passes" if passed else f"{outcome.result}: {outcome.killer} {outcome.message}"
        console.print(f"unmutated: {selected.files[0]} {said} ({outcome.seconds:.0f} s)", markup=False)

    outcomes = run_baseline(mutants, ROOT, jobs, tell)
    return all(outcome.result == "survived" for outcome in outcomes.values())


def run_matrix(mutants: Sequence[Mutant], jobs: int, console: Console) -> dict[Mutant, Outcome]:
    """Run the mutants, with a line for each as it ends."""
    ended = 0

    def tell(mutant: Mutant, outcome: Outcome) -> None:
        nonlocal ended
        ended += 1
        said = outcome.killer or outcome.message
        line = (
            f"{ended}/{len(mutants)} {outcome.result}: {mutant.clause} {mutant.name} ({outcome.seconds:.0f} s) {said}"
        )
        console.print(line, markup=False)

    return run_mutants(mutants, ROOT, jobs, tell)


def show(outcomes: Mapping[Mutant, Outcome], console: Console) -> None:
    """Print the matrix, a row for each mutant."""
    table = Table("clause", "mutant", "where", "result", "killed by", "seconds")
    for mutant, outcome in outcomes.items():
        result = f"[{COLOURS[outcome.result]}]{outcome.result}[/]"
        killer = outcome.killer.replace("[", r"\[")
        table.add_row(mutant.clause, mutant.name, mutant.path, result, killer, f"{outcome.seconds:.1f}")
    console.print(table)


def matrix(outcomes: Mapping[Mutant, Outcome], earlier: Mapping | None = None) -> dict:
    """Return the matrix as it is kept in a file: these outcomes, and those of an `earlier` one by the same versions for
    the catalogue's other mutants."""
    versions = versions_here()
    known = earlier["mutants"] if earlier and earlier["versions"] == versions else []
    rows = {(row["name"], row["clause"], row["says"], row["file"]): row for row in known}
    rows |= {_identity(mutant): _row(mutant, outcome) for mutant, outcome in outcomes.items()}
    rows = [rows[_identity(mutant)] for mutant in MUTANTS if _identity(mutant) in rows]
    return {"killed": sum(row["result"] == "killed" for row in rows), "mutants": rows, "versions": versions}


def versions_here() -> dict[str, str]:
    """Return the versions that a matrix depends on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in VERSIONS}


def _check_keep(chosen: Sequence[Mutant]) -> None:
    """Raise UserError, before anything runs, if what these mutants give cannot be kept."""
    (ROOT / RESULTS).parent.mkdir(exist_ok=True)
    check_target(ROOT / RESULTS, flag="--keep")
    if len(chosen) < len(MUTANTS) and load_results(ROOT).get("versions", versions_here()) != versions_here():
        raise UserError(
            f"--keep: {RESULTS} is of other versions than those installed, and {len(chosen)} of {len(MUTANTS)} mutants "
            "would replace it; run the whole matrix, or use --json FILE"
        )


def _identity(mutant: Mutant) -> tuple[str, ...]:
    return mutant.name, mutant.clause, mutant.says, mutant.path


def _terminate(*_: object) -> None:
    """Leave by way of the clean-up, which removes the copies, and let no second signal break it off."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)


def _row(mutant: Mutant, outcome: Outcome) -> dict:
    return {
        "name": mutant.name,
        "clause": mutant.clause,
        "says": mutant.says,
        "file": mutant.path,
        "result": outcome.result,
        "killer": outcome.killer,
        "message": outcome.message,
        "seconds": round(outcome.seconds, 1),
        "date": time.strftime("%Y-%m-%d"),
    }


def load_results(root: Path = Path()) -> dict:
    """Return the kept matrix, or an empty dict."""
    return json.loads((root / RESULTS).read_text()) if (root / RESULTS).exists() else {}


def table(results: Mapping) -> str:
    """Return the kept matrix as a Markdown table: mutants by clause and by where they are planted, and those killed."""
    rows = []
    clauses = list(dict.fromkeys(mutant["clause"] for mutant in results.get("mutants", ())))
    for clause in [*clauses, "all"]:
        planted = [mutant for mutant in results.get("mutants", ()) if clause in ("all", mutant["clause"])]
        where = [sum(mutant["file"].startswith(f"{package}/") for mutant in planted) for package in PLANTED]
        killed = sum(mutant["result"] == "killed" for mutant in planted)
        rows.append([clause, *map(str, where), f"{killed} of {len(planted)}"])
    return markdown_table(["clause", "in jax_impl", "in torch_ref", "in spec", "killed"], rows)


def _write(path: Path, content: Mapping) -> None:
    try:
        write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m spec_tests.mutants", description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants alone")
    parser.add_argument("--clause", help="the mutants of one clause of spec/SPEC.md: S6, say")
    parser.add_argument("--list", action="store_true", help="name the mutants and what is wrong in each, run nothing")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time, each in a copy of its own (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the matrix to this file")
    parser.add_argument("--keep", action="store_true", help=f"keep what these mutants gave in {RESULTS}")
    return parser

"""`python -m spec_tests.accuracy RECIPE ...`: train each recipe with several seeds, keep the figures, print the table.

Each run is a process of its own, as a user starts it. With `--keep` figures go to `results/accuracy.json`, which
README's table and the recipes' `expected` are held against.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from spec import recipe as recipes
from spec.errors import UserError, run_program
from spec.files import write_atomic

RESULTS = Path("results") / "accuracy.json"
KEPT = ("test_accuracy", "train_accuracy", "cumulative_train_accuracy", "seconds", "compile_seconds")
LESSON = {
    "softmax-regression": "train 0.853 to 0.864",
    "sigmoid-mlp": "47 % (cumulative train)",
    "mlp512": "87.60 %",
    "mnist-mlp512": "97.45 %",
    "deep-mlp": "about 87 %",
    "cnn": "91.53 %",
    "mlp128": "middling",
    "mlp128-batchnorm": "up 5 % at once",
    "mnist-mlp256": "curves only",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m spec_tests.accuracy", description=__doc__, allow_abbrev=False)
    parser.add_argument("recipes", nargs="*", help="names; none prints the table of the figures there are")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1, two at least (default: 3)")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's own; kept as 'NAME, N epochs'")
    parser.add_argument("--keep", action="store_true", help="keep the figures in results/accuracy.json")
    parser.add_argument("--data-dir", type=Path, help="a directory that holds the idx files")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        raise UserError(f"--seeds {arguments.seeds} gives no standard deviation; use two at least")
    results = load_results()
    for name in arguments.recipes:
        recipes.load(name)
        key = name if arguments.epochs is None else f"{name}, {arguments.epochs} epochs"
        results[key] = measure(name, arguments)
        if not arguments.keep:
            continue
        RESULTS.parent.mkdir(exist_ok=True)
        write_atomic(RESULTS, (json.dumps(dict(sorted(results.items())), indent=1) + "\n").encode())
    print(table(results))


def load_results(root: Path = Path()) -> dict[str, dict]:
    """Return the kept figures: by recipe, lists over the seeds, and where they come from."""
    return json.loads((root / RESULTS).read_text()) if (root / RESULTS).exists() else {}


def expected(result: dict) -> dict:
    """Return what a recipe's section `expected` holds: the mean test accuracy, and three standard deviations."""
    values, versions = result["test_accuracy"], result["versions"]
    return {
        "test_accuracy": round(statistics.mean(values), 4),
        "margin": round(3 * statistics.stdev(values), 4),
        "runs": len(values),
        "measured": f"{result['date']}, jax {versions['jax']}, flax {versions['flax']}, optax {versions['optax']}",
    }


def measure(name: str, arguments: argparse.Namespace) -> dict:
    """Train `name` with every seed; return the lists of figures, the date, the versions and the machine."""
    summaries = []
    for seed in range(arguments.seeds):
        start = time.perf_counter()
        summary = _train(name, seed, arguments)
        summaries.append(summary | {"process_seconds": time.perf_counter() - start})
        print(f"{name} seed {seed}: test accuracy {summary['test_accuracy']}", file=sys.stderr)
    return {
        "seeds": list(range(arguments.seeds)),
        "epochs": summaries[0]["epochs"],
        "steps": summaries[0]["steps"],
        **{figure: [summary[figure] for summary in summaries] for figure in (*KEPT, "process_seconds")},
        "lesson_metrics": [summary["lesson_metrics"] for summary in summaries],
        "date": time.strftime("%Y-%m-%d"),
        "versions": summaries[0]["versions"],
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {summaries[0]['devices'][0]}",
    }


def _train(name: str, seed: int, arguments: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "jax_impl.train", "--quiet", "--recipe", name, "--seed", str(seed)]
        command += ["--out", str(out)]
        command += ["--epochs", str(arguments.epochs)] if arguments.epochs is not None else []
        command += ["--data-dir", str(arguments.data_dir)] if arguments.data_dir else []
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            raise UserError(f"{' '.join(command)} exited {ended.returncode}: {ended.stderr.strip()}")
        return json.loads((out / "summary.json").read_text())


def table(results: dict[str, dict]) -> str:
    """Return the figures as a Markdown table: mean and standard deviation over the seeds, median seconds."""
    accuracies = {
        "test accuracy": "test_accuracy",
        "train, last epoch": "train_accuracy",
        "train, cumulative": "cumulative_train_accuracy",
    }
    rows = [["recipe", "lesson", *accuracies, "seeds", "epochs x steps", "seconds"], ["---"] * (5 + len(accuracies))]
    for key, result in sorted(results.items()):
        figures = [_mean_sd(result[name]) for name in accuracies.values()]
        steps = f"{result['epochs']} x {result['steps'] // result['epochs']}"
        seconds = f"{statistics.median(result['process_seconds']):.1f}"
        rows.append([f"`{key}`", LESSON.get(key, "-"), *figures, str(len(result["seeds"])), steps, seconds])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _mean_sd(values: list[float | None]) -> str:
    if None in values:
        return "-"
    return f"{statistics.mean(values):.4f} +- {statistics.stdev(values):.4f}"


if __name__ == "__main__":
    run_program(main)

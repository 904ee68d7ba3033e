"""`python -m spec_tests.speed`: our epoch against the lesson's torch loop, interleaved in one process.

Each pair is one epoch of the lesson's program (torchvision, DataLoader, loop) and one of ours, compile time apart;
figures are medians and ranges of the pairs' ratios. `--process` pairs the two whole programs instead.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from spec import datasets
from spec import recipe as recipes
from spec.errors import UserError, python_command, run_program
from spec.files import write_atomic
from spec_tests.markdown import markdown_table

RESULTS = Path("results") / "speed.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m spec_tests.speed", description=__doc__, allow_abbrev=False)
    parser.add_argument("--recipe", default="mlp128", help="an MLP recipe on idx data (default: mlp128)")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of epochs or processes (default: 7)")
    parser.add_argument("--process", action="store_true", help="pair whole processes, every epoch of the recipe")
    parser.add_argument("--keep", action="store_true", help="keep the times in results/speed.json")
    arguments = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            f"the lesson's loop needs the extra torch: {python_command()} -m pip install -c constraints/main.txt "
            "-e '.[torch]'"
        )
    measure = _processes if arguments.process else _epochs
    lesson, ours = measure(arguments.recipe)
    key = f"{arguments.recipe}, {'whole process' if arguments.process else 'an epoch'}"
    result = {"pairs": [(_timed(lesson), _timed(ours)) for _ in range(arguments.pairs)], **_origin()}
    print(table({key: result}))
    if arguments.keep:
        RESULTS.parent.mkdir(exist_ok=True)
        kept = load_results() | {key: result}
        write_atomic(RESULTS, (json.dumps(dict(sorted(kept.items())), indent=1) + "\n").encode())


def load_results(root: Path = Path()) -> dict[str, dict]:
    """Return the kept times: by recipe and what was timed, the pairs in seconds (lesson, ours), and their origin."""
    return json.loads((root / RESULTS).read_text()) if (root / RESULTS).exists() else {}


def table(results: dict[str, dict]) -> str:
    """Return the times as a Markdown table: median (smallest to largest) of the pairs."""
    rows = []
    for key, result in results.items():
        theirs, ours = zip(*result["pairs"], strict=True)
        ratios = [lesson / mine for lesson, mine in result["pairs"]]
        rows.append([key, str(len(ours)), _range(theirs), _range(ours), f"**{_range(ratios)}**"])
    return markdown_table(["what", "pairs", "lesson's torch, s", "ours, s", "ratio"], rows)


def _origin() -> dict:
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "torch", "torchvision")}
    return {"date": time.strftime("%Y-%m-%d"), "machine": f"{os.cpu_count()} cores, CPU", "versions": versions}


def _epochs(name: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return two functions, each of which runs its program's next epoch of training."""
    from jax_impl.parallel import select_device
    from jax_impl.trainer import Trainer
    from torch_ref import lesson

    recipe = recipes.load(name)
    model, optimizer = lesson.network(recipe)
    loader = lesson.batches(recipe, train=True)
    trainer = Trainer(recipe, datasets.load(recipe.data), select_device("cpu"))
    epochs = trainer.train_epochs(10_000)
    return lambda: lesson.train_epoch(model, optimizer, loader), lambda: next(epochs)


def _processes(name: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return two functions, each of which runs its whole program once."""
    return lambda: _run("torch_ref.lesson", name), lambda: _run("jax_impl.train", name, out=True)


def _run(module: str, name: str, *, out: bool = False) -> None:
    with tempfile.TemporaryDirectory() as folder:
        options = ["--out", str(Path(folder) / "run")] if out else []
        command = [sys.executable, "-m", module, "--recipe", name, *options]
        ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise UserError(f"{' '.join(command)} exited {ended.returncode}: {ended.stderr.strip()}")


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _range(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    run_program(main)

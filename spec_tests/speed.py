"""`python -m spec_tests.speed`: our epoch against the lesson's torch loop, interleaved in one process.

Each pair is one epoch of the lesson's program (torchvision, DataLoader, loop) and one of ours, compile time apart;
figures are medians and ranges of the pairs' ratios. `--process` pairs the two whole programs instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from spec import datasets
from spec import recipe as recipes
from spec.errors import UserError, exit_status


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m spec_tests.speed", description=__doc__, allow_abbrev=False)
    parser.add_argument("--recipe", default="mlp128", help="an MLP recipe on idx data (default: mlp128)")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of epochs or processes (default: 7)")
    parser.add_argument("--process", action="store_true", help="pair whole processes, every epoch of the recipe")
    parser.add_argument("--json", type=Path, help="write every time here")
    arguments = parser.parse_args()
    measure = _processes if arguments.process else _epochs
    lesson, ours = measure(arguments.recipe)
    pairs = [(_timed(lesson), _timed(ours)) for _ in range(arguments.pairs)]
    ratios = [theirs / mine for theirs, mine in pairs]
    what = "process" if arguments.process else "epoch"
    print(f"{arguments.recipe}, one {what}, {len(pairs)} pairs")
    print(f"  lesson's torch  {_range([pair[0] for pair in pairs])} s")
    print(f"  ours            {_range([pair[1] for pair in pairs])} s")
    print(f"  ratio           {_range(ratios)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"recipe": arguments.recipe, "what": what, "pairs": pairs}) + "\n")


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


def _range(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    sys.exit(exit_status(main))

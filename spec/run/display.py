"""What a run shows: a progress bar on a terminal, plain lines elsewhere, nothing but the last line when quiet; and what
went wrong on the way, on standard error, quiet or not."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from spec.batches import Counts

LARGE = 1e6  # a loss that needs an exponent to be read


class PlainConsole(Console):
    """A console that lets a broken pipe be what it is, for `spec.errors.exit_status`."""

    def on_broken_pipe(self) -> None:
        """Raise the error that rich would end the process for, with another status."""
        raise BrokenPipeError


class Display:
    """Shows the figures of `spec.run.history`; never reads or changes them. `OUTCOME` is what its last line takes."""

    OUTCOME = ("recipe", "steps", "seconds", "compile_seconds", "train_accuracy", "test_accuracy")

    def __init__(self, *, quiet: bool, console: Console | None = None) -> None:
        self.quiet = quiet
        self.console = console or PlainConsole(highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        self.epochs = 0  # of the run that is shown, once it is running

    def waiting(self, text: str) -> AbstractContextManager:
        """Show `text` while the body runs, on a terminal."""
        return nullcontext() if self.quiet or not self.console.is_terminal else self.console.status(text)

    @contextmanager
    def running(self, counts: Counts) -> Iterator[None]:
        """Show the bar while the body runs, on a terminal."""
        self.epochs = counts.epochs
        if self.quiet or not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as self.bar:
            self.task = self.bar.add_task(f"epoch 1/{self.epochs}", total=counts.steps, figures="")
            yield
        self.bar = None

    def line(self, text: str) -> None:
        """Print `text`, unless quiet."""
        if not self.quiet:
            self.console.print(text, markup=False)

    def warning(self, text: str) -> None:
        """Print `text` on standard error, quiet or not."""
        print(f"warning: {text}", file=sys.stderr)

    def progress(self, figures: Mapping[str, float]) -> None:
        """Show the lesson's progress line, in the bar or as a line."""
        loss, accuracy = _shown(figures["batch_loss"]), _shown(figures["cumulative_train_accuracy"])
        if self.bar:
            self.bar.update(
                self.task,
                completed=figures["step"],
                description=f"epoch {figures['epoch']}/{self.epochs}",
                figures=f"loss {loss}  cumulative accuracy {accuracy}",
            )
            return
        seen, total = figures["examples_seen"], figures["examples"]
        self.line(
            f"epoch {figures['epoch']}  {seen:,} of {total:,} ({seen / total:.0%})  "
            f"loss {loss}  cumulative accuracy {accuracy}"
        )

    def epoch(self, figures: Mapping) -> None:
        """Print the figures of an epoch that ended."""
        tested = (
            ""
            if figures["test_accuracy"] is None
            else f"  test loss {_shown(figures['test_loss'])} accuracy {figures['test_accuracy']:.4f}"
        )
        bad = f"  {figures['nonfinite_steps']:,} steps not finite" if figures["nonfinite_steps"] else ""
        self.line(
            f"epoch {figures['epoch']}/{self.epochs} done in {figures['seconds']:.2f} s  "
            f"train loss {_shown(figures['train_loss'])} accuracy {_shown(figures['train_accuracy'])}{tested}{bad}"
        )

    def result(self, text: str) -> None:
        """Print `text`, quiet or not."""
        self.console.print(text, markup=False)

    def last_line(self, summary: Mapping, path: Path) -> None:
        """Print the outcome, quiet or not: test accuracy (without a test split, the training one), time, place."""
        split = "train" if summary["test_accuracy"] is None else "test"
        accuracy = _shown(summary[f"{split}_accuracy"])
        compiling = f" and {summary['compile_seconds']:.1f} s compiling" if summary["compile_seconds"] else ""
        self.result(
            f"{summary['recipe']}: {split} accuracy {accuracy} after {summary['steps']:,} steps, "
            f"{summary['seconds']:.1f} s{compiling}; {path}"
        )


def _shown(figure: float | None) -> str:
    """Return a figure of four decimals, or digits if it is large; `none` for that of no step, all being left out."""
    if figure is None:
        return "none"
    return f"{figure:.4f}" if abs(figure) < LARGE else f"{figure:.4g}"

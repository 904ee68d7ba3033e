"""What a benchmark times: programs that train one recipe, each in a process of its own, one at work at a time.

A process of its own gives each program its own threads, memory and compiler, so none is slowed by what another left.
The driver writes one request a line, a JSON object that names a method and its arguments, to the worker's standard
input, and reads one answer a line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from spec.errors import UserError
from spec.recipe import Recipe


class Program(Protocol):
    """A program that trains a recipe."""

    def first_losses(self, steps: int) -> list[float]:
        """Return the mean losses of the first `steps` steps of a run of its own, without dropout, from the specified
        initial state in the specified order (S2, S3): what shows that two programs do the same work."""

    def train(self, steps: int) -> None:
        """Train `steps` more steps, over the epochs' ends too, and wait until they are done."""


def serve(make: Callable[[], Program]) -> None:
    """Answer the driver's requests with the program that `make` returns, until there are no more.

    Whatever a library prints goes to standard error: standard output is the answers'.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    start = time.perf_counter()
    program = make()
    _answer(answers, seconds=time.perf_counter() - start)
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        given = getattr(program, request["do"])(*request["arguments"])
        seconds = time.perf_counter() - start
        _answer(answers, given=given, seconds=seconds, peak_bytes=peak_bytes())


def peak_bytes() -> int:
    """Return the most memory that this process has held.

    Linux counts it for the process alone; the other count starts from that of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())
        return int(peak) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def usable_cores() -> int:
    """Return how many of the machine's CPU cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _answer(answers: IO[str], **figures: Any) -> None:
    answers.write(json.dumps(figures) + "\n")
    answers.flush()


class Worker:
    """The driver's end of a worker's process."""

    def __init__(self, name: str, process: subprocess.Popen, said: Path) -> None:
        self.name = name
        self._process = process
        self._said = said
        self.ready_seconds = self._read()["seconds"]
        self.peak_bytes = 0

    def first_losses(self, steps: int, *, run: int = 0) -> list[float]:
        """Return the program's `first_losses`, of another than the first `run` if it has several."""
        return self.ask("first_losses", steps, *([run] if run else []))

    def seconds(self, steps: int) -> float:
        """Train `steps` steps; return the seconds that took, measured in the worker."""
        return self._request("train", steps)["seconds"]

    def ask(self, do: str, *arguments: int) -> Any:
        """Return what the program's method `do` returns."""
        return self._request(do, *arguments)["given"]

    def _request(self, do: str, *arguments: int) -> dict:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
        answer = self._read()
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])
        return answer

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        return json.loads(line)

    def _failure(self) -> UserError:
        """Return why the worker ended: a mistake of the user's (status 2) in the words that it was told in."""
        said, status = self._said.read_text(errors="replace").strip(), self._process.wait()
        if status == 2 and (told := re.search(r"^error: (.*)", said, re.MULTILINE | re.DOTALL)):
            return UserError(told[1])
        return UserError(f"{self.name} ended with status {status}; it said: {last_words(said)}")


def last_words(said: str) -> str:
    """Return the line of a program's words that says best why it ended: the last traceback's exception, or else the
    last line.

    >>> last_words("Traceback (most recent call last):\\n  File ...\\nValueError: no room\\nfor this:\\nclass A:")
    'ValueError: no room'
    """
    _, traceback, after = said.rpartition("Traceback (most recent call last):\n")
    lines = [line for line in after.splitlines() if line.strip()]
    # Frames are indented; an exception's own words may go on over many lines, and a library may speak after it.
    stated = next((line for line in lines if traceback and not line[0].isspace()), None)
    return stated or (lines[-1] if lines else "nothing")


@contextlib.contextmanager
def worker(name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[Worker]:
    """Run the body with a worker started by `command`; it ends with the body. UserError when it does not get ready.

    What `environment` names is set for it, unless this process has it set.
    """
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "said").open("w") as said:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            bufsize=1,
            env={**(environment or {}), **os.environ},
        )
        try:
            yield Worker(name, process, Path(folder) / "said")
        finally:
            process.kill()
            process.communicate()


def without_dropout(recipe: Recipe) -> Recipe:
    """Return the recipe with dropout of rate 0: masks are not the same in two frameworks."""
    rate = 0.0 if recipe.model.name == "cnn" else None
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dropout=rate))

"""Plants one mutant at a time into a copy of the repository, runs its tests there, and says how that ended."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Literal, TypeVar

from spec.errors import UserError
from spec_tests.mutants.catalogue import Mutant

PACKAGES = ("spec", "jax_impl", "torch_ref", "spec_tests")
LIMIT_SECONDS = 900  # a test run that takes longer hangs

# A test that ends so has found no wrong figure: the mutant does not run.
CRASHES = ("ImportError", "ModuleNotFoundError", "NameError", "SyntaxError", "AttributeError", "UnboundLocalError")

Result = Literal["killed", "survived", "crashed"]
Task = TypeVar("Task", Mutant, "Selection")


class MutantError(UserError):
    """A mutant, or what it is to be planted into, is not as the catalogue says."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The tests to run: files, relative to the repository, and pytest's `-k` expression if not all of them."""

    files: tuple[str, ...]
    only: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run of tests ended: the test that failed first and what it said, and the seconds it took.

    `crashed` means that no test failed in its own body: the tests could not be collected, started or found.
    """

    result: Result
    killer: str
    message: str
    seconds: float


def mutated(mutant: Mutant, root: Path) -> str:
    """Return the text of the mutant's file with the fault in it; MutantError unless the old text occurs once."""
    text = (root / mutant.path).read_text("utf-8")
    if (times := text.count(mutant.old)) != 1:
        raise MutantError(
            f"mutant {mutant.name}: its old text occurs {times} times in {mutant.path}, and must occur once; "
            "bring spec_tests/mutants/catalogue.py up to date"
        )
    return text.replace(mutant.old, mutant.new)


@contextmanager
def planted(mutant: Mutant, root: Path) -> Iterator[None]:
    """Run the body with the fault in the file below `root`; the file is as before afterwards."""
    path = root / mutant.path
    before, fault = path.read_bytes(), mutated(mutant, root)
    path.write_text(fault, "utf-8")
    try:
        yield
    finally:
        path.write_bytes(before)


def selection(mutant: Mutant, root: Path) -> Selection:
    """Return the tests of a mutant: those that it names, or the files of its clause."""
    number = int(mutant.clause.removeprefix("S"))
    files = mutant.tests or [
        f"spec_tests/{path.name}" for path in (root / "spec_tests").glob(f"test_s{number:02}_*.py")
    ]
    if not files or not all((root / file).is_file() for file in files):
        raise MutantError(f"mutant {mutant.name}: its tests {list(files)} are not there; name files that are")
    return Selection(files=tuple(sorted(files)), only=mutant.only)


@contextmanager
def copy_of(root: Path) -> Iterator[Path]:
    """Run the body with a copy of the packages; MutantError unless Python imports them from there."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder).resolve() / "repository"
        copy.mkdir()
        there = [name for name in PACKAGES if (root / name).is_dir()]
        for name in there:
            shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(root / "pyproject.toml", copy)
        _check_imports(copy, there)
        yield copy


def run_tests(selected: Selection, copy: Path) -> Outcome:
    """Run the tests in a Python of their own, up to the first that fails."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
        command += ["--hypothesis-seed", "0", "--junitxml", str(report)]
        command += ["-o", "junit_family=xunit1"]  # the one that takes what tests have counted without a warning
        command += [*selected.files, *(["-k", selected.only] if selected.only else [])]
        environment = _environment(copy) | {"HYPOTHESIS_STORAGE_DIRECTORY": folder}
        try:
            ended = subprocess.run(
                command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS
            )
            status, said = ended.returncode, _last_line(ended.stdout + ended.stderr)
        except subprocess.TimeoutExpired:
            status, said = -1, f"no answer after {LIMIT_SECONDS} s"
        failed = _first_failure(report)
    return _outcome(status, said, failed, time.perf_counter() - start)


def run_baseline(
    mutants: Sequence[Mutant], root: Path, jobs: int, tell: Callable[[Selection, Outcome], None]
) -> dict[Selection, Outcome]:
    """Run all tests that the mutants need on the unmutated copy, a file at a time."""
    wanted: dict[str, set[str]] = defaultdict(set)
    for mutant in mutants:
        selected = selection(mutant, root)
        for file in selected.files:
            wanted[file].add(selected.only)
    selections = [
        Selection(files=(file,), only="" if "" in names else " or ".join(f"({name})" for name in sorted(names)))
        for file, names in sorted(wanted.items())
    ]
    return _on_copies(run_tests, selections, root, jobs, tell)


def run_mutants(
    mutants: Sequence[Mutant], root: Path, jobs: int, tell: Callable[[Mutant, Outcome], None]
) -> dict[Mutant, Outcome]:
    """Run each mutant's tests with the mutant planted, `jobs` at a time, each in a copy of its own."""
    selected = {mutant: selection(mutant, root) for mutant in mutants}

    def run_one(mutant: Mutant, copy: Path) -> Outcome:
        with planted(mutant, copy):
            return run_tests(selected[mutant], copy)

    return _on_copies(run_one, mutants, root, jobs, tell)


def _on_copies(
    run: Callable[[Task, Path], Outcome],
    tasks: Iterable[Task],
    root: Path,
    jobs: int,
    tell: Callable[[Task, Outcome], None],
) -> dict[Task, Outcome]:
    """Return the outcome of `run(task, copy)` for each task; `tell` hears of each as it ends."""
    copies: SimpleQueue[Path] = SimpleQueue()
    outcomes: dict[Task, Outcome] = {}

    def run_in_a_copy(task: Task) -> Outcome:
        copy = copies.get()
        try:
            return run(task, copy)
        finally:
            copies.put(copy)

    with ExitStack() as stack:
        for _ in range(jobs):
            copies.put(stack.enter_context(copy_of(root)))
        pool = stack.enter_context(ThreadPoolExecutor(jobs))
        stack.callback(pool.shutdown, cancel_futures=True)
        waiting = {pool.submit(run_in_a_copy, task): task for task in tasks}
        for future in as_completed(waiting):
            outcomes[waiting[future]] = future.result()
            tell(waiting[future], future.result())
    return {task: outcomes[task] for task in waiting.values()}


def _environment(copy: Path) -> dict[str, str]:
    """Return the environment of a test run: the copy first on the import path, one thread, no bytecode left behind."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return kept | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def _check_imports(copy: Path, packages: Sequence[str]) -> None:
    script = "import importlib, sys; [print(importlib.import_module(name).__file__) for name in sys.argv[1:]]"
    command = [sys.executable, "-c", script, *packages]
    ended = subprocess.run(command, cwd=copy, env=_environment(copy), capture_output=True, text=True)
    found = ended.stdout.split("\n")[:-1]
    if ended.returncode or not all(Path(file).is_relative_to(copy) for file in found):
        raise MutantError(f"Python imports {found or ended.stderr}, not the copy in {copy}; nothing can be planted")


def _first_failure(report: Path) -> tuple[str, str] | None:
    """Return the first test that failed in its own body, `file.py::test`, and the first line of what it said."""
    if not report.exists():
        return None
    for case in ElementTree.parse(report).iter("testcase"):
        failure = case.find("failure")
        if failure is not None:
            file = case.get("classname", "").split(".")[-1]
            said = failure.get("message", "").splitlines() or [""]
            return f"{file}.py::{case.get('name')}", said[0]
    return None


def _outcome(status: int, said: str, failed: tuple[str, str] | None, seconds: float) -> Outcome:
    if status == 0:
        return Outcome(result="survived", killer="", message="", seconds=seconds)
    if status == 1 and failed and failed[1].split(":")[0] not in CRASHES:
        return Outcome(result="killed", killer=failed[0], message=failed[1], seconds=seconds)
    message = f"{failed[0]}: {failed[1]}" if failed else f"exit status {status}: {said}"
    return Outcome(result="crashed", killer="", message=message, seconds=seconds)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""

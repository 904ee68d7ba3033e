"""A program that is told to stop while it imports says so, and nothing else."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in ("spec", "jax_impl", "torch_ref", "spec_tests")
    for path in sorted((ROOT / package).rglob("*.py"))
    if not path.name.startswith("test_")
    and re.search(r'^if __name__ == "__main__":', path.read_text("utf-8"), re.MULTILINE)
}
FIRST = r"""from __future__ import annotations

if __name__ == "__main__":.*
    from spec.errors import run_program

    run_program\((__spec__.name|"[a-z_.]+")\)

"""


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_imports_nothing_before_it_can_be_interrupted(program):
    before, *_, after = re.split(FIRST, PROGRAMS[program].read_text("utf-8"))
    assert "import" not in re.sub(r'""".*?"""', "", before, flags=re.DOTALL)
    assert "__main__" not in after


# Python names each module that it has imported: one of the program's own imports, and some of the frameworks'.
@pytest.mark.parametrize(
    ("program", "imported"),
    [
        ("jax_impl.bench", "pydantic_core"),
        ("jax_impl.bench", "numpy._core.multiarray"),
        ("jax_impl.train", "pydantic_core"),
        ("jax_impl.train", "numpy._core.multiarray"),
        ("jax_impl.train", "jax._src.config"),
        ("torch_ref.train", "torch._jit_internal"),
    ],
)
@pytest.mark.parametrize(
    ("number", "status", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        pytest.param(signal.SIGTERM, 143, "terminated", marks=pytest.mark.slow(1)),
    ],
)
def test_a_signal_during_an_import_ends_the_program_with_one_word(program, imported, number, status, word, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", program, "--recipe", "digits"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) as process:
        seen = any(re.search(rf"\| +{re.escape(imported)}$", line) for line in process.stderr)
        process.send_signal(number)
        said = [line for line in process.stderr.read().splitlines() if not line.startswith("import time:")]
    assert seen
    assert (process.returncode, said) == (status, [word])


@pytest.mark.parametrize("arguments", [["--recipe", "digits", "--epochs", "3"], ["--list"]], ids=["training", "list"])
def test_a_reader_that_goes_away_ends_a_program_with_141_and_no_traceback(arguments, tmp_path):
    out = ["--out", str(tmp_path / "run")] if "--list" not in arguments else []
    command = [sys.executable, "-m", "torch_ref.train", *arguments, *out]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, "")

"""`python -m torch_ref.evaluate RUN`: evaluate a finished run, of either framework."""

from __future__ import annotations

if __name__ == "__main__":
    from spec.errors import run_program

    run_program(__spec__.name)

import sys
from collections.abc import Sequence

from spec.errors import require
from spec.inference import evaluation


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; torch is imported only once the flags and the run are known to be right."""
    flags, run = evaluation.parse(
        sys.argv[1:] if arguments is None else arguments,
        program="python -m torch_ref.evaluate",
        description="Evaluate a finished run, of either framework, with torch.",
    )
    require("torch", extra="torch")
    from torch_ref.inference import evaluate
    from torch_ref.trainer import IMPLEMENTATION

    evaluation.run(flags, run, IMPLEMENTATION, evaluate)

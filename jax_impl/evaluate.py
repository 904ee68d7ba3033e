"""`python -m jax_impl.evaluate RUN`: evaluate a finished run, of either framework."""

from __future__ import annotations

if __name__ == "__main__":
    from spec.errors import run_program

    run_program(__spec__.name)

import os
import sys
from collections.abc import Sequence

from spec.inference import evaluation


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; JAX is imported only once the flags and the run are known to be right."""
    flags, run = evaluation.parse(
        sys.argv[1:] if arguments is None else arguments,
        program="python -m jax_impl.evaluate",
        description="Evaluate a finished run, of either framework, with JAX.",
    )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as jax_impl.train says
    from jax_impl.inference import evaluate
    from jax_impl.trainer import IMPLEMENTATION

    evaluation.run(flags, run, IMPLEMENTATION, evaluate)

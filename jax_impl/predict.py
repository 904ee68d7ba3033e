"""`python -m jax_impl.predict RUN image.png ...`: what a finished run makes of pictures."""

from __future__ import annotations

if __name__ == "__main__":
    from spec.errors import run_program

    run_program(__spec__.name)

import os
import sys
from collections.abc import Sequence

from spec.inference import prediction


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; JAX is imported only once the flags, the run and the pictures are known to be right."""
    flags = prediction.parse(
        sys.argv[1:] if arguments is None else arguments,
        program="python -m jax_impl.predict",
        description="Show pictures to a finished run, of either framework.",
    )
    request = prediction.read(flags)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as jax_impl.train says
    from jax_impl.inference import logits
    from jax_impl.trainer import IMPLEMENTATION

    device = IMPLEMENTATION.select_device(flags.platform)
    with IMPLEMENTATION.memory_explained():
        found = logits(request.recipe, request.inputs, len(request.class_names), request.state, device)
    prediction.report(request, found, flags)

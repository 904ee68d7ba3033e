"""`python -m jax_impl.train`: train a recipe's network and write its run directory."""

from __future__ import annotations

if __name__ == "__main__":
    from spec.errors import run_program

    run_program(__spec__.name)

import os
import sys
from collections.abc import Sequence

from spec import command_line, processes, summary, sweep
from spec.sweep import ManyFlags


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; JAX is imported only once the flags are known to be right."""
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = command_line.parse(
        arguments,
        program="python -m jax_impl.train",
        description="Train a recipe's network with JAX, Flax and optax.",
        kind=ManyFlags,
    )
    sweep.check_given(arguments, flags)
    processes.check(flags)
    if flags.list:
        command_line.print_recipes()
    elif flags.print_config:
        command_line.print_recipe(flags.config)
    elif flags.summary:
        summary.show(flags)
    else:
        # XLA calls two tuning preferences of its own compiler missing processor features whenever it loads a kept
        # program, in an error a kernel (https://github.com/jax-ml/jax/issues/38445); what is serious is raised.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        if flags.distributed:
            from jax_impl.processes import run

            run(flags)
        elif flags.seeds is not None or flags.sweep:
            from jax_impl.many import run

            run(flags)
        else:
            from jax_impl.trainer import IMPLEMENTATION
            from spec.run.program import run

            run(flags, IMPLEMENTATION)

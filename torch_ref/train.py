"""`python -m torch_ref.train`: train a recipe's network in torch and write the same run directory."""

from __future__ import annotations

if __name__ == "__main__":
    from spec.errors import run_program

    run_program(__spec__.name)

import sys
from collections.abc import Sequence

from spec import command_line, summary
from spec.errors import require


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; torch is imported only once the flags are known to be right."""
    flags = command_line.parse(
        sys.argv[1:] if arguments is None else arguments,
        program="python -m torch_ref.train",
        description="Train a recipe's network with torch: the reference.",
    )
    if flags.list:
        command_line.print_recipes()
    elif flags.print_config:
        command_line.print_recipe(flags.config)
    elif flags.summary:
        summary.show(flags)
    else:
        require("torch", extra="torch")
        from spec.run.program import run
        from torch_ref.trainer import IMPLEMENTATION

        run(flags, IMPLEMENTATION)

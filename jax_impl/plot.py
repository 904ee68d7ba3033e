"""`python -m jax_impl.plot RUN [RUN ...]`: learning curves, and what the networks of finished runs make of the data."""

from __future__ import annotations

if __name__ == "__main__":
    from spec.errors import run_program

    run_program(__spec__.name)

import os
import sys
from collections.abc import Sequence

from spec.inference.prediction import preprocessed
from spec.plots import command
from spec.plots.command import Album, Flags
from spec.run.metrics import Recorded


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; JAX is imported only once the flags and the runs are known to be right."""
    flags, recorded = command.parse(
        sys.argv[1:] if arguments is None else arguments,
        program="python -m jax_impl.plot",
        description="Draw runs, of either framework: learning curves, confusion, mistakes, weights.",
    )
    album = Album(flags)
    command.draw_curves(album, recorded)
    for of in recorded:
        if why := command.unfinished(of):
            print(why)
        else:
            _draw(of, album, flags)
    album.close()


def _draw(of: Recorded, album: Album, flags: Flags) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as jax_impl.train says
    from jax_impl.inference import logits
    from jax_impl.trainer import IMPLEMENTATION

    placement = IMPLEMENTATION.select_device(flags.platform)
    loaded = IMPLEMENTATION.load(of.recipe.data, data_dir=flags.data_dir, data_source=flags.data_source)
    about, state = command.asked(of, loaded, flags.split), command.finished(of, loaded)
    inputs = preprocessed(about.examples.inputs, of.recipe, loaded)
    with IMPLEMENTATION.memory_explained():
        found = logits(of.recipe, inputs, loaded.num_classes, state, placement)
    command.draw_predictions(album, of, about, state, found)

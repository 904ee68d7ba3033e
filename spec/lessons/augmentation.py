"""More training images out of those there are: moved by a few pixels, and mirrored."""

from __future__ import annotations

import itertools

import numpy as np

from spec.datasets import Split


def with_moved(images: Split, *, pixels: int, seed: int) -> Split:
    """Return the images [n, height, width, channels], and after them each once more, drawn anew: 2 n.

    That one is moved by up to so many `pixels` in each direction, every way as likely, zeros coming in at the edge; and
    is mirrored left to right as likely as not. The label stays.
    """
    rng = np.random.default_rng(seed)
    inputs, labels = images
    ways = rng.integers(0, 2 * pixels + 1, (len(inputs), 2))
    mirrored = rng.random(len(inputs)) < 0.5
    turned = np.where(mirrored[:, None, None, None], inputs[:, :, ::-1], inputs)
    edged = np.pad(turned, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    height, width = inputs.shape[1:3]
    moved = np.empty_like(inputs)
    for down, right in itertools.product(range(2 * pixels + 1), repeat=2):
        these = (ways == (down, right)).all(axis=1)
        moved[these] = edged[these, down : down + height, right : right + width]
    return Split(np.concatenate([inputs, moved]), np.concatenate([labels, labels]))

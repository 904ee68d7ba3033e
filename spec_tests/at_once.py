"""What a test runs in processes that start at once; it imports no framework, so that they start soon."""

from __future__ import annotations

from threading import Barrier

from spec.datasets import sources
from spec.datasets.catalog import IdxSet


def ensure(idx_set: IdxSet, together: Barrier) -> None:
    """Fill the cache, once all processes are there to do it."""
    together.wait()
    sources.ensure(idx_set)

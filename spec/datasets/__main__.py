"""`python -m spec.datasets fetch|verify NAME`: fill the cache, or check every file in it."""

from __future__ import annotations

if __name__ == "__main__":
    from spec.errors import run_program

    run_program(__spec__.name)

import argparse
from pathlib import Path

from spec.datasets import cache, sources
from spec.datasets.catalog import IDX_SETS
from spec.errors import DataError


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m spec.datasets", description=__doc__, allow_abbrev=False)
    parser.add_argument("action", choices=["fetch", "verify"], help="fill the cache, mending it; or only check it")
    parser.add_argument("name", choices=sorted(IDX_SETS), help="the data set")
    parser.add_argument("--data-dir", type=Path, help="fetch from a directory that holds the idx files")
    arguments = parser.parse_args()
    if arguments.action == "verify":
        verify(arguments.name)
    else:
        print(f"{arguments.name} is in {sources.fetch(arguments.name, data_dir=arguments.data_dir)}, verified")


def verify(name: str) -> None:
    """Print the state of each cached file of the set; DataError when one is missing or damaged."""
    idx_set = IDX_SETS[name]
    found = cache.damage(idx_set)
    for file in idx_set.files:
        print(f"bad   {found[file.name]}" if file.name in found else f"good  {file.name}  sha256 {file.sha256}")
    if found:
        raise DataError(f"{len(found)} of {len(idx_set.files)} files are bad; {cache.mend(idx_set)}")

"""Several seeds at once (`jax_impl.many`), as the notebooks train them; and a claim, measured here and now."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import jax_impl.train
from spec_tests.accuracy.claims import CLAIMS, EXPERIMENTS, Claim, claims_table
from spec_tests.accuracy.results import EXPERIMENTS as KEPT
from spec_tests.accuracy.results import Results, add
from spec_tests.accuracy.runs import read


def trained(flags: Sequence[str], folder: Path | str) -> Path:
    """Train with flags of `jax_impl.train` into `folder`, in place of what an earlier call left there; return it."""
    shutil.rmtree(folder, ignore_errors=True)
    jax_impl.train.main([*flags, "--quiet", "--out", str(folder)])
    return Path(folder)


def answered(words: str, folder: Path, *, seeds: int, trains: bool = True) -> str:
    """Return the table of the claim of those `words`, as Markdown, after training what it needs and is not in `folder`.

    Without `trains` it says of what is not there that it is not measured. Raises KeyError for words no lesson says.
    """
    claim = {one.words: one for one in CLAIMS}[words]
    if trains:
        _train(claim, folder, seeds)
    return claims_table(results_of({key: folder / key for key in claim.needs}), {}, claims=[claim])


def results_of(folders: dict[str, Path]) -> Results:
    """Return the figures of the seeds in each folder that is there, by the key that they go under."""
    results: Results = {}
    for key, folder in folders.items():
        for summary in sorted(folder.glob("seed-*/summary.json")):
            add(results, key, read(summary.parent, one_thread=False), KEPT)
    return results


def _train(claim: Claim, folder: Path, seeds: int) -> None:
    for key in claim.needs:
        if not (folder / key / "summary.json").exists():
            flags = EXPERIMENTS.get(key, f"--recipe {key}").split()
            trained([*flags, "--seeds", str(seeds)], folder / key)

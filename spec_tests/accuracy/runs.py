"""One run: a process of its own, as a user starts it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from spec import params, recipe
from spec.bench_worker import usable_cores
from spec.datasets.sizes import known_size
from spec.errors import UserError
from spec.recipe import Recipe
from spec_tests.accuracy.results import Run, settings_of

MODULES = {"jax": "jax_impl.train", "torch": "torch_ref.train"}


def train(run: Run, *, data_dir: Path | None, one_thread: bool) -> dict:
    """Run the process; return its summary with `settings`, `machine` and, for data of known size, `weight_change`.

    Raises UserError when it fails, with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", MODULES[run.framework], "--quiet", *run.flags]
        command += ["--seed", str(run.seed), "--out", str(out)]
        command += ["--data-dir", str(data_dir)] if data_dir else []
        threads = {"OMP_NUM_THREADS": "1"} if one_thread else {}
        ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
        if ended.returncode:
            raise UserError(f"{' '.join(command)} exited {ended.returncode}: {ended.stderr.strip()}")
        return read(out, one_thread=one_thread)


def read(out: Path, *, one_thread: bool) -> dict:
    """Return the summary of a run directory, with what `results.add` needs besides."""
    summary = json.loads((out / "summary.json").read_text())
    ran = recipe.load(str(out))
    device = f"{summary['devices'][0]}{', 1 thread' if one_thread else ''}"
    return summary | {
        "settings": settings_of(ran),
        "machine": f"{usable_cores()} cores, {platform.machine()}, {device}",
        "weight_change": _weight_change(ran, load_file(out / "weights.safetensors")),
    }


def _weight_change(ran: Recipe, weights: dict[str, np.ndarray]) -> float | None:
    """Return |w - w0| / |w0| over all trained leaves; w0 is the initial state."""
    size = known_size(ran.data)
    if size is None:
        return None
    leaves = params.leaves(ran.model, size.input_shape, params.num_outputs(ran, size.num_classes))
    initial = params.initial_state(leaves, ran.init, ran.seed)
    trained = [leaf.name for leaf in leaves if leaf.trained]
    before = np.concatenate([initial[name].ravel() for name in trained]).astype(np.float64)
    after = np.concatenate([weights[name].ravel() for name in trained])
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))

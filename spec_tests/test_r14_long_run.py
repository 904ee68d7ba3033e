"""R14: 100,000 steps: memory does not grow, and nothing is compiled but the two programs of a run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from spec_tests.processes import Started, started

STEPS_PER_EPOCH = 360  # of digits by batches of 4
STEPS = 100_000
GROWTH = 0.05


def compilations_are_said() -> None:
    """Have every program that XLA compiles said on standard error."""
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: print("compiled", file=sys.stderr) if event.endswith("compile_duration") else None
    )


def resident(trainer: Started) -> int:
    """Return the bytes of memory that it has now."""
    status = Path(f"/proc/{trainer.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory of a process is read from /proc")
def test_a_long_run_needs_no_more_memory_than_a_short_one_and_compiles_twice(tmp_path, counted):
    epochs = -(-STEPS // STEPS_PER_EPOCH) + 1
    flags = f"--recipe digits --batch-size 4 --epochs {epochs} --out {tmp_path / 'run'}".split()
    with started(tmp_path, "jax", flags, cache=tmp_path / "cache", prepare=compilations_are_said) as trainer:
        resident_after = {}
        for epoch in (max(epochs // 10, 1), epochs - 1):
            sign = f"epoch {epoch}/{epochs} done"
            trainer.wait_for(lambda sign=sign: sign in trainer.out.read_text(), seconds=15 * 60)
            resident_after[epoch] = resident(trainer)
        assert trainer.ended() == 0, trainer.err.read_text()
    assert trainer.err.read_text().splitlines() == ["compiled"] * 2
    early, late = resident_after.values()
    assert late < (1 + GROWTH) * early, resident_after
    counted("R14 steps of one run", (epochs - 1) * STEPS_PER_EPOCH)

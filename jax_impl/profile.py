"""What a compiled program spends its time on, operation by operation, by JAX's own profiler."""

from __future__ import annotations

import collections
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax


def operation_seconds(work: Callable[[], object]) -> tuple[float, dict[str, float]]:
    """Return the seconds that `work` ran, and those of each kind of compiled operation meanwhile, the longest first.

    An operation counts without those that ran inside it: a loop is what it adds to its body. Kinds are the compiler's
    names without their numbers (`dot`, `copy_fusion`). An accelerator's own clock counts where there is one, for the
    host then only launches. Operations that ran at once, on several threads, all count: together they may be more than
    the seconds that `work` ran. `work` must wait for the device.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            work()
            whole = time.perf_counter() - start
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    seconds: collections.Counter[str] = collections.Counter()
    for plane in devices or planes:
        for line in plane.lines:
            named = [(event, dict(event.stats).get("hlo_op")) for event in line.events]
            seconds.update(
                own_seconds((event.start_ns, event.duration_ns, kind(name)) for event, name in named if name)
            )
    return whole, dict(seconds.most_common())


def own_seconds(spans: Iterable[tuple[float, float, str]]) -> dict[str, float]:
    """Return what each name of (start, duration, name), in nanoseconds, took itself, without the spans inside it."""
    own: collections.Counter[str] = collections.Counter()
    open_spans: list[tuple[float, str]] = []
    for start, duration, name in sorted(spans, key=lambda span: (span[0], -span[1])):
        while open_spans and open_spans[-1][0] <= start:
            open_spans.pop()
        if open_spans:
            own[open_spans[-1][1]] -= duration / 1e9
        own[name] += duration / 1e9
        open_spans.append((start + duration, name))
    return dict(own)


def kind(operation: str) -> str:
    """Return an operation's name without its number.

    >>> kind("copy_fusion.12.clone")
    'copy_fusion'
    """
    return re.sub(r"(\.\d+|\.clone|_\d+)+$", "", operation)

"""Every step of a run on one device, made on several devices too, from the same state (S9.3, S11.3).

`python -m spec_tests.parallel_steps OUT RECIPE.json STEPS MODE:DEVICES ...` writes into OUT, a .json file, what
`Forcing` reports of each place. It makes eight devices of the CPU.
"""

from __future__ import annotations

if __name__ == "__main__":
    from spec.errors import run_program

    run_program(__spec__.name)

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from spec import recipe
from spec.recipe import Recipe
from spec_tests.lockstep.report import Forced
from spec_tests.parallel_runs import DEVICES, few, run_module


def forced_steps(folder: Path, of: Recipe, steps: int, places: Sequence[str]) -> dict[str, Forced]:
    """Train `of` on one device; report how each of so many steps compares at the `places`, `MODE:DEVICES`."""
    out = run_module("parallel_steps", folder / "steps.json", of, steps, *places)
    return {place: Forced(**report) for place, report in json.loads(out.read_text()).items()}


def main() -> None:
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)
    from jax_impl.parallel import place
    from spec_tests.adapters import DevicesAdapter, JaxAdapter
    from spec_tests.lockstep.runs import Forcing, Pair

    out, given, steps, *places = sys.argv[1:]
    of = recipe.parse(json.loads(Path(given).read_text())["recipe"], source=given)
    pair = Pair.of(of, few(of, int(steps)))
    leader = JaxAdapter(pair.network)
    followers = {}
    for name in places:
        mode, devices = name.split(":")
        placement = place("cpu", parallel=mode, devices=int(devices))
        followers[name] = Forcing(pair, DevicesAdapter(pair.network, placement))
    for batch in pair.batches(1):
        images, labels = pair.train.inputs[batch], pair.train.labels[batch]
        before = leader.state(), leader.opt_state()
        decisions = leader.forward(images, train=True).decisions
        leader.step(images, labels)
        for forcing in followers.values():
            forcing.step(images, labels, decisions, *before, after=(leader.state(), leader.opt_state()))
    Path(out).write_text(json.dumps({name: dataclasses.asdict(of.report) for name, of in followers.items()}))

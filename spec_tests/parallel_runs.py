"""Runs of one recipe on one device and on several, in a process of its own that makes eight devices of the CPU.

`python -m spec_tests.parallel_runs OUT RECIPE.json STEPS MODE:DEVICES ...` writes what each run came to into OUT, an
.npz file: `MODE:DEVICES/NAME` for every array; and for every two of them, `FROM>TO`, whether TO has FROM's state to the
bit, once it took over the checkpoint that FROM wrote. The mode `sharded+state` divides the state too.
"""

from __future__ import annotations

if __name__ == "__main__":
    from spec.errors import run_program

    run_program(__spec__.name)

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from spec import datasets, recipe
from spec.datasets import Dataset, Split
from spec.datasets.sizes import size_of
from spec.recipe import Recipe
from spec.run.history import EpochDone, StepsDone
from spec.run.trainer import Trainer

DEVICES = 8
RESTORED = "restored"
TESTED = 37  # examples to evaluate: no number of devices but 1 divides them

Found = dict[str, dict[str, np.ndarray]]


def runs(folder: Path, of: Recipe, steps: int, places: Sequence[str]) -> Found:
    """Train `of` for an epoch of so many steps at each of the `places`, `MODE:DEVICES`; return the arrays of each."""
    found: Found = {place: {} for place in (*places, RESTORED)}
    with np.load(run_module("parallel_runs", folder / "runs.npz", of, steps, *places)) as arrays:
        for name, array in arrays.items():
            place, of_place = name.split("/")
            found[place][of_place] = array
    return found


def run_module(module: str, out: Path, of: Recipe, *arguments: object) -> Path:
    """Run `python -m spec_tests.MODULE OUT RECIPE.json ARGUMENTS` to its end; return `out`, which it wrote."""
    given = out.with_name("recipe.json")
    given.write_text(json.dumps({"recipe": recipe.to_mapping(of)}))
    command = [sys.executable, "-W", "error", "-m", f"spec_tests.{module}", *map(str, (out, given, *arguments))]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return out


def few(of: Recipe, steps: int) -> Dataset:
    """Return as much of the recipe's data as so many steps take, a short last batch among them if it is kept."""
    whole = datasets.load(of.data)
    examples = steps * of.batch_size - of.batch_size // 2 * (of.last_batch == "keep")
    train = Split(*(array[:examples] for array in whole.train))
    return dataclasses.replace(whole, train=train, test=Split(*(array[:TESTED] for array in whole.test)))


def main() -> None:
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)
    from jax_impl import trainer as jax_trainer
    from jax_impl.parallel import place
    from jax_impl.programs import compile_programs

    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    out, given, steps, *places = sys.argv[1:]
    of = recipe.parse(json.loads(Path(given).read_text())["recipe"], source=given)
    dataset, arrays, trainers = few(of, int(steps)), {}, {}
    for name in places:
        mode, devices = name.split(":")
        compiled.clear()
        mode, _, shards = mode.partition("+")
        placement = place("cpu", parallel=mode, devices=int(devices), shard_state=bool(shards))
        programs = compile_programs(of, size_of(dataset), placement)
        trainer = jax_trainer.Trainer(of, dataset, placement, programs=programs)
        events = list(trainer.events())
        trained, tested = ([event for event in events if isinstance(event, kind)] for kind in (StepsDone, EpochDone))
        found = {f"state.{leaf}": array for leaf, array in trainer.state().items()}
        found |= {f"named.{leaf}": array for leaf, array in trainer.named(trainer.snapshot()).items()}
        found["losses"] = np.concatenate([event.losses for event in trained])
        found["num_correct"] = np.concatenate([event.num_correct for event in trained])
        found["test_losses"] = np.concatenate([event.test_losses for event in tested])
        found["test_correct"] = np.concatenate([event.test_correct for event in tested])
        found["compiled"] = np.array(len(compiled))
        found["held"] = np.array(bytes_held(trainer))
        found["gathers"] = np.array(mode == "sharded" and programs.run_steps.as_text().count("all-gather("))
        arrays |= {f"{name}/{array}": value for array, value in found.items()}
        trainers[name] = trainer
    np.savez(out, **arrays, **restored(trainers, Path(out).parent))


def bytes_held(trainer: Trainer) -> int:
    """Return the bytes of the state that the first device holds."""
    import jax

    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(trainer._state))


def restored(trainers: Mapping[str, Trainer], folder: Path) -> dict[str, np.ndarray]:
    """Return for every two trainers whether the second has the first one's state, once it took over its checkpoint."""
    from jax_impl import checkpoint

    same = {}
    snapshots = {name: trainer.snapshot() for name, trainer in trainers.items()}
    for name, snapshot in snapshots.items():
        place = folder / name.replace(":", "-")
        place.mkdir()
        checkpoint.write(snapshot, place)
        for other, trainer in trainers.items():
            trainer.restore(checkpoint.read(place, like=trainer.snapshot()))
            same[f"{RESTORED}/{name}>{other}"] = np.array(_bits(trainer.snapshot()) == _bits(snapshot))
    return same


def _bits(snapshot: object) -> list[tuple]:
    import jax

    return [(leaf.dtype, leaf.shape, leaf.tobytes()) for leaf in jax.tree.leaves(snapshot)]

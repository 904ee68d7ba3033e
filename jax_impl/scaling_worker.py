"""What `jax_impl.scaling` measures, each in processes of their own that have a core each."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from spec import datasets
from spec import recipe as recipes
from spec.bench_worker import usable_cores
from spec.datasets.sizes import size_of
from spec.errors import UserError

TURNS = 7
STEPS = {"mlp": 200, "cnn": 4}  # of a turn
SHARES = (1, 2, 4, 8)  # of the batch
SIZES = (4_096, 65_536, 262_144, 1_048_576, 4_194_304)  # bytes: what gradients have
REPEATS = 20  # all-reduces in one program


def machine() -> dict[str, Any]:
    """Return what all is measured on. Raises UserError where two processes cannot have a core each."""
    if usable_cores() < 2:
        raise UserError("two processes need a core each, and there is one; use --latency and --bandwidth instead")
    return {"platform": platform.platform(), "cores": usable_cores(), "turns": TURNS}


def program(name: str, devices: int) -> dict[str, Any]:
    """Return what the compiler says of a recipe's steps on several devices, without a short last batch: its `text`, and
    the bytes of one device for the state, whole and divided, the data set and the scratch memory."""
    return _alone(_program, name, devices)


def step_seconds(name: str) -> dict[int, float]:
    """Return the seconds of a step on one core, by the size of the batch."""
    return _alone(_step_seconds, name)


def two_processes(name: str) -> dict[str, float]:
    """Return the seconds of a step of `one` process, and of `two`, with a core each."""
    return {"one": _alone(_run_seconds, name), "two": _together(_run_seconds, name)}


def all_reduce_seconds() -> dict[int, float]:
    """Return the seconds of an all-reduce between two processes, by its bytes."""
    return _together(_all_reduce_seconds)


def _alone(function: Callable, *arguments: Any) -> Any:
    with _process(0) as process:
        return process.submit(function, *arguments).result()


def _together(function: Callable, *arguments: Any) -> Any:
    """Return what the first of two processes that are joined gives."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with _process(0) as first, _process(1) as second:
        calls = [
            process.submit(_joined, function, *arguments, port, rank) for rank, process in enumerate((first, second))
        ]
        found, _ = (call.result() for call in calls)
        return found


def _joined(function: Callable, *arguments: Any) -> Any:
    """Join the processes, do the work, and part."""
    import jax

    from jax_impl.distributed import join

    *given, port, rank = arguments
    join(coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=rank, connect=60, heartbeat=100)
    try:
        return function(*given)
    finally:
        jax.distributed.shutdown()


def _process(core: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_pin, initargs=(core,))


def _pin(core: int) -> None:
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


def _recipe(name: str, **changes: Any) -> recipes.Recipe:
    return dataclasses.replace(recipes.load(name), last_batch="drop", expected=None, **changes)


def _program(name: str, devices: int) -> dict[str, Any]:
    import jax

    from jax_impl.parallel import place
    from jax_impl.programs import compile_programs
    from jax_impl.stepper import put

    recipe = _recipe(name)
    dataset = datasets.load(recipe.data)

    def compiled(**how: Any) -> Any:
        return compile_programs(recipe, size_of(dataset), place("cpu", parallel="sharded", devices=devices, **how))

    def held(tree: Any) -> int:
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    programs = compiled()
    return {
        "text": programs.run_steps.as_text(),
        "scratch_bytes": programs.run_steps.memory_analysis().temp_size_in_bytes,
        "state_bytes": held(programs.state),
        "sharded_state_bytes": held(compiled(shard_state=True).state),
        "data_bytes": held(put(dataset, recipe.preprocessing, place("cpu", parallel="sharded", devices=devices))),
    }


def _step_seconds(name: str) -> dict[int, float]:
    from jax_impl.parallel import place
    from jax_impl.stepper import Stepper

    whole = recipes.load(name)
    dataset, here, steps = datasets.load(whole.data), place("cpu"), STEPS[whole.model.name]
    sizes = [whole.batch_size // share for share in SHARES]
    steppers = {size: Stepper(_recipe(name, batch_size=size), dataset, here) for size in sizes}
    turns = [{size: _seconds(stepper, steps) for size, stepper in steppers.items()} for _ in range(TURNS + 1)]
    return {size: statistics.median(turn[size] for turn in turns[1:]) for size in sizes}


def _run_seconds(name: str) -> float:
    from jax_impl.parallel import place
    from jax_impl.stepper import Stepper

    recipe = _recipe(name)
    stepper = Stepper(recipe, datasets.load(recipe.data), place("cpu"))
    turns = [_seconds(stepper, STEPS[recipe.model.name]) for _ in range(TURNS + 1)]
    return statistics.median(turns[1:])


def _all_reduce_seconds() -> dict[int, float]:
    import numpy as np

    from jax_impl.parallel import place

    placement, found = place("cpu"), {}
    for size in SIZES:
        array = placement.put(np.ones((len(placement.devices), size // 4), np.float32))
        summed = placement.compiled(_summing(placement.part(len(array))), array)
        times = [_seconds_of(lambda array=array, summed=summed: summed(array)) for _ in range(TURNS + 1)]
        found[size] = statistics.median(times[1:]) / REPEATS
    return found


def _summing(part: Any) -> Callable:
    """Return what sums rows [n, ...], of which each device has one, over the devices, again and again."""
    import jax.numpy as jnp
    from jax import lax

    def summed(rows: Any) -> Any:
        def again(_: int, total: Any) -> Any:
            return part.rows(rows * (1 + total)).sum(axis=0) / 3

        return lax.fori_loop(0, REPEATS, again, jnp.zeros_like(rows[0]))

    return summed


def _seconds(stepper: Any, steps: int) -> float:
    return _seconds_of(lambda: stepper.train(steps)) / steps


def _seconds_of(work: Callable[[], Any]) -> float:
    import jax

    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start

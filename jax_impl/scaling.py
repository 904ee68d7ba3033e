"""How far a run would scale, by what a step computes and moves and by what this machine's cores and loopback give.

`python -m jax_impl.scaling` measures; docs/scaling.md derives the model and shows the tables.
"""

from __future__ import annotations

if __name__ == "__main__":
    from spec.errors import run_program

    run_program(__spec__.name)

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spec import command_line, files, params
from spec import recipe as recipes
from spec.batches import count
from spec.datasets.sizes import known_size
from spec.errors import UserError
from spec.flops import training_flops
from spec.markdown import markdown_table
from spec.recipe import Recipe

RESULTS = Path("results") / "scaling.json"
RECIPES = ("mlp128", "mlp512", "cnn")
DEVICES = (1, 2, 4, 8, 16, 32, 64, 128)
COUNTED_ON = 4  # devices that the traffic is read off a program for; it is the same for any number of them
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Measure, and print the tables of docs/scaling.md."""

    latency: float | None = None
    """seconds of one message between two devices; with it nothing is measured, and what is kept gives the rest"""
    bandwidth: float | None = None
    """bytes a second between two devices, beside --latency"""
    speed: float = 1.0
    """how many times as fast as a core of this machine a device computes, beside --latency"""
    keep: bool = False
    """write what was measured to results/scaling.json"""


@dataclass(frozen=True)
class Connection:
    """What joins the devices: seconds of a message, however short, and the bytes a second that follow."""

    latency: float
    bandwidth: float

    def all_reduce(self, size: int, messages: int, devices: int) -> float:
        r"""Return the seconds of `messages` all-reduces of `size` bytes together, as a ring of `devices` makes them.

        $2 (n - 1) \alpha$ each, and $2 \frac{n-1}{n} \frac{V}{\beta}$ for all $V$ bytes (Thakur, Rabenseifner and
        Gropp, DOI 10.1177/1094342005051521).

        >>> Connection(latency=0.5, bandwidth=8.0).all_reduce(16, 1, 2)
        3.0
        """
        return 2 * (devices - 1) * (messages * self.latency + size / devices / self.bandwidth)


@dataclass(frozen=True)
class Compute:
    """What a step takes on one device: seconds whatever the batch, and seconds an example."""

    fixed: float
    example: float

    def step(self, examples: int | float) -> float:
        """Return the seconds of a step of so many examples."""
        return self.fixed + self.example * examples


def main() -> None:
    """Run the command line."""
    flags = command_line.parsed(Flags, sys.argv[1:], prog="python -m jax_impl.scaling", description=Flags.__doc__)
    if (flags.latency is None) != (flags.bandwidth is None):
        raise UserError("--latency and --bandwidth are for each other; give both, or none, to measure them")
    if flags.latency is not None:
        _check_positive(flags)
        assumed = Connection(flags.latency, flags.bandwidth)
        print(extrapolation(load_results(), assumed, speed=flags.speed))
        return
    if flags.keep:
        files.check_target(RESULTS, flag="--keep")
    results = measure()
    print("\n\n".join(table(results) for table in TABLES.values()))
    if flags.keep:
        files.write_atomic(RESULTS, (json.dumps(results, indent=2) + "\n").encode())


def measure() -> dict[str, Any]:
    """Return all that the tables show: counted, and measured on this machine."""
    from jax_impl import scaling_worker as worker

    results: dict[str, Any] = {"machine": worker.machine(), "recipes": {}}
    for name in RECIPES:
        recipe = recipes.load(name)
        steps = {int(size): seconds for size, seconds in worker.step_seconds(name).items()}
        results["recipes"][name] = {
            **counted(recipe, worker.program(name, COUNTED_ON)),
            "step_seconds": steps,
            "compute": asdict(fit_compute(steps)),
            "two_processes": worker.two_processes(name),
        }
    sizes = worker.all_reduce_seconds()
    return results | {"all_reduce_seconds": sizes, "connection": asdict(fit_connection(sizes))}


def counted(recipe: Recipe, program: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a step computes, moves and holds: `program` is what the compiler says of the one on several devices.

    Bytes are those of one device but for the data set's, of which each has all.
    """
    size = known_size(recipe.data)
    outputs = params.num_outputs(recipe, size.num_classes)
    leaves = params.leaves(recipe.model, size.input_shape, outputs)
    sent = traffic(program["text"])
    return {
        "batch_size": recipe.batch_size,
        "steps_per_epoch": count(recipe, size.num_train).steps_per_epoch,
        "parameters": params.num_parameters(leaves),
        "flops": training_flops(recipe.model, size.input_shape, outputs) * recipe.batch_size,
        "reduced_bytes": sum(sent.values()),
        "messages": len(sent),
        "state_bytes": program["state_bytes"],
        "sharded_state_bytes": program["sharded_state_bytes"],
        "data_bytes": program["data_bytes"],
        "scratch_bytes": program["scratch_bytes"],
    }


def traffic(text: str) -> dict[str, int]:
    """Return the bytes that each collective of a compiled program sums over the devices, by its name.

    Raises ValueError for one that is not an all-reduce: the model knows no other.

    >>> traffic("%all-reduce.1 = (f32[3,2]{1,0}, s32[]) all-reduce(%a, %b), channel_id=1")
    {'%all-reduce.1': 28}
    """
    found = {}
    for name, shapes, kind in re.findall(rf"(%?[\w.-]+) = (.*?) ({COLLECTIVES})(?:-start)?\(", text):
        if kind != "all-reduce":
            raise ValueError(f"{name} is no all-reduce")
        found[name] = sum(
            BYTES[dtype] * int(np.prod([int(length) for length in shape.split(",") if length], dtype=np.int64))
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        )
    return found


def fit_compute(step_seconds: Mapping[int, float]) -> Compute:
    """Return the line through the seconds of steps of some batch sizes that is off by the least share of each."""
    sizes, seconds = (np.array(list(values), float) for values in (step_seconds, step_seconds.values()))
    example, fixed = np.polyfit(sizes, seconds, 1, w=1 / seconds)
    return Compute(max(float(fixed), 0.0), float(example))


def fit_connection(all_reduce_seconds: Mapping[int, float]) -> Connection:
    """Return latency and bandwidth by the seconds of all-reduces between two, t = 2 latency + bytes / bandwidth."""
    sizes = np.array([float(size) for size in all_reduce_seconds])
    seconds = np.array(list(all_reduce_seconds.values()))
    inverse, twice = np.polyfit(sizes, seconds, 1, w=1 / seconds)
    return Connection(max(float(twice), 0.0) / 2, 1 / float(inverse))


def step_seconds(of: Mapping[str, Any], connection: Connection, devices: int, *, speed: float = 1.0) -> float:
    r"""Return the seconds of a step on so many devices, $a + b \frac{B}{n}$ and the all-reduces."""
    compute = Compute(**of["compute"]).step(of["batch_size"] / devices) / speed
    return compute + connection.all_reduce(of["reduced_bytes"], of["messages"], devices)


def best(of: Mapping[str, Any], connection: Connection, *, speed: float = 1.0) -> int:
    """Return the number of devices, at most one an example, on which a step takes least."""
    return min(range(1, of["batch_size"] + 1), key=lambda devices: step_seconds(of, connection, devices, speed=speed))


def constants(results: Mapping[str, Any]) -> str:
    """Return the table of what was measured."""
    connection = Connection(**results["connection"])
    rows = [
        [name, f"{1e6 * of['compute']['fixed']:.0f} us", f"{1e6 * of['compute']['example']:.2f} us", _sizes(of)]
        for name, of in results["recipes"].items()
    ]
    joined = [
        ["between two processes", f"{1e6 * connection.latency:.0f} us", f"{connection.bandwidth / MB:.0f} MB/s", ""]
    ]
    return (
        markdown_table(["recipe", "a", "b", "seconds a step were measured for batches of"], rows)
        + "\n\n"
        + (markdown_table(["connection", "alpha", "beta", ""], joined))
    )


def costs(results: Mapping[str, Any]) -> str:
    """Return the table of what a step computes, moves and holds."""
    rows = [
        [
            name,
            f"{of['parameters']:,}",
            f"{of['flops'] / MB:,.0f}",
            f"{of['reduced_bytes']:,}",
            f"{of['messages']}",
            f"{of['state_bytes'] / MB:.2f}",
            f"{of['sharded_state_bytes'] / MB:.2f}",
            f"{of['data_bytes'] / MB:.1f}",
            f"{of['scratch_bytes'] / MB:.1f}",
        ]
        for name, of in results["recipes"].items()
    ]
    heading = ["recipe", "parameters", "MFLOP a step", "bytes all-reduced a step", "all-reduces", "state, MB"]
    return markdown_table([*heading, f"with `--shard-state` on {COUNTED_ON}", "data, MB", "scratch, MB"], rows)


def check(results: Mapping[str, Any]) -> str:
    """Return the table that holds the model against two processes, with a core each."""
    connection = Connection(**results["connection"])
    rows = []
    for name, of in results["recipes"].items():
        one, two = (of["two_processes"][which] for which in ("one", "two"))
        said = step_seconds(of, connection, 1) / step_seconds(of, connection, 2)
        rows.append([name, f"{1e3 * one:.2f}", f"{1e3 * two:.2f}", f"{one / two:.2f}", f"{said:.2f}"])
    return markdown_table(["recipe", "ms a step, one core", "two processes", "times as fast", "by the model"], rows)


def extrapolation(results: Mapping[str, Any], connection: Connection | None = None, *, speed: float = 1.0) -> str:
    """Return the table of seconds an epoch on more and more devices, by the model."""
    connection = connection or Connection(**results["connection"])
    rows = []
    for name, of in results["recipes"].items():
        epochs = [
            f"{of['steps_per_epoch'] * step_seconds(of, connection, devices, speed=speed):.3g}" for devices in DEVICES
        ]
        rows.append([name, *epochs, str(best(of, connection, speed=speed))])
    return markdown_table(["seconds an epoch on", *map(str, DEVICES), "fewest on"], rows)


TABLES = {"constants": constants, "costs": costs, "check": check, "extrapolation": extrapolation}


def load_results(root: Path = Path()) -> dict[str, Any]:
    """Return what was kept. Raises UserError where it is not there, or not what was written."""
    try:
        results = json.loads((root / RESULTS).read_text("utf-8"))
        return {name: results[name] for name in ("machine", "recipes", "connection", "all_reduce_seconds")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{root / RESULTS} cannot be read: {error}; `--keep` without --latency makes it anew") from None


def _sizes(of: Mapping[str, Any]) -> str:
    return ", ".join(f"{size}: {1e3 * seconds:.2f} ms" for size, seconds in of["step_seconds"].items())


def _check_positive(flags: Flags) -> None:
    for name, least in (("latency", 0.0), ("bandwidth", None), ("speed", None)):
        value = getattr(flags, name)
        if not (value > 0 or value == least) or not np.isfinite(value):
            raise UserError(f"--{name} {value:g} is no {name}; use {'0 or more' if least == 0 else 'more than 0'}")

"""`python -m jax_impl.bench`: our epoch beside other programs that train the same recipe, in turn, on this machine.

Each program is a process of its own. They take turns, so that the machine's drift meets all alike, and what is reported
are ratios, turn by turn. Before that each must show our first losses. Getting ready, compilation included, is apart.
The floor is the operations of the products (`spec.flops`) over the device's float32 matmul peak, measured beside them;
efficiency is floor over time. With `--seeds N` it is N runs in one program beside the same runs one after the other;
with `--process` whole processes.
"""

from __future__ import annotations

if __name__ == "__main__":
    from spec.errors import run_program

    run_program(__spec__.name)

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import math
import operator
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from jax_impl.parallel import PLATFORMS
from spec import datasets, flops, params
from spec import recipe as recipes
from spec.batches import count
from spec.bench_worker import Worker, usable_cores, worker
from spec.datasets.catalog import IDX_SETS
from spec.errors import UserError, did_you_mean, require
from spec.files import check_target, write_atomic
from spec.markdown import markdown_table
from spec.recipe import Recipe
from spec.run.display import PlainConsole
from spec.sweep import MOST_RUNS, NUM_SEEDS, counted

BASELINES = {
    "lesson": "the lesson's torch program: torchvision, DataLoader",
    "eager": "torch, tensors in memory",
    "channels_last": "torch, in memory, channels last",
    "compile": "torch.compile, in memory",
    "stock": "the loop of Flax's documentation",
    "keras": "Keras 3 on the JAX backend, fit",
}
MODES = {"sharded": "ours, --parallel sharded on one device", "pmap": "ours, --parallel pmap on one device"}
MEAN_CROSS_ENTROPY = {"loss.name": ("cross_entropy",), "loss.reduction": ("mean",), "loss.label_smoothing": (0.0,)}
# What a program takes of a recipe, where that is not everything. Keras decays weights apart from the gradient, has the
# learning rate inside its momentum buffer, where a schedule reaches old gradients too, and Adam's epsilon elsewhere.
TAKES: dict[str, dict[str, tuple]] = {
    "lesson": {
        "data.name": tuple(IDX_SETS),
        **MEAN_CROSS_ENTROPY,
        "preprocessing.divisor": (255.0,),
        "preprocessing.standardize": (False,),
        "schedule.name": ("constant",),
    },
    "channels_last": {"model.name": ("cnn",)},
    "stock": MEAN_CROSS_ENTROPY,
    "keras": {
        **MEAN_CROSS_ENTROPY,
        "model.input_batchnorm": (False,),
        "optimizer.name": ("sgd",),
        "optimizer.weight_decay": (0.0,),
        "optimizer.dampening": (0.0,),
        "schedule.name": ("constant",),
    },
}
PROCESSES = {
    "cold": "nothing compiled before",
    "warm": "our programs kept",
    "saving": "our programs kept, and beside it ours that saves no checkpoint",
}
ON_JAX = ("ours", "many", *MODES, "stock", "keras")
WHAT = {"ours": "the epoch program of jax_impl"} | BASELINES | MODES
WHAT |= {"alone": "as many runs, one after the other", "unsaved": "ours with --checkpoint-every never"}
# JAX takes three quarters of a GPU's memory when it starts; here several programs share it.
# Products at full width are asked for as ours are: an accelerator's own choice is narrower (S12.2).
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
RESULTS = Path("results") / "bench.json"
# So few steps that rounding alone tells the losses apart. A CNN's pools have ties, which rounding decides (S9.6): two
# torch programs of it are 3e-4 apart after three steps and 5e-3 after eight (measured).
CHECKED_STEPS = {"mlp": 20, "cnn": 4}
PROFILED = 10
LOSS_TOLERANCE = 1e-3
PACKAGES = ("jax", "flax", "torch", "keras")
CHARTS = (".png", ".svg", ".pdf")
WIDTH = 100  # of the tables where no terminal says how wide it is
console = PlainConsole(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)


def main() -> None:
    """Run the command line. What was measured is shown before it is written, and so it is after an interrupt."""
    flags = _parser().parse_args()
    recipe = recipes.load(flags.recipe)
    _check(flags, recipe)
    compared = compare_processes if flags.process else compare_seeds if flags.seeds else compare
    with worker("the device", _module("jax_impl.machine", flags.platform), ENVIRONMENT) as machine:
        made_by = origin(machine.ask("device"))
        report = compared(recipe, flags, machine) | made_by
    show(report)
    if flags.json:
        _write("--json", flags.json, report)
    if flags.keep:
        _write("--keep", RESULTS, dict(sorted((load_results() | {key(report): report}).items())))
    if flags.chart:
        chart(report, flags.chart)
    if len(report["seconds"]["ours"]) < flags.pairs:
        raise KeyboardInterrupt


def compare(recipe: Recipe, flags: argparse.Namespace, machine: Worker) -> dict:
    """Return the report of the programs' turns: `steps` steps each, after one turn that does not count.

    A program that nobody asked for is left out, with the reason, where it does not train the recipe as stated, and
    where it does not start: torch may have no such device.
    """
    platform = machine.ask("device")["platform"]
    for name in () if flags.against else installed_baselines():
        if reason := misfit(name, recipe):
            console.print(f"{name} is left out: {reason}")
    with contextlib.ExitStack() as stack:
        workers = {"ours": _start(stack, "ours", flags.recipe, platform)}
        for name in flags.against or default_baselines(recipe):
            try:
                workers[name] = _start(stack, name, flags.recipe, platform)
            except UserError as error:
                if flags.against:
                    raise UserError(f"--against {name}: {error}") from None
                console.print(f"{name} is left out: {error}")
        times = {name: program.seconds for name, program in workers.items()}
        losses = {name: program.first_losses for name, program in workers.items()}
        return {"recipe": recipe.name} | _timed(recipe, workers, times, [losses], flags, machine)


def compare_seeds(recipe: Recipe, flags: argparse.Namespace, machine: Worker) -> dict:
    """Return the report of `seeds` runs in one program beside as many one after the other, in turn: `steps` steps each.

    Those that come one after the other are one program of a single run, for as many steps as all the runs have. Equal
    work is checked of the first run and of the last.
    """
    platform = machine.ask("device")["platform"]
    with contextlib.ExitStack() as stack:
        many = _start(stack, "many", flags.recipe, platform, seeds=flags.seeds)
        alone = _start(stack, "ours", flags.recipe, platform)
        workers = {"ours": many, "alone": alone}
        times = {"ours": many.seconds, "alone": lambda steps: alone.seconds(steps * flags.seeds)}
        losses = [
            {name: functools.partial(program.first_losses, run=run) for name, program in workers.items()}
            for run in sorted({0, flags.seeds - 1})
        ]
        timed = _timed(recipe, workers, times, losses, flags, machine)
        return {"recipe": recipe.name, "seeds": flags.seeds} | timed | {"flops": timed["flops"] * flags.seeds}


def _timed(
    recipe: Recipe,
    workers: Mapping[str, Worker],
    times: Mapping[str, Callable[[int], float]],
    losses: Sequence[Mapping[str, Callable[[int], list[float]]]],
    flags: argparse.Namespace,
    machine: Worker,
) -> dict:
    """Return what the turns of the workers give, and with `--profile` what a turn of ours was spent on."""
    size = extent(recipe, flags.steps)
    checked = min(CHECKED_STEPS[recipe.model.name], size["steps_per_epoch"])
    for each in losses:
        check_equal_work(recipe, {name: first_losses(checked) for name, first_losses in each.items()})
    which = ", of the first run and of the last" if len(losses) > 1 else ""
    same = f"the losses of the first {counted(checked, 'step')} are the same in all programs{which}"
    console.print(f"checked: {same}" if len(workers) > 1 else "ours alone: no other program is timed beside it")
    seconds, rates = take_turns(times, size["steps"], flags.pairs, machine)
    whole = len(seconds["ours"]) == flags.pairs  # an interrupt has ended the workers
    return {
        **size,
        "precision": recipe.precision,
        "matmul_flops_per_second": rates,
        "seconds": seconds,
        "ready_seconds": {name: program.ready_seconds for name, program in workers.items()},
        "peak_bytes": {name: program.peak_bytes for name, program in workers.items()},
        **({"profile": workers["ours"].ask("profile", size["steps"])} if flags.profile and whole else {}),
    }


def compare_processes(recipe: Recipe, flags: argparse.Namespace, machine: Worker) -> dict:
    """Return the report of whole processes, ours and the lesson's in turn: all epochs of the recipe, start and end.

    Ours finds its compiled programs on disk (warm), or an empty place for them each time (cold). To see what saving
    costs, the other is ours too, without checkpoints.
    """
    platform = machine.ask("device")["platform"]
    with tempfile.TemporaryDirectory() as kept:
        ours = functools.partial(_whole_process, "jax_impl.train", flags.recipe, platform)
        if flags.process != "cold":
            ours(kept)

        def compiled() -> float:
            with tempfile.TemporaryDirectory() as fresh:
                return ours(fresh if flags.process == "cold" else kept)

        programs: dict[str, Callable[[], float]] = {"ours": compiled}
        if flags.process == "saving":
            programs["unsaved"] = functools.partial(ours, kept, "--checkpoint-every", "never")
        else:
            programs["lesson"] = functools.partial(_whole_process, "torch_ref.lesson", flags.recipe, platform, None)
        seconds = _turns(flags.pairs, functools.partial(_each, programs))
    return {"recipe": recipe.name, "process": flags.process, "seconds": seconds}


def extent(recipe: Recipe, steps: int | None) -> dict[str, int]:
    """Return the steps of a turn (an epoch's unless given) and of an epoch, and the operations of a turn's products."""
    dataset = datasets.load(recipe.data)
    counts = count(recipe, len(dataset.train.labels))
    examples = steps * recipe.batch_size if steps else counts.examples_per_epoch
    outputs = params.num_outputs(recipe, dataset.num_classes)
    operations = examples * flops.training_flops(recipe.model, dataset.input_shape, outputs)
    return {"steps": steps or counts.steps_per_epoch, "steps_per_epoch": counts.steps_per_epoch, "flops": operations}


def command(name: str, recipe: str, platform: str, *, seeds: int | None = None) -> list[str]:
    """Return the command that starts a program's worker on a platform."""
    module = "jax_impl.baselines" if name in ON_JAX else "torch_ref.baselines"
    return [*_module(module, platform), *(["--seeds", str(seeds)] if seeds else []), name, recipe]


def _module(name: str, platform: str | None) -> list[str]:
    return [sys.executable, "-m", name, *(["--platform", platform] if platform else [])]


def _start(stack: contextlib.ExitStack, name: str, recipe: str, platform: str, *, seeds: int | None = None) -> Worker:
    return stack.enter_context(worker(name, command(name, recipe, platform, seeds=seeds), ENVIRONMENT))


def check_equal_work(recipe: Recipe, losses: Mapping[str, Sequence[float]]) -> None:
    """Raise UserError unless the first losses of every program are ours, and finite."""
    for step, loss in enumerate(losses["ours"]):
        if not math.isfinite(loss):
            raise UserError(
                f"{recipe.name} diverges: its loss at step {step} is {loss}; lower its learning_rate (now "
                f"{recipe.optimizer.learning_rate:g}), or scale the inputs down; nothing was timed"
            )
    for name, theirs in losses.items():
        for step, (one, two) in enumerate(zip(losses["ours"], theirs, strict=True)):
            if not math.isclose(one, two, rel_tol=LOSS_TOLERANCE):
                raise UserError(
                    f"{name} does other work: its loss at step {step} is {two:.6f}, ours {one:.6f}; nothing was timed"
                )


def take_turns(
    programs: Mapping[str, Callable[[int], float]], steps: int, turns: int, machine: Worker
) -> tuple[dict[str, list[float]], list[float]]:
    """Return each program's seconds, turn by turn, and the device's matmul rate at each, FLOP/s.

    A first turn is not counted.
    """
    of_so_many = {name: functools.partial(seconds, steps) for name, seconds in programs.items()}
    rates = []

    def measure(turn: int) -> dict[str, float]:
        measured = _each(of_so_many, turn)
        rates.append(machine.ask("matmul_rate"))
        return measured

    warming = measure(0)
    left = figures(turns * sum(warming.values()))
    console.print(f"warming up: {_said(warming)}; {counted(turns, 'turn')} in about {left} s")
    return _turns(turns, measure), rates[1:]


def _each(programs: Mapping[str, Callable[[], float]], turn: int) -> dict[str, float]:
    """Return the seconds of each program, in the order of `programs`. Another is the first with every turn, for what
    came before may leave the machine warm."""
    names, first = list(programs), turn % len(programs)
    measured = {name: programs[name]() for name in (*names[first:], *names[:first])}
    return {name: measured[name] for name in names}


def _turns(turns: int, measure: Callable[[int], dict[str, float]]) -> dict[str, list[float]]:
    """Return the seconds that `measure` gives of each turn, from 1 on, by program; after an interrupt, of those that
    were done, if any was."""
    done: list[dict[str, float]] = []
    try:
        for turn in range(1, turns + 1):
            done.append(measure(turn))
            console.print(f"turn {turn} of {turns}: {_said(done[-1])}")
    except KeyboardInterrupt:
        if not done:
            raise
        console.print(f"interrupted: what follows is of {counted(len(done), 'turn')}, not {turns}")
    return {name: [measured[name] for measured in done] for name in done[0]}


def ratios(report: Mapping, name: str) -> list[float]:
    """Return a program's time over ours, turn by turn."""
    return [theirs / ours for theirs, ours in zip(report["seconds"][name], report["seconds"]["ours"], strict=True)]


def efficiency(report: Mapping) -> float:
    """Return floor over time: the operations at the machine's best matmul rate, over our median turn."""
    return report["flops"] / max(report["matmul_flops_per_second"]) / statistics.median(report["seconds"]["ours"])


def show(report: Mapping) -> None:
    """Print the report: medians, and of the ratios the smallest and the largest."""
    console.print(_table(report))
    for name in report["seconds"]:
        console.print(f"{name}: {WHAT[name]}")
    console.print("seconds are medians; over ours is a program's time over ours, turn by turn: above 1 it is slower")
    if "seeds" in report:
        console.print(f"all times are of {counted(report['seeds'], 'run')} together")
    console.print(f"on {report['machine']}")
    if "flops" in report:
        _show_efficiency(report)
    if "profile" in report:
        _show_profile(report["profile"], report["steps"])


def _table(report: Mapping) -> Table:
    """Return the table of the report, with the columns that it has something for."""
    table = Table(box=None, pad_edge=False, header_style="bold", title=_title(report), title_justify="left")
    rows = {name: _row(report, name) for name in report["seconds"]}
    for heading in rows["ours"]:
        table.add_column(heading, justify="left" if heading == "program" else "right", no_wrap=True)
    for row in rows.values():
        table.add_row(*row.values())
    return table


def _row(report: Mapping, name: str) -> dict[str, str]:
    """Return the cells of a program, by their headings."""
    row = {"program": name, "seconds": figures(statistics.median(report["seconds"][name]))}
    row["over ours"] = "1" if name == "ours" else _range(ratios(report, name), 2)
    if "steps" in report:
        row["ms/epoch"], row["us/step"] = _absolute(report, name)
        row["ready, s"] = f"{report['ready_seconds'][name]:.1f}"
        row["MB"] = f"{report['peak_bytes'][name] / 1e6:,.0f}"
    return row


def _title(report: Mapping) -> str:
    """Return what was timed: the recipe, how many runs of it, the turns."""
    timed = [report["recipe"]]
    if "process" in report:
        timed.append(f"whole processes, {report['process']} ({PROCESSES[report['process']]})")
    if "seeds" in report:
        timed.append(counted(report["seeds"], "run"))
    turns = counted(len(report["seconds"]["ours"]), "turn")
    timed.append(f"{turns} of {counted(report['steps'], 'step')}" if "steps" in report else turns)
    return ", ".join(timed)


def _show_efficiency(report: Mapping) -> None:
    rate = max(report["matmul_flops_per_second"]) / 1e9
    console.print(f"{figures(report['flops'] / 1e9)} GFLOP a turn, float32 matmul at {figures(rate)} GFLOP/s at best")
    narrow = f"; the products are {report['precision']}, the floor is float32's"
    console.print(
        f"efficiency, floor over time: {efficiency(report):.0%}{narrow if report['precision'] != 'float32' else ''}"
    )


def figures(value: float) -> str:
    """Return a positive number with three figures or more, and no exponent.

    >>> figures(0.00712), figures(3.14159), figures(1234.5)
    ('0.00712', '3.14', '1,234')
    """
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _absolute(report: Mapping, name: str) -> tuple[str, str]:
    """Return the milliseconds of an epoch and the microseconds of a step, of all runs of the program together."""
    if "steps" not in report:
        return "-", "-"
    step = statistics.median(report["seconds"][name]) / report["steps"]
    return f"{1e3 * step * report['steps_per_epoch']:,.1f}", f"{1e6 * step:,.1f}"


def _show_profile(profile: Mapping, steps: int) -> None:
    """Print what the longest operations of a turn of ours took, the rest together, and when none of them ran.

    Shares are of the turn. Where operations ran side by side and fill more than it, they are of all operations' time,
    and add up to 1 as well; when none ran is then unknown.
    """
    operations, whole = profile["operations"], profile["seconds"]
    longest = list(operations.items())[:PROFILED]
    busy = sum(operations.values())
    side_by_side = busy > whole
    rows = [*longest, ("all others", busy - sum(seconds for _, seconds in longest)), ("no operation", whole - busy)]
    table = Table("operation of ours", "us a step", "share", title="a turn under the profiler, which itself costs time")
    for name, seconds in rows:
        if seconds > 0:
            table.add_row(name, f"{1e6 * seconds / steps:,.1f}", f"{seconds / max(whole, busy):.0%}")
    console.print(table)
    of_what = f"of all operations, which ran side by side: {busy / whole:.2f} times the turn"
    console.print(f"share is {of_what if side_by_side else 'of the turn'}")


def chart(report: Mapping, path: Path) -> None:
    """Draw the ratios as bars with their ranges, the largest at the top."""
    from matplotlib.figure import Figure

    drawn = {name: ratios(report, name) for name in report["seconds"] if name != "ours"}
    names = sorted(drawn, key=lambda name: statistics.median(drawn[name]))
    medians = [statistics.median(drawn[name]) for name in names]
    below = [median - min(drawn[name]) for median, name in zip(medians, names, strict=True)]
    above = [max(drawn[name]) - median for median, name in zip(medians, names, strict=True)]
    figure = Figure(figsize=(9, 1.4 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh([WHAT[name] for name in names], medians, xerr=[below, above], color="#4878a8", capsize=3)
    axes.axvline(1, color="black", linewidth=1)
    for index, (median, more) in enumerate(zip(medians, above, strict=True)):
        axes.annotate(f"{median:.2f}", (median + more, index), xytext=(6, 0), textcoords="offset points", va="center")
    axes.margins(x=0.15)
    axes.set_xlabel("their time over ours, median and range: above 1 is slower")
    figure.suptitle(f"{_title(report)}; {report['machine']}, {report['date']}", fontsize=10)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"--chart {path} cannot be written: {error}; name another place") from None
    console.print(f"wrote {path}")


def load_results(root: Path = Path()) -> dict[str, dict]:
    """Return the kept reports, by recipe and what was timed; UserError where the file holds anything else."""
    path = root / RESULTS
    if not path.exists():
        return {}
    try:
        kept = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}; mend it, or move it away to start anew") from None
    if not isinstance(kept, dict) or not all(isinstance(report, dict) for report in kept.values()):
        raise UserError(f"{path} must hold a table of reports; mend it, or move it away to start anew")
    return kept


def key(report: Mapping) -> str:
    """Return the name under which a report is kept."""
    process = f", whole process, {report['process']}" if "process" in report else ""
    seeds = f", {report['seeds']} seeds" if "seeds" in report else ""
    modes = "".join(f", {name}" for name in MODES if name in report["seconds"])
    return (
        report["recipe"]
        + process
        + seeds
        + modes
        + ("" if report.get("platform", "cpu") == "cpu" else f", {report['platform']}")
    )


def table(results: Mapping[str, dict]) -> str:
    """Return the kept reports as a Markdown table, a column each: time over ours, median (smallest to largest)."""
    reports = list(results.values())
    rows = [
        [what, *(_range(ratios(report, name), 2) if name in report["seconds"] else "-" for report in reports)]
        for name, what in WHAT.items()
        if name != "ours" and any(name in report["seconds"] for report in reports)
    ]
    own = {
        "ours, s": lambda report: f"{statistics.median(report['seconds']['ours']):.3f}",
        "in": lambda report: f"{report['steps']:,} steps" if "steps" in report else "-",
        "ours, ms an epoch, by that": lambda report: _absolute(report, "ours")[0],
        "ours, us a step": lambda report: _absolute(report, "ours")[1],
        "efficiency": lambda report: f"{efficiency(report):.0%}" if "flops" in report else "-",
        "ours, peak MB": lambda report: f"{report['peak_bytes']['ours'] / 1e6:,.0f}" if "peak_bytes" in report else "-",
        "turns": lambda report: str(len(report["seconds"]["ours"])),
        "on": lambda report: report["machine"],
    }
    rows += [[what, *map(say, reports)] for what, say in own.items()]
    return markdown_table(["time over ours", *(f"`{name}`" for name in results)], rows)


def origin(device: Mapping[str, str]) -> dict:
    """Return where and when: date, platform, machine, versions."""
    there = [name for name in PACKAGES if importlib.util.find_spec(name)]
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in there}
    machine = counted(usable_cores(), "CPU core")
    machine = machine if device["platform"] == "cpu" else f"{device['kind']}, {machine}"
    return {"date": time.strftime("%Y-%m-%d"), "platform": device["platform"], "machine": machine, "versions": versions}


def _cache_in(folder: str) -> dict[str, str]:
    return {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def _whole_process(module: str, recipe: str, platform: str, compiled: str | None, *more: str) -> float:
    """Return how long a trainer takes from start to end; ours keeps its programs in `compiled`, the lesson has none."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--out", str(Path(folder) / "run")] if compiled else []
        environment = os.environ | (_cache_in(compiled) if compiled else {})
        start = time.perf_counter()
        ended = subprocess.run(
            [*_module(module, platform), "--recipe", recipe, *options, *more],
            capture_output=True,
            text=True,
            env=environment,
        )
        seconds = time.perf_counter() - start
    if ended.returncode:
        raise UserError(f"python -m {module} --recipe {recipe} ended with {ended.returncode}: {ended.stderr.strip()}")
    return seconds


def _check(flags: argparse.Namespace, recipe: Recipe) -> None:
    """Raise UserError for flags that cannot be, before anything starts."""
    for name in ("pairs", "steps", "seeds"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise UserError(f"--{name} {getattr(flags, name)} must be 1 or more")
    for name in flags.against or ():
        _check_baseline(name, recipe, flag=f"--against {name}")
    if flags.process:
        given = [name for name in ("steps", "against", "seeds", "profile") if getattr(flags, name)]
        if given:
            raise UserError(f"--process times whole processes; leave out --{given[0]}")
        if flags.process != "saving":
            _check_baseline("lesson", recipe, flag=f"--process {flags.process}")
    if (flags.seeds or 0) > MOST_RUNS or recipe.seed + (flags.seeds or 0) > NUM_SEEDS:
        raise UserError(f"--seeds {flags.seeds} must be {MOST_RUNS:,} or less, and the last seed under {NUM_SEEDS:,}")
    if flags.seeds and flags.against:
        raise UserError("--seeds times our runs together and one after the other; leave out --against")
    if flags.chart and not (flags.process or flags.seeds or flags.against or default_baselines(recipe)):
        raise UserError(f"--chart draws other programs' times, and none here trains {recipe.name}; leave it out")
    _check_files(flags)


def _check_baseline(name: str, recipe: Recipe, *, flag: str) -> None:
    """Raise UserError unless there is such a program here, and it trains the recipe as stated."""
    there = BASELINES | MODES
    if name not in there:
        raise UserError(f"{flag}: there is no such program{did_you_mean(name, there)}; there are {', '.join(there)}")
    for package, extra in _needs(name):
        require(package, extra=extra)
    if reason := misfit(name, recipe):
        raise UserError(f"{flag}: {reason}; leave it out, or take another recipe")


def _check_files(flags: argparse.Namespace) -> None:
    """Raise UserError unless what the flags ask for can be written."""
    if flags.chart and flags.chart.suffix not in CHARTS:
        raise UserError(f"--chart {flags.chart} must end in one of {', '.join(CHARTS)}")
    for name in ("json", "chart"):
        if getattr(flags, name):
            check_target(getattr(flags, name), flag=f"--{name}")
    if flags.keep:
        with contextlib.suppress(OSError):
            RESULTS.parent.mkdir(exist_ok=True)
        check_target(RESULTS, flag="--keep")
        load_results()  # which is needed when all turns are done
    if flags.chart:
        require("matplotlib", extra="plot")


def default_baselines(recipe: Recipe) -> list[str]:
    """Return the programs that are installed here and train this recipe as stated."""
    return [name for name in installed_baselines() if not misfit(name, recipe)]


def installed_baselines() -> list[str]:
    """Return the programs whose packages are here."""
    return [name for name in BASELINES if all(importlib.util.find_spec(package) for package, _ in _needs(name))]


def misfit(name: str, recipe: Recipe) -> str | None:
    """Return in a line the first thing that the recipe has and the program has not; None where it trains the recipe.

    All programs but ours compute in float32, whatever the recipe's precision.
    """
    if name in MODES:
        return None
    takes = {"precision": ("float32",)} | TAKES.get(name, {})
    stated = {field: operator.attrgetter(field)(recipe) for field in takes}
    for field, value in stated.items():
        if value is not None and value not in takes[field]:
            return f"{recipe.name} has {field} {value}; {name} takes only {' or '.join(map(str, takes[field]))}"
    return None


def _needs(name: str) -> Iterable[tuple[str, str]]:
    """Return the packages that a baseline needs, and the extras that bring them."""
    on_jax = {name: [] for name in ON_JAX} | {"keras": [("keras", "keras")]}
    return on_jax.get(name, [("torch", "torch")])


def _said(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {figures(taken)} s" for name, taken in seconds.items())


def _range(values: Sequence[float], digits: int) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _write(flag: str, path: Path, content: Mapping) -> None:
    try:
        write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"{flag}: {path} cannot be written: {error}; name another place") from None
    console.print(f"wrote {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jax_impl.bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--recipe", default="mlp128", help="a name or a .toml file (default: mlp128)")
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="PROGRAM",
        help="; ".join(f"{name}: {what}" for name, what in (BASELINES | MODES).items())
        + " (default: all that can run here but our own modes)",
    )
    parser.add_argument("--pairs", type=int, default=7, help="turns that count (default: 7)")
    parser.add_argument("--steps", type=int, help="steps a turn (default: an epoch's)")
    parser.add_argument("--platform", choices=PLATFORMS, help="default: an accelerator if there is one")
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="instead: N runs in one program, and the same runs one after the other"
    )
    parser.add_argument("--profile", action="store_true", help="say what operations a turn of ours was spent on")
    parser.add_argument(
        "--process",
        choices=PROCESSES,
        help="whole processes instead: ours and the lesson's, with nothing compiled before or with our programs kept; "
        "or, to see what saving costs, ours and ours that saves no checkpoint",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times to this file")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the ratios: .png, .svg, .pdf (extra plot)")
    parser.add_argument("--keep", action="store_true", help=f"keep the times in {RESULTS}")
    return parser

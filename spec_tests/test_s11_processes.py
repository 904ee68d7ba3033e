"""S11, R12: a run of several processes is that of one; what goes wrong in one is heard of in all, and made good."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jax_impl.processes
import jax_impl.trainer
from jax_impl.distributed import _differing, join
from spec import recipe
from spec.datasets import Dataset
from spec.errors import LostProcessError, UserError
from spec.processes import check
from spec.run import checkpoints
from spec.sweep import ManyFlags
from spec_tests.processes import PATIENCE, Started, started
from spec_tests.tolerances import SEVERAL_DEVICES

HEARTBEAT = 10  # seconds
BY_JAX = (-signal.SIGABRT, 1)  # how JAX's runtime ends a process: since jax 0.8, and before
LOST = ("gone", "another task died", "gloo::")  # what we say, what the runtime says, what joins CPUs says
SLACK = 5.0  # seconds that the survivors may take beyond it (R12)
DIGITS = ["--recipe", "digits", "--precision", "float64", "--platform", "cpu"]
SHORT = [*DIGITS, "--batch-size", "6", "--learning-rate", "0.01", "--epochs", "1"]
LONG = [*SHORT, "--epochs", "5", "--checkpoint-every", "50", "--metrics.progress-every", "10"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def members(
    folder: Path,
    arguments: Sequence[object],
    *,
    processes: int,
    own: dict[int, Sequence[object]] | None = None,
    prepare: dict[int, Callable[[], None]] | None = None,
) -> Iterator[list[Started]]:
    """Run the processes of one run on this machine, each with the same arguments, and those that are its `own`; what is
    to `prepare` some of them is called there first."""
    folder.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                member(
                    folder,
                    address,
                    processes,
                    number,
                    [*arguments, *(own or {}).get(number, ())],
                    (prepare or {}).get(number),
                )
            )
            for number in range(processes)
        ]


def member(
    folder: Path,
    address: str,
    processes: int,
    number: int,
    arguments: Sequence[object],
    prepare: Callable[[], None] | None = None,
) -> contextlib.AbstractContextManager[Started]:
    place = folder / f"process-{number}"
    place.mkdir(exist_ok=True)
    which = ["--coordinator", address, "--num-processes", processes, "--process-id", number]
    given = ["--distributed", *which, "--heartbeat-timeout", HEARTBEAT, *arguments]
    return started(place, "jax", list(map(str, given)), cache=folder / f"compiled-{number}", prepare=prepare)


def train(folder: Path, arguments: Sequence[object], *, processes: int, seconds: float = PATIENCE) -> None:
    """Run all processes to their end."""
    with members(folder, arguments, processes=processes) as run:
        assert [process.ended(seconds=seconds) for process in run] == [0] * processes, [
            one.err.read_text() for one in run
        ]
        assert [process.err.read_text() for process in run] == [""] * processes


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "weights.safetensors")


def assert_same_weights(run: Path, other: Path) -> None:
    found, wanted = weights(run), weights(other)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert np.abs(found[name] - wanted[name]).max() <= SEVERAL_DEVICES["float64"], name


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run of LONG in one process."""
    return run_of_one(tmp_path_factory.mktemp("alone"), LONG)


def run_of_one(folder: Path, arguments: Sequence[str]) -> Path:
    with started(folder, "jax", [*arguments, "--out", str(folder / "run")], cache=folder / "compiled") as process:
        assert process.ended() == 0, process.err.read_text()
    return folder / "run"


@pytest.mark.parametrize(("processes", "devices", "mode"), [(2, 2, ["pmap"]), (4, 1, ["sharded", "--shard-state"])])
def test_several_processes_train_the_run_of_one(processes, devices, mode, tmp_path, counted):
    given = [*SHORT, "--devices", devices, "--parallel", *mode, "--out", tmp_path / "run"]
    train(tmp_path, given, processes=processes)
    (tmp_path / "alone").mkdir()
    assert_same_weights(tmp_path / "run", run_of_one(tmp_path / "alone", SHORT))
    shown = [(tmp_path / f"process-{number}" / "out.txt").read_text() for number in range(processes)]
    assert f"on {processes * devices} devices" in shown[0]
    assert shown[1].endswith(f"process 1 of {processes}: does what process 0 does\n")
    counted("R11 runs of several processes", 1)


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_process_stops_all_and_all_go_on(told, alone, tmp_path, counted):
    given = [*LONG, *(["--parallel", "sharded", "--shard-state"] * told), "--out", tmp_path / "run"]
    with members(tmp_path, given, processes=2) as run:
        run[0].wait_for(lambda: "loss" in run[0].out.read_text())
        run[told].send(signal.SIGTERM)
        assert [process.ended() for process in run] == [128 + signal.SIGTERM] * 2
        first, second = (process.err.read_text() for process in run)
    assert f"saved in {tmp_path / 'run'}; --resume" in first
    assert "process 0 left: stopped after epoch" in second
    assert checkpoints.newest_good(tmp_path / "run" / "checkpoints")[0] is not None
    train(tmp_path, given, processes=2)
    assert_same_weights(tmp_path / "run", alone)
    train(tmp_path, given, processes=2)
    assert "is finished; --overwrite does it again" in run[0].out.read_text()
    counted("R12 runs of several processes that a signal stopped, and that went on", 1)


def kill_one(folder: Path, given: Sequence[object], *, processes: int, victim: int, seconds: float) -> None:
    """Kill one process of a run some time after it began to train; the others leave soon, saying why."""
    with members(folder, given, processes=processes) as run:
        run[0].wait_for(lambda: "loss" in run[0].out.read_text())
        time.sleep(seconds)
        run[victim].send(signal.SIGKILL)
        killed = time.monotonic()
        statuses = [process.ended() for process in run]
        took = time.monotonic() - killed
        said = [process.err.read_text() for process in run]
    assert took <= HEARTBEAT + SLACK, said
    assert statuses[victim] == -signal.SIGKILL
    for number in set(range(processes)) - {victim}:
        assert statuses[number] in (os.EX_TEMPFAIL, *BY_JAX), said[number]
        assert any(sign in said[number] for sign in LOST), said[number]


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_others_leave_and_all_go_on(victim, alone, tmp_path, counted):
    given = [*LONG, "--out", tmp_path / "run"]
    kill_one(tmp_path, given, processes=2, victim=victim, seconds=0.1)
    train(tmp_path, given, processes=2)
    assert_same_weights(tmp_path / "run", alone)
    counted("R12 kills of one of several processes", 1)


@pytest.mark.slow(minutes=5)
@pytest.mark.parametrize("processes", [2, 4])
def test_a_run_of_several_processes_that_is_killed_ten_times_is_the_unbroken_one(processes, tmp_path, counted):
    chance = random.Random(processes)
    given = [*LONG, "--epochs", "20"]
    steps = []
    for _ in range(10):
        victim, seconds = chance.randrange(processes), chance.uniform(0, 1)
        kill_one(tmp_path, [*given, "--out", tmp_path / "run"], processes=processes, victim=victim, seconds=seconds)
        newest, mistakes = checkpoints.newest_good(tmp_path / "run" / "checkpoints")
        assert not mistakes
        steps.append(newest.step if newest else 0)
    assert steps == sorted(steps)
    assert 0 < steps[-1] < 20 * 240, steps
    train(tmp_path, [*given, "--out", tmp_path / "run"], processes=processes, seconds=10 * PATIENCE)
    (tmp_path / "alone").mkdir()
    assert_same_weights(tmp_path / "run", run_of_one(tmp_path / "alone", given))
    counted("R12 kills of one of several processes", 10)


def test_another_number_of_processes_goes_on_with_a_run(alone, tmp_path):
    given = [*LONG, "--out", tmp_path / "run"]
    with members(tmp_path, given, processes=2) as run:
        run[0].wait_for(lambda: "loss" in run[0].out.read_text())
        run[0].send(signal.SIGTERM)
        assert [process.ended() for process in run] == [128 + signal.SIGTERM] * 2
    train(tmp_path, given, processes=3)
    assert_same_weights(tmp_path / "run", alone)
    assert len(json.loads((tmp_path / "run" / "summary.json").read_text())["devices"]) == 3


def test_a_run_of_several_processes_whose_numbers_end_stops_in_all(tmp_path):
    given = [*SHORT, "--precision", "float32", "--preprocessing.divisor", "1e-36", "--out", tmp_path / "run"]
    with members(tmp_path, given, processes=2) as run:
        assert [process.ended() for process in run] == [2, 2]
        first, second = (process.err.read_text() for process in run)
    assert second == first.replace("error: ", "error: process 0 left: ")
    assert "step" in first


def test_nobody_who_reads_process_0_is_told_to_the_others(tmp_path):
    with members(tmp_path, [*LONG, "--out", tmp_path / "run"], processes=2, prepare={0: closed_output}) as run:
        assert [process.ended() for process in run] == [141, 141]
        assert run[1].err.read_text() == "error: process 0 left: nobody reads its output any more\n"


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (["--learning-rate", "0.02"], "optimizer.learning_rate: 0.01 in process 0, 0.02 in process 1"),
        (["--uneven", "refuse"], "uneven: pad in process 0, refuse in process 1"),
        (["--on-nonfinite", "skip"], "on_nonfinite: stop in process 0, skip in process 1"),
        (["--parallel", "sharded", "--shard-state"], "shard_state: False in process 0, True in process 1"),
        (["--parallel", "pmap"], "parallel: None in process 0, pmap in process 1"),
    ],
)
def test_processes_that_disagree_are_told_in_what(own, said, tmp_path):
    with members(tmp_path, [*SHORT, "--out", tmp_path / "run"], processes=2, own={1: own}) as run:
        assert [process.ended() for process in run] == [2, 2]
        for process in run:
            assert "the processes of a run have to agree" in process.err.read_text()
            assert said in process.err.read_text()
    assert not (tmp_path / "run").exists()


def test_what_process_0_refuses_is_said_by_all(tmp_path):
    (tmp_path / "run").write_text("a file")
    with members(tmp_path, [*SHORT, "--out", tmp_path / "run"], processes=2) as run:
        assert [process.ended() for process in run] == [2, 2]
        why = f"--out {tmp_path / 'run'} is a file; name a directory that does not exist yet\n"
        assert [process.err.read_text() for process in run] == [f"error: {why}", f"error: process 0 left: {why}"]


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (["--recipe", "mlp128", "--data-dir", "nowhere"], "nowhere"),
        (["--devices", "0"], "--devices 0 are none; use 1 at least"),
        (
            ["--devices", "2"],
            "--devices 2 is more than process 0 has: 1 cpu device; use 1 or less, the same in every process",
        ),
    ],
)
def test_what_another_process_refuses_is_said_by_all(own, said, tmp_path):
    with members(tmp_path, [*SHORT, "--out", tmp_path / "run"], processes=2, own={1: own}) as run:
        assert [process.ended() for process in run] == [2, 2]
        assert run[0].err.read_text().startswith("error: process 1 left: ")
        assert said in run[0].err.read_text()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "is reached, but not all processes of the run came within 4 s"),
        (
            1,
            "was not reached within 4 s (Connection refused); see that its address is right and open, and that",
        ),
    ],
)
def test_a_process_that_is_alone_leaves_when_its_time_is_up(number, said, tmp_path):
    arguments = [*SHORT, "--connect-timeout", "4"]
    address = f"127.0.0.1:{free_port()}"
    with member(tmp_path, address, 2, number, arguments) as alone:
        assert alone.ended() == os.EX_TEMPFAIL
        said_meanwhile = f"waiting for the other processes of the run to meet at {address}, for up to 4 s ...\n"
        assert alone.out.read_text() == said_meanwhile
        error = alone.err.read_text()
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1


def test_process_0_whose_address_is_another_machines_is_told_so(tmp_path):
    address = f"192.0.2.1:{free_port()}"  # for documentation: no machine has it
    with member(tmp_path, address, 2, 0, [*SHORT, "--connect-timeout", "4"]) as process:
        assert process.ended() == os.EX_TEMPFAIL
        assert f"--coordinator {address} was not reached within 4 s" in process.err.read_text()
        assert "see that its address is the name or address of this machine" in process.err.read_text()


def test_a_port_that_is_taken_is_refused(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with member(tmp_path, address, 2, 0, SHORT) as process:
            assert process.ended() == 2
            why = "cannot be opened here: Address already in use"
            mend = "see that no other process 0 is started, or name another port"
            assert process.err.read_text() == f"error: --coordinator {address} {why}; {mend}\n"


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        ("UNAVAILABLE: failed to connect to all addresses", LostProcessError),
        ("INVALID_ARGUMENT: task 1 is not among 1", UserError),
    ],
)
def test_what_goes_wrong_while_they_meet_is_worth_another_try_only_where_one_was_lost(raised, kind, monkeypatch):
    def initialize(**_: object) -> None:
        raise jax.errors.JaxRuntimeError(raised)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match=raised) as left:
        join(coordinator="127.0.0.1:1", num_processes=2, process_id=1, connect=9, heartbeat=9)
    assert type(left.value) is kind


def test_distributed_where_nothing_says_which_process_this_is_is_refused(tmp_path):
    with started(tmp_path, "jax", [*SHORT, "--distributed"], cache=tmp_path / "compiled") as process:
        assert process.ended() == 2
        assert "--distributed finds no Slurm, Kubernetes, Cloud TPU or Open MPI here" in process.err.read_text()


def test_every_fact_of_every_process_is_held_against_process_0s():
    given = [{"versions.jax": "1", "data_sha256": "a"}, {"versions.jax": "2", "data_sha256": "a"}, {"data_sha256": "b"}]
    assert _differing(given[:1] * 3) == []
    assert _differing(given) == [
        "versions.jax: 1 in process 0, 2 in process 1",
        "versions.jax: 1 in process 0, None in process 2",
        "data_sha256: a in process 0, b in process 2",
    ]


@pytest.mark.parametrize("changed", ["data", "versions"])
def test_data_and_versions_are_among_the_facts(changed, tmp_path):
    with members(tmp_path, [*SHORT, "--out", tmp_path / "run"], processes=2, prepare={1: CHANGES[changed]}) as run:
        assert [process.ended() for process in run] == [2, 2]
        assert f"{FACTS[changed]}: " in run[0].err.read_text()


def closed_output() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def slow_compiler() -> None:
    compiles = jax_impl.trainer.compile_programs
    jax_impl.trainer.compile_programs = lambda *given, **how: (time.sleep(60), compiles(*given, **how))[1]


def other_data() -> None:
    load = jax_impl.trainer.IMPLEMENTATION.load

    def changed(*given: object, **where: object) -> Dataset:
        dataset = load(*given, **where)
        labels = dataset.train.labels.copy()
        labels[0] += 1
        return dataclasses.replace(dataset, train=dataset.train._replace(labels=labels))

    jax_impl.processes.IMPLEMENTATION = dataclasses.replace(jax_impl.trainer.IMPLEMENTATION, load=changed)


def other_versions() -> None:
    importlib.metadata.version = lambda name: "0.0.1"


CHANGES = {"data": other_data, "versions": other_versions}
FACTS = {"data": "data_sha256", "versions": "versions.jax"}


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_while_all_are_compiling_ends_all(told, tmp_path):
    slow = dict.fromkeys((0, 1), slow_compiler)
    with members(tmp_path, [*SHORT, "--out", tmp_path / "run"], processes=2, prepare=slow) as run:
        run[0].wait_for(lambda: "digits: 64" in run[0].out.read_text())
        run[1].wait_for(lambda: "does what" in run[1].out.read_text())
        time.sleep(1)
        run[told].send(signal.SIGTERM)
        assert [process.ended() for process in run] == [128 + signal.SIGTERM] * 2
        assert f"process {told} left: " in run[1 - told].err.read_text()


NAMED = {"distributed": True, "coordinator": "10.0.0.1:1234", "num_processes": 2, "process_id": 1}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({**NAMED, "distributed": False}, "--coordinator is for a run of several processes; add --distributed"),
        ({**NAMED, "process_id": 2}, "--process-id 2 is none of 2 processes, which are counted from 0; use 0 to 1"),
        ({**NAMED, "process_id": -1}, "--process-id -1 is none of 2 processes, which are counted from 0; use 0 to 1"),
        ({**NAMED, "num_processes": 0}, "--num-processes 0 are none; use 1 at least"),
        ({**NAMED, "num_processes": None}, "--coordinator needs --num-processes beside it; or leave out all three"),
        (
            {**NAMED, "coordinator": "10.0.0.1"},
            "--coordinator 10.0.0.1 is no HOST:PORT; 10.0.0.1:1234, or [::1]:1234, say",
        ),
        ({**NAMED, "coordinator": "host:0"}, "--coordinator host:0 is no HOST:PORT; 10.0.0.1:1234, or [::1]:1234, say"),
        (
            {**NAMED, "coordinator": "host:65536"},
            "--coordinator host:65536 is no HOST:PORT; 10.0.0.1:1234, or [::1]:1234, say",
        ),
        ({**NAMED, "coordinator": "::1:80"}, "--coordinator ::1:80 is no HOST:PORT; 10.0.0.1:1234, or [::1]:1234, say"),
        ({"connect_timeout": 9}, "--connect-timeout is for a run of several processes; add --distributed"),
        ({"devices": 33}, "a batch of 32 is less than 33 devices; use 32 in all, or fewer"),
        ({**NAMED, "seeds": 3}, "--distributed is for one run, and --seeds and --sweep are for many; leave one out"),
        ({**NAMED, "connect_timeout": 0}, "--connect-timeout 0 must be 1 second or more"),
        ({**NAMED, "heartbeat_timeout": 0}, "--heartbeat-timeout 0 must be 1 second or more"),
    ],
)
def test_flags_that_name_no_process_are_refused(flags, said):
    with pytest.raises(UserError) as refused:
        check(ManyFlags(config=recipe.load("digits"), **flags))
    assert str(refused.value) == said


@pytest.mark.parametrize("coordinator", ["localhost:1", "node-3.cluster:65535", "[::1]:8476", "127.0.0.1:80"])
def test_flags_that_name_a_process_are_taken(coordinator):
    assert check(ManyFlags(config=recipe.load("digits"), **{**NAMED, "coordinator": coordinator})) is None

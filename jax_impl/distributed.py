"""The processes of one run, on JAX's distributed runtime: how they meet, agree, hear of one another, and part.

Process 0 leads: it alone decides what comes next and writes it down, call by call, in the runtime's key-value store,
from which the others read it. What they compute then, they compute together, in the same compiled programs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jax

from jax_impl.background import in_background
from spec.errors import LostProcessError, UserError, outcome
from spec.signals import Stopped, raise_on_signals

NEVER = 10**6  # seconds; JAX ends the process with a page of addresses where its own time limit passes
SOON_SECONDS = 3.0  # that the others may take to come before a word is said of it
ASK_SECONDS = 0.25  # how often the others are asked after, at most
PART_SECONDS = 30.0  # that process 0 gives the others to hear why it leaves
LAST_SECONDS = 0.5  # from then on, for them to leave before the store does
KEPT = 16  # commands that stay to be read: the others are two behind at most
OF_THE_CONNECTION = "[Gg]loo|NCCL|UNAVAILABLE|CANCELLED|ABORTED|[Cc]onnection|[Cc]oordination"  # in JAX's errors
AGAIN = "start all of them again with the same command, and the run goes on from its last checkpoint, if it has one yet"


class Left(UserError):  # noqa: N818 - it is another process that went wrong
    """Another process of the run left, for a reason it gave; this one leaves with the same status."""

    def __init__(self, process: int, status: int, message: str) -> None:
        super().__init__(f"process {process} left: {message}")
        self.status = status


@dataclass
class Group:
    """One process of a run, `process_id` of `num_processes`, and what it has of the others: the store's `client`."""

    process_id: int
    num_processes: int
    client: Any
    _commands: int = 0
    _signal: int | None = None
    _asked: float = field(default_factory=time.monotonic)

    @property
    def leads(self) -> bool:
        """Return whether this is process 0."""
        return self.process_id == 0

    def tell(self, command: str, *numbers: int) -> None:
        """Write down what all do next."""
        self._set(f"command/{self._commands}", json.dumps([command, *numbers]))
        if self._commands >= KEPT:
            with self._reached():
                self.client.key_value_delete(_key(f"command/{self._commands - KEPT}"))
        self._commands += 1

    def told(self, meanwhile: Callable[[], None] = lambda: None) -> tuple[str, list[int]]:
        """Return what process 0 wrote down next, once it did; `meanwhile` is called first, and every now and then."""
        meanwhile()
        command, *numbers = json.loads(self._wait_for(f"command/{self._commands}", meanwhile))
        self._commands += 1
        return command, numbers

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Return once every process has given the same facts. Raises UserError, the same in each, naming the facts in
        which one differs from process 0."""
        self._set(f"facts/{self.process_id}", json.dumps(facts))
        if self.leads:
            given = [json.loads(self._wait_for(f"facts/{process}")) for process in range(self.num_processes)]
            self._set("verdict", json.dumps(_differing(given)))
        if differing := json.loads(self._wait_for("verdict")):
            listed = "\n  ".join(differing)
            raise UserError(f"the processes of a run have to agree, and these do not; give all the same:\n  {listed}")

    def signal(self, number: int) -> None:
        """Let process 0 know of a signal."""
        self._set(f"signal/{self.process_id}", str(number))

    def signalled(self) -> int | None:
        """Return the number of a signal that another process was given, as far as is known; None without one."""
        self.watch()
        return self._signal

    def watch(self) -> bool:
        """Ask after the others, unless that was just done. Raises what one left for, Left or Stopped; else False, for
        all is well."""
        if time.monotonic() - self._asked >= ASK_SECONDS:
            self._asked = time.monotonic()
            self._raise_of_those_who_left()
            if self.leads:
                self._signal = next((int(number) for _, number in self._list("signal/")), None)
        return False

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what JAX raises in the body where another process went away into that one's reason, or into
        LostProcessError."""
        try:
            yield
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            if not re.search(OF_THE_CONNECTION, str(error)):
                raise
            self._lost(error)

    def result(self, future: Future) -> Any:
        """Return what a future gives, as long as the others are there."""
        while not future.done():
            self.watch()
            wait([future], timeout=ASK_SECONDS)
        return future.result()

    @contextlib.contextmanager
    def parting(self) -> Iterator[None]:
        """Let the others know why this process leaves, if the body raises; else part when all are at the end."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, LostProcessError):
                with contextlib.suppress(LostProcessError):
                    self._leave(error)
            raise
        with self.explained():
            jax.distributed.shutdown()

    def _leave(self, error: BaseException) -> None:
        """Write down why this process leaves, unless it does so for another's reason; process 0 waits for the others to
        read it, for the store ends with it."""
        if not isinstance(error, Left):
            number = error.number if isinstance(error, Stopped) else None
            status, message = outcome(error) or (1, f"{type(error).__name__}: {error}")
            self._set(f"left/{self.process_id}", json.dumps([status, number, message]))
        deadline = time.monotonic() + PART_SECONDS
        while self.leads and len(self._know()) < self.num_processes and time.monotonic() < deadline:
            time.sleep(ASK_SECONDS / 5)
        time.sleep(LAST_SECONDS if self.leads else 0)

    def _know(self) -> set[int]:
        """Return the processes that know that one left, this one among them."""
        return {_process(key) for key, _ in (*self._list("left/"), *self._list("read/"))} | {self.process_id}

    def _raise_of_those_who_left(self) -> None:
        for key, content in self._list("left/"):
            process, (status, number, message) = _process(key), json.loads(content)
            if process == self.process_id:
                continue
            self._set(f"read/{self.process_id}", "")
            if number:
                raise Stopped(number, f"process {process} left: {message}")
            raise Left(process, status, message)

    def _lost(self, error: Exception) -> NoReturn:
        deadline = time.monotonic() + 2 * ASK_SECONDS
        while time.monotonic() < deadline:  # whoever left may be about to say why
            self._raise_of_those_who_left()
            time.sleep(ASK_SECONDS / 5)
        raise LostProcessError(f"another process of the run is gone ({_first_line(error)}); {AGAIN}") from None

    def _wait_for(self, name: str, meanwhile: Callable[[], Any] = lambda: None) -> str:
        while True:
            try:
                return self.client.blocking_key_value_get(_key(name), int(ASK_SECONDS * 1000))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    self._gone(error)
            meanwhile()
            self.watch()

    def _list(self, name: str) -> list[tuple[str, str]]:
        with self._reached():
            return self.client.key_value_dir_get(_key(name))
        return []

    def _set(self, name: str, content: str) -> None:
        with self._reached():
            self.client.key_value_set(_key(name), content, allow_overwrite=True)

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            self._gone(error)

    def _gone(self, error: Exception) -> NoReturn:
        raise LostProcessError(f"process 0 of the run is gone ({_first_line(error)}); {AGAIN}") from None


def join(
    *,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    connect: int,
    heartbeat: int,
    say: Callable[[str], None] = lambda text: None,
) -> Group:
    """Meet the other processes of the run, within `connect` seconds, and return the group that they are.

    What is None is what Slurm, Kubernetes, Cloud TPU or Open MPI say. Raises UserError where nothing says it or the
    port is taken, LostProcessError when time is up. A process that is not heard of for `heartbeat` seconds ends all.
    What takes long is told to `say`.
    """
    if coordinator and process_id == 0:
        _check_free(coordinator)
    named = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    if coordinator:
        named |= {"cluster_detection_method": "deactivate", "coordinator_bind_address": _bound(coordinator)}
    times = {"initialization_timeout": NEVER, "heartbeat_timeout_seconds": heartbeat}
    meeting = in_background(lambda: jax.distributed.initialize(**named, **times))
    try:
        if connect > SOON_SECONDS and not wait([meeting], timeout=SOON_SECONDS).done:
            where = f" to meet at {coordinator}" if coordinator else ""
            say(f"waiting for the other processes of the run{where}, for up to {connect} s ...")
        meeting.result(timeout=connect - SOON_SECONDS * (connect > SOON_SECONDS))
    except TimeoutError:
        raise LostProcessError(_not_met(coordinator, process_id, connect)) from None
    except ValueError as error:
        raise UserError(
            f"--distributed finds no Slurm, Kubernetes, Cloud TPU or Open MPI here ({_first_line(error)}); give "
            "--coordinator HOST:PORT, --num-processes and --process-id"
        ) from None
    except RuntimeError as error:
        if re.search(OF_THE_CONNECTION, str(error)):
            raise LostProcessError(
                f"the processes of the run lost one another as they met ({_first_line(error)}); {AGAIN}"
            ) from None
        raise UserError(
            f"the processes of the run cannot meet: {_first_line(error)}; see that each is named once"
        ) from None
    raise_on_signals()  # JAX has taken SIGTERM, and does nothing with it
    _silence_gloo()
    from jax._src.distributed import global_state  # JAX makes its key-value store no more public than this

    return Group(global_state.process_id, global_state.num_processes, global_state.client)


def _check_free(coordinator: str) -> None:
    """Raise UserError unless the port can be had: JAX crashes where it cannot."""
    host, port = _bound(coordinator).rsplit(":", 1)
    try:
        socket.create_server((host.strip("[]"), int(port)), family=_family(host)).close()
    except OSError as error:
        # What is wrong with a name has a number of its own, below 0.
        reason = os.strerror(error.errno) if (error.errno or 0) > 0 else error.strerror
        raise UserError(
            f"--coordinator {coordinator} cannot be opened here: {reason}; see that no other process 0 is started, or "
            "name another port"
        ) from None


def _bound(coordinator: str) -> str:
    """Return the address that process 0 listens at: every one of its machine's, unless it is asked for this machine
    alone."""
    host, port = coordinator.rsplit(":", 1)
    local = host in ("localhost", "[::1]") or host.startswith("127.")
    everywhere = "[::]" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104 - the others are on other machines
    return coordinator if local else f"{everywhere}:{port}"


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if host.startswith("[") else socket.AF_INET


def _not_met(coordinator: str | None, process_id: int | None, connect: int) -> str:
    more = (
        "see that all are started, with the same --num-processes and each with a --process-id of its own, or give "
        "--connect-timeout more"
    )
    if not coordinator:
        return f"not all processes of the run came within {connect} s; {more}"
    host, port = coordinator.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError as error:
        here = (
            "the name or address of this machine"
            if process_id == 0
            else "right and open, and that process 0 is started"
        )
        return (
            f"--coordinator {coordinator} was not reached within {connect} s ({error.strerror or error}); see that its "
            f"address is {here}, or give --connect-timeout more"
        )
    return f"{coordinator} is reached, but not all processes of the run came within {connect} s; {more}"


def _silence_gloo() -> None:
    """Part Python's standard output from that of the libraries: what joins CPUs says so there, line by line."""
    sys.stdout.flush()
    own = os.dup(1)
    os.set_inheritable(own, False)
    sys.stdout = os.fdopen(
        own, "w", buffering=1 if os.isatty(own) else -1, encoding=sys.stdout.encoding, errors=sys.stdout.errors
    )
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _differing(given: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each fact in which a process differs from the first."""
    wanted = given[0]
    return [
        f"{name}: {wanted.get(name)} in process 0, {facts.get(name)} in process {process}"
        for process, facts in enumerate(given)
        for name in {**wanted, **facts}
        if wanted.get(name) != facts.get(name)
    ]


def _key(name: str) -> str:
    return f"lockstep/{name}"


def _process(key: str) -> int:
    return int(key.rsplit("/", 1)[1])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

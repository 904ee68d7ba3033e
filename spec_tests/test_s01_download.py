"""S1, R8: a download is verified, bounded and shared; the cache never holds a bad file, whatever the server does."""

from __future__ import annotations

import dataclasses
import gzip
import multiprocessing
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from spec.datasets import cache, sources
from spec.datasets.catalog import IdxSet
from spec.errors import DataError
from spec_tests import at_once
from spec_tests.conftest import CONTENTS


class Server(ThreadingHTTPServer):
    """Serves the tiny data set, misbehaving as `behaviour` says; counts its requests."""

    daemon_threads = True
    behaviour = "good"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        self.released = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1].removesuffix(".gz")
        self.server.requests.append(name)
        body = gzip.compress(CONTENTS[name])
        match self.server.behaviour:
            case "404":
                self.send_error(404)
            case "500":
                self.send_error(500)
            case "500 once" if len(self.server.requests) == 1:
                self.send_error(500)
            case "hang":
                self.server.released.wait(30)
            case "late":
                self.server.released.wait(0.2)
                self.send(body)
            case "cut":
                self.send(body[: len(body) // 2], length=len(body))
            case "false length, too long":
                self.send(body, length=len(body) + 100)
            case "false length, too short":
                self.send(body, length=len(body) - 10)
            case "length that is no number":
                self.send(body, length="9" * 5_000)
            case "wrong bytes":
                self.send(gzip.compress(b"<html>not what you asked for</html>"))
            case "another file":
                self.send(gzip.compress(CONTENTS["t10k-labels-idx1-ubyte"]))
            case "redirect to a file":
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd")
                self.end_headers()
            case "redirect without end":
                self.send_response(302)
                self.send_header("Location", self.path)
                self.end_headers()
            case "slow":
                self.send_response(200)
                self.end_headers()
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    if self.server.released.wait(0.05):
                        return
            case "endless":
                self.send_response(200)
                self.end_headers()
                while not self.server.released.is_set():
                    self.wfile.write(bytes(1 << 16))
            case "no http":
                self.wfile.write(b"hello\r\n\r\n")
            case _:
                self.send(body)

    def send(self, body: bytes, *, length: int | str | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client leaves, as it should
            super().handle()


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(sources, "SOCKET_SECONDS", 0.5)
    monkeypatch.setattr(sources, "FILE_SECONDS", 1)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def served(tiny: IdxSet, server: Server) -> IdxSet:
    return dataclasses.replace(tiny, mirrors=(f"http://127.0.0.1:{server.server_port}/data",))


def cached(tiny: IdxSet) -> dict[str, bytes]:
    folder = cache.raw_folder(tiny)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


SERVERS = "R8 behaviours of a server"


@pytest.mark.parametrize("behaviour", ["good", "500 once", "late"])
def test_a_good_download_fills_the_cache(tiny, server, behaviour, counted):
    server.behaviour = behaviour
    sources.ensure(served(tiny, server))
    assert cached(tiny) == CONTENTS
    counted(SERVERS, 1)


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("404", "HTTP Error 404"),
        ("500", "HTTP Error 500"),
        ("hang", "timed out"),
        ("cut", "sent [0-9,]+ of [0-9,]+ bytes"),
        ("false length, too long", "sent [0-9,]+ of [0-9,]+ bytes"),
        ("false length, too short", "gave a wrong file: train-images-idx3-ubyte cannot be read"),
        ("length that is no number", "integer string conversion"),
        ("wrong bytes", "gave a wrong file: train-images-idx3-ubyte is cut short"),
        ("another file", "gave a wrong file: train-images-idx3-ubyte is mislabelled"),
        ("redirect to a file", "is not allowed"),
        ("redirect without end", "infinite loop"),
        ("slow", "took over 1 s"),
        ("endless", "sent over 70,256 bytes"),
        ("no http", "hello"),
    ],
)
def test_whatever_the_server_does_the_cache_holds_no_file(tiny, server, behaviour, said, counted):
    server.behaviour = behaviour
    start = time.monotonic()
    with pytest.raises(DataError, match=said):
        sources.ensure(served(tiny, server))
    assert time.monotonic() - start < 20
    assert cached(tiny) == {}
    server.behaviour = "good"
    sources.ensure(served(tiny, server))
    assert cached(tiny) == CONTENTS
    counted(SERVERS, 1)


def test_the_next_mirror_serves_when_the_first_is_down(tiny, server):
    good = served(tiny, server)
    sources.ensure(dataclasses.replace(good, mirrors=("http://127.0.0.1:9/closed", *good.mirrors)))
    assert cached(tiny) == CONTENTS


def test_only_the_missing_files_are_downloaded(tiny, server):
    cache.raw_folder(tiny).mkdir(parents=True)
    (cache.raw_folder(tiny) / "train-images-idx3-ubyte").write_bytes(CONTENTS["train-images-idx3-ubyte"])
    sources.ensure(served(tiny, server))
    assert sorted(server.requests) == sorted(set(CONTENTS) - {"train-images-idx3-ubyte"})


def test_eight_processes_at_once_share_one_download(tiny, server, counted):
    server.behaviour = "late"  # the first holds the lock while the others come
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(8)
    processes = [context.Process(target=at_once.ensure, args=(served(tiny, server), together)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert cached(tiny) == CONTENTS
    assert sorted(server.requests) == sorted(CONTENTS)
    counted("R8 processes that share a download", len(processes))


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    from spec import files

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def fake_apt(tmp_path, monkeypatch) -> Path:
    """An apt-get whose `download` works only with package lists of its own, and a dpkg-deb that unpacks a folder."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    share = tmp_path / "package" / "usr" / "share" / "datasets" / "fashion-mnist"
    share.mkdir(parents=True)
    for name, content in CONTENTS.items():
        (share / f"{name}.gz").write_bytes(gzip.compress(content))
    calls = tmp_path / "calls"
    (binaries / "apt-get").write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\n'
        'case "$*" in *Dir::State=*) ;; *) echo "E: Unable to locate package" >&2; exit 100;; esac\n'
        'case "$*" in *download*) touch dataset-fashion-mnist_1_all.deb;; esac\n'
    )
    (binaries / "dpkg-deb").write_text(f'#!/bin/sh\ncp -r {tmp_path / "package"} "$3"\n')
    for name in ("apt-get", "dpkg-deb"):
        (binaries / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    return calls


def test_apt_fetches_lists_of_its_own_when_the_systems_are_empty(tiny, fake_apt):
    debian = dataclasses.replace(tiny, debian_package="dataset-fashion-mnist")
    assert sources.from_apt(debian, list(debian.files)) == CONTENTS
    first, update, download = fake_apt.read_text().splitlines()
    assert first.endswith("download dataset-fashion-mnist")
    assert update.endswith("update")
    assert "Dir::State=/" in update
    assert "Dir::State=/" in download


def test_apt_that_fails_or_is_not_there_is_a_reason_not_a_traceback(tiny, monkeypatch):
    debian = dataclasses.replace(tiny, debian_package="dataset-fashion-mnist")

    def fail(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(100, command, output="", stderr="E: no network\n")

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(sources.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(DataError, match="apt-get failed: E: no network"):
        sources.from_apt(debian, list(debian.files))
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="this system has no apt-get"):
        sources.from_apt(debian, list(debian.files))

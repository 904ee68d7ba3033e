"""Where an idx data set can come from. Each source returns verified contents by file name, or raises DataError.

Order: the cache; a directory the user names; the system's package; https mirrors; the package by apt, without root.
"""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from spec.datasets import cache
from spec.datasets.catalog import IDX_SETS, IdxFile, IdxSet
from spec.errors import DataError

SYSTEM_FOLDER = Path("/usr/share/datasets")
SOCKET_SECONDS = 10
FILE_SECONDS = 300
APT_SECONDS = 300
TRIES = 2
CHUNK_BYTES = 1 << 16

Contents = dict[str, bytes]
Source = Callable[[IdxSet, list[IdxFile]], Contents]


def ensure(idx_set: IdxSet, *, data_dir: Path | None = None, repair: bool = False) -> None:
    """Make sure that the cache holds the set's files, fetching those it lacks (and, with `repair`, damaged ones).

    A directory the user names must hold good files even where the cache has them already: a damaged file that was
    named must not hide behind a good one that was not. Its files mend a damaged cache.
    """
    named = from_directory(data_dir)(idx_set, list(idx_set.files)) if data_dir else None
    repair = repair or named is not None
    if not _lacking(idx_set, repair=repair):
        return
    with cache.lock(idx_set):
        if lacking := _lacking(idx_set, repair=repair):
            contents = named or _first_that_works(idx_set, lacking, sources())
            cache.store(idx_set, {file.name: contents[file.name] for file in lacking})


def sources() -> dict[str, Source]:
    """Return the sources after the cache and the named directory, in order, under names for messages."""
    return {
        "the system's package": from_system_package,
        "https mirrors": from_mirrors,
        "apt-get download": from_apt,
    }


def _lacking(idx_set: IdxSet, *, repair: bool) -> list[IdxFile]:
    if not repair:
        return cache.missing_files(idx_set)
    bad = cache.damage(idx_set)
    return [file for file in idx_set.files if file.name in bad]


def _first_that_works(idx_set: IdxSet, files: list[IdxFile], tried: dict[str, Source]) -> Contents:
    reasons = []
    for name, source in tried.items():
        try:
            return source(idx_set, files)
        except DataError as error:
            reasons.append(f"  {name}: {error}")
    raise DataError(
        f"the cache {cache.raw_folder(idx_set)} lacks good files of {idx_set.title}, and no source has them:\n"
        + "\n".join(reasons)
        + "\nGet its four idx files, and name their directory with --data-dir DIR, or put them there; "
        "`--recipe digits` runs with no download"
    )


def from_directory(directory: Path) -> Source:
    """Return the source that reads `directory`: idx files, plain or gzip, in it or in torchvision's folders below."""

    def source(idx_set: IdxSet, files: list[IdxFile]) -> Contents:
        if not os.path.isdir(directory):
            raise DataError(
                f"--data-dir {directory} is not a directory; name one that holds {idx_set.title}'s idx files"
            )
        places = (directory, directory / "raw", directory / idx_set.folder / "raw")
        return {file.name: _read_found(_find(places, file), file) for file in files}

    return source


def _find(places: Iterable[Path], file: IdxFile) -> Path:
    candidates = [place / name for place in places for name in (file.name, f"{file.name}.gz")]
    for path in candidates:
        if os.path.exists(path):
            return path
    raise DataError(f"{candidates[0]} is missing, and so is {candidates[1].name}; put either there")


def _read_found(path: Path, file: IdxFile) -> bytes:
    try:
        return cache.read_verified(path, file)
    except DataError as error:
        raise DataError(f"{error}; put a good copy there, or leave --data-dir out to fetch one") from None


def from_system_package(idx_set: IdxSet, files: list[IdxFile]) -> Contents:
    """Read what the system's package manager installed under /usr/share/datasets."""
    if idx_set.debian_package is None:
        raise DataError(f"there is none for {idx_set.title}")
    folder = SYSTEM_FOLDER / idx_set.debian_package.removeprefix("dataset-")
    if not os.path.isdir(folder):
        raise DataError(f"{idx_set.debian_package} is not installed")
    return {file.name: cache.read_verified(_find((folder,), file), file) for file in files}


def from_mirrors(idx_set: IdxSet, files: list[IdxFile]) -> Contents:
    """Download from the first of the set's mirrors that gives every file, verified."""
    reasons = []
    for mirror in idx_set.mirrors:
        try:
            return {file.name: _download_verified(f"{mirror}/{file.name}.gz", file) for file in files}
        except DataError as error:
            reasons.append(str(error))
    raise DataError("; ".join(reasons) or "there is none")


def _download_verified(url: str, file: IdxFile) -> bytes:
    with tempfile.TemporaryDirectory(prefix="lockstep-") as folder:
        path = Path(folder) / f"{file.name}.gz"
        _download(url, path, limit=file.num_bytes + CHUNK_BYTES)
        try:
            return cache.read_verified(path, file)
        except DataError as error:
            raise DataError(f"{url} gave a wrong file: {str(error).replace(str(path), file.name)}") from None


def _download(url: str, path: Path, *, limit: int) -> None:
    """Save `url` at `path` within `limit` bytes and `FILE_SECONDS`, in at most `TRIES` tries, with a progress bar."""
    for attempt in range(1, TRIES + 1):
        try:
            _download_once(url, path, limit=limit)
            return
        except (OSError, http.client.HTTPException, ValueError) as error:
            if attempt == TRIES or getattr(error, "code", 0) in range(400, 500):
                raise DataError(f"{url}: {error}") from None


def _download_once(url: str, path: Path, *, limit: int) -> None:
    deadline = time.monotonic() + FILE_SECONDS
    response = urllib.request.urlopen(url, timeout=SOCKET_SECONDS)  # noqa: S310 -- the catalog's own addresses
    with response, path.open("wb") as file, _bar() as bar:
        stated = response.headers.get("Content-Length", "")
        total = int(stated) if stated.isdecimal() else None
        task = bar.add_task(url.rsplit("/", 1)[-1], total=total)
        received = 0
        while chunk := response.read1(CHUNK_BYTES):
            received += file.write(chunk)
            bar.update(task, completed=received)
            if received > limit:
                raise DataError(f"{url} sent over {limit:,} bytes; the file is smaller")
            if time.monotonic() > deadline:
                raise DataError(f"{url} took over {FILE_SECONDS} s")
        if total is not None and received != total:
            raise DataError(f"{url} sent {received:,} of {total:,} bytes")


def _bar() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def from_apt(idx_set: IdxSet, files: list[IdxFile]) -> Contents:
    """Download and unpack Debian's package in a temporary folder, with package lists of its own: no root needed."""
    package = idx_set.debian_package
    if package is None:
        raise DataError(f"Debian has no package of {idx_set.title}")
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise DataError("this system has no apt-get")
    print(f"fetching Debian's package {package} with apt-get ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="lockstep-") as name:
        folder = Path(name)
        try:
            _apt_get_download(package, folder)
        except DataError:
            _apt_get_download(package, folder, own_lists=True)
        (archive,) = folder.glob(f"{package}_*.deb")
        _run(["dpkg-deb", "-x", archive.name, "unpacked"], folder)
        found = folder / "unpacked" / SYSTEM_FOLDER.relative_to("/") / package.removeprefix("dataset-")
        return {file.name: cache.read_verified(_find((found,), file), file) for file in files}


def _apt_get_download(package: str, folder: Path, *, own_lists: bool = False) -> None:
    command = ["apt-get", "--quiet", "-o", "APT::Sandbox::User=root"]
    if own_lists:
        for needed in ("state/lists/partial", "cache/archives/partial"):
            (folder / needed).mkdir(parents=True)
        command += ["-o", f"Dir::State={folder}/state", "-o", "Dir::State::status=/var/lib/dpkg/status"]
        command += ["-o", f"Dir::Cache={folder}/cache"]
        _run([*command, "update"], folder)
    _run([*command, "download", package], folder)


def _run(command: list[str], folder: Path) -> None:
    environment = os.environ | {"LC_ALL": "C"}
    try:
        subprocess.run(
            command, cwd=folder, env=environment, check=True, capture_output=True, text=True, timeout=APT_SECONDS
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or error.stdout.strip() or "no message").splitlines()[-1]
        raise DataError(f"{command[0]} failed: {last}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"{command[0]} failed: {error}") from None


def fetch(name: str, *, data_dir: Path | None = None) -> Path:
    """Fetch the named set into the cache, mending damaged files; return the folder of its files."""
    ensure(IDX_SETS[name], data_dir=data_dir, repair=True)
    return cache.raw_folder(IDX_SETS[name])

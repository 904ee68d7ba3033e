"""R6: whatever an idx or gz file holds, a reader gives exactly its content or our data error, in 1 s and 256 MB."""

from __future__ import annotations

import contextlib
import gzip
import os
import resource
import signal
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import pytest

import torch_ref.data
from spec import datasets
from spec.datasets import cache, idx
from spec.datasets.catalog import IDX_SETS, IdxFile
from spec.errors import DataError
from spec.recipe import Data
from spec_tests.conftest import CONTENTS, idx_bytes

INPUTS = "R6 idx and gz inputs"
SECONDS = 1.0
BYTES = 256 * 2**20
MUTATIONS = 10_000
FAST_MUTATIONS = 500

LABELS, IMAGES = "train-labels-idx1-ubyte", "train-images-idx3-ubyte"
LABEL_BYTES, IMAGE_BYTES = CONTENTS[LABELS], CONTENTS[IMAGES]
LOADERS = (datasets.load, torch_ref.data.load)


# What a reader may take


def address_space() -> int:
    """Return the bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def stop(_signal: int, _frame: FrameType | None) -> None:
    pytest.fail("took too long")  # no Exception: nothing that is read handles it


@contextlib.contextmanager
def bounded(*, seconds: float = SECONDS, memory: int = BYTES) -> Iterator[None]:
    """Fail the test when its body takes longer, even blocked in the system; refuse it more memory, from here on."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + memory, before[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def content_or_refusal(read: Callable[[], np.ndarray]) -> bytes | str:
    """Return the idx content of the array that `read` gives, or what its DataError says; no other error is caught."""
    with bounded():
        try:
            array = read()
        except DataError as error:
            return str(error)
    return idx_bytes(array)


def test_a_reader_that_takes_too_long_fails_even_when_it_is_blocked():
    for blocked in (lambda: time.sleep(60), lambda: [None for _ in iter(int, 1)]):
        with pytest.raises(pytest.fail.Exception, match="took too long"), bounded(seconds=0.05):
            blocked()


def test_a_reader_that_takes_too_much_memory_fails_and_the_next_has_all_of_it_again():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError):
        content_or_refusal(lambda: np.zeros(BYTES * 64, np.uint8))  # more than a long-lived process has at hand
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    with bounded(memory=2 * BYTES):
        assert np.zeros(BYTES * 9 // 8, np.uint8).nbytes > BYTES


def test_an_error_that_is_not_ours_is_no_refusal():
    with pytest.raises(zlib.error):
        content_or_refusal(lambda: np.frombuffer(zlib.decompress(b"no"), np.uint8))


# Files made by hand


def header(magic: bytes, *sizes: int) -> bytes:
    return magic + struct.pack(f">{len(sizes)}I", *sizes)


def written(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def zipped(content: bytes, *, flags: int = 0, fields: bytes = b"") -> bytes:
    """Return `content` as gzip, its header's flags and their fields as given."""
    plain = gzip.compress(content, mtime=0)
    return plain[:3] + bytes([flags]) + plain[4:10] + fields + plain[10:]


def sparse(path: Path, start: bytes = b"") -> None:
    path.write_bytes(start)
    os.truncate(path, 1 << 36)


def loop(path: Path) -> None:
    path.symlink_to(path)


def linked(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


ONE, THREE = b"\0\0\x08\x01", b"\0\0\x08\x03"  # magics of unsigned bytes: labels, images
SIX = header(ONE, 6)
BODY, PIXELS = LABEL_BYTES[8:], IMAGE_BYTES[16:]
GOOD = "right"
GZ = zipped(LABEL_BYTES)
RESERVED, EXTRA, NAMED, COMMENTED = 0xE0, 4, 8, 16  # flags of a gzip header
SPLIT = b"".join(zipped(bytes([byte])) for byte in LABEL_BYTES)

# What is put in the place of which file; what is said of it where its sha256 is not looked at.
LABELS_BY_HAND: dict[str, tuple[Callable[[Path], object], str]] = {
    "as it should be": (written(LABEL_BYTES), GOOD),
    "empty": (written(b""), "is empty"),
    "one byte": (written(b"\0"), "has 1 bytes; an idx file of rank 1 has a header of 8"),
    "magic alone": (written(ONE), "has 4 bytes; an idx file of rank 1"),
    "header cut": (written(SIX[:7]), "has 7 bytes; an idx file of rank 1"),
    "header alone": (written(SIX), "has 8 bytes; its header says 14"),
    "a label too few": (written(LABEL_BYTES[:-1]), "has 13 bytes; its header says 14"),
    "a label too many": (written(LABEL_BYTES + b"\1"), "holds over 14 bytes"),
    "trailing newline": (written(LABEL_BYTES + b"\n"), "holds over 14 bytes"),
    "twice": (written(LABEL_BYTES * 2), "holds over 14 bytes"),
    "first byte not zero": (written(b"\1" + LABEL_BYTES[1:]), "starts with 01 00 08 01"),
    "signed bytes": (written(header(b"\0\0\x09\x01", 6) + BODY), "starts with 00 00 09 01"),
    "no element type": (written(header(b"\0\0\0\x01", 6) + BODY), "starts with 00 00 00 01"),
    "float elements": (written(header(b"\0\0\x0d\x01", 6) + BODY), "starts with 00 00 0d 01"),
    "rank 0": (written(header(b"\0\0\x08\0", 6) + BODY), "starts with 00 00 08 00"),
    "rank 3": (written(header(THREE, 6) + BODY), "starts with 00 00 08 03"),
    "rank 255": (written(header(b"\0\0\x08\xff", 6) + BODY), "starts with 00 00 08 ff"),
    "little-endian": (written(ONE + struct.pack("<I", 6) + BODY), "its header says 100,663,304"),
    "size 0": (written(header(ONE, 0)), r"holds shape [0]; train-labels-idx1-ubyte has [6]"),
    "size 0 before labels": (written(header(ONE, 0) + BODY), "has 14 bytes; its header says 8"),
    "size too small": (written(header(ONE, 5) + BODY), "its header says 13"),
    "size too large": (written(header(ONE, 7) + BODY), "its header says 15"),
    "size beyond signed": (written(header(ONE, 2**31) + BODY), "its header says 2,147,483,656"),
    "size largest": (written(header(ONE, 2**32 - 1) + BODY), "its header says 4,294,967,303"),
    "fewer labels": (written(header(ONE, 5) + BODY[:5]), "holds shape [5]"),
    "label 10": (written(SIX + BODY[:5] + b"\x0a"), "holds the label 10; labels run from 0 to 9"),
    "label 255": (written(SIX + BODY[:5] + b"\xff"), "holds the label 255"),
    "a web page": (written(b"<html>log in"), "starts with 3c 68 74 6d"),
    "text with a mark": (written("\ufeff0 1 2".encode()), "starts with ef bb bf 30"),
    "gzip": (written(GZ), GOOD),
    "gzip, named": (written(zipped(LABEL_BYTES, flags=NAMED, fields=b"train\0")), GOOD),
    "gzip, extra field": (written(zipped(LABEL_BYTES, flags=EXTRA, fields=b"\3\0abc")), GOOD),
    "gzip, extra field cut": (written(zipped(b"", flags=EXTRA, fields=b"\xff\xff")), "cannot be read"),
    "gzip, name without end": (written(zipped(b"", flags=NAMED)[:10] + b"n" * 10**4), "cannot be read"),
    "gzip, two members": (written(zipped(LABEL_BYTES[:5]) + zipped(LABEL_BYTES[5:])), GOOD),
    "gzip, a member a byte": (written(SPLIT), GOOD),
    "gzip, empty members between": (written(zipped(b"") + GZ + zipped(b"")), GOOD),
    "gzip, zeros behind": (written(GZ + bytes(10**4)), GOOD),
    "gzip, zeros between members": (written(zipped(SIX) + bytes(3) + zipped(BODY)), GOOD),
    "gzip, bytes behind": (written(GZ + b"more"), "cannot be read"),
    "gzip, second member cut": (written(zipped(SIX) + zipped(BODY)[:-1]), "cannot be read"),
    "gzip, twice": (written(GZ * 2), "holds over 14 bytes"),
    "gzip of nothing": (written(zipped(b"")), "is empty"),
    "gzip, magic alone": (written(GZ[:2]), "cannot be read"),
    "gzip, header cut": (written(GZ[:9]), "cannot be read"),
    "gzip, data cut": (written(GZ[:14]), "cannot be read"),
    "gzip, checksum cut": (written(GZ[:-6]), "cannot be read"),
    "gzip, length cut": (written(GZ[:-1]), "cannot be read"),
    "gzip, wrong checksum": (written(GZ[:-8] + b"\0" + GZ[-7:]), "cannot be read"),
    "gzip, wrong length": (written(GZ[:-4] + b"\0" + GZ[-3:]), "cannot be read"),
    "gzip, no known method": (written(GZ[:2] + b"\7" + GZ[3:]), "cannot be read"),
    "gzip, reserved flags": (written(zipped(LABEL_BYTES, flags=RESERVED)), "cannot be read"),
    "gzip bomb": (written(zipped(bytes(10**6)) * 1_000), "is gzip, and larger than the 14 bytes"),
    "gzip bomb, small": (written(zipped(bytes(10**7))), "holds over 14 bytes"),
    "directory": (Path.mkdir, "is not a regular file"),
    "fifo": (os.mkfifo, "is not a regular file"),
    "link to itself": (loop, "is not a regular file"),
    "link to nothing": (linked("nowhere"), "is not a regular file"),
    "link to a directory": (linked("."), "is not a regular file"),
    "link to a device without end": (linked("/dev/zero"), "is not a regular file"),
    "unreadable, to root as well": (linked("/proc/self/mem"), "cannot be read"),
    "sparse": (sparse, "holds over 14 bytes"),
    "sparse gzip": (lambda path: sparse(path, GZ), "is gzip, and larger than the 14 bytes"),
}

IMAGES_BY_HAND: dict[str, tuple[Callable[[Path], object], str]] = {
    "images as they should be": (written(IMAGE_BYTES), GOOD),
    "images' size wraps at 32 bits": (written(header(THREE, 6, 28, 28 + 2**29) + PIXELS), "its header says 90,194,31"),
    "images' size wraps at 64 bits": (written(header(THREE, 2**31, 2**31, 4)), "its header says 18,446,744,073,709,55"),
    "none, but vast": (written(header(THREE, 0, 2**32 - 1, 2**32 - 1)), "which no array can have"),
    "none": (written(header(THREE, 0, 28, 28)), "holds shape [0, 28, 28]"),
    "dimensions changed about": (written(header(THREE, 28, 6, 28) + PIXELS), "holds shape [28, 6, 28]"),
    "rows in one": (written(header(THREE, 6, 784, 1) + PIXELS), "holds shape [6, 784, 1]"),
    "rank 4": (written(header(b"\0\0\x08\x04", 6, 28, 28, 1) + PIXELS[4:]), "starts with 00 00 08 04"),
    "labels for images": (written(LABEL_BYTES), "has 14 bytes; an idx file of rank 3 has a header of 16"),
    "lines ended anew": (written(IMAGE_BYTES.replace(b"\n", b"\r\n")), "holds over 4,720 bytes"),
    "gzip in gzip": (written(zipped(zipped(IMAGE_BYTES))), "starts with 1f 8b 08 00"),
    "a picture": (written(b"\x89PNG\r\n\x1a\n" + bytes(99)), "starts with 89 50 4e 47"),
}

BY_HAND = {name: (LABELS, *case) for name, case in LABELS_BY_HAND.items()}
BY_HAND |= {name: (IMAGES, *case) for name, case in IMAGES_BY_HAND.items()}
PLAIN = ("as it should be", "images as they should be")  # what torchvision can read too, in the cache


@pytest.mark.parametrize("name", BY_HAND)
def test_a_file_made_by_hand_is_parsed_or_refused_with_what_is_wrong(name, tiny, tmp_path, counted):
    of, make, said = BY_HAND[name]
    (file,) = (file for file in tiny.files if file.name == of)
    make(tmp_path / of)
    found = content_or_refusal(lambda: unverified(tmp_path / of, file))
    if said == GOOD:
        assert found == CONTENTS[of]
    else:
        assert str(tmp_path / of) in found
        assert said in found
    counted(INPUTS, 1)


@pytest.mark.parametrize("place", ["in a named directory", "in the cache"])
@pytest.mark.parametrize("name", BY_HAND)
def test_a_data_set_with_a_file_made_by_hand_is_the_right_one_or_refused(name, place, tiny, tmp_path):
    of, make, said = BY_HAND[name]
    named = tmp_path / "named" if place == "in a named directory" else None
    folder = named or cache.raw_folder(tiny)
    folder.mkdir(parents=True)
    for other in set(CONTENTS) - {of}:
        (folder / other).write_bytes(CONTENTS[other])
    make(folder / of)
    part = "labels" if of == LABELS else "inputs"
    for load in LOADERS:
        found = content_or_refusal(lambda load=load: flat(load(Data(name="fashion_mnist"), data_dir=named), part))
        if said == GOOD and (named or name in PLAIN):
            assert found == CONTENTS[of]
        else:
            assert str(folder) in found
            assert not named or not list((tmp_path / "cache").rglob("*ubyte"))


def flat(dataset: datasets.Dataset, part: str) -> np.ndarray:
    """Return what the idx file of the training split's labels or inputs holds."""
    array = getattr(dataset.train, part)
    return array.astype(np.uint8) if part == "labels" else array[..., 0]


def unverified(path: Path, file: IdxFile) -> np.ndarray:
    """Read a file as the cache does, but for its sha256: the parser stands alone against what is in it."""
    return file.parse(idx.read_bytes(path, limit=file.num_bytes), source=str(path))


# Files as large as a real one may be

REAL = IDX_SETS["fashion_mnist"].files[0]
MANY = 40_000_000
EMPTY_BLOCK = b"\0\0\0\xff\xff"  # of deflate, stored

VAST: dict[str, tuple[Callable[[Path], object], str]] = {
    "a name without end": (written(zipped(b"", flags=NAMED)[:10] + b"n" * MANY), "cannot be read"),
    "a comment without end": (written(zipped(b"", flags=COMMENTED)[:10] + b"n" * MANY), "cannot be read"),
    "empty members": (written(zipped(b"") * (MANY // len(zipped(b"")))), "it is over 10,000 gzip files in one"),
    "members of a byte": (written(zipped(b"a") * (MANY // len(zipped(b"a")))), "it is over 10,000 gzip files"),
    "empty blocks": (written(GZ[:10] + EMPTY_BLOCK * (MANY // len(EMPTY_BLOCK))), "cannot be read"),
    "zeros behind": (written(GZ + bytes(MANY)), "is cut short: it holds 14 of"),
    "a bomb of 1 GB": (written(zipped(bytes(10**6)) * 1_000), "holds over 47,040,016 bytes"),
    "a hole of 64 GB": (sparse, "holds over 47,040,016 bytes"),
    "a hole of 64 GB behind gzip": (lambda path: sparse(path, GZ), "is gzip, and larger than the 47,040,016 bytes"),
    "sizes of 79 octillion": (written(header(THREE, *[2**32 - 1] * 3)), "is cut short: it holds 16 of"),
    "all zeros": (written(zipped(bytes(REAL.num_bytes))), "is damaged: its sha256 is"),
}


@pytest.mark.parametrize("name", VAST)
def test_a_file_that_is_vast_or_says_so_is_refused_in_time_where_the_real_one_is_large(name, tmp_path, counted):
    make, said = VAST[name]
    make(tmp_path / IMAGES)
    found = content_or_refusal(lambda: REAL.parse(cache.read_verified(tmp_path / IMAGES, REAL), source=IMAGES))
    assert said in found
    counted(INPUTS, 1)


def test_the_largest_real_file_is_read_in_time_however_badly_it_compresses(tmp_path, counted):
    elements = np.random.default_rng(0).integers(0, 256, REAL.shape, dtype=np.uint8)
    content = idx_bytes(elements)
    (tmp_path / IMAGES).write_bytes(gzip.compress(content, 0))
    assert (tmp_path / IMAGES).stat().st_size > len(content)
    assert content_or_refusal(lambda: unverified(tmp_path / IMAGES, REAL)) == content
    counted(INPUTS, 1)


# Files changed at random

BASES = [(name, content) for name in (LABELS, IMAGES) for content in (CONTENTS[name], zipped(CONTENTS[name]))]


def mutated(number: int) -> tuple[str, bytes]:
    """Return which file the input of that number stands for, and a valid content of it changed in one to four ways."""
    draw = np.random.default_rng([number, *b"idx"])
    name, content = BASES[draw.integers(len(BASES))]
    for _ in range(draw.integers(1, 5)):
        content = changed(content, draw)
    return name, content


def changed(content: bytes, draw: np.random.Generator) -> bytes:
    """Return `content` with a bit or a byte changed, or some bytes cut, put in or repeated; half near an end."""
    ends = (min(24, len(content)), len(content), len(content))
    place = int(draw.integers(ends[draw.integers(3)] + 1))
    place = len(content) - place if draw.integers(4) == 0 else place
    length = int(draw.integers(1, 9))
    before, behind = content[:place], content[place:]
    match draw.integers(6):
        case 0:
            return before + bytes([behind[0] ^ (1 << draw.integers(8))]) + behind[1:] if behind else before
        case 1:
            return before + draw.bytes(1) + behind[1:]
        case 2:
            return before
        case 3:
            return before + behind[length:]
        case 4:
            return before + draw.bytes(length) + behind
        case _:
            return before + behind[:length] + behind


@pytest.mark.parametrize(
    "numbers",
    [range(FAST_MUTATIONS), pytest.param(range(FAST_MUTATIONS, MUTATIONS), marks=pytest.mark.slow(minutes=1))],
    ids=lambda numbers: f"{numbers.start}-{numbers.stop}",
)
def test_a_file_changed_at_random_gives_its_content_or_a_refusal(numbers, tiny, tmp_path, counted):
    files = {file.name: file for file in tiny.files}
    verified, parsed = 0, 0
    for number in numbers:
        name, content = mutated(number)
        path = tmp_path / name
        path.write_bytes(content)
        found = content_or_refusal(lambda path=path: verify(path, files[path.name]))
        assert isinstance(found, str) or found == CONTENTS[name], number
        verified += isinstance(found, bytes)
        found = content_or_refusal(lambda path=path: unverified(path, files[path.name]))
        # A gzip file's own checksum guards its content; of another, any elements are as good, but labels under 10.
        right = CONTENTS[name] if content[:2] == idx.GZIP_MAGIC else content
        assert isinstance(found, str) or found == right, number
        parsed += isinstance(found, bytes)
    assert 0 < verified < parsed < len(numbers) / 2
    counted(INPUTS, len(numbers))


def verify(path: Path, file: IdxFile) -> np.ndarray:
    """Read a file as the cache does."""
    return file.parse(cache.read_verified(path, file), source=str(path))

"""The idx format of MNIST: two zero bytes, an element type, a rank, big-endian sizes, then the elements.

Source: LeCun, Cortes and Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np

from spec.errors import DataError

UNSIGNED_BYTE = 8
GZIP_MAGIC = b"\x1f\x8b"


def read_bytes(path: Path, *, limit: int) -> bytes:
    """Return the content of `path`, decompressed if it is gzip, without ever holding more than `limit` bytes.

    Raises DataError for a file that is not a regular one, is empty, cannot be read, or holds more.
    """
    if not os.path.isfile(path):
        raise DataError(f"{path} is not a regular file; give an idx file, plain or gzip")
    try:
        with path.open("rb") as file:
            compressed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
            file.seek(0)
            content = gzip.GzipFile(fileobj=file).read(limit + 1) if compressed else file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not content:
        raise DataError(f"{path} is empty")
    if len(content) > limit:
        raise DataError(f"{path} holds over {limit:,} bytes, more than this data set has")
    return content


def parse(content: bytes, *, rank: int, source: str) -> np.ndarray:
    """Return the array that idx `content` holds: uint8, `rank` dimensions; a read-only view of `content`.

    Raises DataError for another element type or rank, and for a length that is not what the sizes say.
    """
    header = 4 + 4 * rank
    if len(content) < header:
        raise DataError(f"{source} has {len(content)} bytes; an idx file of rank {rank} has a header of {header}")
    if content[:4] != bytes([0, 0, UNSIGNED_BYTE, rank]):
        raise DataError(
            f"{source} starts with {content[:4].hex(' ')}; an idx file of unsigned bytes of rank {rank} "
            f"starts with 00 00 08 {rank:02x}"
        )
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", rank, 4))
    expected = header + math.prod(shape)
    if len(content) != expected:
        raise DataError(f"{source} has {len(content):,} bytes; its header says {expected:,}, for shape {list(shape)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)

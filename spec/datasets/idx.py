"""The idx format of MNIST: two zero bytes, an element type, a rank, big-endian sizes, then the elements.

Source: LeCun, Cortes and Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import math
import os
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from spec.errors import DataError

UNSIGNED_BYTE = 8
GZIP_MAGIC = b"\x1f\x8b"
GZIP_OVERHEAD = 1 << 16  # bytes; what gzip adds to bytes that it cannot make fewer is far less
MOST_MEMBERS = 10_000  # a gzip file may be many, one after another; block compressors write one for 64 KiB
CHUNK_BYTES = 1 << 14


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
            if compressed and os.fstat(file.fileno()).st_size > limit + GZIP_OVERHEAD:
                raise DataError(f"{path} is gzip, and larger than the {limit:,} bytes that this data set has")
            content = _decompressed(file, limit=limit) if compressed else file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not content:
        raise DataError(f"{path} is empty")
    if len(content) > limit:
        raise DataError(f"{path} holds over {limit:,} bytes, more than this data set has")
    return content


def _decompressed(file: BinaryIO, *, limit: int) -> bytes:
    """Return what the gzip `file` holds, its first `limit` + 1 bytes if it holds more.

    Python's gzip reads a header's texts and the zeros after a member byte by byte: a file of those takes it minutes.
    Raises EOFError when the file is cut short, zlib.error when it is damaged.
    """
    content, chunk = bytearray(), file.read(CHUNK_BYTES)
    for _ in range(MOST_MEMBERS):
        member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)  # gzip's header, checksum and length
        while not member.eof:
            if not chunk:
                raise EOFError("its compressed data are cut short")
            content += member.decompress(chunk, limit + 1 - len(content))
            if len(content) > limit:
                return bytes(content)
            chunk = member.unused_data if member.eof else file.read(CHUNK_BYTES)
        while not (chunk := chunk.lstrip(b"\0")):
            if not (chunk := file.read(CHUNK_BYTES)):
                return bytes(content)
    raise EOFError(f"it is over {MOST_MEMBERS:,} gzip files in one")


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
    try:
        return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
    except ValueError:  # a size of 0 beside sizes that no array can have
        raise DataError(f"{source} says shape {list(shape)}, which no array can have") from None

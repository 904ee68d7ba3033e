"""State dicts in `.pt` files: read by `torch.load(..., weights_only=True)` alone, so that nothing in them is run."""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spec.errors import StateError
from spec.weights import MOST_BYTES, Foreign, read_file, shown

COUNTER = "num_batches_tracked"  # of torch's BatchNorm, which nothing depends on: its momentum is given
SAVE = "save a state dict: torch.save(model.state_dict(), PATH)"


def read(path: Path) -> dict[str, np.ndarray | Foreign]:
    """Return the arrays of the state dict in a file by name, in its order, without BatchNorm's counters.

    They are views of what was read. What no array can be made of is a Foreign. Raises StateError when the file holds
    anything but a state dict: nothing of it has been run.
    """
    content = read_file(path)
    _refuse_a_bomb(content, path)
    try:
        with warnings.catch_warnings(action="ignore"):  # of old protocols, and of archives that are refused anyway
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise StateError(f"{path} {_refused(error)}") from None
    if not isinstance(found, Mapping):
        raise StateError(f"{path} holds a {type(found).__name__}; {SAVE}")
    if any(isinstance(value, Mapping) for value in found.values()):
        names = ", ".join(shown(str(name)) for name in list(found)[:6])
        raise StateError(f"{path} is a checkpoint of several things, {names}; {SAVE} alone")
    return {str(name): _array(value) for name, value in found.items() if not str(name).endswith(COUNTER)}


def to_bytes(state: Mapping[str, np.ndarray]) -> bytes:
    """Return the canonical state as the content of a `.pt` file that `load_state_dict` takes."""
    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(np.array(array, order="C")) for name, array in state.items()}, buffer)
    return buffer.getvalue()


def _array(value: Any) -> np.ndarray | Foreign:
    if not isinstance(value, torch.Tensor):
        return Foreign((), type(value).__name__)
    dtype = str(value.dtype).removeprefix("torch.")
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        return Foreign(tuple(value.shape), f"{dtype}, {value.layout} on {value.device.type}")
    try:
        return value.detach().numpy()
    except (TypeError, RuntimeError):  # bfloat16, say
        return Foreign(tuple(value.shape), dtype)


def _refuse_a_bomb(content: bytes, path: Path) -> None:
    """Raise StateError when a zip archive says that it holds more than weights have."""
    try:
        size = sum(item.file_size for item in zipfile.ZipFile(io.BytesIO(content)).infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, UnicodeDecodeError):
        return  # a pickle, or damaged: torch will say
    if size > MOST_BYTES:
        raise StateError(f"{path} unpacks to {size:,} bytes; weights have at most {MOST_BYTES:,}; name another file")


def _refused(error: Exception) -> str:
    """Say what torch refused, and the mend."""
    reason = str(error)
    if asked := re.search(r"GLOBAL (\S+)|class (\S+) ", reason):
        name = shown(next(filter(None, asked.groups())))
        return f"asks for {name}, which no state dict needs; nothing of it was run; {SAVE}"
    told = re.search(r"WeightsUnpickler error:\s*(.+)", reason)  # the rest is advice to load it all the same
    first = told[1] if told else f"{type(error).__name__} {reason.strip().partition('. ')[0]}".strip()
    return f"is damaged, or no state dict: {shown(first)}; {SAVE}"

"""R9: files of weights that are malicious, damaged or of another network. No code runs, every mismatch is listed.

Each of four families makes a quarter of the 1,000 inputs, from a seed. What is read in spite of its damage must be the
very weights: nothing else is ever loaded.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import pickle
import pkgutil
import runpy
import shutil
import subprocess
import sys
import timeit
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spec import conversion, recipe, run_reader, weights
from spec.errors import RunDirectoryError, StateError
from spec_tests.assertions import assert_identical
from spec_tests.commands import made_run, random_state
from torch_ref import state_dicts

COUNTED = "R9 malicious, damaged and unfit weights"
DIGITS = recipe.load("digits")
LEAVES = conversion.leaves_of(DIGITS)
STATE = random_state(DIGITS)
TENSORS = {name: torch.from_numpy(array) for name, array in STATE.items()}
GOOD = weights.to_safetensors(STATE)
EACH = 250


def checked(found: weights.Found) -> dict[str, np.ndarray]:
    return weights.check(found, LEAVES, "float32", what="the file", mend="give another")


# Malicious pickles


class Reduced:
    """An object whose pickle makes it by calling `function(*arguments)`."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.made_by = function, arguments

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.made_by

    def __call__(self) -> None:
        raise AssertionError("only its pickle is to be called")


named = pkgutil.resolve_name  # of what the scan over the source lets no file mention


PAYLOADS: dict[str, Callable[[Path], Reduced]] = {
    "os.system": lambda canary: Reduced(named("os:system"), f"touch '{canary}'"),
    "os.mkdir": lambda canary: Reduced(os.mkdir, str(canary)),
    "subprocess.call": lambda canary: Reduced(subprocess.call, ["touch", str(canary)]),
    "subprocess.check_output": lambda canary: Reduced(subprocess.check_output, ["touch", str(canary)]),
    "eval": lambda canary: Reduced(named("builtins:eval"), f"open({str(canary)!r}, 'w').close()"),
    "exec": lambda canary: Reduced(named("builtins:exec"), f"open({str(canary)!r}, 'w').close()"),
    "open": lambda canary: Reduced(open, str(canary), "w"),
    "io.FileIO": lambda canary: Reduced(io.FileIO, str(canary), "w"),
    "shutil.copy": lambda canary: Reduced(shutil.copy, __file__, str(canary)),
    "timeit.timeit": lambda canary: Reduced(
        timeit.timeit, f"open({str(canary)!r}, 'w').close()", "", timeit.default_timer, 1
    ),
    "runpy.run_path": lambda canary: Reduced(runpy.run_path, f"{canary}.py"),
    "functools.partial": lambda canary: Reduced(functools.partial(os.mkdir, str(canary))),
    "getattr": lambda canary: Reduced(Reduced(getattr, Path(canary), "touch")),
    "numpy.savetxt": lambda canary: Reduced(np.savetxt, str(canary), [0.0]),
    "torch.save": lambda canary: Reduced(torch.save, [], str(canary)),
}  # fmt: skip


def in_attribute(payload: Reduced) -> OrderedDict:
    state = OrderedDict(TENSORS)
    state._metadata = payload  # where torch keeps the versions of a network's modules
    return state


PLACES: dict[str, Callable[[Reduced], Any]] = {
    "itself": lambda payload: payload,
    "a value": lambda payload: TENSORS | {"linear1.bias": payload},
    "one more value": lambda payload: TENSORS | {"extra": payload},
    "a key": lambda payload: TENSORS | {payload: torch.zeros(1)},
    "a list": lambda payload: [TENSORS, [payload]],
    "an attribute": in_attribute,
    "a parameter's hooks": lambda payload: (
        TENSORS | {"linear1.bias": Reduced(torch._utils._rebuild_parameter, torch.zeros(64), True, payload)}
    ),
}


def saved_by_torch(content: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def archive(pickled: bytes) -> bytes:
    """Return a zip archive as torch writes it, around a pickle of one's own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3\n")
    return buffer.getvalue()


def in_persistent_id(content: object) -> bytes:
    """Return an archive whose pickle names a storage by what the content is, where torch looks up the storage."""

    class Pickler(pickle._Pickler):
        def persistent_id(self, value: object) -> object:
            return ("storage", content, "0", "cpu", 1) if value == "here" else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(["here"])
    return archive(buffer.getvalue())


CONTAINERS: dict[str, Callable[[object], bytes]] = {
    "torch.save": saved_by_torch,
    "torch.save, as before 1.6": lambda content: saved_by_torch(content, _use_new_zipfile_serialization=False),
    "a storage's name": in_persistent_id,
    **{f"a pickle of protocol {n}": functools.partial(pickle.dumps, protocol=n) for n in range(6)},
    "a pickle in an archive": lambda content: archive(pickle.dumps(content, protocol=2)),
}


def planted(folder: Path, *, payload: str, place: str, container: str) -> tuple[bytes, Path]:
    """Return a malicious file's content, and the canary that it makes if its code is run."""
    canary = folder / f"canary {payload} {place} {container}".replace("/", " ")
    Path(f"{canary}.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    return CONTAINERS[container](PLACES[place](PAYLOADS[payload](canary))), canary


def load_unsafely(paths: list[Path], folder: Path) -> None:
    """Have a process of its own load the files as nobody should."""
    script = (
        "import sys, torch\n"
        "for path in sys.argv[1:]:\n"
        f"    try:\n        torch.load(path, weights_only={False})\n"
        "    except BaseException:\n        pass\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-W", "ignore", "-c", script, *map(str, paths)]
    subprocess.run(command, check=True, env=environment, capture_output=True)


def with_module(folder: Path, name: str) -> tuple[bytes, Path]:
    """Return a pickle that names a class of a module, and the canary that is made where the module is imported."""
    canary = folder / f"canary {name}"
    (folder / f"{name}.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Weights: pass\n")
    return f"c{name}\nWeights\n)\x81.".encode("latin-1"), canary


def test_the_canaries_are_made_by_a_load_that_trusts_the_file_and_by_ours_never(tmp_path, monkeypatch):
    cases = [(payload, "itself", "torch.save") for payload in PAYLOADS]
    cases += [("os.mkdir", place, "torch.save") for place in list(PLACES)[1:]]
    cases += [("os.mkdir", "itself", container) for container in list(CONTAINERS)[1:]]
    planned = [
        planted(tmp_path, payload=payload, place=place, container=container) for payload, place, container in cases
    ]
    (bare, first), (pickled, second) = with_module(tmp_path, "planted_bare"), with_module(tmp_path, "planted_archived")
    planned += [(bare, first), (archive(pickled), second)]
    monkeypatch.syspath_prepend(tmp_path)
    files = []
    for content, canary in planned:
        files.append(Path(f"{canary}.pt"))
        files[-1].write_bytes(content)
        with pytest.raises(StateError):
            checked(state_dicts.read(files[-1]))
    assert [canary.name for _, canary in planned if canary.exists()] == []
    load_unsafely(files, tmp_path)
    assert [canary.name for _, canary in planned if not canary.exists()] == []
    assert len(planned) == len(PAYLOADS) + len(PLACES) + len(CONTAINERS)


def test_no_malicious_pickle_runs_whole_or_damaged(tmp_path, counted):
    generator = np.random.default_rng(0)
    combinations = list(itertools.product(PAYLOADS, PLACES, CONTAINERS))
    path = tmp_path / "weights.pt"
    for turn, index in enumerate(generator.permutation(len(combinations))[:EACH]):
        payload, place, container = combinations[index]
        content, canary = planted(tmp_path, payload=payload, place=place, container=container)
        damaged = turn % 2 == 1
        path.write_bytes(flipped(content, generator, within=400) if damaged else content)
        if damaged:
            with_damage(lambda: state_dicts.read(path))
        else:
            with pytest.raises(StateError, match=r"weights\.pt |^the file does not fit"):
                checked(state_dicts.read(path))
        assert not canary.exists(), (payload, place, container)
    counted(COUNTED, EACH)


def with_damage(read: Callable[[], weights.Found]) -> dict[str, np.ndarray] | None:
    """Return the weights that are read in spite of damage, None when they are refused by an error of ours."""
    try:
        return checked(read())
    except StateError:
        return None


def flipped(content: bytes, generator: np.random.Generator, *, within: int | None = None) -> bytes:
    """Return the content with one to eight of its bits flipped, of the first `within` bytes."""
    changed = bytearray(content)
    num_bits = 8 * min(within or len(changed), len(changed))
    for bit in generator.choice(num_bits, int(generator.integers(1, 9)), replace=False):
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# Damaged headers of safetensors

Header = dict[str, Any]


def split() -> tuple[Header, bytes]:
    length = int.from_bytes(GOOD[:8], "little")
    return json.loads(GOOD[8 : 8 + length]), GOOD[8 + length :]


def joined(header: str | bytes, data: bytes, *, length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def edited(edit: Callable[[Header, str, np.random.Generator], object]) -> Callable[[np.random.Generator], bytes]:
    """Return what damages one entry, drawn, of the header."""

    def damage(generator: np.random.Generator) -> bytes:
        header, data = split()
        edit(header, str(generator.choice(list(header))), generator)
        return joined(json.dumps(header), data)

    return damage


def replaced(key: str, *values: Any) -> Callable[[np.random.Generator], bytes]:
    """Return what gives one entry another value for `key`, drawn."""
    return edited(lambda header, name, generator: header[name].update({key: values[generator.integers(len(values))]}))


def with_length(generator: np.random.Generator) -> bytes:
    lengths = (0, 1, len(GOOD), 100_000_001, 2**31, 2**32 + 8, 2**63, 2**64 - 1, int(generator.integers(2**62)))
    return int(lengths[generator.integers(len(lengths))]).to_bytes(8, "little") + GOOD[8:]


def with_a_name_twice(generator: np.random.Generator) -> bytes:
    header, data = split()
    name, other = generator.choice(list(header), 2, replace=False)
    again = json.dumps({str(name): header[str(other)]})[1:-1]
    return joined(json.dumps(header)[:-1] + f", {again}}}", data)


def with_bytes_that_are_no_text(generator: np.random.Generator) -> bytes:
    header, data = split()
    text = bytearray(json.dumps(header).encode())
    text[generator.integers(len(text))] = generator.integers(0x80, 0x100)
    return joined(bytes(text), data)


def with_other_json(generator: np.random.Generator) -> bytes:
    texts = ("", "[]", "null", "{", "NaN", '"x"', "[" * 5_000, '{"a":' * 5_000, '{"a": {}}', '{"a": 1}', "\x00" * 99)
    return joined(texts[generator.integers(len(texts))], split()[1])


def moved(header: Header, name: str, generator: np.random.Generator) -> None:
    by = int(generator.choice([-400, -4, -1, 1, 4, 400]))
    start, stop = header[name]["data_offsets"]
    header[name]["data_offsets"] = [max(0, start + by), max(0, stop + by)]


def overlapping(header: Header, name: str, generator: np.random.Generator) -> None:
    others = [other for other in header if other != name]
    header[name]["data_offsets"] = header[str(generator.choice(others))]["data_offsets"]


HUGE = 2**62
KEYS = ("dtype", "shape", "data_offsets")
DAMAGES: dict[str, Callable[[np.random.Generator], bytes]] = {
    "flipped bits": lambda generator: flipped(GOOD, generator, within=len(GOOD) - len(split()[1])),
    "flipped bits of the length": lambda generator: flipped(GOOD, generator, within=8),
    "cut": lambda generator: GOOD[: generator.integers(len(GOOD))],
    "longer": lambda generator: GOOD + bytes(int(generator.integers(1, 99))),
    "begun late": lambda generator: GOOD[generator.integers(1, len(GOOD)) :],
    "noise": lambda generator: generator.bytes(int(generator.integers(999))),
    "length": with_length,
    "moved offsets": edited(moved),
    "overlapping offsets": edited(overlapping),
    "odd offsets": replaced("data_offsets", [4, 0], [-4, 4], [0, HUGE], [HUGE, HUGE], [0], [], [0.5, 1], None, "0"),
    "shapes": replaced("shape", [], [0], [1], [HUGE, HUGE], [2**32, 2**32], [-1], [1.5], ["64"], None, [[64]], [2**64]),
    "dtypes": replaced("dtype", "F64", "F16", "BF16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "C64", "f32", "object", 4),
    "a name twice": with_a_name_twice,
    "no name": edited(lambda header, name, _: header.update({"": header.pop(name)})),
    "another name": edited(lambda header, name, _: header.update({f"{name}\x1b[2J": header.pop(name)})),
    "left out": edited(lambda header, name, _: header.pop(name)),
    "a key left out": edited(lambda header, name, generator: header[name].pop(str(generator.choice(KEYS)))),
    "metadata": edited(lambda header, name, _: header.update({"__metadata__": {"x": [1]}})),
    "no text": with_bytes_that_are_no_text,
    "other json": with_other_json,
}  # fmt: skip


def test_a_damaged_header_is_refused_or_changes_nothing(tmp_path, counted):
    generator, kinds = np.random.default_rng(1), list(DAMAGES)
    path, refused = tmp_path / "weights.safetensors", set()
    for turn in range(EACH):
        kind = kinds[turn % len(kinds)]
        path.write_bytes(DAMAGES[kind](generator))
        found = with_damage(lambda: weights.from_safetensors(weights.read_file(path), source=str(path)))
        if found is None:
            refused.add(kind)
        else:
            assert_identical(found, STATE, item=kind)
    assert refused == set(kinds)
    counted(COUNTED, EACH)


def test_a_good_header_is_read():
    header, data = split()
    again = {"__metadata__": {"made": "by hand"}, **dict(reversed(header.items()))}
    assert_identical(checked(weights.from_safetensors(joined(json.dumps(again), data), source="x")), STATE, item="x")


def test_what_is_said_of_a_file_is_safe_to_print():
    header, data = split()
    header["linear1.bias\x1b[2J" + "x" * 500] = header.pop("linear1.bias")
    found = weights.from_safetensors(joined(json.dumps(header), data), source="x")
    with pytest.raises(StateError) as refused:
        checked(found)
    assert "linear1.bias\\x1b[2Jxxx" in str(refused.value)
    assert all(line.isprintable() and len(line) < 200 for line in str(refused.value).splitlines())


def test_a_file_of_many_names_is_refused_in_a_thousand_lines():
    found = STATE | {f"n{index}": np.zeros(0, np.float32) for index in range(100_000)}
    lines = weights.mismatches(found, LEAVES, "float32")
    assert lines[-1] == "and 99,000 names more that are none of its arrays"
    assert len(lines) == 1_001


# Weights of another network


def missing(state: dict, name: str, generator: np.random.Generator) -> list[str]:
    del state[name]
    return [f"{name} is missing; it has shape"]


def renamed(state: dict, name: str, generator: np.random.Generator) -> list[str]:
    state[f"model.{name}"] = state.pop(name)
    return [f"{name} is missing; it has shape", f"model.{name} is not one of its arrays"]


def one_more(state: dict, name: str, generator: np.random.Generator) -> list[str]:
    state[f"{name}.more"] = state[name]
    return [f"{name}.more is not one of its arrays"]


def reshaped(state: dict, name: str, generator: np.random.Generator) -> list[str]:
    found, wanted = list(state[name].reshape(1, -1).shape), list(state[name].shape)
    state[name] = state[name].reshape(1, -1)
    return [f"{name} has shape {found}; it must have {wanted}"]


def larger(state: dict, name: str, generator: np.random.Generator) -> list[str]:
    wanted = list(state[name].shape)
    state[name] = np.concatenate([state[name], state[name][:1]])
    return [f"{name} has shape {list(state[name].shape)}; it must have {wanted}"]


def of_another_dtype(state: dict, name: str, generator: np.random.Generator) -> list[str]:
    dtype = str(generator.choice(["float64", "float16", "int32", "int64", "uint8", "bool"]))
    state[name] = state[name].astype(dtype)
    return [f"{name} holds {dtype}; it must hold float32"]


def not_finite(state: dict, name: str, generator: np.random.Generator) -> list[str]:
    state[name] = state[name].copy()
    places = generator.choice(state[name].size, int(generator.integers(1, 9)), replace=False)
    state[name].flat[places] = generator.choice([np.nan, np.inf, -np.inf], len(places))
    return [f"{name} holds {len(places)} of {state[name].size} numbers that are not finite"]


MISFITS = (missing, renamed, one_more, reshaped, larger, of_another_dtype, not_finite)


def test_every_mismatch_is_listed_at_once_by_either_format(tmp_path, counted):
    generator = np.random.default_rng(2)
    for turn in range(EACH):
        state, wanted = dict(STATE), []
        spoilt = generator.choice(list(STATE), int(generator.integers(1, len(STATE) + 1)), replace=False)
        for place, name in enumerate(spoilt):
            misfit = MISFITS[(turn + place) % len(MISFITS)]
            wanted += misfit(state, str(name), generator)
        path = tmp_path / ("weights.pt" if turn % 2 else "weights.safetensors")
        if turn % 2:
            torch.save({name: torch.from_numpy(array.copy()) for name, array in state.items()}, path)
            found = state_dicts.read(path)
        else:
            path.write_bytes(weights.to_safetensors(state))
            found = weights.from_safetensors(path.read_bytes(), source=str(path))
        with pytest.raises(StateError) as refused:
            checked(found)
        lines = str(refused.value).splitlines()
        assert len(lines) == len(wanted) + 2
        assert all(any(line.startswith(f"  {start}") for line in lines[1:-1]) for start in wanted), (wanted, lines)
    counted(COUNTED, EACH)


# A run's own weights


RUN_DAMAGES: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "flipped bits": flipped,
    "a flipped bit of a weight": lambda content, generator: content[:-4] + flipped(content[-4:], generator, within=1),
    "cut": lambda content, generator: content[: generator.integers(len(content))],
    "zeros": lambda content, generator: content[:-64] + bytes(64),
    "longer": lambda content, generator: content + bytes(int(generator.integers(1, 99))),
    "another run's": lambda content, generator: weights.to_safetensors(random_state(DIGITS, seed=1)),
}


def test_no_damage_to_a_runs_weights_goes_unnoticed(tmp_path, counted):
    state = made_run(tmp_path / "run", DIGITS)
    path = tmp_path / "run" / "weights.safetensors"
    good, generator, kinds = path.read_bytes(), np.random.default_rng(3), list(RUN_DAMAGES)
    for turn in range(EACH):
        kind = kinds[turn % len(kinds)]
        damaged = RUN_DAMAGES[kind](good, generator)
        assert damaged != good
        path.write_bytes(damaged)
        with pytest.raises(RunDirectoryError, match=r"weights\.safetensors is damaged: its sha256 is [0-9a-f]{64}"):
            run_reader.read(tmp_path / "run")
    path.write_bytes(good)
    assert_identical(run_reader.read(tmp_path / "run").found, state, item="the good file")
    counted(COUNTED, EACH)

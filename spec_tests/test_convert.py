"""Weights between runs, safetensors and torch's state dicts: the same bits, or every mismatch at once."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

import jax_impl.convert
import torch_ref.conversion
from spec import conversion, params, recipe, weights
from spec.datasets.sizes import known_size
from spec.errors import StateError
from spec.recipe import Recipe
from spec.run import run_reader
from spec_tests.assertions import assert_identical
from spec_tests.commands import call, changed, made_run, random_state
from torch_ref import models, state_dicts

JAX, TORCH = conversion.main, torch_ref.conversion.main
KINDS = {
    "mlp": changed("digits"),
    "mlp with batchnorm": changed("mlp128-batchnorm"),
    "cnn": changed("cnn", model={"channels": [2, 3], "hidden_sizes": [5, 4]}),
    "float64": changed("digits", precision="float64"),
    "bfloat16": changed("digits", precision="bfloat16"),
}
LESSON = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))  # as a lesson writes digits


def network(of: Recipe, *, seed: int = 0) -> nn.Sequential:
    """Return torch's own network of a recipe, its weights random, its statistics and counters not those of a start."""
    size = known_size(of.data)
    net = models.network(of.model, size.input_shape, params.num_outputs(of, size.num_classes))
    net.to(torch.float64 if of.precision == "float64" else torch.float32)
    random = {name: torch.from_numpy(array) for name, array in random_state(of, seed=seed).items()}
    counters = {name: value + 7 for name, value in net.state_dict().items() if name.endswith("tracked")}
    net.load_state_dict(random | counters)
    return net


def arrays(state_dict: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in state_dict.items() if not name.endswith("num_batches_tracked")}


def converted(main, *arguments: object) -> str:
    ended = call(main, *arguments)
    assert ended.status == 0, ended.err
    return ended.out


def refused(main, *arguments: object) -> str:
    ended = call(main, *arguments)
    assert (ended.status, ended.out) == (2, "")
    assert "Traceback" not in ended.err
    return " ".join(ended.err.replace("│", " ").split())


@pytest.fixture
def toml(tmp_path) -> callable:
    """Return a function that writes a recipe to a file, for `--recipe`."""

    def write(of: Recipe) -> Path:
        import tomli_w

        (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe.to_mapping(of)))
        return tmp_path / "recipe.toml"

    return write


# There and back


@pytest.mark.parametrize("kind", KINDS)
def test_torch_to_jax_to_torch_is_bit_for_bit(kind, toml, tmp_path):
    of = KINDS[kind]
    net = network(of)
    torch.save(net.state_dict(), tmp_path / "first.pt")
    converted(TORCH, tmp_path / "first.pt", tmp_path / "run", "--recipe", toml(of))
    run = run_reader.read(tmp_path / "run")
    leaves = conversion.leaves_of(run.recipe)
    on_device = jax_impl.convert.from_canonical(
        run.state(known_size(of.data)), leaves, dtype=np.float32, device=jax.devices("cpu")[0]
    )
    if of.precision != "float64":  # which JAX has only where it is asked for
        assert_identical(jax_impl.convert.to_canonical(*on_device, leaves), run.found, item="on the device")
    converted(JAX, tmp_path / "run", tmp_path / "second.safetensors")
    converted(JAX, tmp_path / "second.safetensors", tmp_path / "run2", "--recipe", tmp_path / "run")
    converted(TORCH, tmp_path / "run2", tmp_path / "third.pt")
    third = torch.load(tmp_path / "third.pt", weights_only=True)
    assert_identical(arrays(third), arrays(net.state_dict()), item=kind)
    assert list(third) == [leaf.name for leaf in leaves]
    other = network(of, seed=1)
    other.load_state_dict(third)
    assert_identical(arrays(other.state_dict()), arrays(net.state_dict()), item="loaded")


@pytest.mark.parametrize("main", [JAX, TORCH], ids=["jax", "torch"])
def test_safetensors_and_runs_are_converted_by_either_side_alike(main, tmp_path):
    state = made_run(tmp_path / "run", KINDS["mlp"])
    out = converted(main, tmp_path / "run", tmp_path / "x.safetensors")
    source = f"{tmp_path / 'run'} -> {tmp_path / 'x.safetensors'}"
    assert out == f"{source}: 4 arrays, 4,810 numbers, float32, for digits\n"
    assert_identical(load_file(tmp_path / "x.safetensors"), state, item="file")
    converted(main, tmp_path / "x.safetensors", tmp_path / "deep" / "run", "--recipe", "digits")
    assert sorted(path.name for path in (tmp_path / "deep" / "run").iterdir()) == ["config.json", "weights.safetensors"]
    found = run_reader.read(tmp_path / "deep" / "run")
    assert_identical(found.found, state, item="run")
    assert found.recipe == recipe.load("digits")
    assert found.made_by is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "run", "x.safetensors"]


def test_a_converted_run_is_verified_by_its_own_checksum(tmp_path):
    made_run(tmp_path / "run", KINDS["mlp"])
    path = tmp_path / "run" / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    said = refused(JAX, tmp_path / "run", tmp_path / "x.safetensors")
    assert "weights.safetensors is damaged: its sha256 is " in said
    assert not (tmp_path / "x.safetensors").exists()


# What torch saves


def test_a_lessons_sequential_is_refused_with_every_mismatch_and_taken_in_order(tmp_path):
    torch.save(LESSON.state_dict(), tmp_path / "lesson.pt")
    said = refused(TORCH, tmp_path / "lesson.pt", tmp_path / "run", "--recipe", "digits")
    for line in (
        "linear1.weight is missing; it has shape [64, 64]",
        "linear1.bias is missing; it has shape [64]",
        "linear2.weight is missing; it has shape [10, 64]",
        "linear2.bias is missing; it has shape [10]",
        *(f"{name} is not one of its arrays" for name in ("1.weight", "1.bias", "3.weight", "3.bias")),
        "in order the shapes fit: --by-order",
    ):
        assert line in said
    assert not (tmp_path / "run").exists()
    converted(TORCH, tmp_path / "lesson.pt", tmp_path / "run", "--recipe", "digits", "--by-order")
    found = run_reader.read(tmp_path / "run").found
    assert list(found) != list(LESSON.state_dict())
    for ours, theirs in zip(
        ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias"), LESSON.state_dict(), strict=True
    ):
        assert_identical({ours: found[ours]}, {ours: LESSON.state_dict()[theirs].numpy()}, item=ours)


def test_a_lessons_cnn_is_taken_in_order_with_its_batchnorm(toml, tmp_path):
    of = KINDS["cnn"]
    net = network(of)
    torch.save(
        OrderedDict((f"{place}.x", tensor) for place, tensor in enumerate(net.state_dict().values())), tmp_path / "x.pt"
    )
    said = refused(TORCH, tmp_path / "x.pt", tmp_path / "run", "--recipe", toml(of), "--by-order")
    assert "6.x [] is not conv2.weight [3, 2, 3, 3]" in said  # a counter that has lost its name
    layers = nn.Sequential(*net)
    torch.save(layers.state_dict(), tmp_path / "layers.pt")
    converted(TORCH, tmp_path / "layers.pt", tmp_path / "run", "--recipe", toml(of), "--by-order")
    assert_identical(run_reader.read(tmp_path / "run").found, arrays(net.state_dict()), item="run")


def test_what_does_not_fit_in_order_is_listed_pair_by_pair(tmp_path):
    torch.save(LESSON.state_dict() | {"5.weight": torch.zeros(3)}, tmp_path / "more.pt")
    said = refused(TORCH, tmp_path / "more.pt", tmp_path / "run", "--recipe", "mlp128", "--by-order")
    for line in (
        "1.weight [64, 64] is not linear1.weight [128, 784]",
        "1.bias [64] is not linear2.weight [10, 128]",
        "3.weight [10, 64] is one too many",
        "3.bias [10] is one too many",
        "5.weight [3] is one too many",
    ):
        assert line in said
    fewer = {"1.weight": np.zeros((128, 784), np.float32)}
    with pytest.raises(StateError, match=r"nothing is left for linear2.weight \[10, 128\]"):
        conversion.in_order(fewer, conversion.leaves_of(recipe.load("mlp128")))


MISFITS = {
    "bfloat16": (lambda state: {name: value.bfloat16() for name, value in state.items()}, "holds bfloat16"),
    "float16": (lambda state: {name: value.half() for name, value in state.items()}, "holds float16"),
    "float64": (lambda state: {name: value.double() for name, value in state.items()}, "holds float64"),
    "integers": (lambda state: {name: value.long() for name, value in state.items()}, "holds int64"),
    "complex": (lambda state: {name: value.cfloat() for name, value in state.items()}, "holds complex64"),
    "sparse": (lambda state: {name: value.to_sparse() for name, value in state.items()}, "holds float32, torch.sparse"),
    "numbers": (lambda state: dict.fromkeys(state, 1.5), "has shape []; it must have"),
    "nan": (lambda state: {name: value * torch.nan for name, value in state.items()}, "that are not finite"),
    "transposed": (lambda state: {name: value[..., None] for name, value in state.items()}, "1]; it must have"),
    "renamed": (lambda state: {f"model.{name}": value for name, value in state.items()}, "is not one of its arrays"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_every_mismatch_of_a_state_dict_is_listed_at_once(misfit, tmp_path):
    spoiled, said = MISFITS[misfit]
    state = spoiled(network(KINDS["mlp"]).state_dict())
    torch.save(state, tmp_path / "x.pt")
    ended = call(TORCH, tmp_path / "x.pt", tmp_path / "run", "--recipe", "digits")
    assert ended.status == 2
    lines = [line for line in ended.err.splitlines() if said in line]
    assert len(lines) == 4
    assert all(any(line.startswith(f"  {name} ") for line in lines) for name in state)


@pytest.mark.parametrize("command", [JAX, TORCH])
def test_every_name_of_a_large_network_is_printed_and_the_mend_comes_last(command, tmp_path):
    of = recipe.load("cnn")
    save_file({f"unknown{index}": np.zeros(1, np.float32) for index in range(30)}, tmp_path / "x.safetensors")
    arguments = [tmp_path / "x.safetensors", tmp_path / "run", "--recipe", "cnn"]
    lines = call(command, *arguments).err.splitlines()
    for name in [*params.state_shapes(conversion.leaves_of(of)), *(f"unknown{index}" for index in range(30))]:
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1, name
    assert not lines[-1].startswith("  ")
    many = {f"unknown{index}": np.zeros(1, np.float32) for index in range(1_000)}
    save_file(many, tmp_path / "x.safetensors")
    cut = call(command, *arguments).err.splitlines()
    assert len(cut) == 500
    assert re.fullmatch(r"\.\.\. [0-9,]+ lines more", cut[-2])
    assert cut[-1] == lines[-1]


class Untrusted:
    """An object of a class that no state dict needs."""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda: LESSON, "asks for torch.nn.modules.container.Sequential, which no state dict needs; nothing of it"),
        (lambda: {"a": Untrusted()}, "x.pt asks for spec_tests.test_convert.Untrusted, which no state dict needs"),
        (lambda: {"epoch": 3, "model": LESSON.state_dict()}, "is a checkpoint of several things, epoch, model; save"),
        (lambda: [torch.zeros(3)], "x.pt holds a list; save a state dict"),
        (lambda: torch.zeros(3), "x.pt holds a Tensor; save a state dict"),
        (dict, "linear1.weight is missing"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_state_dict_is_refused_with_the_mend(content, said, tmp_path):
    torch.save(content(), tmp_path / "x.pt")
    assert said in refused(TORCH, tmp_path / "x.pt", tmp_path / "run", "--recipe", "digits")
    assert not (tmp_path / "run").exists()


def test_a_state_dict_is_read_however_torch_saved_it(tmp_path):
    state = network(KINDS["mlp"]).state_dict()
    parameters = {name: nn.Parameter(value) for name, value in state.items()}
    strided = {name: value.t().contiguous().t() if value.ndim == 2 else value for name, value in state.items()}
    for name, saved, options in (
        ("old", state, {"_use_new_zipfile_serialization": False}),
        ("parameters", parameters, {}),
        ("strided", strided, {}),
        ("protocol", state, {"pickle_protocol": 3}),
    ):
        torch.save(saved, tmp_path / f"{name}.pth", **options)
        converted(TORCH, tmp_path / f"{name}.pth", tmp_path / name, "--recipe", "digits")
        assert_identical(run_reader.read(tmp_path / name).found, arrays(state), item=name)


def test_an_archive_that_unpacks_to_more_than_weights_have_is_refused(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.pt")
    monkeypatch.setattr(state_dicts, "MOST_BYTES", 4_000)
    with pytest.raises(StateError, match=r"x.pt unpacks to [0-9,]+ bytes; weights have at most 4,000"):
        state_dicts.read(tmp_path / "x.pt")
    monkeypatch.setattr(weights, "MOST_BYTES", 3_000)
    with pytest.raises(StateError, match=r"x.pt has [0-9,]+ bytes; weights have at most 3,000"):
        state_dicts.read(tmp_path / "x.pt")


# Refusals


def test_what_cannot_be_converted_is_refused_before_anything_is_written(tmp_path):
    made_run(tmp_path / "run", KINDS["mlp"])
    made_run(tmp_path / "trained", KINDS["mlp"])
    (tmp_path / "trained" / "summary.json").write_text("{}")
    good = tmp_path / "good.safetensors"
    converted(JAX, tmp_path / "run", good)
    (tmp_path / "x.npz").write_bytes(b"")
    (tmp_path / "plain").write_bytes(b"")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    run, new = tmp_path / "run", tmp_path / "new"
    mistakes = [
        ([JAX, good, new], "does not say which recipe it is for; add --recipe NAME"),
        ([JAX, good, new, "--recipe", "digist"], "did you mean 'digits'?"),
        ([JAX, good, new, "--recipe", "mlp128"], "linear1.weight has shape [64, 64]; it must have [128, 784]"),
        ([JAX, run, good], "good.safetensors is there already; name another file, or add --overwrite"),
        ([JAX, good, run, "--recipe", "digits"], "run is there already; name another directory, or add --overwrite"),
        ([JAX, good, tmp_path / "trained", "--recipe", "digits", "--overwrite"], "convert writes: summary.json"),
        ([JAX, run, new], "are both run directories; nothing to convert"),
        ([JAX, good, tmp_path / "b.safetensors", "--recipe", "digits"], "are both .safetensors files"),
        ([JAX, run, tmp_path / "b.safetensors", "--recipe", "digits"], "has its own; leave it out"),
        ([JAX, run, tmp_path / "x.pt"], ".pt files are torch's; `"),
        ([JAX, tmp_path / "x.pt", new, "--recipe", "digits"], ".pt files are torch's; `"),
        ([JAX, tmp_path / "x.npz", new], "x.npz is no kind of file that is known"),
        ([JAX, tmp_path / "plain", new], "plain is no kind of file that is known"),
        ([JAX, tmp_path / "no.safetensors", new, "--recipe", "digits"], "no.safetensors does not exist; name a file"),
        ([JAX, tmp_path / "no", good], "no does not exist; name a run's directory"),
        ([JAX, run, tmp_path / "no" / "b.safetensors"], "its directory does not exist; make it first"),
        ([JAX, good, tmp_path / "plain" / "b", "--recipe", "digits"], "plain takes no files"),
        ([JAX, good, Path("/proc/lockstep"), "--recipe", "digits"], "/proc/lockstep cannot be written"),
        ([JAX, good], "OUT"),
        ([JAX, run, tmp_path / "b.safetensors", "--by-order"], "--by-order"),
        ([TORCH, run, tmp_path / "b.safetensors", "--by-order"], "--by-order is for a .pt file"),
        ([TORCH, good, tmp_path / "b.pt"], "does not say which recipe it is for"),
        ([TORCH, tmp_path / "no.pt", new, "--recipe", "digits"], "no.pt does not exist"),
    ]  # fmt: skip
    for arguments, said in mistakes:
        assert said in refused(*arguments), said
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert len(mistakes) == 23


def test_overwrite_replaces_a_file_and_what_convert_made(tmp_path):
    old, new = made_run(tmp_path / "old", KINDS["mlp"]), made_run(tmp_path / "new", KINDS["mlp"], seed=1)
    converted(JAX, tmp_path / "old", tmp_path / "x.safetensors")
    assert_identical(load_file(tmp_path / "x.safetensors"), old, item="before")
    converted(JAX, tmp_path / "new", tmp_path / "x.safetensors", "--overwrite")
    assert_identical(load_file(tmp_path / "x.safetensors"), new, item="after")
    converted(JAX, tmp_path / "x.safetensors", tmp_path / "old", "--recipe", "digits", "--overwrite")
    assert_identical(run_reader.read(tmp_path / "old").found, new, item="run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old", "x.safetensors"]


@pytest.mark.parametrize("failing", ["write_atomic", "rename"])
def test_a_disk_that_refuses_leaves_what_was_there(failing, tmp_path, monkeypatch):
    old = made_run(tmp_path / "run", KINDS["mlp"])
    save_file(random_state(KINDS["mlp"], seed=1), tmp_path / "x.safetensors")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    rename = Path.rename
    if failing == "write_atomic":
        monkeypatch.setattr(conversion, "write_atomic", refuse)
    else:
        monkeypatch.setattr(Path, "rename", lambda path, to: refuse() if path.name == "made" else rename(path, to))
    said = refused(JAX, tmp_path / "x.safetensors", tmp_path / "run", "--recipe", "digits", "--overwrite")
    assert "run cannot be written: [Errno 28] No space left on device; name another place" in said
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert_identical(run_reader.read(tmp_path / "run").found, old, item="run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "x.safetensors"]


@pytest.mark.parametrize("package", ["jax_impl", "torch_ref"])
def test_the_commands_are_there(package, tmp_path):
    made_run(tmp_path / "run", KINDS["mlp"])
    command = [sys.executable, "-m", f"{package}.convert", str(tmp_path / "run"), str(tmp_path / "x.safetensors")]
    first, again = (subprocess.run(command, capture_output=True, text=True) for _ in range(2))
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.endswith("4 arrays, 4,810 numbers, float32, for digits\n")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("error: OUT ")


def test_without_torch_a_pt_file_says_what_to_install(tmp_path, monkeypatch):
    made_run(tmp_path / "run", KINDS["mlp"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "torch is not installed" in refused(TORCH, tmp_path / "run", tmp_path / "x.pt")
    converted(TORCH, tmp_path / "run", tmp_path / "x.safetensors")

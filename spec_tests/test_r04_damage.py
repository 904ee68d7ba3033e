"""R4: no damaged checkpoint is loaded; the newest good one is, and the bad file is named."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from spec.run import checkpoints, program
from spec.run.checkpoints import CheckpointError
from spec_tests.conftest import FRAMEWORKS

FLAGS = ["--recipe", "digits", "--epochs", "3", "--checkpoint-every", "epoch", "--keep-checkpoints", "9", "--quiet"]
NEWEST, OLDER = "00000135", "00000090"  # 45 steps an epoch
pytestmark = pytest.mark.usefixtures("compiled_once")
WAYS = ("delete", "empty", "cut", "bit flip", "swap with an older step")
DAMAGES = 200


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Return a finished run of each framework, with checkpoints of all its epochs."""
    folder = tmp_path_factory.mktemp("runs")
    for framework, main in FRAMEWORKS.items():
        main([*FLAGS, "--out", str(folder / framework)])
    return {framework: folder / framework for framework in FRAMEWORKS}


def files(run: Path) -> list[str]:
    """Return the files of the newest checkpoint that have anything in them, by their paths in it."""
    newest = run / "checkpoints" / NEWEST
    paths = (path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    return sorted(str(path.relative_to(newest)) for path in paths)


def damage(file: Path, way: str, older: Path, generator: np.random.Generator) -> None:
    """Do to a file what `way` says; `older` is the same file of an older step, or another file of it."""
    content = bytearray(file.read_bytes())
    if way == "delete":
        file.unlink()
    elif way == "empty":
        file.write_bytes(b"")
    elif way == "cut":
        file.write_bytes(content[: generator.integers(len(content))])
    elif way == "bit flip":
        content[generator.integers(len(content))] ^= 1 << generator.integers(8)
        file.write_bytes(content)
    else:
        file.write_bytes(older.read_bytes())


def older_of(run: Path, name: str, present: bytes) -> Path:
    """Return the older checkpoint's file of that name, which must differ; where Orbax names files by chance, its file
    that is most like it in size."""
    older = run / "checkpoints" / OLDER
    if (older / name).is_file() and (older / name).read_bytes() != present:
        return older / name
    others = [path for path in older.rglob("*") if path.is_file() and path.read_bytes() != present]
    return min(others, key=lambda path: abs(path.stat().st_size - len(present)))


def cases(runs: dict[str, Path]) -> Iterator[tuple[str, str, str, int]]:
    """Yield framework, file, way and a seed: every file in every way, again with other seeds, `DAMAGES` in all."""
    everything = [(framework, name, way) for framework, run in runs.items() for name in files(run) for way in WAYS]
    drawn = [case for case in everything if case[2] in ("cut", "bit flip")]
    for seed, case in enumerate(itertools.islice(itertools.chain(everything, itertools.cycle(drawn)), DAMAGES)):
        yield *case, seed


def test_of_200_damages_to_any_file_none_is_loaded_and_each_is_named(runs, tmp_path, counted):
    done = 0
    for framework, name, way, seed in cases(runs):
        folder = tmp_path / str(seed)
        shutil.copytree(runs[framework] / "checkpoints", folder)
        file = folder / NEWEST / name
        present = file.read_bytes()
        damage(file, way, older_of(runs[framework], name, present), np.random.default_rng(seed))
        found, mistakes = checkpoints.newest_good(folder)
        assert found.path == folder / OLDER, (framework, name, way)
        assert [str(file) in str(mistake) for mistake in mistakes] == [True], (mistakes, name, way)
        shutil.rmtree(folder)
        done += 1
    counted("R4 damages, none of them loaded", done)
    assert done == DAMAGES


def test_an_undamaged_checkpoint_is_taken(runs):
    for run in runs.values():
        found, mistakes = checkpoints.newest_good(run / "checkpoints")
        assert (found.path.name, found.step, mistakes) == (NEWEST, int(NEWEST), [])


def test_a_manifest_swapped_whole_with_its_files_is_of_another_step(runs, tmp_path):
    shutil.copytree(runs["jax"] / "checkpoints", tmp_path / "checkpoints")
    newest, older = (tmp_path / "checkpoints" / name for name in (NEWEST, OLDER))
    shutil.rmtree(newest)
    shutil.copytree(older, newest)
    with pytest.raises(CheckpointError, match=r"manifest.json is of step 90, and its folder is not"):
        checkpoints.verify(newest)


def test_a_manifest_changed_by_hand_is_damaged(runs, tmp_path):
    shutil.copytree(runs["torch"] / "checkpoints", tmp_path / "checkpoints")
    file = tmp_path / "checkpoints" / NEWEST / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({**manifest, "score": 1.0}))
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged"):
        checkpoints.verify(file.parent)


STRAYS = {
    "an empty folder that is named as a later step": lambda folder: (folder / "99999999").mkdir(),
    "a folder of another name": lambda folder: (folder / "mine").mkdir(),
    "a file that is named as a later step": lambda folder: (folder / "00000200").write_text("notes"),
    "what a killed save left": lambda folder: (folder / ".00000180.new").mkdir(),
    "what a killed removal left": lambda folder: (folder / ".00000045.old").mkdir(),
    "a later step without a manifest": lambda folder: shutil.copytree(
        folder / NEWEST, folder / "00000180", ignore=shutil.ignore_patterns("manifest.json")
    ),
}


@pytest.mark.parametrize("what", STRAYS)
def test_a_stray_thing_beside_the_checkpoints_does_not_keep_a_run_from_going_on(
    what, runs, trainer_command, tmp_path, counted
):
    run = tmp_path / "run"
    shutil.copytree(runs["torch"], run)
    (run / "summary.json").unlink()
    STRAYS[what](run / "checkpoints")
    ended = trainer_command(*FLAGS[:-1], "--out", run, framework="torch")
    assert ended.status == 0, ended.err
    assert f"going on from {run / 'checkpoints' / NEWEST}" in ended.out
    assert (run / "weights.safetensors").read_bytes() == (runs["torch"] / "weights.safetensors").read_bytes()
    assert not [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    counted("R4 stray things", 1)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_run_goes_on_from_the_newest_good_one_says_which_is_bad_and_keeps_it_aside(
    framework, runs, trainer_command, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(runs[framework], run)
    (run / "summary.json").unlink()
    folder = run / "checkpoints"
    damaged = next(path for path in sorted((folder / NEWEST).rglob("*"), key=lambda of: -of.stat().st_size))
    damage(damaged, "bit flip", damaged, np.random.default_rng(0))
    ended = trainer_command(*FLAGS[:-1], "--out", run, framework=framework)
    assert ended.status == 0, ended.err
    assert f"warning: not used: {damaged} is damaged" in ended.err
    assert f"going on from {folder / OLDER}, epoch 3, step 0" in ended.out
    assert (run / "weights.safetensors").read_bytes() == (runs[framework] / "weights.safetensors").read_bytes()
    assert (folder / f"{NEWEST}.damaged").is_dir()
    assert checkpoints.verify(folder / NEWEST).step == int(NEWEST)


def test_with_no_good_one_left_nothing_is_touched_and_all_are_named(runs, trainer_command, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["torch"], run)
    (run / "summary.json").unlink()
    for manifest in (run / "checkpoints").glob("*/manifest.json"):
        manifest.write_text("{}")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    ended = trainer_command(*FLAGS[:-1], "--out", run, framework="torch")
    assert (ended.status, ended.err.count("\n")) == (2, 4)
    assert f"{run} has no good checkpoint to go on from; name another --out" in ended.err
    assert ended.err.count("manifest.json is damaged: it is no manifest") == 3
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_before_its_first_checkpoint_a_run_begins_anew_and_says_so(runs, trainer_command, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["torch"], run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints")
    ended = trainer_command(*FLAGS[:-1], "--out", run, framework="torch")
    assert ended.status == 0, ended.err
    assert f"{run} has no checkpoint yet: it begins anew" in ended.out
    assert (run / "metrics.jsonl").read_text().count('"epoch"') == (runs["torch"] / "metrics.jsonl").read_text().count(
        '"epoch"'
    )
    assert (run / "weights.safetensors").read_bytes() == (runs["torch"] / "weights.safetensors").read_bytes()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_checkpoint_of_a_run_of_another_recipe_is_not_taken(framework, runs, trainer_command, tmp_path):
    other, run = tmp_path / "other", tmp_path / "run"
    assert trainer_command(*FLAGS, "--seed", 1, "--out", other, framework=framework).status == 0
    shutil.copytree(runs[framework], run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / NEWEST)
    shutil.copytree(other / "checkpoints" / NEWEST, run / "checkpoints" / NEWEST)
    ended = trainer_command(*FLAGS[:-1], "--out", run, framework=framework)
    assert ended.status == 0, ended.err
    assert f"not used: {run / 'checkpoints' / NEWEST / 'manifest.json'} is of a run of another recipe than" in ended.err
    assert f"going on from {run / 'checkpoints' / OLDER}" in ended.out
    assert (run / "weights.safetensors").read_bytes() == (runs[framework] / "weights.safetensors").read_bytes()


def test_a_checkpoint_of_other_versions_is_taken_with_a_word_of_warning(runs, trainer_command, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(runs["torch"], run)
    (run / "summary.json").unlink()
    version = program.importlib.metadata.version
    monkeypatch.setattr(program.importlib.metadata, "version", lambda name: "0.0" if name == "numpy" else version(name))
    ended = trainer_command(*FLAGS[:-1], "--out", run, framework="torch")
    assert ended.status == 0, ended.err
    assert "made by other versions: last bits may part from those of an unbroken run" in ended.out


def test_the_last_ones_and_the_first_of_the_best_are_kept(tmp_path):
    for step, score in enumerate([0.5, 0.9, 0.7, 0.9, None, 0.8, 0.1], start=1):
        checkpoints.write(
            tmp_path, step=step, about={"score": score}, files={"a": bytes([step])}, state=lambda folder: None
        )
        checkpoints.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002", "00000006", "00000007"]


def test_a_checkpoint_whose_replacement_fails_is_put_back(tmp_path, monkeypatch):
    write = {"step": 1, "about": {"score": None}, "state": lambda folder: None}
    checkpoints.write(tmp_path, files={"a": b"old"}, **write)
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise OSError("the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match="the disk is gone"):
        checkpoints.write(tmp_path, files={"a": b"new"}, **write)
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
    checkpoints.verify(tmp_path / "00000001")
    assert (tmp_path / "00000001" / "a").read_bytes() == b"old"


def test_a_save_that_fails_leaves_what_was_there_and_nothing_else(tmp_path):
    write = {"about": {"score": None}, "files": {"a": b"1"}}
    checkpoints.write(tmp_path, step=1, **write, state=lambda folder: None)

    def fails(folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        checkpoints.write(tmp_path, step=2, **write, state=fails)
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
    assert checkpoints.verify(tmp_path / "00000001").step == 1

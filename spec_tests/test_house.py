"""The house: arrows, constraints, the wheel, and a README that is true."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import jax_impl.evaluate
import jax_impl.plot
import jax_impl.predict
import torch_ref.conversion
import torch_ref.evaluate
from jax_impl import bench, many
from spec import conversion, recipe, sweep
from spec_tests.commands import call, made_run
from spec_tests.conftest import FRAMEWORKS, idx_bytes
from spec_tests.lockstep import results as lockstep
from spec_tests.lockstep.report import Epoch, Forced, judge
from spec_tests.mutants import __main__ as mutants
from spec_tests.mutants.catalogue import MUTANTS
from spec_tests.specification import statements
from spec_tests.tolerances import CEILING_FLOAT32

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
OURS = ("spec", "jax_impl", "torch_ref", "spec_tests", "constraints", "docs", "examples", "notebooks", "results", ".ci")
SKIPPED = shutil.ignore_patterns(".venv*", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".git")
# In a linked worktree .git is a file, which is not tracked.
TRACKED = [str(path.relative_to(ROOT)) for path in ROOT.iterdir() if path.is_file() and path.name != ".git"] + [
    str(path.relative_to(ROOT))
    for folder in OURS
    for path in (ROOT / folder).rglob("*")
    if path.is_file()
    and path.suffix != ".pyc"
    and "runs" not in path.relative_to(ROOT).parts  # `make docs` leaves the notebooks' runs
]


def test_the_import_arrows_hold():
    ended = subprocess.run([Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
    assert "0 broken" in ended.stdout


def test_a_broken_arrow_is_noticed(tmp_path):
    for package in ("spec", "jax_impl", "torch_ref", "spec_tests"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("import jax_impl" if package == "spec" else "")
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    only = [contract for contract in contracts if contract["name"].startswith("spec imports nothing")]
    assert len(only) == 1
    lines = [
        "[importlinter]",
        "root_packages =",
        *(f"    {name}" for name in ("spec", "jax_impl", "torch_ref", "spec_tests")),
    ]
    lines += ["include_external_packages = True", "[importlinter:contract:one]", "name = one", "type = forbidden"]
    lines += ["source_modules = spec", "forbidden_modules =", *(f"    {name}" for name in only[0]["forbidden_modules"])]
    (tmp_path / ".importlinter").write_text("\n".join(lines))
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "1 broken" in ended.stdout


def test_every_dependency_is_pinned_and_no_address_is_given():
    pins = [line for line in (ROOT / "constraints/main.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins)
    pinned = {re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    accelerators = extras["cuda"] + extras["tpu"]
    named = [
        *project["dependencies"],
        *(name for extra in extras.values() for name in extra if name not in accelerators),
    ]
    needed = {re.split(r"[\[<>=!]", name)[0].replace("_", "-").lower() for name in named}
    assert needed - {"lockstep"} <= pinned


@pytest.mark.parametrize("name", [name for name in TRACKED if name != "spec_tests/test_house.py"])
def test_no_file_names_a_package_index_or_a_path_of_one_machine(name):
    text = (ROOT / name).read_text("utf-8", errors="replace")
    assert not re.search(r"pypi\.org|pythonhosted|index-url|find-links|/root/|/work/|/tmp/", text)


def test_an_installed_wheel_works_outside_the_checkout(tmp_path):
    shutil.copytree(ROOT, tmp_path / "source", ignore=SKIPPED)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*command, str(tmp_path / "source")], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("lockstep-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    script = "import spec; from jax_impl import train; train.main(['--list']); "
    script += "train.main(['--recipe', 'digits', '--epochs', '1', '--out', 'run', '--quiet']); print(spec.__file__)"
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1].startswith(str(tmp_path / "installed"))
    assert (tmp_path / "run" / "summary.json").is_file()
    assert all(name in ended.stdout for name in recipe.recipe_names())
    assert (tmp_path / "installed" / f"{wheel.name.split('-py3')[0]}.dist-info" / "licenses" / "LICENSE").is_file()


# The README


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("command", [line for line in commands() if re.search(r"(jax_impl|torch_ref)\.train", line)])
def test_every_trainer_command_of_the_readme_is_taken(command, capsys, tmp_path, monkeypatch):
    arguments = shlex.split(command.split(">")[0])[3:]
    main = FRAMEWORKS["torch" if "torch_ref" in command else "jax"]
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "night"):
        (tmp_path / "runs" / name / "checkpoints" / "00000938").mkdir(parents=True)
        config = {"recipe": recipe.to_mapping(recipe.load("mlp512"))}
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps(config))
    shutil.copy(recipe.RECIPES / "mlp512.toml", tmp_path / "mine.toml")
    monkeypatch.setattr(many, "run", lambda flags: print(sweep.plan(flags)))
    shown = [] if {"--list", "--help", "--seeds", "--sweep"} & set(arguments) else ["--print-config"]
    with contextlib.suppress(SystemExit) if "--help" in arguments else contextlib.nullcontext():
        main([*arguments, *shown])
    assert capsys.readouterr().out


USING = {
    "jax_impl.evaluate": jax_impl.evaluate.main,
    "torch_ref.evaluate": torch_ref.evaluate.main,
    "jax_impl.predict": jax_impl.predict.main,
    "jax_impl.plot": jax_impl.plot.main,
    "jax_impl.convert": conversion.main,
    "torch_ref.convert": torch_ref.conversion.main,
}


def test_every_command_of_the_readme_that_uses_a_run_works(fashion_mnist, tmp_path, monkeypatch):
    used = [
        (found[1], line) for line in commands() if (found := re.search(r"python -m (\S+)", line)) and found[1] in USING
    ]
    assert {module for module, _ in used} == set(USING)
    for name in ("mine", "torch"):
        made_run(tmp_path / "runs" / name, recipe.load("mlp512"))
        figures = {name: 0.5 for kind in ("train", "test") for name in (f"{kind}_loss", f"{kind}_accuracy")}
        line = json.dumps({"event": "epoch", "epoch": 1, **figures})
        (tmp_path / "runs" / name / "metrics.jsonl").write_text(f"{line}\n")
    (tmp_path / "photos").mkdir()
    for path in ("shirt.jpg", "photos/one.png"):
        Image.fromarray(fashion_mnist.test.inputs[0, ..., 0]).save(tmp_path / path)
    images = idx_bytes(fashion_mnist.test.inputs[:3, ..., 0])
    (tmp_path / "images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    lesson = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    torch.save(lesson.state_dict(), tmp_path / "lesson.pt")
    monkeypatch.chdir(tmp_path)
    for module, line in used:
        ended = call(USING[module], *shlex.split(line)[3:])
        assert (ended.status, ended.err) == (0, ""), line
        assert ended.out


def test_the_readmes_other_commands_are_known():
    known = ("make train", "make test", "make docs", "python3 -m venv", ".venv/bin/pip install")
    known += (".venv/bin/tensorboard --logdir", ".venv/bin/jupytext --to ipynb")
    modules = ("jax_impl.train", "jax_impl.bench", "torch_ref.train", "spec.datasets", "spec_tests.accuracy")
    modules += ("spec_tests.lockstep", "spec_tests.mutants", *USING)
    for command in commands():
        module = re.search(r"python -m (\S+)", command)
        assert command.startswith(known) or (module and module[1] in modules), command


def test_the_readmes_python_runs(capsys, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "readme.py").write_text(code)
    namespace = runpy.run_path(str(tmp_path / "readme.py"))
    assert set(namespace["weights"]) == {"linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias"}
    assert float(capsys.readouterr().out.split()[-1]) > 0.95  # the last epoch's test accuracy


TABLES = {"bench": bench, "lockstep": lockstep, "mutants": mutants}


@pytest.mark.parametrize(("name", "module"), TABLES.items(), ids=TABLES)
def test_the_readmes_tables_are_those_of_the_results(name, module):
    (shown,) = re.findall(rf"<!-- {name}: .*? -->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    assert shown.strip() == module.table(module.load_results(ROOT))


RECIPES = [name for name in recipe.recipe_names() if name not in ("csv", "map-style")]  # these two need a user's data
MODELS = {name: recipe.load(name).model for name in RECIPES}
DECIDING = [name for name, model in MODELS.items() if model.name == "cnn" or "relu" in model.activations]


@pytest.mark.parametrize("key", lockstep.load_results(ROOT))
def test_every_kept_full_run_is_in_step_by_the_rules_of_today(key):
    report = lockstep.load_results(ROOT)[key]
    of = dataclasses.replace(recipe.load(report["recipe"]), precision=report["precision"])
    epochs = [Epoch(**epoch | {"forced": epoch["forced"] and Forced(**epoch["forced"])}) for epoch in report["epochs"]]
    verdict = judge(of, epochs, share_gates=report["share_gates"])
    assert (verdict.held, verdict.broken) == (report["held"], report["broken"] or [])
    assert verdict.broken == []


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_kept_whole_run_in_float64_and_forced_steps_in_float32(name):
    reports = lockstep.longest(lockstep.load_results(ROOT), name)
    double, single = reports["float64"], reports["float32"]
    assert double["max_steps"] is double["max_epochs"] is None
    assert double["held"] or recipe.load(name).optimizer.name == "adam"  # whose twin may part at once
    assert single["epochs"][-1]["forced"]["steps"] == single["epochs"][-1]["steps"]
    assert single["epochs"][-1]["steps"] == double["epochs"][-1]["steps"]


@pytest.mark.parametrize("name", DECIDING)
def test_every_relu_recipe_has_a_kept_whole_run_with_shared_gates(name):
    shared = lockstep.longest(lockstep.load_results(ROOT), name)["gates shared"]
    assert shared["max_steps"] is shared["max_epochs"] is None
    if recipe.load(name).optimizer.name == "sgd":
        assert min(epoch["equal_predictions"] for epoch in shared["epochs"]) == 1
        assert max(epoch["weight_difference"] for epoch in shared["epochs"]) <= CEILING_FLOAT32


def test_every_mutant_of_the_catalogue_is_kept_and_killed_by_a_test_of_its_clause():
    rows = mutants.load_results(ROOT)["mutants"]
    assert [(row["name"], row["clause"], row["says"], row["file"]) for row in rows] == [
        (mutant.name, mutant.clause, mutant.says, mutant.path) for mutant in MUTANTS
    ]
    listed = {(statement.number.split(".")[0], *test) for statement in statements() for test in statement.tests}
    for row in rows:
        file, test = re.split(r"::|\[", row["killer"])[:2]
        assert row["result"] == "killed", row["name"]
        assert (row["clause"], file, test) in listed, f"{row['name']}: {test} is no test of {row['clause']}"


def test_the_readmes_file_tree_is_there():
    tree = README.split("## How it is laid out")[1].split("```")[1]
    for name in re.findall(r"[a-z_]+/|[a-z_]+\.py", tree):
        assert any(path.endswith(name) or f"/{name}" in f"/{path}" for path in TRACKED), name

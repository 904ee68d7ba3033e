"""The notebooks: paired with scripts, without outputs, and whole in quick mode, on one device and on four."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

from spec import quick

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NAMES = [path.stem for path in sorted(FOLDER.glob("*.py"))]
SECONDS = 120  # of a cell in quick mode; how long a whole notebook takes is measured, and no test
FULL_SECONDS = 3_600
DEVICES = (1, 4)
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]["Repository"]
every_notebook = pytest.mark.parametrize("name", NAMES)


def notebook(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def run(name: str, folder: Path, *, devices: int, seconds: float, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a notebook's cells in an empty folder; return what they printed. Raises where a cell fails or is late."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", str(devices))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONWARNINGS", "error::DeprecationWarning:__main__")
    monkeypatch.chdir(folder)
    ran = notebook(name)
    client = nbclient.NotebookClient(ran, timeout=seconds, kernel_name="python3")
    client.execute(cwd=str(folder))
    outputs = [output for cell in ran.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def test_there_are_five_notebooks():
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05"]


@every_notebook
def test_a_notebook_is_its_script(name):
    script = jupytext.read(FOLDER / f"{name}.py")
    assert [(cell.cell_type, cell.source) for cell in notebook(name).cells] == [
        (cell.cell_type, cell.source) for cell in script.cells
    ]


@every_notebook
def test_a_notebook_is_kept_without_what_it_showed(name):
    for cell in notebook(name).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@every_notebook
def test_a_notebook_begins_with_its_badge_and_a_summary_in_chinese(name):
    first = notebook(name).cells[0].source
    address = REPOSITORY.removeprefix("https://github.com/")
    assert f"https://colab.research.google.com/github/{address}/blob/main/notebooks/{name}.ipynb" in first
    assert len(re.findall(r"[\u4e00-\u9fff]", first)) >= 40


def test_what_a_notebook_installs_is_no_part_of_jupyter_where_it_runs_in_it():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    installed = [wanted for extra in ("notebooks", "torch", "plot") for wanted in extras[extra]]
    assert extras["notebooks"][0] == "lockstep[torch,plot]"
    names = {re.match(r"[\w-]+", wanted)[0] for wanted in installed}
    assert names == {"lockstep", "torch", "torchvision", "matplotlib", "plotly"}


@every_notebook
def test_a_notebook_defines_nothing_but_calls_the_packages(name):
    code = "\n".join(cell.source for cell in notebook(name).cells if cell.cell_type == "code")
    assert not re.findall(r"^\s*(?:def|class) \w+|^\s*while ", code, re.MULTILINE)


@every_notebook
@pytest.mark.slow(minutes=2)
@pytest.mark.parametrize("devices", DEVICES)
def test_a_notebook_runs_whole_in_quick_mode(name, devices, tmp_path, monkeypatch, counted):
    monkeypatch.setenv(quick.VARIABLE, "1")
    printed = run(name, tmp_path, devices=devices, seconds=SECONDS, monkeypatch=monkeypatch)
    assert quick.said() in printed  # the canary: the kernel is in quick mode indeed
    assert f"{devices} device" in printed
    for config in tmp_path.glob("runs/cnn/config.json"):  # of the notebook that trains on every device
        assert len(json.loads(config.read_text("utf-8"))["devices"]) == devices
    counted("notebooks run whole in quick mode", 1)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow(minutes=60 if name[:2] == "05" else 6)) for name in NAMES]
)
def test_a_notebook_runs_whole_in_full_mode(name, tmp_path, monkeypatch, fashion_mnist, mnist):
    monkeypatch.delenv(quick.VARIABLE, raising=False)
    printed = run(name, tmp_path, devices=1, seconds=FULL_SECONDS, monkeypatch=monkeypatch)
    assert quick.said() in printed


def test_a_cell_that_fails_fails_its_notebook(tmp_path, monkeypatch):
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("raise SystemError('planted')")])
    monkeypatch.setitem(globals(), "notebook", lambda name: broken)
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="planted"):
        run("broken", tmp_path, devices=1, seconds=SECONDS, monkeypatch=monkeypatch)

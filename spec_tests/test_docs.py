"""The site: built without warnings and without a network, every page there, every formula readable without a script."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = re.findall(r": (\S+\.(?:md|ipynb))$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
FETCHED = re.compile(
    r'<(?:script|img|iframe)[^>]* src="(https?:[^"]*)"|<link[^>]* rel="stylesheet"[^>]*href="(https?:[^"]*)"'
)

BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


def build(root: Path, folder: Path) -> subprocess.CompletedProcess:
    """Build the site of a checkout, its notebooks as they are kept: running them is for test_notebooks.py."""
    environment = os.environ | {"LOCKSTEP_EXECUTE": "false", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT, folder)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


def test_every_page_of_the_repository_is_one_of_the_sites(site):
    notebooks = {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert notebooks | {"index.md", "specification.md", "examples.md", "scaling.md"} == set(PAGES)
    for page in PAGES:
        assert (site / page).with_suffix(".html").read_text("utf-8").count("<h1") >= 1, page


def test_no_page_fetches_anything_but_the_badge_of_colab(site):
    for page in site.rglob("*.html"):
        fetched = {address for found in FETCHED.findall(page.read_text("utf-8")) for address in found if address}
        assert fetched <= {BADGE}, page


def test_every_formula_is_mathml(site):
    page = (site / "specification.html").read_text("utf-8")
    source = (ROOT / "spec" / "SPEC.md").read_text("utf-8")
    formulas = re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", re.sub(r"`[^`\n]*`", "", source), re.DOTALL)
    assert len(formulas) > 300
    assert page.count("<math ") == len(formulas)
    assert "arithmatex" not in page


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem[:2])
def test_every_formula_of_a_notebook_is_mathml(site, path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    formulas = re.findall(r"\$\$.+?\$\$|\$[^$]+\$", re.sub(r"`[^`]*`", "", text), re.DOTALL)
    page = (site / "notebooks" / f"{path.stem}.html").read_text("utf-8")
    assert page.count("<math ") == len(formulas)


def test_links_between_the_pages_lead_to_them(site):
    assert 'href="specification.html"' in (site / "index.html").read_text("utf-8")
    assert 'href="index.html#several-processes-on-one-machine-or-on-many"' in (site / "examples.html").read_text(
        "utf-8"
    )


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path):
    for path in ("mkdocs.yml", "docs", "notebooks", "README.md", "spec/SPEC.md", "examples/README.md"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (shutil.copytree if (ROOT / path).is_dir() else shutil.copy)(ROOT / path, tmp_path / path)
    with (tmp_path / "docs" / "scaling.md").open("a") as page:
        page.write("\n[gone](nowhere.md)\n")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode == 1
    assert "nowhere.md" in built.stderr

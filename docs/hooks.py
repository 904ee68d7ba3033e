"""What mkdocs is told of this repository: which files outside docs/ are pages, and that formulas become MathML."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "spec/SPEC.md": "specification.md", "examples/README.md": "examples.md"}
LINKS = {
    "spec/SPEC.md": "specification.md",
    "docs/scaling.md": "scaling.md",
    "examples/README.md": "examples.md",
    "../README.md": "index.md",
}
CODE = re.compile(r"(<(pre|code|script|style|svg)\b.*?</\2>)", re.DOTALL)  # where a dollar is a dollar
DOLLARS = (re.compile(r"\$\$([^<]+?)\$\$"), "div"), (re.compile(r"\$([^$<]+)\$"), "span")
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


@event_priority(100)  # before what renders notebooks looks for them
def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere in the repository, their links to one another made those of the site."""
    for source, page in PAGES.items():
        content = (ROOT / source).read_text("utf-8")
        files.append(File.generated(config, page, content=_linked(content)))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files.append(File(f"notebooks/{path.name}", str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_content(html: str, *, page: Page, **_: object) -> str:
    """Return a page's HTML, its formulas MathML: no script has to be fetched to read them."""
    if page.file.src_uri.endswith(".ipynb"):
        html = "".join(
            part if index % 3 == 1 else _marked(part) for index, part in enumerate(CODE.split(html)) if index % 3 < 2
        )
    return FORMULA.sub(_mathml, html)


def _marked(html: str) -> str:
    """Return HTML of a notebook with its formulas marked as those of other pages are."""
    for pattern, tag in DOLLARS:
        html = pattern.sub(rf'<{tag} class="arithmatex">\1</{tag}>', html)
    return html


def _linked(content: str) -> str:
    for path, page in LINKS.items():
        content = re.sub(rf"\]\({re.escape(path)}(#[^)]*)?\)", rf"]({page}\1)", content)
    return content


def _mathml(found: re.Match) -> str:
    latex = unescape(found[2]).strip()
    display = "block" if found[1] == "div" else "inline"
    return convert(
        latex.removeprefix(r"\[").removeprefix(r"\(").removesuffix(r"\]").removesuffix(r"\)"), display=display
    )

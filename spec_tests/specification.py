"""SPEC.md as data: its statements, and the tests that each lists."""

from __future__ import annotations

import dataclasses
import functools
import re
from importlib import resources

LISTED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


@dataclasses.dataclass(frozen=True)
class Statement:
    """A statement of SPEC.md: its number, and what stands under its heading."""

    number: str
    body: str

    @property
    def tests_line(self) -> str:
        """The line that lists its tests; empty unless there is exactly one."""
        found = re.findall(r"^\*Tests:\* (.*)$", self.body, re.MULTILINE)
        return found[0] if len(found) == 1 else ""

    @property
    def tests(self) -> list[tuple[str, str]]:
        """File and name of each test that it lists."""
        return LISTED.findall(self.tests_line)


@functools.cache
def text() -> str:
    """Return the page."""
    return (resources.files("spec") / "SPEC.md").read_text("utf-8")


def statements() -> list[Statement]:
    """Return the statements in the page's order."""
    parts = re.split(r"^(#{2,3} S\d+(?:\.\d+)? .*)$", text(), flags=re.MULTILINE)
    headed = zip(parts[1::2], parts[2::2], strict=True)
    return [Statement(heading.split()[1], body) for heading, body in headed if heading.startswith("### ")]

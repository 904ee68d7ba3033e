"""Pictures in a terminal that shows them: kitty's protocol (kitty, Ghostty, Konsole, WezTerm) and iTerm2's."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Mapping
from pathlib import Path

CHUNK = 4096  # letters that kitty takes in one piece
KITTY = ("kitty", "ghostty", "konsole", "wezterm")
ITERM = ("iterm", "mintty", "vscode")


def protocol(environment: Mapping[str, str]) -> str | None:
    """Return which protocol the terminal knows, by what it says of itself: kitty, iterm, or None.

    >>> protocol({"TERM": "xterm-kitty"}), protocol({"TERM_PROGRAM": "iTerm.app"}), protocol({"TERM": "xterm"})
    ('kitty', 'iterm', None)
    """
    named = " ".join(environment.get(name, "") for name in ("TERM", "TERM_PROGRAM", "LC_TERMINAL")).lower()
    if any(name in named for name in KITTY) or "KITTY_WINDOW_ID" in environment or "KONSOLE_VERSION" in environment:
        return "kitty"
    return "iterm" if any(name in named for name in ITERM) else None


def encoded(png: bytes, by: str) -> str:
    """Return what makes a terminal show a PNG file's content, by one of the protocols."""
    text = base64.standard_b64encode(png).decode()
    if by == "iterm":
        return f"\x1b]1337;File=inline=1;size={len(png)}:{text}\a\n"
    pieces = [text[start : start + CHUNK] for start in range(0, len(text), CHUNK)]
    controls = [f"{'a=T,f=100,' * (index == 0)}m={int(index + 1 < len(pieces))}" for index in range(len(pieces))]
    return "".join(f"\x1b_G{control};{piece}\x1b\\" for control, piece in zip(controls, pieces, strict=True)) + "\n"


def show(path: Path) -> bool:
    """Show a PNG file in the terminal; return False, having done nothing, where that is none or shows no pictures."""
    by = protocol(os.environ) if sys.stdout.isatty() else None
    if by:
        sys.stdout.write(encoded(path.read_bytes(), by))
    return by is not None

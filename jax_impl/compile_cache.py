"""Compiled programs kept on disk, so that the second run of a recipe does not compile."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import jax

from spec.datasets import cache

FOLDER = "compiled"


def keep_compiled_programs() -> None:
    """Let JAX keep what it compiles in `<cache root>/compiled/<machine>`, unless the user named a place to it already.

    XLA checks badly whether a program fits the processor it is loaded on, so each kind of processor has a folder of
    its own. Where the cache cannot be written, and with JAX_ENABLE_COMPILATION_CACHE=false, nothing is kept.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    folder = cache.root() / FOLDER / _machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _machine() -> str:
    """Return a short name of this machine's processor and what it can do."""
    described = platform.machine() + platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        described += "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return hashlib.sha256(described.encode()).hexdigest()[:16]

"""The source: nothing in it runs what a file or a string holds, starts a shell, or fetches over an open line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("spec", "jax_impl", "torch_ref", "spec_tests", "notebooks")
# All but this file, whose strings are bad input for the scan.
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) if path != Path(__file__)]

UNPICKLERS = {
    f"{module}.{name}"
    for module in ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "joblib")
    for name in ("load", "loads", "Unpickler", "*")
} | {"shelve.open", "shelve.Shelf", "shelve.DbfilenameShelf", "shelve.*", "pandas.read_pickle"}
YAML_LOADERS = {f"yaml.{name}" for name in ("load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "*")}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
SHELLS |= {"asyncio.create_subprocess_shell"}
RUNNERS = {name for builtin in ("eval", "exec") for name in (builtin, f"builtins.{builtin}")}
FORBIDDEN = dict.fromkeys(UNPICKLERS, "pickle") | dict.fromkeys(YAML_LOADERS, "yaml.load")
FORBIDDEN |= dict.fromkeys(SHELLS, "shell") | dict.fromkeys(RUNNERS, "eval or exec")
TORCH_LOADS = {"torch.load", "torch.serialization.load"}
OPEN_LINE = re.compile(r"http://(?!(127\.0\.0\.1|localhost)(?![\w.-]))", re.IGNORECASE)


def found(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and kind of whatever has no place in the source."""
    names, docstrings, safe = imported(tree), docstrings_of(tree), set()
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=module, level=0):
                yield from ((node.lineno, kind(f"{module}.{alias.name}")) for alias in node.names)
            case ast.Call():
                yield from ((node.lineno, wrong) for wrong in wrong_arguments(node, qualified(node.func, names)))
                safe |= {node.func} if has(node, "weights_only", True) else set()
            case ast.Constant(value=str() as text) if node not in docstrings and OPEN_LINE.search(text):
                yield node.lineno, "http"
            case ast.Name() | ast.Attribute() if node not in safe:
                yield node.lineno, kind(qualified(node, names))


def kind(name: str) -> str:
    return "torch.load" if name in TORCH_LOADS else FORBIDDEN.get(name, "")


def wrong_arguments(call: ast.Call, name: str) -> Iterator[str]:
    """Yield what a call's arguments ask for that they may not."""
    for option, wrong in (("shell", "shell"), ("allow_pickle", "allow_pickle")):
        if any(keyword.arg == option for keyword in call.keywords) and not has(call, option, False):
            yield wrong
    if name == "numpy.load" and len(call.args) > 2:  # the third is allow_pickle
        yield "allow_pickle"


def has(call: ast.Call, option: str, value: object) -> bool:
    """Say whether a call gives `option` exactly that value, written out."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == option]
    return [getattr(one, "value", None) is value for one in given] == [True]


def imported(tree: ast.Module) -> dict[str, str]:
    """Return what each imported name stands for: `np` for numpy, `loads` for pickle.loads."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def qualified(node: ast.AST, names: dict[str, str]) -> str:
    """Return a dotted name with its first part as imported; an empty one for any other expression."""
    match node:
        case ast.Name(id=name):
            return names.get(name, name)
        case ast.Attribute(value=value, attr=attribute):
            return f"{qualified(value, names)}.{attribute}"
    return ""


def docstrings_of(tree: ast.Module) -> set[ast.AST]:
    """Return the strings that stand alone: docstrings of all kinds."""
    return {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def kinds(source: str) -> set[str]:
    return {wrong for _, wrong in found(ast.parse(source)) if wrong}


def test_the_source_runs_no_file_or_string_starts_no_shell_and_fetches_over_no_open_line():
    packages = {path.relative_to(ROOT).parts[0] for path in SOURCES}
    assert packages >= {"spec", "jax_impl", "torch_ref", "spec_tests"}
    bad = [
        f"{path.relative_to(ROOT)}:{line} {wrong}"
        for path in SOURCES
        for line, wrong in found(ast.parse(path.read_text("utf-8")))
        if wrong
    ]
    assert bad == []


PLANTED = [
    ("pickle", "import pickle\npickle.load(file)"),
    ("pickle", "import pickle\nstate = pickle.loads(content)"),
    ("pickle", "import pickle as p\np.Unpickler(file).load()"),
    ("pickle", "from pickle import loads"),
    ("pickle", "from pickle import loads as read\nread(content)"),
    ("pickle", "from pickle import *"),
    ("pickle", "import pickle\nread = pickle.load"),
    ("pickle", "import cPickle\ncPickle.load(file)"),
    ("pickle", "def read():\n    import dill\n    return dill.load(file)"),
    ("pickle", "import cloudpickle\ncloudpickle.loads(content)"),
    ("pickle", "import shelve\nshelve.open('file')"),
    ("pickle", "from joblib import load\nload('file')"),
    ("pickle", "import joblib\njoblib.load('file')"),
    ("pickle", "import marshal\nmarshal.loads(content)"),
    ("pickle", "import pandas as pd\npd.read_pickle('file')"),
    ("torch.load", "import torch\ntorch.load('file')"),
    ("torch.load", "import torch\ntorch.load('file', map_location='cpu', weights_only=False)"),
    ("torch.load", "import torch\ntorch.load('file', weights_only=safe)"),
    ("torch.load", "import torch\ntorch.load('file', **options)"),
    ("torch.load", "import torch\nread = torch.load"),
    ("torch.load", "import torch as t\nt.serialization.load('file')"),
    ("torch.load", "from torch import load\nload('file')"),
    ("eval or exec", "eval('1 + 1')"),
    ("eval or exec", "def run(code):\n    exec(compile(code, 'name', 'exec'), {})"),
    ("eval or exec", "values = list(map(eval, texts))"),
    ("eval or exec", "import builtins\nbuiltins.exec(code)"),
    ("eval or exec", "from builtins import eval as evaluate"),
    ("shell", "import subprocess\nsubprocess.run(f'ls {name}', shell=True)"),
    ("shell", "from subprocess import Popen\nPopen(command, shell=choice)"),
    ("shell", "import os\nos.system('ls')"),
    ("shell", "from os import popen\npopen('ls')"),
    ("shell", "import subprocess\nsubprocess.getoutput('ls')"),
    ("allow_pickle", "import numpy as np\nnp.load('file', allow_pickle=True)"),
    ("allow_pickle", "import numpy\nnumpy.savez('file', allow_pickle=choice)"),
    ("allow_pickle", "import numpy as np\nnp.load('file', None, True)"),
    ("yaml.load", "import yaml\nyaml.load(text)"),
    ("yaml.load", "import yaml\nyaml.load(text, Loader=yaml.Loader)"),
    ("yaml.load", "from yaml import unsafe_load as read"),
    ("http", "MIRROR = 'http://example.org/data'"),
    ("http", "MIRRORS = ('https://example.org', 'HTTP://example.org')"),
    ("http", "def url(host):\n    return f'http://{host}/data'"),
    ("http", "URL = 'http://127.0.0.1.example.org'"),
    ("http", "URL = 'http://localhost-of-another.org:80'"),
]


@pytest.mark.parametrize(("wrong", "source"), PLANTED)
def test_the_scan_sees_what_is_planted(wrong, source):
    assert kinds(source) == {wrong}


INNOCENT = [
    "network.eval()\nmodel.compile()\nself.exec(1)",
    "import re\nre.compile('eval(x)')",
    "import torch\nnetwork = torch.compile(network)",
    "import torch\ntorch.load('file', map_location='cpu', weights_only=True)",
    "import pickle\npickle.dumps(trap)",
    "import json\njson.load(file)\njson.loads(text)",
    "from safetensors.numpy import load",
    "import tomllib\ntomllib.loads('eval = 1')",
    "import numpy as np\nnp.load('file')\nnp.load('file', allow_pickle=False)\nnp.load('file', None)",
    "import yaml\nyaml.safe_load(text)",
    "import subprocess\nsubprocess.run(['ls'])\nsubprocess.run(['ls'], shell=False)",
    "import os\nos.environ['shell'] = 'True'",
    "# pickle.load(file), http://example.org",
    '"""A docstring: http://example.org; pickle.load(file), eval(text)."""',
    "class Evaluation:\n    '''From http://example.org.'''\n    def eval(self): ...\n    def load(self): ...",
    "MIRROR = 'https://example.org'\nSERVER = f'http://127.0.0.1:{port}/data'\nOTHER = 'http://localhost:8000'",
    "load('file')\nevaluate(text)\nexecute(text)\nsystem('ls')",
]


@pytest.mark.parametrize("source", INNOCENT)
def test_the_scan_passes_over_what_only_looks_like_it(source):
    assert kinds(source) == set()

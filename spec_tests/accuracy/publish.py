"""Write what is computed from the results into its places: README's tables and the recipes' `expected`."""

from __future__ import annotations

import re
from pathlib import Path

import tomli_w

from spec.files import write_atomic
from spec_tests.accuracy.claims import claims_table
from spec_tests.accuracy.results import Results, load_experiments, load_results
from spec_tests.accuracy.tables import expected, has_test_split, table


def publish(root: Path) -> None:
    """Rewrite the tables of `root`'s README between their markers, and section `expected` of its recipes."""
    results, experiments = load_results(root), load_experiments(root)
    readme = root / "README.md"
    text = replace_table(readme.read_text("utf-8"), "accuracy", table(results))
    text = replace_table(text, "claims", claims_table(results, experiments))
    write_atomic(readme, text.encode())
    for path in sorted((root / "spec" / "recipes").glob("*.toml")):
        write_atomic(path, with_expected(path.read_text("utf-8"), path.stem, results).encode())


def replace_table(text: str, name: str, table: str) -> str:
    """Return `text` with the table between `<!-- name: ... -->` and `<!-- /name -->` replaced."""
    pattern = rf"(<!-- {name}: [^\n]* -->\n).*?(<!-- /{name} -->)"
    replaced, count = re.subn(pattern, lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"README has {count} places for the table {name}; it must have one")
    return replaced


def with_expected(text: str, name: str, results: Results) -> str:
    """Return a recipe's text with the `expected` of the results as its last section, or none if none is measured."""
    text = text.split("\n[expected]\n")[0].rstrip("\n") + "\n"
    result = results.get(name)
    if result and all(has_test_split(block) for block in result.values()):
        text += "\n" + tomli_w.dumps({"expected": expected(result)})
    return text

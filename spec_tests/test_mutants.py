"""The kill matrix: its mutants still apply, its runner tells killed, survived and crashed apart, and none survives."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from spec.errors import UserError
from spec_tests.mutants import __main__ as matrix
from spec_tests.mutants import runner
from spec_tests.mutants.catalogue import MUTANTS, Mutant
from spec_tests.mutants.runner import Outcome

ROOT = Path(__file__).parents[1]
HARMED = [f"S{number}" for number in (*range(1, 10), 11, 12)]  # S10 judges kept figures


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies_once_and_compiles(mutant):
    before = (ROOT / mutant.path).read_text("utf-8")
    after = runner.mutated(mutant, ROOT)
    assert before.count(mutant.old) == 1
    assert after != before
    compile(after, mutant.path, "exec")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_tests_that_a_mutant_names_are_there(mutant):
    selected = runner.selection(mutant, ROOT)
    texts = "".join((ROOT / file).read_text("utf-8") for file in selected.files)
    for word in re.findall(r"\w*_\w*", mutant.only):
        assert re.search(rf"def test_\w*{word}", texts), word


def test_mutants_have_names_of_their_own_and_say_what_is_wrong():
    assert max(Counter(mutant.name for mutant in MUTANTS).values()) == 1
    assert all(re.fullmatch(r"[a-z0-9-]+", mutant.name) for mutant in MUTANTS)
    assert all(mutant.says and "\n" not in mutant.says for mutant in MUTANTS)


def test_there_are_mutants_of_every_clause_and_of_both_implementations():
    assert len(MUTANTS) >= 66
    planted = Counter(mutant.path.split("/")[0] for mutant in MUTANTS)
    assert min(planted["jax_impl"], planted["torch_ref"]) >= 20
    assert {mutant.clause for mutant in MUTANTS} == set(HARMED)


def test_none_is_planted_into_the_truth_or_the_tests():
    for mutant in MUTANTS:
        assert mutant.path.startswith(("jax_impl/", "torch_ref/", "spec/")), mutant.name
        assert not mutant.path.startswith(("spec/oracle", "spec/recipes", "spec/golden")), mutant.name


# The runner, on a repository of one function and one test

ADD = """\"\"\"Adds.\"\"\"

FIRST = 1


def add(a: int, b: int) -> int:
    return a + b
"""
FIXTURE = """import pytest


@pytest.fixture(autouse=True)
def five():
    assert jax_impl.toy.add(2, 3) == 5


"""
TESTS = """import jax_impl.toy


def test_two_and_three_are_five():
    assert jax_impl.toy.add(2, 3) == 5


def test_zero_changes_nothing():
    assert jax_impl.toy.add(2, 0) == 2
"""


def toy(name: str, old: str, new: str, **changes: object) -> Mutant:
    return Mutant(name=name, clause="S1", says="a fault", path="jax_impl/toy.py", old=old, new=new, **changes)


TOYS = {
    "killed": toy("product", "a + b", "a * b"),
    "survived": toy("other-words", '"""Adds."""', '"""Sums."""'),
    "crashed": toy("no-import", "FIRST = 1", "FIRST = SECOND"),
}


@pytest.fixture
def repository(tmp_path) -> Path:
    for package, files in {"jax_impl": {"toy.py": ADD}, "spec_tests": {"test_s01_toy.py": TESTS}}.items():
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
        for name, text in files.items():
            (tmp_path / package / name).write_text(text)
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["slow: takes minutes"]\n')
    return tmp_path


def unheard(task: object, outcome: runner.Outcome) -> None:
    pass


def test_the_runner_tells_killed_survived_and_crashed_apart(repository):
    heard = []
    outcomes = runner.run_mutants([*TOYS.values()], repository, 2, lambda mutant, outcome: heard.append(mutant))
    assert {mutant.name: outcome.result for mutant, outcome in outcomes.items()} == {
        mutant.name: result for result, mutant in TOYS.items()
    }
    assert set(heard) == set(TOYS.values())
    assert outcomes[TOYS["killed"]].killer == "test_s01_toy.py::test_two_and_three_are_five"
    assert "assert 6 == 5" in outcomes[TOYS["killed"]].message
    assert outcomes[TOYS["crashed"]].message.startswith("exit status 2")
    assert (repository / "jax_impl" / "toy.py").read_text() == ADD  # faults are planted into copies alone


def test_a_test_that_has_counted_something_kills_as_any_other(repository):
    settings = repository / "pyproject.toml"
    settings.write_text(settings.read_text() + 'filterwarnings = ["error"]\n')
    counting = TESTS.replace("five():\n", "five(record_property):\n    record_property('counted', 1)\n")
    (repository / "spec_tests" / "test_s01_toy.py").write_text(counting)
    (outcome,) = runner.run_mutants([TOYS["killed"]], repository, 1, unheard).values()
    assert (outcome.result, outcome.killer) == ("killed", "test_s01_toy.py::test_two_and_three_are_five")


def test_tests_that_are_not_found_kill_nothing(repository):
    mutant = toy("product", "a + b", "a * b", only="no_such_test")
    (outcome,) = runner.run_mutants([mutant], repository, 1, unheard).values()
    assert (outcome.result, outcome.message[:13]) == ("crashed", "exit status 5")


def test_a_failure_before_the_test_begins_kills_nothing(repository):
    fixture = (
        "import pytest\n\n\n@pytest.fixture(autouse=True)\ndef five():\n    assert jax_impl.toy.add(2, 3) == 5\n\n\n"
    )
    (repository / "spec_tests" / "test_s01_toy.py").write_text(fixture + TESTS)
    (outcome,) = runner.run_mutants([TOYS["killed"]], repository, 1, unheard).values()
    assert outcome.result == "crashed"


def test_the_baseline_runs_each_file_once_with_all_that_its_mutants_need(repository):
    one, other = (toy(name, "a + b", "a * b", only=name) for name in ("two_and_three", "zero"))
    ((selected, outcome),) = runner.run_baseline([one, other], repository, 1, unheard).items()
    assert selected == runner.Selection(files=("spec_tests/test_s01_toy.py",), only="(two_and_three) or (zero)")
    assert outcome.result == "survived"
    (repository / "jax_impl" / "toy.py").write_text(ADD.replace("a + b", "a"))
    ((_, outcome),) = runner.run_baseline([one, other], repository, 1, unheard).items()
    assert outcome.result == "killed"


@pytest.mark.parametrize(("old", "times"), [("no such text", 0), ("a", 3)])
def test_a_mutant_that_does_not_apply_once_is_an_error_that_names_it(repository, old, times):
    with pytest.raises(UserError, match=rf"mutant stale: its old text occurs {times} times in jax_impl/toy.py"):
        runner.mutated(toy("stale", old, "b"), repository)


def test_a_copy_that_is_not_what_python_imports_is_refused(repository, monkeypatch):
    monkeypatch.setattr(runner, "_environment", lambda copy: {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"})
    with pytest.raises(UserError, match="not the copy in"):
        runner.run_mutants([TOYS["killed"]], repository, 1, unheard)


# The program


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "jax-uphil"], r"--only jax-uphil: no mutant has this name \(did you mean 'jax-uphill'\?\)"),
        (["--clause", "S10"], "--clause S10: no mutant is of this clause; there are S1, S2"),
        (["--clause", "S4", "--only", "jax-uphill"], "--clause S4: none of jax-uphill is of this clause"),
        (["--jobs", "0"], "--jobs 0: must be 1 or more"),
        (["--json", "."], r"--json \. is a directory; name a file"),
    ],
)
def test_a_mistake_is_named_with_its_mend(arguments, said):
    with pytest.raises(UserError, match=said):
        matrix.main(arguments)


def test_the_mutants_of_a_clause_are_listed_without_running_anything(capsys):
    matrix.main(["--clause", "S9", "--list"])
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == sum(mutant.clause == "S9" for mutant in MUTANTS)
    assert "S9 torch-takes-the-callers-memory: torch's parameters are the caller's own arrays" in "\n".join(listed)


def test_a_terminated_matrix_leaves_no_copy_behind(tmp_path):
    command = [sys.executable, "-m", "spec_tests.mutants", "--only", "jax-uphill", "--jobs", "1"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: list(tmp_path.glob("mutants-*/repository/pyproject.toml")))
        process.terminate()
        assert process.wait(timeout=300) == 128 + signal.SIGTERM
    assert list(tmp_path.glob("mutants-*")) == []


def wait_for(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline, "nothing happened for two minutes"
        time.sleep(0.05)


def run_program(
    repository: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str, mutants: dict[str, Mutant] = TOYS
) -> int:
    monkeypatch.setattr(matrix, "ROOT", repository)
    monkeypatch.setattr(matrix, "MUTANTS", tuple(mutants.values()))
    with pytest.raises(SystemExit) as left:
        matrix.main(list(arguments))
    return int(left.value.code)


def test_the_program_prints_the_matrix_keeps_it_and_ends_with_the_count(repository, monkeypatch, capsys):
    status = run_program(repository, monkeypatch, "--json", str(repository / "matrix.json"))
    out = capsys.readouterr().out
    assert status == 1
    assert out.splitlines()[-1] == "killed 1 of 3"
    assert "1/3 " in out
    assert re.search(r"S1 +│ product +│ jax_impl/toy.py +│ killed +│ test_s01_toy.py::test_two_and_three_are_five", out)
    kept = json.loads((repository / "matrix.json").read_text())
    assert {row["name"]: row["result"] for row in kept["mutants"]} == {
        mutant.name: result for result, mutant in TOYS.items()
    }
    assert kept["mutants"][0].keys() >= {"name", "clause", "file", "result", "killer", "seconds", "date"}
    assert kept["versions"].keys() >= {"python", "pytest", "jax", "torch"}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"]) for row in kept["mutants"])


def test_a_part_of_the_matrix_takes_its_place_in_the_kept_one(monkeypatch):
    monkeypatch.setattr(matrix, "MUTANTS", tuple(TOYS.values()))
    first, *others = TOYS.values()
    lived = Outcome(result="survived", killer="", message="", seconds=1.0)
    whole = matrix.matrix(dict.fromkeys(TOYS.values(), lived))
    gone = whole | {"mutants": [*whole["mutants"], whole["mutants"][0] | {"name": "no-longer-there"}]}
    part = matrix.matrix({first: dataclasses.replace(lived, result="killed")}, gone)
    assert [row["name"] for row in part["mutants"]] == [mutant.name for mutant in TOYS.values()]
    assert [row["result"] for row in part["mutants"]] == ["killed", *("survived" for _ in others)]
    assert part["killed"] == 1
    assert len(matrix.matrix({first: lived}, gone | {"versions": {}})["mutants"]) == 1
    said_otherwise = [row | {"says": "something else"} for row in whole["mutants"]]
    assert len(matrix.matrix({first: lived}, whole | {"mutants": said_otherwise})["mutants"]) == 1


def test_a_part_is_not_kept_in_the_place_of_a_matrix_of_other_versions(repository, monkeypatch):
    (repository / "results").mkdir()
    (repository / "results" / "mutants.json").write_text(json.dumps({"mutants": [], "versions": {"python": "2.7"}}))
    monkeypatch.setattr(matrix, "ROOT", repository)
    with pytest.raises(UserError, match=f"1 of {len(MUTANTS)} mutants would replace it; run the whole matrix"):
        matrix.main(["--only", "jax-uphill", "--keep"])


def test_the_program_leaves_with_0_when_all_are_killed_and_refuses_a_broken_baseline(repository, monkeypatch, capsys):
    assert run_program(repository, monkeypatch, "--only", "product", "--jobs", "1") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "killed 1 of 1"
    broken = toy("product", "a * b", "a - b")
    (repository / "jax_impl" / "toy.py").write_text(ADD.replace("a + b", "a * b"))
    assert run_program(repository, monkeypatch, mutants={"killed": broken}) == 1
    assert "the unmutated copy fails its own tests" in capsys.readouterr().out


@pytest.mark.slow(minutes=45)
def test_every_mutant_is_killed(tmp_path):
    with pytest.raises(SystemExit) as left:
        matrix.main(["--json", str(tmp_path / "matrix.json")])
    rows = json.loads((tmp_path / "matrix.json").read_text())["mutants"]
    assert [row for row in rows if row["result"] != "killed"] == []
    assert len(rows) == len(MUTANTS)
    assert left.value.code == 0

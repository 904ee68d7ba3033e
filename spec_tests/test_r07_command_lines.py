"""R7: every mistake in a recipe or on a command line is a short error that names it, and the program exits with 2.

What is put in is made from the recipe's schema: each field, and whatever its type, its bounds, its choices or its
pattern do not allow. What is refused follows from those, and is not asked of the program.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import gzip
import itertools
import json
import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tomli_w

from spec import recipe
from spec.command_line import Flags
from spec.sweep import ManyFlags
from spec_tests.conftest import FRAMEWORKS, Ended

INPUTS = "R7 recipes and command lines"
MOST_LINES = 10
EVERY = 61  # of what is made by rule and needs the whole command line, a share this small is not slow
PARTS = ["some", pytest.param("the others", marks=pytest.mark.slow(minutes=1))]
KINDS = {"jax": ManyFlags, "torch": Flags}

Place = tuple[str, ...]


# The schema


class Rule(NamedTuple):
    """What a field may hold: a type, what bounds it, the rules of its elements if it is a list."""

    kind: type
    bounds: Mapping[str, Any]
    choices: tuple[str, ...]
    elements: tuple[Rule, ...]


def rule_of(hint: Any) -> Rule:
    """Return the rule that a type hint states; None is for fields that do not apply, and is not asked for here."""
    bounds: dict[str, Any] = {}
    while typing.get_origin(hint) in (typing.Annotated, typing.Union, types.UnionType):
        if typing.get_origin(hint) is typing.Annotated:
            hint, *notes = typing.get_args(hint)
            for part in (part for note in notes for part in getattr(note, "metadata", ())):
                bounds |= bounds_of(part)
        else:
            (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return Rule(str, bounds, parts, ())
    if typing.get_origin(hint) is tuple:
        fixed = {} if parts[-1] is ... else {"min_length": len(parts), "max_length": len(parts)}
        return Rule(list, bounds | fixed, (), tuple(rule_of(part) for part in parts if part is not ...))
    return Rule(hint, bounds, (), ())


def bounds_of(part: Any) -> dict[str, Any]:
    names = ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern")
    return {name: getattr(part, name) for name in names if getattr(part, name, None) is not None}


def schema() -> dict[Place, Rule]:
    """Return the rule of each field that a recipe states, by its path."""
    rules: dict[Place, Rule] = {}
    for name, hint in typing.get_type_hints(recipe.Recipe, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            inner = typing.get_type_hints(hint, include_extras=True)
            rules |= {(name, field): rule_of(inner[field]) for field in inner}
        elif name != "expected":
            rules[(name,)] = rule_of(hint)
    return rules


SCHEMA = schema()
SHIPPED = [recipe.to_mapping(recipe.load(name)) for name in ("mlp128", *recipe.recipe_names())]
# No recipe that ships has these.
SCHEDULES = ({"name": "step", "step_epochs": 2, "gamma": 0.5}, {"name": "cosine", "final_learning_rate": 0.0})
BASES = [*SHIPPED, *(SHIPPED[0] | {"schedule": schedule} for schedule in SCHEDULES)]


def base(path: Place) -> dict[str, Any]:
    """Return a good recipe that states the field."""
    found = next(mapping for mapping in BASES if path[-1] in section(mapping, path))
    return {name: copy.deepcopy(value) for name, value in found.items() if name != "expected"}


def section(mapping: dict[str, Any], path: Place) -> dict[str, Any]:
    return mapping if len(path) == 1 else mapping[path[0]]


def with_value(path: Place, value: Any) -> str:
    """Return a good recipe's TOML but for the value of one field."""
    mapping = base(path)
    section(mapping, path)[path[-1]] = value
    return tomli_w.dumps(mapping)


# Values that a rule does not allow

VALUES: dict[type, tuple[Any, ...]] = {
    bool: (True,),
    int: (1,),
    float: (0.5,),
    str: ("one", "nan", ""),
    list: ([], [[]], [{}]),
    dict: ({}, {"name": "one"}),
    datetime.date: (datetime.date(2026, 1, 1), datetime.datetime(2026, 1, 1, 12), datetime.time(12)),
}
TAKEN = {float: {float, int}}  # a whole number is a fraction too
HUGE = 10**40
STRANGE = ("", "zzz", "Upper", "two words", "-first", "../up", "naïve", "\u202e", "line\n", "a\x1b[2Jb", "x" * 100_000)
NO_NUMBERS = ("", "one", "[1]", "½", "五", "0x10", "1,5", "true", "--", "\udcff", "9" * 5_000 + "x")
NOT_WHOLE = ("2.5", "1e3", "nan", "inf", "9" * 5_000)


def outside(rule: Rule) -> Iterator[Any]:
    """Yield what is of the rule's type, but not within its bounds, choices or pattern."""
    least, most = rule.bounds.get("ge", rule.bounds.get("gt")), rule.bounds.get("le", rule.bounds.get("lt"))
    if rule.kind is int:
        yield from (least - 1, -HUGE, most + ("le" in rule.bounds), HUGE)
    elif rule.kind is float:
        yield from (math.nan, math.inf, -math.inf, -1e308, 1e308)
        yield least if "gt" in rule.bounds else math.nextafter(least, -math.inf)
        yield most if "lt" in rule.bounds else math.nextafter(most, math.inf)
    elif rule.choices:
        first, *_, last = rule.choices
        yield from (*STRANGE, first.upper(), f"{first}s", f" {last}")
    elif rule.kind is str:
        yield from (text for text in STRANGE if not allows(rule, text))


def allows(rule: Rule, text: str) -> bool:
    fits = len(text) <= rule.bounds.get("max_length", math.inf)
    return fits and re.fullmatch(rule.bounds.get("pattern", ".*").removesuffix("$"), text, re.DOTALL) is not None


def bad_values(rule: Rule) -> Iterator[Any]:
    """Yield values for TOML that the rule does not allow."""
    for kind, values in VALUES.items():
        if kind not in TAKEN.get(rule.kind, {rule.kind}):
            yield from values
    yield from outside(rule)
    if rule.kind is list:
        good, rest = good_elements(rule)
        yield from ([bad, *rest] for bad in bad_values(rule.elements[0]))
        yield from ([good] * length for length in wrong_lengths(rule))


def good_elements(rule: Rule) -> tuple[Any, list[Any]]:
    """Return a good element of a list, and what must follow one."""
    first = rule.elements[0]
    good = first.choices[0] if first.choices else first.kind(first.bounds["ge"])
    return good, [good] * (rule.bounds.get("min_length", 1) - 1)


def wrong_lengths(rule: Rule) -> list[int]:
    return [rule.bounds[end] + more for end, more in (("min_length", -1), ("max_length", 1)) if end in rule.bounds]


def bad_words(rule: Rule) -> Iterator[list[str]]:
    """Yield words for a flag that the rule does not allow."""
    if rule.kind is list:
        good, rest = good_elements(rule)
        found = ([*words, *map(str, rest)] for words in bad_words(rule.elements[0]))
        yield from (words for words in found if not {"--", "-first"} & set(words))  # by itself either is an option
        yield from ([str(good)] * length for length in wrong_lengths(rule))
        return
    if rule.kind is not str:
        yield from ([word] for word in NO_NUMBERS)
    if rule.kind is int:
        yield from ([word] for word in NOT_WHOLE)
    yield from ([value if rule.kind is str else repr(value)] for value in outside(rule))


def flags_of(path: Place, words: list[str]) -> list[str]:
    option = f"--{'.'.join(path)}".replace("_", "-")
    return [f"{option}={words[0]}"] if SCHEMA[path].kind is not list else [option, *words]


# Names that are nearly right


def slips(word: str) -> list[str]:
    """Return the words at one slip of the hand from `word`: a letter lost, one doubled, two changed about."""
    places = range(len(word))
    lost = [word[:i] + word[i + 1 :] for i in places]
    doubled = [word[:i] + word[i] + word[i:] for i in places]
    return lost + doubled + [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in places[:-1]]


def misspelt(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return, for each name, a letter of it lost, one doubled and two changed about, if that is near to no other."""
    names = sorted(names)
    near = {name: set(slips(name)) for name in names}
    pairs = []
    for name in names:
        for slip in slips(name)[len(name) // 2 :: len(name)]:
            if slip not in names and [other for other in names if slip in near[other]] == [name]:
                pairs.append((slip, name))
    return pairs


# What must be seen


def assert_refused(ended: Ended, *said: str) -> None:
    """Fail unless the program ended with 2, nothing on its output, and a short, printable error that says all that."""
    lines = ended.err.split("\n")
    assert ended.status == 2, f"{ended.status} {ended.err}"
    assert ended.out == ""
    assert lines.pop() == ""
    assert 1 <= len(lines) <= MOST_LINES, ended.err
    assert "Traceback" not in ended.err
    assert all(line.isprintable() for line in lines), lines
    for one in said:
        assert one.replace("-", "_") in ended.err.replace("-", "_"), f"{one} is not in {ended.err}"


@pytest.fixture
def refused(trainer_command, tmp_path) -> Callable[..., None]:
    """Return a function that fails unless the front doors refuse arguments, saying so; what they take, they print."""

    def check(arguments: Sequence[object], *said: str, of: Iterable[str] = FRAMEWORKS) -> None:
        for framework in of:
            assert_refused(trainer_command(*arguments, "--print-config", framework=framework), *said)

    return check


@pytest.mark.parametrize(
    "ended",
    [
        Ended(0, "", "error: no\n"),
        Ended(1, "", "error: no\n"),
        Ended(2, "", ""),
        Ended(2, "some", "error: no\n"),
        Ended(2, "", "error: other\n"),
        Ended(2, "", "Traceback\nerror: no\n"),
        Ended(2, "", "error: no\x1b[2J\n"),
        Ended(2, "", "error: no\n" * (MOST_LINES + 1)),
    ],
)
def test_an_end_that_is_no_refusal_is_seen(ended):
    assert_refused(Ended(2, "", "error: no\n"), "no")
    with pytest.raises(AssertionError):
        assert_refused(ended, "no")


# Fields


def share(part: str, items: Sequence[Any], *, every: int = EVERY) -> list[Any]:
    return [item for number, item in enumerate(items) if (number % every == 0) == (part == "some")]


def dotted(path: Place) -> str:
    return ".".join(path)


def turns(places: Iterable[Any]) -> Iterator[tuple[Any, str]]:
    """Yield each with one of the frameworks, which take turns."""
    return zip(places, itertools.cycle(FRAMEWORKS), strict=False)


@pytest.mark.parametrize("path", SCHEMA, ids=dotted)
def test_a_file_with_a_value_that_its_field_does_not_allow_is_refused_naming_it(path, refused, tmp_path, counted):
    file = tmp_path / "mine.toml"
    values = list(bad_values(SCHEMA[path]))
    for value, framework in turns(values):
        file.write_text(with_value(path, value), "utf-8")
        refused(["--recipe", file], dotted(path), of=[framework])
    counted(INPUTS, len(values))


def word_lists() -> list[tuple[Place, list[str]]]:
    return [(path, words) for path, rule in SCHEMA.items() for words in bad_words(rule)]


@pytest.mark.parametrize("part", PARTS)
def test_a_flag_with_a_value_that_its_field_does_not_allow_is_refused_naming_it(part, refused, tmp_path, counted):
    file = tmp_path / "mine.toml"
    asked = share(part, word_lists())
    for (path, words), framework in turns(asked):
        file.write_text(tomli_w.dumps(base(path)), "utf-8")
        refused(["--recipe", file, *flags_of(path, words)], dotted(path), of=[framework])
    counted(INPUTS, len(asked))


def test_a_file_with_a_field_that_its_kind_does_not_use_is_refused_naming_both(refused, tmp_path, counted):
    file = tmp_path / "mine.toml"
    number = 0
    for name, kinds in recipe.USES.items():
        for kind, field in itertools.product(kinds, sorted(set().union(*kinds.values()))):
            if field in kinds[kind]:
                continue
            mapping = copy.deepcopy(next(found for found in BASES if found[name]["name"] == kind))
            mapping[name][field] = base((name, field))[name][field]
            file.write_text(tomli_w.dumps(mapping), "utf-8")
            refused(["--recipe", file], f"{name}.{field}", f"is not used by {kind}")
            number += 1
    counted(INPUTS, number)


# Names that are not there


def test_a_misspelt_field_of_a_file_is_refused_with_the_nearest_name(refused, tmp_path, counted):
    file = tmp_path / "mine.toml"
    number = 0
    for place in ((), *((name,) for name in recipe.USES)):
        names = {path[len(place)] for path in SCHEMA if path[: len(place)] == place}
        for slip, name in misspelt(names):
            mapping = base((*place, name))
            fields = mapping[place[0]] if place else mapping
            fields[slip] = fields.pop(name)
            file.write_text(tomli_w.dumps(mapping), "utf-8")
            refused(["--recipe", file], f"{dotted((*place, slip))} is not a field (did you mean '{name}'?)")
            number += 1
    counted(INPUTS, number)


def options(framework: str) -> set[str]:
    flags = {field.name for field in dataclasses.fields(KINDS[framework])} - {"config"}
    return {f"--{name}".replace("_", "-") for name in flags | set(map(dotted, SCHEMA))}


@pytest.mark.parametrize("part", PARTS)
def test_a_misspelt_option_is_refused_with_the_nearest_name(part, refused, counted):
    pairs = [(framework, *pair) for framework in FRAMEWORKS for pair in misspelt(options(framework))]
    asked = share(part, [pair for pair in pairs if pair[1].startswith("--")])
    for framework, slip, name in asked:
        refused([slip, "1"], f"{slip} is not an option (did you mean {name}?)", of=[framework])
    counted(INPUTS, len(asked))


def test_a_misspelt_recipe_is_refused_with_the_nearest_name(refused, counted):
    asked = misspelt(recipe.recipe_names())
    for slip, name in asked:
        refused(["--recipe", slip], f"no recipe has the name '{slip}' (did you mean '{name}'?)")
    counted(INPUTS, len(asked))


# Files

TEXT = tomli_w.dumps(base(("epochs",)))
LINES = TEXT.splitlines(keepends=True)
KEYS = [number for number, line in enumerate(LINES) if " = " in line]
TABLES = [line for line in LINES if line.startswith("[")]
DRAW = np.random.default_rng([7, *b"recipes"])


def broken_texts() -> Iterator[str]:
    """Yield recipes cut short, which lack a field at least, and with a key or a table that is there twice."""
    yield from (TEXT[: int(length)] for length in DRAW.choice(len(TEXT.rstrip()), 60, replace=False))
    yield from ("".join([*LINES[:number], LINES[number], *LINES[number:]]) for number in KEYS)
    yield from (TEXT + table for table in TABLES)


BYTES: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n\t\n",
    "a remark": b"# a recipe\n",
    "zeros": bytes(100),
    "noise": DRAW.bytes(1_000),
    "UTF-16": TEXT.encode("utf-16"),
    "Latin-1": TEXT.replace("relu", "relü").encode("latin-1"),
    "gzip": gzip.compress(TEXT.encode()),
    "a picture": b"\x89PNG\r\n\x1a\n",
    "another format": json.dumps(base(("epochs",))).encode(),
    "YAML": TEXT.replace(" = ", ": ").encode(),
    "too large": TEXT.encode() + b"#" * 1_000_000,
    "too deep": b"a = " + b"[" * 100_000,
    "a number too long": TEXT.replace("seed = 0", f"seed = {'9' * 5_000}").encode(),
    "an unended text": TEXT.replace("description = ", 'description = """', 1).encode(),
    "an escape that is none": TEXT.replace("name = ", 'name = "\\x" #', 1).encode(),
    "half a surrogate": TEXT.replace("name = ", 'name = "\\ud800" #', 1).encode(),
    "a key of many lines": b'"' + b"\\n" * 50 + b'" = 1\n' + TEXT.encode(),
    "a key that moves the cursor": b'"\\u001b[2J" = 1\n' + TEXT.encode(),
    "a key without end": b"k" * 100_000 + b" = 1\n" + TEXT.encode(),
    "a key of many parts": b".".join([b"a"] * 2_000) + b" = 1\n" + TEXT.encode(),
    "keys without end": b"".join(b"k%d = 1\n" % number for number in range(10_000)) + TEXT.encode(),
}
JSON = ["", "[]", "3", "null", "nan", '"text"', "{", '{"recipe": []}', '{"recipe": {}}', "[" * 100_000]
JSON += [
    json.dumps({"recipe": base(("epochs",)) | {"description": "\ud800"}}),
    json.dumps(base(("epochs",)) | {"seed": math.nan}),
]


def test_a_broken_file_is_refused_naming_it(refused, tmp_path, counted):
    asked = [("toml", text.encode()) for text in broken_texts()]
    asked += [("toml", content) for content in BYTES.values()] + [("json", text.encode()) for text in JSON]
    for suffix, content in asked:
        file = tmp_path / f"mine.{suffix}"
        file.write_bytes(content)
        refused(["--recipe", file], str(file))
    counted(INPUTS, len(asked))


MISSING = [
    "nowhere.toml",
    "nowhere/",
    "./nowhere",
    "~nobody-of-that-name/mine.toml",
    "~/nowhere.json",
    "n" * 300 + ".toml",
]
MISSING += [
    "naïve.toml",
    "\udcff.toml",
    "\x1b[2J.toml",
    "two\n" * 20 + "lines.toml",
    "/".join("ab" * 200) + ".toml",
    "nul\0.toml",
]
NAMES = ["", " ", "zzz", "naïve", "\udcff", "\x1b[2J", "line\n" * 20, "n" * 100_000, "None", "-1", "..", "mlp128.tom"]


def test_a_recipe_that_is_not_there_is_refused(refused, tmp_path, monkeypatch, counted):
    monkeypatch.chdir(tmp_path)
    Path("folder.toml").mkdir()
    os.mkfifo("fifo.toml")
    Path("loop.toml").symlink_to("loop.toml")
    Path("device.toml").symlink_to("/dev/zero")
    Path("unreadable.toml").symlink_to("/proc/self/mem")
    kept = sorted(path.name for path in tmp_path.iterdir())
    asked = [*MISSING, *NAMES, *kept]
    for name in asked:
        refused([f"--recipe={name}"], "recipe")
    counted(INPUTS, len(asked))


# Flags that contradict one another, or the recipe

CONTRADICTIONS = [
    ("--optimizer.name adam", "optimizer.momentum 0.8 is not used by adam"),
    ("--optimizer.name adam --optimizer.betas 0.9 0.9 --optimizer.epsilon 1e-8", "optimizer.momentum 0.8 is not used"),
    ("--optimizer.betas 0.9 0.9", "optimizer.betas (0.9, 0.9) is not used by sgd"),
    ("--optimizer.nesterov True --momentum 0", "optimizer.nesterov true needs momentum above 0"),
    ("--optimizer.nesterov True --optimizer.dampening 0.5", "optimizer.nesterov true needs"),
    ("--optimizer.dampening 0.5 --momentum 0", "optimizer.dampening 0.5 has no effect at momentum 0"),
    ("--optimizer.momentum None", "optimizer.momentum is missing: sgd needs it"),
    ("--model.name cnn", "model.channels is missing: cnn needs it"),
    ("--model.channels 8 8", "model.channels (8, 8) is not used by mlp"),
    ("--model.hidden-sizes 8 8", "model.activations has 1 names for 2 hidden_sizes"),
    ("--model.activations", "model.activations has 0 names for 1 hidden_sizes"),
    ("--data.name digits", "data.test_fraction is missing: digits needs it"),
    ("--data.seed 0", "data.seed 0 is not used by fashion_mnist"),
    ("--data.path here.csv", "data.path 'here.csv' is not used by fashion_mnist"),
    ("--schedule.name step", "schedule.gamma is missing: step needs it"),
    ("--schedule.gamma 0.5", "schedule.gamma 0.5 is not used by constant"),
    ("--schedule.name cosine --schedule.final-learning-rate 1 --learning-rate 0.5", "final_learning_rate 1.0 is above"),
    ("--init.weight normal", "init.std None: a normal weight or bias needs it"),
    ("--init.std 0.5", "init.std 0.5: a normal weight or bias needs it, and nothing else does"),
    ("--loss.name binary_cross_entropy --loss.label-smoothing 0.5", "loss.label_smoothing 0.5 is for cross_entropy"),
    ("--recipe synthetic-3class --data.num-examples 10000000 --data.num-features 51", "is 510,000,000"),
    ("--recipe", "--recipe"),
    ("--epochs", "--epochs"),
    ("--epochs --quiet", "--epochs"),
    ("--epochs 2 3", "3"),
    ("--optimizer.betas 0.5", "--optimizer.betas"),
    ("--quiet --no-quiet", "--no-quiet"),
    ("--list=maybe", "maybe"),
    ("mlp512", "mlp512"),
    ("--expected.test-accuracy 1", "--expected.test-accuracy is not an option"),
    ("--platform abacus", "abacus"),
    ("--data-source web", "web"),
    ("-x", "-x"),
    ("-- --epochs 2", "--"),
]


@pytest.mark.parametrize("part", PARTS)
def test_flags_that_contradict_one_another_or_the_recipe_are_refused(part, refused, counted):
    asked = share(part, CONTRADICTIONS, every=4)
    for (flags, said), framework in turns(asked):
        refused(flags.split(), said, of=[framework])
    counted(INPUTS, len(asked))


@pytest.mark.parametrize(
    ("flags", "where"),
    [(["--quiet", "--out", ""], " after --out"), (["--epochs=1", ""], " after --epochs"), ([""], "")],
)
def test_an_empty_argument_is_refused_before_it_becomes_this_folder(flags, where, refused):
    refused(flags, f'error: an argument{where} is empty (""), as that of a shell variable with no value is')


BY_A_RUN = [
    ("--out {0}/file", "--out {0}/file is a file"),
    ("--out {0}/file/below", "is a file"),
    ("--out {0}", "--out {0} is not empty"),
    ("--out {0} --overwrite", "{0} holds more: file"),
    ("--data-dir {0}/file", "--data-dir {0}/file is not a directory"),
    ("--data-dir ~nobody-of-that-name", "--data-dir ~nobody-of-that-name is not a directory"),
    ("--recipe digits --data-dir {0}", "--data-dir {0} is for fashion_mnist and mnist"),
    ("--recipe digits --data-source tfds", "--data-source tfds is for fashion_mnist and mnist"),
    ("--recipe csv --data.path ~nobody-of-that-name/a.csv", "~nobody-of-that-name/a.csv does not exist"),
]
OF_MANY_RUNS = [
    ("--seeds 0", "--seeds 0 must be 1 or more"),
    ("--seeds -1", "--seeds -1 must be 1 or more"),
    ("--seeds 1001", "1,001 runs are asked for"),
    ("--seeds 2 --seed 4294967295", "--seeds 2 from --seed 4294967295 on goes past the last"),
    ("--seeds many", "--seeds"),
    ("--sweep", "--sweep names no field"),
    ("--sweep epochs=1 --sweep epochs=2", "--sweep is there twice"),
    ("--sweep epochs=1 epochs=2", "--sweep epochs"),
    ("--sweep epohcs=1,2", "did you mean 'epochs'"),
    ("--sweep epochs=", "--sweep epochs="),
    ("--sweep epochs", "--sweep epochs"),
    ("--sweep seed=1,2", "--sweep seed: that is not swept"),
    ("--sweep epochs=1,0", "epochs 0: must be"),
    ("--sweep learning_rate=nan,x", "optimizer.learning_rate"),
    ("--sweep model.hidden_sizes=" + "[" * 9_999, "--sweep model.hidden_sizes=[[["),
    ("--sweep epochs=1 --out {0}/file", "is a file"),
]
# torch alone reads the data: beside them, the other side has begun to compile what it would run.
BY_WHOM = [*itertools.product(["torch"], BY_A_RUN), *itertools.product(["jax"], OF_MANY_RUNS)]


@pytest.mark.parametrize("part", PARTS)
def test_flags_that_only_a_run_can_refuse_are_refused_and_nothing_is_written(part, trainer_command, tmp_path, counted):
    (tmp_path / "file").write_text("in the way")
    asked = share(part, BY_WHOM, every=4)
    for framework, (flags, said) in asked:
        ended = trainer_command(*flags.format(tmp_path).split(), framework=framework)
        assert_refused(ended, said.format(tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
    counted(INPUTS, len(asked))


# What is right is taken


def ends(rule: Rule) -> tuple[Any, Any]:
    """Return the least and the most that a number may be."""
    bounds = rule.bounds
    if rule.kind is int:
        return bounds["ge"], bounds["le"] if "le" in bounds else bounds["lt"] - 1
    least = bounds["ge"] if "ge" in bounds else math.nextafter(bounds["gt"], math.inf)
    return least, bounds["le"] if "le" in bounds else math.nextafter(bounds["lt"], -math.inf)


def right_values() -> list[tuple[Place, Any]]:
    """Return each number's ends, and texts; but the end of a schedule that may be no higher than its start."""
    lower = ("schedule", "final_learning_rate")
    numbers = [(path, end) for path, rule in SCHEMA.items() if rule.kind in (int, float) for end in ends(rule)]
    numbers.remove((lower, ends(SCHEMA[lower])[1]))
    texts = ["", "naïve 漢字 \"quoted\" \\ 'as is'", "tab\there", "x" * SCHEMA[("description",)].bounds["max_length"]]
    return numbers + [(("description",), text) for text in texts]


@pytest.mark.parametrize("part", PARTS)
def test_the_least_and_the_most_of_every_field_are_taken_and_printed(part, trainer_command, tmp_path):
    file = tmp_path / "mine.toml"
    asked = share(part, right_values(), every=8)
    assert len(asked) > 3
    for (path, value), framework in turns(asked):
        file.write_text(with_value(path, value), "utf-8")
        ended = trainer_command("--recipe", file, "--print-config", framework=framework)
        assert (ended.status, ended.err) == (0, ""), dotted(path)
        assert section(tomllib.loads(ended.out), path)[path[-1]] == value, dotted(path)

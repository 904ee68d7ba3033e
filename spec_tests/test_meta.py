"""The suite itself: each helper fails on bad input, each statement has its tests, no tolerance is loose or unnamed."""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from spec import recipe
from spec.errors import StateError
from spec_tests import tolerances
from spec_tests.adapters import ADAPTERS, Adapter, Arrays, Network
from spec_tests.assertions import (
    assert_error_ratio,
    assert_identical,
    assert_no_shared_memory,
    assert_within,
    error_ratios,
    largest_difference,
    layer_scale,
)
from spec_tests.specification import LISTED, statements, text

FOLDER = Path(__file__).parent

# The helpers of assertions.py

GOOD: Arrays = {
    "linear1.weight": np.arange(1.0, 10.0).reshape(3, 3),
    "linear1.bias": np.array([0.5, -0.25, 0.0]),
    "linear2.weight": np.arange(6.0).reshape(2, 3),
}


def changed(name: str, array: np.ndarray | None) -> Arrays:
    """Return copies of GOOD with `array` under `name`, or without that name."""
    kept = {key: value.copy() for key, value in GOOD.items() if key != name}
    return kept if array is None else kept | {name: array}


def with_value(value: float) -> Arrays:
    array = GOOD["linear1.weight"].copy()
    array[1, 2] = value
    return changed("linear1.weight", array)


BAD: dict[str, Arrays] = {
    "a wrong value": with_value(6.5),
    "a wrong value in the other direction": with_value(5.5),
    "nan": with_value(math.nan),
    "infinity": with_value(math.inf),
    "a missing name": changed("linear1.bias", None),
    "an extra name": changed("linear3.bias", np.zeros(2)),
    "a wrong shape": changed("linear2.weight", np.arange(6.0)),
    "a shape that would be stretched": changed("linear1.bias", np.array([0.5])),
    "a transposed leaf": changed("linear2.weight", GOOD["linear2.weight"].T),
    "a transposed square leaf": changed("linear1.weight", GOOD["linear1.weight"].T),
    "leaves that changed places": changed("linear1.weight", GOOD["linear1.weight"][::-1]),
    "an empty leaf": changed("linear1.bias", np.zeros(0)),
    "nothing": {},
}
NEARLY = {name: array + 1e-12 for name, array in GOOD.items()}  # what an honest other side would give
COMPARE: dict[str, Callable[[Arrays, Arrays], None]] = {
    "assert_identical": lambda found, wanted: assert_identical(found, wanted, item="item"),
    "assert_within": lambda found, wanted: assert_within(found, wanted, bound=1e-10, item="item"),
    "assert_within, by layer": lambda found, wanted: assert_within(
        found, wanted, bound=1e-10, item="item", relative_to_layer=True
    ),
    "assert_error_ratio, ours": lambda found, wanted: assert_error_ratio(found, NEARLY, wanted, item="item"),
    "assert_error_ratio, theirs": lambda found, wanted: assert_error_ratio(NEARLY, found, wanted, item="item"),
}


@pytest.mark.parametrize("helper", COMPARE)
def test_a_comparison_passes_on_what_is_equal(helper):
    assert COMPARE[helper]({name: array.copy() for name, array in GOOD.items()}, GOOD) is None


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("helper", COMPARE)
def test_a_comparison_fails_on_bad_input_whichever_side_has_it(helper, bad):
    for found, wanted in ((BAD[bad], GOOD), (GOOD, BAD[bad])):
        if "error_ratio" in helper and wanted is not GOOD and set(wanted) == set(GOOD):
            continue  # a truth that is wrong is no side of the ratio; its names and shapes are checked all the same
        with pytest.raises((AssertionError, StateError)):
            COMPARE[helper](found, wanted)


@pytest.mark.parametrize("helper", COMPARE)
def test_what_is_not_finite_or_misshapen_in_the_wanted_arrays_fails_too(helper):
    for bad in ("nan", "infinity", "a wrong shape", "a transposed leaf", "an empty leaf"):
        with pytest.raises((AssertionError, StateError)):
            COMPARE[helper](GOOD, BAD[bad])


@pytest.mark.parametrize("helper", [name for name in COMPARE if "identical" not in name])
def test_a_comparison_says_item_or_leaf_and_how_far_off(helper):
    with pytest.raises(AssertionError, match=r"item: linear1\.weight"):
        COMPARE[helper](BAD["a wrong value"], GOOD)


def test_identical_means_dtype_and_bits_and_says_where():
    single = {name: array.astype(np.float32) for name, array in GOOD.items()}
    with pytest.raises(AssertionError, match=r"linear1\.weight is float32, wanted float64"):
        assert_identical(single, GOOD, item="item")
    with pytest.raises(AssertionError, match=r"item: linear1.weight differs: at \[1, 2\] got .*6.5.*, wanted .*6.0"):
        assert_identical(BAD["a wrong value"], GOOD, item="item")
    last_bit = with_value(np.nextafter(6.0, 7.0))
    negative_zero = changed("linear1.bias", np.array([0.5, -0.25, -0.0]))
    for found in (last_bit, negative_zero):
        with pytest.raises(AssertionError, match="differs"):
            assert_identical(found, GOOD, item="item")


def test_within_is_up_to_the_bound_and_not_beyond():
    off, by = with_value(6 + 2.0**-32), 2.0**-32
    assert_within(off, GOOD, bound=by, item="item")
    with pytest.raises(AssertionError, match=r"linear1.weight is 2.33e-10 off, allowed 2.31e-10"):
        assert_within(off, GOOD, bound=0.99 * by, item="item")
    assert_within(off, GOOD, bound=by / 9, item="item", relative_to_layer=True)
    with pytest.raises(AssertionError, match="off, allowed"):
        assert_within(off, GOOD, bound=0.99 * by / 9, item="item", relative_to_layer=True)


@pytest.mark.parametrize(("dtype", "ceiling"), [(np.float32, 1e-3), (np.float64, 1e-9)])
def test_within_refuses_a_bound_that_would_let_anything_pass(dtype, ceiling):
    one = {"linear1.weight": np.array([-0.5, 0.25], dtype)}
    large = {"linear1.weight": np.array([-200, 0.25], dtype)}
    for arrays, largest in ((one, 1), (large, 200)):
        assert_within(arrays, arrays, bound=ceiling * largest, item="item")
        assert_within(arrays, arrays, bound=ceiling, item="item", relative_to_layer=True)
        with pytest.raises(ValueError, match="is the most; tighten it"):
            assert_within(arrays, arrays, bound=1.01 * ceiling * largest, item="item")
    small = {"linear1.weight": np.array([-0.001, 0.0], dtype)}
    for arrays in (one, large, small):
        with pytest.raises(ValueError, match="is the most; tighten it"):
            assert_within(arrays, arrays, bound=1.01 * ceiling, item="item", relative_to_layer=True)


def test_the_floor_of_the_ratio_is_what_plain_sums_are_off_anywhere_in_the_layer_and_stays_under_the_ceiling():
    truth = {"one.weight": np.array([1.0]), "one.bias": np.array([0.0]), "two.weight": np.array([1.0])}
    off = truth | {"one.weight": np.array([1 + 2.0**-14])}

    def ratio(**plain: float) -> float:
        sums = truth | {name.replace("_", "."): truth[name.replace("_", ".")] + by for name, by in plain.items()}
        return error_ratios(off, truth, truth, plain=sums)["one.weight"]

    assert ratio() == ratio(two_weight=2.0**-14) == 2**10
    assert ratio(one_weight=-(2.0**-18)) == ratio(one_bias=2.0**-18) == 2.0**-14 / (2.0**-18 + 2.0**-24)
    assert ratio(one_bias=1e3) == 2.0**-14 * tolerances.KAPPA / tolerances.CEILING_FLOAT32


def test_a_longer_sum_counts_by_the_root_of_its_terms():
    truth, off = {"one": np.array([1.0])}, {"one": np.array([1 + 2.0**-14])}
    assert error_ratios(off, truth, truth, terms=16) == {"one": 2.0**-14 / 2.0**-22}
    assert error_ratios(off, truth, truth, terms=16, plain={"one": np.array([1 - 2.0**-22])}) == {"one": 2.0**7}


def test_a_leaf_is_measured_by_its_own_layer():
    assert layer_scale(GOOD, "linear1.bias") == layer_scale(GOOD, "linear1.weight") == 9
    assert layer_scale(GOOD, "linear2.weight") == 5
    assert layer_scale({"relu1": np.array([-2.0]), "relu2": np.array([3.0])}, "relu1") == 2


def test_the_ratio_is_that_of_the_larger_error_and_small_errors_count_as_a_rounding():
    truth = {"one": np.array([1.0, 0.5])}

    def off(by: float) -> Arrays:
        return {"one": truth["one"] + np.array([0.0, by])}

    assert error_ratios(off(0.25), off(0.0625), truth) == error_ratios(off(0.0625), off(-0.25), truth) == {"one": 4}
    assert error_ratios(off(0.0), off(0.0), truth) == {"one": 0}
    assert error_ratios(off(0.25), off(0.0), truth) == {"one": 0.25 * 2**24}
    assert error_ratios(off(2**-24), off(0.0), truth) == {"one": 1}
    assert_error_ratio(off(0.25), off(0.25 / tolerances.KAPPA), truth, item="item")
    with pytest.raises(AssertionError, match="one side's error"):
        assert_error_ratio(off(0.25), off(0.25 / tolerances.KAPPA / 1.01), truth, item="item")


def test_shared_memory_is_found_under_any_name_and_through_views():
    copies = {name: array.copy() for name, array in GOOD.items()}
    assert_no_shared_memory(GOOD, copies, item="item")
    for shared in (GOOD["linear2.weight"], GOOD["linear2.weight"].T, GOOD["linear2.weight"][1:, ::2]):
        with pytest.raises(AssertionError, match=r"item: linear2.weight and other share memory"):
            assert_no_shared_memory(GOOD, {"other": shared}, item="item")


def test_the_largest_difference_is_over_all_leaves_without_a_sign():
    assert largest_difference(GOOD, GOOD) == 0
    assert largest_difference(BAD["a wrong value"], GOOD) == largest_difference(GOOD, BAD["a wrong value"]) == 0.5
    for bad in ("nan", "a missing name", "an extra name", "a transposed leaf", "a shape that would be stretched"):
        for pair in ((BAD[bad], GOOD), (GOOD, BAD[bad])):
            with pytest.raises(StateError):
                largest_difference(*pair)


# The adapters' door


@functools.cache
def adapter(name: str) -> Adapter:
    mlp = recipe.load("mlp128")
    model = dataclasses.replace(mlp.model, hidden_sizes=(4,), bias=True, input_batchnorm=True)
    network = Network(recipe=dataclasses.replace(mlp, model=model), input_shape=(3,), outputs=2)
    return ADAPTERS[name](network)


def spoiled(arrays: Arrays, prefix: str) -> tuple[Arrays, list[str]]:
    """Return the arrays with a mistake of each kind, and what a message must say of each."""
    one, two, three, four = (
        f"{prefix}{name}" for name in ("linear1.bias", "linear2.weight", "norm0.bias", "norm0.weight")
    )
    bad = {name: array for name, array in arrays.items() if name != one}
    bad[two] = arrays[two].T
    bad[three] = np.full_like(arrays[three], np.nan)
    bad[four] = np.full_like(arrays[four], np.inf)
    bad[f"{prefix}linear7.weight"] = np.zeros((2, 2))
    bad[f"{prefix}linear1.weights"] = np.zeros((2, 2))
    return bad, [
        rf"{one} is missing; it has shape \[4\]",
        rf"{two} has shape \[4, 2\]; it must have \[2, 4\]",
        rf"{three} holds 1 of 1 numbers that are not finite",
        rf"{four} holds 1 of 1 numbers that are not finite",
        rf"{prefix}linear7.weight is not one of its arrays",
        rf"{prefix}linear1.weights is not one of its arrays \(did you mean '{prefix}linear1.weight'\?\)",
    ]


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("parts", [("state",), ("opt_state",), ("state", "opt_state")], ids=" and ".join)
def test_states_with_many_mistakes_are_refused_with_all_of_them_and_nothing_is_loaded(name, parts):
    side = adapter(name)
    before = {"state": side.state(), "opt_state": side.opt_state()}
    given = {part: {leaf: array + 1 for leaf, array in arrays.items()} for part, arrays in before.items()}
    said: list[str] = []
    for part in parts:
        given[part], patterns = spoiled(before[part], "" if part == "state" else "momentum_buffer.")
        said += patterns
    with pytest.raises(StateError, match="does not fit") as refused:
        side.load(**given)
    found = str(refused.value).splitlines()[1:]
    for pattern in said:
        assert any(re.match(rf"  {pattern}", line) for line in found), f"{pattern} is not in {found}"
    assert len(found) == len(said)
    assert_identical(side.state(), before["state"], item=name)
    assert_identical(side.opt_state(), before["opt_state"], item=name)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_optimisers_state_of_another_rule_or_without_its_step_is_refused(name):
    side = adapter(name)
    state, opt_state = side.state(), side.opt_state()
    adams = {f"exp_avg.{leaf}": state[leaf] for leaf in side.network.trained}
    without = {key: array for key, array in opt_state.items() if key != "step"}
    for bad, said in ((opt_state | adams, "exp_avg.linear1.weight is not one"), (without, "step is missing")):
        with pytest.raises(StateError, match=said):
            side.load(state, bad)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_shares_no_memory_with_what_it_takes_and_gives(name):
    side = adapter(name)
    given = side.state(), side.opt_state()
    side.load(*given)
    for item, taken, found in zip(("state", "opt_state"), given, (side.state(), side.opt_state()), strict=True):
        assert_no_shared_memory(taken, found, item=item)
    before = side.state()
    for arrays in (*given, side.state(), side.opt_state()):
        for array in arrays.values():
            array += 1
    assert_identical(side.state(), before, item=name)


# SPEC.md

TEST_FILES = sorted(FOLDER.glob("test_*.py"))
TREES = {path.name: ast.parse(path.read_text("utf-8")) for path in sorted(FOLDER.rglob("*.py"))}


def functions_of(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    yield from (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))


def test_clauses_and_statements_are_numbered_in_order_without_a_gap():
    clauses = [int(number) for number in re.findall(r"^## S(\d+) ", text(), re.MULTILINE)]
    assert clauses == list(range(1, len(clauses) + 1))
    found = [statement.number for statement in statements()]
    expected = [
        f"S{clause}.{index}"
        for clause in clauses
        for index in range(1, 1 + sum(number.startswith(f"S{clause}.") for number in found))
    ]
    assert found == expected
    assert all(f"S{clause}.1" in found for clause in clauses)


def test_every_statement_has_one_source_line_and_one_line_of_tests_that_holds_nothing_else():
    for statement in statements():
        assert len(re.findall(r"^\*Source:\* \S", statement.body, re.MULTILINE)) == 1, statement.number
        assert statement.tests, f"{statement.number} has no test"
        assert re.sub(LISTED, "", statement.tests_line).replace(", ", "") == "", statement.number
        assert len(set(statement.tests)) == len(statement.tests), f"{statement.number} lists a test twice"
    assert sum(len(statement.tests) for statement in statements()) == len(LISTED.findall(text()))


def test_every_reference_to_a_statement_is_to_one_that_exists():
    numbers = {statement.number for statement in statements()}
    assert set(re.findall(r"\bS\d+\.\d+\b", text())) <= numbers


def test_every_test_that_the_specification_lists_exists():
    there = {(name, test.name) for name, tree in TREES.items() for test in functions_of(tree)}
    listed = {test for statement in statements() for test in statement.tests}
    assert sorted(listed - there) == []


def test_every_test_of_a_clause_is_listed_in_the_specification():
    listed = {test for statement in statements() for test in statement.tests}
    there = {
        (path.name, test.name)
        for path in FOLDER.glob("test_s[0-9][0-9]_*.py")
        for test in functions_of(TREES[path.name])
    }
    assert len(there) > 100
    assert sorted(there - listed) == []


def test_nothing_is_left_to_do():
    assert re.findall(r"`TODO [^`]*`", text()) == []
    assert "TODO" not in text()


# The source of the suite

CLOSE_CALLS = {
    "allclose", "assert_allclose", "isclose", "assert_almost_equal", "assert_array_almost_equal", "assertAlmostEqual",
    "assert_approx_equal", "assert_close", "array_almost_equal", "assert_array_max_ulp", "assert_tree_all_close",
}  # fmt: skip
TOLERANCES = {"abs", "rel", "atol", "rtol", "bound", "tol", "tolerance", "nulp", "decimal"}


def called(node: ast.AST) -> str:
    """Return the last name of what a call calls: `approx` of `pytest.approx(...)`."""
    function = node.func if isinstance(node, ast.Call) else None
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def literals(tree: ast.Module) -> dict[str, float]:
    """Return the names that are given a number written out, anywhere in the file."""
    pairs = [
        (node.targets[0].id, number(node.value, {}))
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
    ]
    return {name: value for name, value in pairs if value is not None}


ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def number(node: ast.AST, names: dict[str, float]) -> float | None:
    """Return what a numeric expression of literals and `names` comes to, None for any other."""
    match node:
        case ast.Constant(value=bool()):
            return None
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.Name(id=name):
            return names.get(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inside = number(operand, names)
            return None if inside is None else -inside
        case ast.BinOp(left=left, op=op, right=right):
            sides = number(left, names), number(right, names)
            return None if None in sides or type(op) not in ARITHMETIC else ARITHMETIC[type(op)](*sides)
    return None


def is_error(node: ast.AST, differences: set[str]) -> bool:
    """Say whether an expression measures an error: the absolute value of a difference, or a helper that takes one."""
    for inner in ast.walk(node):
        if called(inner) == "largest_difference":
            return True
        if called(inner) in ("abs", "fabs", "absolute", "norm") and is_difference(inner, differences):
            return True
    return False


def is_difference(node: ast.AST, differences: set[str]) -> bool:
    """Say whether something is subtracted in an expression, or it has the name of a difference or an error."""
    return any(
        isinstance(getattr(inner, "op", None), ast.Sub)
        or (isinstance(inner, ast.Name) and (inner.id in differences or re.search("err|diff", inner.id) is not None))
        for inner in ast.walk(node)
    )


def named_differences(tree: ast.Module) -> set[str]:
    """Return the names that are given a difference anywhere in the file."""
    return {
        node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and is_difference(node.value, set())
    }


def typed_in(tree: ast.Module) -> Iterator[tuple[int, float]]:
    """Yield line and value of each tolerance that stands in a file as a number, or under a name of its own there."""
    names, differences = literals(tree), named_differences(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = [keyword.value for keyword in node.keywords if keyword.arg in TOLERANCES]
            yield from ((node.lineno, value) for value in (number(one, names) for one in given) if value is not None)
        if isinstance(node, ast.Compare):
            yield from ((node.lineno, value) for value in limits(node, names, differences))


def limits(node: ast.Compare, names: dict[str, float], differences: set[str]) -> Iterator[float]:
    """Yield the numbers that a comparison of an error allows; a range with a floor above 0 is about a size."""
    sides = [node.left, *node.comparators]
    pairs = [
        (left, right) if isinstance(operator, ast.Lt | ast.LtE) else (right, left)
        for operator, left, right in zip(node.ops, sides, sides[1:], strict=False)
        if isinstance(operator, ast.Lt | ast.LtE | ast.Gt | ast.GtE)
    ]
    if any((number(smaller, names) or 0) > 0 for smaller, _ in pairs):
        return
    for smaller, larger in pairs:
        value = number(larger, names)
        if value is not None and is_error(smaller, differences):
            yield value


def suite() -> dict[str, ast.Module]:
    """Return the files that are scanned: all but this one, whose tolerances are bad input for the helpers."""
    return {name: tree for name, tree in TREES.items() if name not in (Path(__file__).name, "__init__.py")}


def test_nothing_is_compared_by_a_frameworks_idea_of_close():
    everything = suite() | {"test_meta.py": TREES["test_meta.py"]}
    found = [
        f"{name}:{node.lineno} {called(node)}"
        for name, tree in everything.items()
        for node in ast.walk(tree)
        if called(node) in CLOSE_CALLS
    ]
    assert found == []


def test_approx_always_says_how_near():
    found = [
        f"{name}:{node.lineno}"
        for name, tree in suite().items()
        for node in ast.walk(tree)
        if called(node) == "approx" and not {"abs", "rel"} & {keyword.arg for keyword in node.keywords}
    ]
    assert found == []


def test_no_tolerance_is_typed_in():
    assert [f"{name}:{line} {value}" for name, tree in suite().items() for line, value in typed_in(tree) if value] == []


def test_the_named_tolerances_are_tight_for_what_they_are_named_after():
    named = {name: value for name, value in vars(tolerances).items() if name.isupper() and isinstance(value, float)}
    assert named
    looser = {"CENTRAL_DIFFERENCE", "DIFFERENCE_STEP", "FOUR_DECIMALS", "SEVEN_DIGITS", "PLANTED_FAULT"}  # no rounding
    for name, value in named.items():
        assert 0 < value <= (1e-3 if name.endswith("FLOAT32") or name in looser else 1e-9), name
    assert 1 <= tolerances.KAPPA <= 8


def test_the_scan_sees_a_loose_tolerance_however_it_is_written():
    seen = [
        "assert abs(a - b) < 0.5",
        "assert np.abs(a - b).max() <= 1",
        "assert 0.5 > np.abs(a - b).max()",
        "assert 0 <= largest_difference(a, b) < 0.5",
        "assert_within(a, b, bound=2 * 0.3, item='')",
        "assert a == pytest.approx(b, rel=0.5)",
        "LOOSE = 0.5\nassert np.abs(a - b).max() < LOOSE",
        "gap = a - b\nassert np.abs(gap).max() < 0.5",
    ]
    for source in seen:
        assert max(value for _, value in typed_in(ast.parse(source))) > tolerances.CEILING_FLOAT32, source
    for source in (
        "assert count < 5",
        "assert abs(a) > 0.5",
        "assert 0.3 < abs(a) < 1",
        "assert np.abs(a - b).max() <= chain_bound(leaves)",
    ):
        assert all(value <= tolerances.CEILING_FLOAT32 for _, value in typed_in(ast.parse(source))), source


def proves(function: ast.FunctionDef, helpers: dict[str, ast.FunctionDef], seen: frozenset[str] = frozenset()) -> bool:
    """Say whether a function asserts, expects an error, or calls what does: a helper of its file, or assert_*."""
    for node in ast.walk(function):
        name = called(node)
        if isinstance(node, ast.Assert) or name in ("raises", "fail") or name.startswith("assert_"):
            return True
        if name in helpers and name not in seen and proves(helpers[name], helpers, seen | {name}):
            return True
    return False


def test_every_test_can_fail():
    idle = [
        f"{path.name}::{test.name}"
        for path in TEST_FILES
        for test in functions_of(TREES[path.name])
        if not proves(
            test, {node.name: node for node in ast.walk(TREES[path.name]) if isinstance(node, ast.FunctionDef)}
        )
    ]
    assert idle == []


def test_no_two_tests_of_a_file_share_a_name():
    for path in TEST_FILES:
        names = [test.name for test in functions_of(TREES[path.name])]
        assert len(names) == len(set(names)), path.name

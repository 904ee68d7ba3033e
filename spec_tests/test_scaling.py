"""docs/scaling.md: its tables are those of the results, and its model is what the formulas say."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from jax_impl import scaling
from jax_impl.scaling import Compute, Connection
from jax_impl.scaling_worker import program
from spec import params, recipe
from spec.errors import UserError
from spec_tests.tolerances import SOLVED

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text("utf-8")
MADE_UP = {"batch_size": 100, "compute": {"fixed": 1.0, "example": 0.5}, "reduced_bytes": 800, "messages": 2}


@pytest.mark.parametrize("name", scaling.TABLES)
def test_the_pages_tables_are_those_of_the_results(name):
    (shown,) = re.findall(rf"<!-- {name}: .*? -->\n(.*?)<!-- /{name} -->", PAGE, re.DOTALL)
    assert shown.strip() == scaling.TABLES[name](scaling.load_results(ROOT))


def test_a_step_is_a_fixed_part_its_examples_and_the_rings_rounds():
    connection = Connection(latency=0.25, bandwidth=100.0)
    assert scaling.step_seconds(MADE_UP, connection, 1) == 1 + 50
    assert scaling.step_seconds(MADE_UP, connection, 4) == 1 + 12.5 + 2 * 3 * (2 * 0.25 + 800 / 4 / 100)
    assert scaling.step_seconds(MADE_UP, connection, 4, speed=2.0) == 13.5 / 2 + 15
    # t(n) = 51 - 50 (1 - 1/n) + (n - 1) + 16 (1 - 1/n): 51, 35, 30.33, 28.5, 27.8, 27.67, 27.86
    assert (
        scaling.best(MADE_UP, connection) == 6 == round(((50 - 2 * 800 / 100) / (2 * 2 * 0.25)) ** 0.5)
    )  # the page's n*


def test_the_constants_are_those_that_seconds_without_noise_were_made_of():
    compute = Compute(fixed=3e-4, example=2e-6)
    found = scaling.fit_compute({size: compute.step(size) for size in (16, 32, 64, 128)})
    assert (found.fixed, found.example) == pytest.approx((3e-4, 2e-6), rel=SOLVED)
    connection = Connection(latency=1e-4, bandwidth=1e8)
    joined = scaling.fit_connection({size: connection.all_reduce(size, 1, 2) for size in (4, 4096, 10**6)})
    assert (joined.latency, joined.bandwidth) == pytest.approx((1e-4, 1e8), rel=SOLVED)


def test_an_mlp_moves_its_gradients_its_loss_and_its_right_answers_and_nothing_else(fashion_mnist):
    of = recipe.load("mlp128")
    on_four = program("mlp128", 4)
    found = scaling.counted(of, on_four)
    parameters = params.num_parameters(params.leaves(of.model, (28, 28, 1), 10))
    assert found["reduced_bytes"] == 4 * parameters + 4 + 4
    assert found["state_bytes"] == 2 * 4 * parameters  # weights and momentum
    assert found["sharded_state_bytes"] == found["state_bytes"] / 4
    pixels_and_label = 28 * 28 + 4
    examples = sum(len(split.labels) for split in (fashion_mnist.train, fashion_mnist.test))
    assert (
        found["data_bytes"] == examples * pixels_and_label + 2 * 4 * 256
    )  # and the value of each byte, for each split


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter", "all-to-all", "collective-permute-start"])
def test_what_moves_in_another_way_is_noticed(kind):
    with pytest.raises(ValueError, match="is no all-reduce"):
        scaling.traffic(f"%moved.1 = f32[8]{{0}} {kind}(%x)")


def test_a_connection_of_ones_own_is_put_in_the_place_of_the_measured_one(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["scaling", "--latency", "0", "--bandwidth", "1e300", "--speed", "2"])
    scaling.main()
    first = capsys.readouterr().out.splitlines()[2].split(" | ")
    of = scaling.load_results(ROOT)["recipes"]["mlp128"]
    whole = of["compute"]["fixed"] + of["compute"]["example"] * of["batch_size"]
    assert first[1] == f"{of['steps_per_epoch'] * whole / 2:.3g}"
    assert first[-1] == f"{of['batch_size']} |"  # where messages cost nothing, a device an example


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--latency", "1e-6"], "--latency and --bandwidth are for each other"),
        (["--latency", "-1", "--bandwidth", "1"], "--latency -1 is no latency; use 0 or more"),
        (["--latency", "nan", "--bandwidth", "1"], "--latency nan is no latency"),
        (["--latency", "0", "--bandwidth", "0"], "--bandwidth 0 is no bandwidth; use more than 0"),
        (["--latency", "0", "--bandwidth", "1", "--speed", "0"], "--speed 0 is no speed; use more than 0"),
        (["--latency", "0", "--bandwidth", "1"], "results/scaling.json cannot be read"),
    ],
)
def test_flags_that_say_no_connection_are_refused(flags, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["scaling", *flags])
    with pytest.raises(UserError, match=said):
        scaling.main()

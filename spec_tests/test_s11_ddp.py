"""S11: a run divided over devices in JAX is the one that torch divides over processes, and the one that torch does not.

torch's SyncBatchNorm computes on accelerators alone, so statistics of the whole batch are compared with one process of
torch, and those of each device with DistributedDataParallel, whose every process normalises its own rows.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from spec import recipe
from spec.recipe import Recipe
from spec_tests.adapters import Arrays
from spec_tests.assertions import assert_within, largest_difference
from spec_tests.ddp_runs import ddp_run
from spec_tests.parallel_runs import few, runs
from spec_tests.tolerances import SEVERAL_DEVICES
from torch_ref.trainer import Trainer

PLACES = ("sharded:2", "pmap:2")


def mlp128(precision: str) -> Recipe:
    return dataclasses.replace(recipe.load("mlp128"), epochs=1, expected=None, precision=precision)


def small_cnn(statistics: str) -> Recipe:
    """Return a CNN without dropout, whose masks would not agree."""
    cnn = recipe.load("cnn")
    layers = {"channels": (3,), "hidden_sizes": (6,), "dropout": 0.0, "batchnorm_statistics": statistics}
    model = dataclasses.replace(cnn.model, **layers)
    changed = {"epochs": 1, "batch_size": 16, "last_batch": "drop", "precision": "float64", "expected": None}
    return dataclasses.replace(cnn, model=model, **changed)


def in_one_process(of: Recipe, steps: int) -> Arrays:
    trainer = Trainer(of, few(of, steps), torch.device("cpu"))
    list(trainer.events())
    return trainer.state()


def on_two_devices(folder: Path, of: Recipe, steps: int) -> dict[str, Arrays]:
    """Return the states that JAX's runs end in."""
    found = runs(folder, of, steps, PLACES)
    return {
        place: {name.removeprefix("state."): array for name, array in found[place].items() if name.startswith("state.")}
        for place in PLACES
    }


def assert_same_states(sides: dict[str, Arrays], wanted: Arrays, of: Recipe) -> None:
    for side, state in sides.items():
        assert_within(state, wanted, bound=SEVERAL_DEVICES[of.precision], item=side)


@pytest.mark.slow(minutes=1)
@pytest.mark.parametrize("precision", SEVERAL_DEVICES)
def test_after_100_steps_jax_on_two_devices_and_torch_in_two_processes_and_in_one_have_the_same_weights(
    precision, tmp_path, fashion_mnist
):
    of = mlp128(precision)
    alone, (first, second) = in_one_process(of, 100), ddp_run(tmp_path, of, 100, processes=2)
    sides = {"torch in two processes, the first": first, "the second": second, **on_two_devices(tmp_path, of, 100)}
    assert_same_states(sides, alone, of)


@pytest.mark.parametrize("steps", [3, pytest.param(100, marks=pytest.mark.slow(minutes=1))])
def test_local_statistics_are_those_of_torchs_distributed_data_parallel(steps, tmp_path, fashion_mnist):
    of = small_cnn("local")
    first, second = ddp_run(tmp_path, of, steps, processes=2)
    assert_same_states(on_two_devices(tmp_path, of, steps), first, of)
    # The processes share what is trained; statistics are of the first one's rows, in no process of the whole batch's.
    running = [{name: rank[name] for name in first if ".running_" in name} for rank in (first, second)]
    assert largest_difference(*running) > 1e-3
    assert largest_difference(first, in_one_process(of, steps)) > 1e-3


@pytest.mark.slow(minutes=1)
def test_global_statistics_are_those_of_torch_in_one_process(tmp_path, fashion_mnist):
    of = small_cnn("global")
    assert_same_states(on_two_devices(tmp_path, of, 100), in_one_process(of, 100), of)

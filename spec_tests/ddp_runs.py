"""A run of `torch_ref` whose batches are divided over processes, by torch's own DistributedDataParallel.

`python -m spec_tests.ddp_runs OUT RECIPE.json STEPS PROCESSES` starts so many processes on this machine, joined by gloo
over the loopback through a file beside OUT. Each takes its rows of every global batch; what they come to goes into OUT,
an .npz file: `RANK/NAME` for every array.
"""

from __future__ import annotations

if __name__ == "__main__":
    from spec.errors import run_program

    run_program(__spec__.name)

import json
import os
import socket
import sys
from datetime import timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from spec import recipe
from spec.batches import epoch_order
from spec.recipe import Recipe
from spec_tests.parallel_runs import few, run_module
from torch_ref import data
from torch_ref.step import train_step
from torch_ref.trainer import Trainer

Arrays = dict[str, np.ndarray]


def ddp_run(folder: Path, of: Recipe, steps: int, *, processes: int) -> list[Arrays]:
    """Train `of` for so many steps in so many processes; return parameters and running statistics of each."""
    with np.load(run_module("ddp_runs", folder / "ddp.npz", of, steps, processes)) as arrays:
        ranks = [f"{rank}/" for rank in range(processes)]
        return [{name.removeprefix(rank): arrays[name] for name in arrays if name.startswith(rank)} for rank in ranks]


def main() -> None:
    out, given, steps, processes = sys.argv[1:]
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    done = multiprocessing.get_context("fork").Barrier(int(processes))
    arguments = (Path(out), given, int(steps), int(processes), done)
    # Forked, they need not import torch anew, which takes longer than a short run.
    multiprocessing.start_processes(_train, arguments, nprocs=int(processes), start_method="fork")
    found = {}
    for rank in range(int(processes)):
        with np.load(_of_rank(Path(out), rank)) as arrays:
            found |= {f"{rank}/{name}": array for name, array in arrays.items()}
    np.savez(out, **found)


def _train(rank: int, out: Path, given: str, steps: int, processes: int, done: Barrier) -> None:
    """Train on the rows of one process, write what it came to, and leave with the others."""
    torch.set_num_threads(1)
    joined = out.with_name("joined").absolute().as_uri()
    limit = timedelta(minutes=2)
    distributed.init_process_group("gloo", init_method=joined, rank=rank, world_size=processes, timeout=limit)
    of = recipe.parse(json.loads(Path(given).read_text())["recipe"], source=given)
    trainer = Trainer(of, few(of, steps), torch.device("cpu"))
    network = DistributedDataParallel(trainer.network)
    order = epoch_order(of.seed, 1, trainer.counts.num_examples)
    for batch in data.batches(trainer.train_split, trainer.counts, order):
        own = (tensor.chunk(processes)[rank] for tensor in batch)
        train_step(network, trainer.optimizer, *own, of.loss)
    np.savez(_of_rank(out, rank), **trainer.state())
    done.wait()
    os._exit(0)  # what torch frees at an orderly end sometimes waits for ever: a lock of gloo's against Python's


def _of_rank(out: Path, rank: int) -> Path:
    return out.with_name(f"rank{rank}.npz")

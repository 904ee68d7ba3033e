"""Between the canonical states of `spec.params` and torch's modules and optimisers. Copies: no memory is shared.

`python -m torch_ref.convert RUN_OR_FILE OUT` is the command of `torch_ref.conversion`.
"""

from __future__ import annotations

if __name__ == "__main__":  # the command needs nothing of what is below
    from spec.errors import run_program

    run_program("torch_ref.conversion")

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn, optim


def load_state(network: nn.Module, state: Mapping[str, np.ndarray]) -> None:
    """Copy the canonical `state` into the parameters and running statistics of `network`, in its own dtype."""
    tensors = {name: torch.tensor(np.ascontiguousarray(array)) for name, array in state.items()}
    counters = {name: value for name, value in network.state_dict().items() if name.endswith("num_batches_tracked")}
    network.load_state_dict(tensors | counters)


def state(network: nn.Module) -> dict[str, np.ndarray]:
    """Return the canonical state of `network`: contiguous NumPy arrays of their own."""
    return {
        name: tensor.detach().cpu().numpy().copy()
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def load_optimizer(optimizer: optim.Optimizer, network: nn.Module, opt_state: Mapping[str, np.ndarray]) -> None:
    """Copy the canonical optimiser state (`momentum_buffer.NAME`, `exp_avg.NAME`, ..., `step`) into a new `optimizer`.

    Before the first step torch has no buffers, and the first one is the gradient itself, undamped (S6).
    """
    step = int(opt_state["step"])
    if step == 0:
        return
    for key, array in opt_state.items():
        kind, _, name = key.partition(".")
        if not name:
            continue
        parameter = network.get_parameter(name)
        tensor = torch.tensor(np.ascontiguousarray(array), dtype=parameter.dtype, device=parameter.device)
        optimizer.state[parameter][kind] = tensor
        if kind == "exp_avg":
            optimizer.state[parameter]["step"] = torch.tensor(float(step))


def optimizer_state(optimizer: optim.Optimizer, network: nn.Module, step: int) -> dict[str, np.ndarray]:
    """Return the canonical state of `optimizer` after `step` updates; before the first its buffers are 0."""
    return {"step": np.array(step), **dict(_buffers(optimizer, network))}


def _buffers(optimizer: optim.Optimizer, network: nn.Module) -> Iterator[tuple[str, np.ndarray]]:
    options = optimizer.defaults
    kinds = ("exp_avg", "exp_avg_sq") if "betas" in options else ("momentum_buffer",) if options["momentum"] else ()
    for kind in kinds:
        for name, parameter in network.named_parameters():
            buffer = optimizer.state[parameter].get(kind)
            tensor = torch.zeros_like(parameter) if buffer is None else buffer
            yield f"{kind}.{name}", tensor.detach().cpu().numpy().copy()

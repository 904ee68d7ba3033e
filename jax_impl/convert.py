"""Between the canonical state of `spec.params` (torch's layouts) and Flax's nested dicts (S3).

`python -m jax_impl.convert RUN_OR_FILE OUT` is the command of `spec.conversion`.
"""

from __future__ import annotations

if __name__ == "__main__":  # the command needs nothing of what is below
    from spec.errors import run_program

    run_program("spec.conversion")

import math
from collections.abc import Mapping, Sequence

import numpy as np
import optax
from jax.typing import DTypeLike

from jax_impl.parallel import Layout, put
from spec.layers import FLAX_NAMES
from spec.params import Leaf

_BUFFERS = {"trace": "momentum_buffer", "mu": "exp_avg", "nu": "exp_avg_sq"}  # optax's names, torch's names


def from_canonical(
    state: Mapping[str, np.ndarray], leaves: Sequence[Leaf], *, dtype: DTypeLike, device: Layout
) -> tuple[dict, dict]:
    """Return (params, batch_stats), nested dicts of `dtype` arrays on `device`: copies, no memory is shared."""
    params: dict = {}
    batch_stats: dict = {}
    for leaf in leaves:
        array = np.array(_to_flax(state[leaf.name], leaf), dtype=dtype, order="C", copy=True)
        tree = params if leaf.trained else batch_stats
        tree.setdefault(leaf.name.split(".")[0], {})[FLAX_NAMES[leaf.role]] = put(array, device)
    return params, batch_stats


def to_canonical(params: Mapping, batch_stats: Mapping, leaves: Sequence[Leaf]) -> dict[str, np.ndarray]:
    """Return the canonical state, contiguous NumPy arrays of their own; the inverse of `from_canonical`."""
    state = {}
    for leaf in leaves:
        tree = params if leaf.trained else batch_stats
        array = np.asarray(tree[leaf.name.split(".")[0]][FLAX_NAMES[leaf.role]])
        state[leaf.name] = np.array(_from_flax(array, leaf), order="C", copy=True)
    return state


def optimizer_from_canonical(
    fresh: optax.OptState,
    opt_state: Mapping[str, np.ndarray],
    leaves: Sequence[Leaf],
    *,
    dtype: DTypeLike,
    device: Layout,
) -> optax.OptState:
    """Return `fresh`, what the optimiser's `init` gave, with the canonical buffers and counts of `opt_state` (S6)."""
    trained = [leaf for leaf in leaves if leaf.trained]
    values: dict = {}
    for name, kind in _BUFFERS.items():
        if optax.tree_utils.tree_get(fresh, name) is not None:
            arrays = {leaf.name: opt_state[f"{kind}.{leaf.name}"] for leaf in trained}
            values[name], _ = from_canonical(arrays, trained, dtype=dtype, device=device)
    if optax.tree_utils.tree_get_all_with_path(fresh, "count"):
        values["count"] = put(np.int32(opt_state["step"]), device)
    return optax.tree_utils.tree_set(fresh, **values) if values else fresh


def optimizer_to_canonical(opt_state: optax.OptState, leaves: Sequence[Leaf], step: int) -> dict[str, np.ndarray]:
    """Return the canonical state of the optimiser after `step` updates; the inverse of `optimizer_from_canonical`."""
    trained = [leaf for leaf in leaves if leaf.trained]
    state = {"step": np.array(step)}
    for name, kind in _BUFFERS.items():
        tree = optax.tree_utils.tree_get(opt_state, name)
        if tree is not None:
            state |= {f"{kind}.{leaf}": array for leaf, array in to_canonical(tree, {}, trained).items()}
    return state


def _to_flax(array: np.ndarray, leaf: Leaf) -> np.ndarray:
    """Return a weight as Flax has it: linear [in, out], convolution [h, w, in, out], a flattened image h, w, c."""
    if leaf.role != "weight":
        return array
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    if leaf.flattened:
        height, width, channels = leaf.flattened
        return array.reshape(-1, channels, height, width).transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    return array.T


def _from_flax(array: np.ndarray, leaf: Leaf) -> np.ndarray:
    if leaf.role != "weight":
        return array
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    if leaf.flattened:
        units = array.shape[-1]
        return array.reshape(*leaf.flattened, units).transpose(3, 2, 0, 1).reshape(units, math.prod(leaf.flattened))
    return array.T

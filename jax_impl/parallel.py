"""Where a program runs, and how a batch is divided there: the only file that names devices."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import ArrayLike, DTypeLike

from spec.errors import UserError

PLATFORMS = ("cpu", "gpu", "tpu")
AXIS = "batch"

Mode = Literal["jit", "sharded", "pmap"]
Layout = jax.Device | Sharding | Callable[[tuple[int, ...]], Sharding]  # where an array goes, perhaps by its shape


@dataclass(frozen=True)
class Part:
    """What a program, or each device's copy of it, sees of a batch of `size` examples that is divided into `parts`.

    With a `sharding` the program sees the whole batch, of which every device has some rows; with an `axis` it is one
    copy of `parts`, sees its own rows, and hears of the others' through the axis. A batch that does not divide is
    filled up with rows that weigh nothing. A part that is `alone` has an axis and takes its own rows for the batch.
    """

    size: int = 0
    parts: int = 1
    axis: str | None = None
    sharding: NamedSharding | None = None
    alone: bool = False

    @property
    def padded(self) -> int:
        """Return the rows of the batch, filled up."""
        return -(-self.size // self.parts) * self.parts

    @property
    def filled(self) -> float:
        """Return the share of the rows that are examples."""
        return self.size / self.padded if self.size else 1.0

    def count(self, rows: int) -> int:
        """Return the number of examples in the whole batch, of which `rows` are seen here; alone, in the first part's:
        it is full wherever there are as many examples as parts."""
        return rows if self.alone else self.size or rows

    def rows(self, array: jax.Array) -> jax.Array:
        """Return what is seen here of a batch's `array` [size, ...]: all of it, or this copy's rows; filled up."""
        if self.padded > self.size:
            array = jnp.pad(array, ((0, self.padded - self.size), *((0, 0),) * (array.ndim - 1)))
        if self.sharding:
            return lax.with_sharding_constraint(array, self.sharding)
        if self.axis:
            own = self.padded // self.parts
            return lax.dynamic_slice_in_dim(array, lax.axis_index(self.axis) * own, own)
        return array

    def weights(self, dtype: DTypeLike) -> jax.Array | None:
        """Return the weight of each row that is seen here, 1 on average over the batch; None where all are 1.

        Alone, 1 on average over the part's own rows, or all 0 where each of them fills up.
        """
        if self.padded == self.size:
            return None
        if self.alone:
            filled = self.rows(jnp.ones(self.size, dtype))
            return filled * (len(filled) / jnp.maximum(filled.sum(), 1))
        return self.rows(jnp.full(self.size, self.padded / self.size, dtype))

    def mean(self, tree: Any) -> Any:
        """Return the mean over the parts of what each has found of its own rows; alone, what was found."""
        return lax.pmean(tree, self.axis) if self.axis and not self.alone else tree

    def sum(self, tree: Any) -> Any:
        """Return the sum over the parts of what each has found of its own rows."""
        return lax.psum(tree, self.axis) if self.axis else tree

    def first(self, tree: Any) -> Any:
        """Return to every part what the first one has found of its own rows."""
        is_first = lax.axis_index(self.axis) == 0
        return lax.psum(jax.tree.map(lambda leaf: jnp.where(is_first, leaf, 0), tree), self.axis)

    def each(self, function: Callable[..., tuple[jax.Array, Any]]) -> Callable[..., tuple[jax.Array, Any]]:
        """Return what makes of the rows seen here what `function` makes of each part's, as if there were no other.

        `function` takes (rows [rows, ...], *shared, part) and returns (rows [rows, ...], found), of which `found` is
        that of the first part. A program that sees the whole batch views it as [parts, rows, ...]: no row moves.
        """
        alone = self if self.parts == 1 else replace(self, axis=AXIS, sharding=None, alone=True)

        def of_one(rows: jax.Array, *shared: Any) -> tuple[jax.Array, Any]:
            rows, found = function(rows, *shared, alone)
            return rows, alone.first(found) if alone.alone else found

        def of_all(rows: jax.Array, *shared: Any) -> tuple[jax.Array, Any]:
            axes = (0, *(None for _ in shared))
            mapped = jax.vmap(of_one, in_axes=axes, out_axes=(0, None), axis_name=AXIS)
            rows, found = mapped(rows.reshape(self.parts, -1, *rows.shape[1:]), *shared)
            return rows.reshape(-1, *rows.shape[2:]), found

        return of_all if self.sharding and alone.alone else of_one

    def gathered(self, array: jax.Array) -> jax.Array:
        """Return all rows [size, ...] of what is known of those that are seen here."""
        whole = lax.all_gather(array, self.axis, tiled=True) if self.axis else array
        return whole[: self.size] if self.padded > self.size else whole


WHOLE = Part()


@dataclass(frozen=True)
class Placement:
    """The devices of a run, and what makes one program of them: `jit` on one device, `jit` over arrays that are sharded
    (one program, divided by the compiler), or `pmap` (a program for each device, joined by collectives).

    With `shard_state` every device keeps a part of the parameters and of the optimiser's state alone.
    """

    mode: Mode
    devices: tuple[jax.Device, ...]
    uneven: str = "pad"
    shard_state: bool = False

    @classmethod
    def single(cls, device: jax.Device) -> Placement:
        """Return that of one device."""
        return cls("jit", (device,))

    @property
    def replicated(self) -> Sharding:
        """Return how an array lies whole on every device."""
        if self.mode == "jit":
            return jax.sharding.SingleDeviceSharding(self.devices[0])
        return NamedSharding(self._mesh, PartitionSpec())

    def of_state(self, shape: tuple[int, ...]) -> Sharding:
        """Return how an array of the state lies: whole on every device, or divided along the longest axis that all
        devices can share evenly."""
        even = [axis for axis, length in enumerate(shape) if length % len(self.devices) == 0]
        if not (self.shard_state and even):
            return self.replicated
        longest = max(even, key=shape.__getitem__)
        return NamedSharding(self._mesh, PartitionSpec(*(None,) * longest, AXIS))

    def described(self) -> list[str]:
        """Return the devices' names: `cpu:cpu:0`."""
        return [f"{device.platform}:{device.device_kind}:{device.id}" for device in self.devices]

    def check_divides(self, sizes: Sequence[int], *, alone: bool = False) -> None:
        """Raise UserError for a batch of one of these sizes that has fewer examples than there are devices, or that is
        uneven and to be refused; with `alone`, also for one that leaves a device a single example."""
        parts = len(self.devices)
        for size in sizes:
            if size < parts:
                last = size < max(sizes)
                what, more = ("an epoch's last batch", ", or last_batch drop") if last else ("a batch", "")
                raise UserError(f"{what} of {size} is less than {parts} devices; use {size} in all, or fewer{more}")
            if size % parts and self.uneven == "refuse":
                lower, upper = size // parts * parts, -(-size // parts) * parts
                raise UserError(f"batch_size {size} is not divisible by {parts} devices; use {lower} or {upper}")
            if alone and parts > 1 and 1 in (-(-size // parts), size % -(-size // parts)):
                raise UserError(
                    f"a batch of {size} leaves one of {parts} devices a single example, whose variance local BatchNorm "
                    "cannot take; use other --devices, or model.batchnorm_statistics global"
                )

    def part(self, size: int) -> Part:
        """Return how a batch of `size` examples is divided."""
        if self.mode == "jit":
            return WHOLE
        if self.mode == "pmap":
            return Part(size, len(self.devices), axis=AXIS)
        return Part(size, len(self.devices), sharding=NamedSharding(self._mesh, PartitionSpec(AXIS)))

    def put(self, tree: Any) -> Any:
        """Return the arrays of a tree, whole on every device."""
        return jax.tree.map(lambda leaf: put(leaf, self.replicated), tree)

    def put_state(self, tree: Any) -> Any:
        """Return the arrays of a state as they lie on the devices."""
        return jax.tree.map(lambda leaf: put(leaf, self.of_state), tree)

    def whole(self, state: Any) -> Any:
        """Return a state of which this process has all, a collective of the processes that share it: one array after
        the other is whole on the devices, and then the host's."""
        if not self.shard_state or self.replicated.is_fully_addressable:
            return state
        return jax.tree.map(lambda leaf: np.asarray(_gathering(self.replicated)(leaf)), state)

    def shape(self, shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        """Return what stands for an array that is whole on every device."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.replicated)

    def compiled(self, function: Callable, *arguments: Any, donates: bool = False) -> Callable:
        """Return `function` compiled for `arguments`; what it returns is whole on every device.

        With `donates` the first one's memory is given to the first that it returns, which lies as that one did.
        """
        if self.mode == "pmap":
            return self._pmapped(function, arguments, donates)
        outs = {} if self.mode == "jit" else {"out_shardings": self.replicated}
        if self.shard_state and donates:
            _, *others = jax.eval_shape(function, *arguments)
            state = jax.tree.map(lambda leaf: leaf.sharding, arguments[0])
            outs = {"out_shardings": (state, *(self.replicated for _ in others))}
        return jax.jit(function, donate_argnums=(0,) * donates, **outs).lower(*arguments).compile()

    def _pmapped(self, function: Callable, arguments: Sequence[Any], donates: bool) -> Callable:
        ranks = self._ranks()

        def on_each(rank: jax.Array, *arguments: Any) -> Any:
            return function(*arguments)

        mapped = jax.pmap(
            on_each,
            axis_name=AXIS,
            in_axes=(0, *(None for _ in arguments)),
            out_axes=None,
            devices=self.devices,
            donate_argnums=(1,) * donates,
        )
        if not self.replicated.is_fully_addressable:  # pmap cannot be lowered for the shapes of several processes
            arguments = jax.tree.map(lambda leaf: put(np.zeros(leaf.shape, leaf.dtype), self.replicated), arguments)
        program = mapped.lower(ranks, *arguments).compile()
        return lambda *given: program(ranks, *given)

    def _ranks(self) -> np.ndarray | jax.Array:
        """Return an argument for pmap to go by: it wants one that is divided, of this process's devices before
        jax 0.8, and of all since."""
        ranks = np.arange(len(self.devices), dtype=np.int32)
        if not getattr(jax.config, "jax_pmap_shmap_merge", True):
            return ranks[: sum(device.process_index == jax.process_index() for device in self.devices)]
        return put(ranks, NamedSharding(self._mesh, PartitionSpec(AXIS)))

    @property
    def _mesh(self) -> Mesh:
        return Mesh(np.array(self.devices), (AXIS,), axis_types=(AxisType.Auto,))


def place(
    platform: str | None,
    *,
    parallel: Mode | None = None,
    devices: int | None = None,
    uneven: str = "pad",
    shard_state: bool = False,
) -> Placement:
    """Return where a run is placed: on `devices` of the platform's in each process of the run, all of an accelerator's
    and one CPU unless given.

    A CPU is as many devices as one asks for, each with its own copy of everything. Raises UserError for what there is
    not.
    """
    if devices is not None:
        _split_cpu(max(devices, 1))
    # First of all: every process waits here for every other one.
    there = [list(own) for _, own in itertools.groupby(_devices(platform), lambda device: device.process_index)]
    _check(there, devices, parallel)
    single = parallel == "jit" or there[0][0].platform == "cpu"
    chosen = tuple(device for own in there for device in own[: devices or (1 if single else None)])
    mode = parallel or ("jit" if len(chosen) == 1 else "sharded")
    if shard_state and mode != "sharded":
        raise UserError(
            f"--shard-state divides the state as sharded does the batch, and this is {mode} on {len(chosen)} "
            f"device{'s' * (len(chosen) > 1)}; use --parallel sharded and --devices 2 or more, or leave it out"
        )
    return Placement(mode, chosen, uneven, shard_state)


def _check(there: Sequence[Sequence[jax.Device]], devices: int | None, parallel: Mode | None) -> None:
    """Raise UserError when so many `devices` of each process are not `there`, or are not for the mode."""
    if devices is not None and devices < 1:
        raise UserError(f"--devices {devices} are none; use 1 at least")
    if parallel == "jit" and (devices or 1) > 1:
        raise UserError(f"--parallel jit is for one device, and --devices is {devices}; use sharded or pmap")
    if parallel == "jit" and len(there) > 1:
        raise UserError(f"--parallel jit is for one device, and there are {len(there)} processes; use sharded or pmap")
    for process, own in enumerate(there):
        if devices and devices > len(own):
            names = f"{len(own)} {own[0].platform} device{'s' * (len(own) > 1)}"
            where = f"process {process} has" if len(there) > 1 else "there are"
            raise UserError(
                f"--devices {devices} is more than {where}: {names}; use {len(own)} or less"
                + ", the same in every process" * (len(there) > 1)
            )


def put(array: ArrayLike, device: Layout) -> jax.Array:
    """Return an array on a device, or as it lies over several; where some are another process's, each has its own."""
    if callable(device):
        device = device(np.shape(array))
    if isinstance(device, jax.Device) or device.is_fully_addressable:
        return jax.device_put(array, device)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, device, lambda index: array[index])


@functools.cache
def _gathering(replicated: Sharding) -> Callable[[jax.Array], jax.Array]:
    """Return the program that makes an array whole on every device, compiled once for a shape."""
    return jax.jit(lambda array: array, out_shardings=replicated)


def select_device(platform: str | None) -> jax.Device:
    """Return the first device of `platform`, or of JAX's own choice: an accelerator if there is one, else the CPU.

    Raises UserError when this machine has no such platform.
    """
    return _devices(platform)[0]


def _split_cpu(devices: int) -> None:
    """Have JAX make so many devices of the CPU, unless it has begun, or was told how many."""
    with contextlib.suppress(RuntimeError):
        if jax.config.jax_num_cpu_devices < devices and "device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", devices)


def _devices(platform: str | None) -> list[jax.Device]:
    try:
        if platform == "cpu":
            jax.config.update("jax_platforms", "cpu")
        return jax.devices(platform)
    except (RuntimeError, AssertionError) as error:  # the assertion is JAX's, of JAX_PLATFORMS=cuda without a GPU
        asked = f"--platform {platform}" if platform else f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        reason = (str(error).strip().splitlines() or ["JAX finds no such device"])[-1]
        raise UserError(
            f"{asked} is not on this machine ({reason}); leave it out, or install the extra of your accelerator "
            "(cuda, tpu)"
        ) from None

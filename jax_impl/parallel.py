"""Where a program runs, and how a batch is divided there: the only file that names devices."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from spec.errors import UserError

PLATFORMS = ("cpu", "gpu", "tpu")
AXIS = "batch"

Mode = Literal["jit", "sharded", "pmap"]


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
    (one program, divided by the compiler), or `pmap` (a program for each device, joined by collectives)."""

    mode: Mode
    devices: tuple[jax.Device, ...]
    uneven: str = "pad"

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

    def described(self) -> list[str]:
        """Return the devices' names: `cpu:cpu:0`."""
        return [f"{device.platform}:{device.device_kind}:{device.id}" for device in self.devices]

    def check_divides(self, sizes: Sequence[int], *, alone: bool = False) -> None:
        """Raise UserError for a batch of one of these sizes that has fewer examples than there are devices, or that is
        uneven and to be refused; with `alone`, also for one that leaves a device a single example."""
        parts = len(self.devices)
        for size in sizes:
            if size < parts:
                raise UserError(f"a batch of {size} is less than {parts} devices; use --devices {size} or less")
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
        return jax.device_put(tree, self.replicated)

    def shape(self, shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        """Return what stands for an array that is whole on every device."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.replicated)

    def compiled(self, function: Callable, *arguments: Any, donates: bool = False) -> Callable:
        """Return `function`, of arrays that are whole on every device to such arrays, compiled for `arguments`; with
        `donates` the first one's memory is given away."""
        if self.mode == "pmap":
            return self._pmapped(function, arguments, donates)
        outs = {} if self.mode == "jit" else {"out_shardings": self.replicated}
        return jax.jit(function, donate_argnums=(0,) * donates, **outs).lower(*arguments).compile()

    def _pmapped(self, function: Callable, arguments: Sequence[Any], donates: bool) -> Callable:
        ranks = np.arange(len(self.devices), dtype=np.int32)  # pmap wants an argument to go by

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
        program = mapped.lower(ranks, *arguments).compile()
        return lambda *given: program(ranks, *given)

    @property
    def _mesh(self) -> Mesh:
        return Mesh(np.array(self.devices), (AXIS,), axis_types=(AxisType.Auto,))


def place(
    platform: str | None, *, parallel: Mode | None = None, devices: int | None = None, uneven: str = "pad"
) -> Placement:
    """Return where a run is placed: on `devices` of the platform's, all of an accelerator's and one CPU unless given.

    A CPU is as many devices as one asks for, each with its own copy of everything. Raises UserError for what there is
    not.
    """
    if devices is not None and devices < 1:
        raise UserError(f"--devices {devices} are none; use 1 at least")
    if devices is not None and devices > 1 and parallel == "jit":
        raise UserError(f"--parallel jit is for one device, and --devices is {devices}; use sharded or pmap")
    if devices is not None:
        _split_cpu(devices)
    there = _devices(platform)
    wanted = devices or (1 if there[0].platform == "cpu" or parallel == "jit" else len(there))
    if wanted > len(there):
        names = f"{len(there)} {there[0].platform} device{'s' * (len(there) > 1)}"
        raise UserError(f"--devices {wanted} is more than there are: {names}; use {len(there)} or less")
    return Placement(parallel or ("jit" if wanted == 1 else "sharded"), tuple(there[:wanted]), uneven)


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

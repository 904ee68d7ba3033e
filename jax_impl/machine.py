"""The device that a benchmark runs on, served as a worker: `python -m jax_impl.machine [--platform PLATFORM]`."""

from __future__ import annotations

if __name__ == "__main__":
    from spec.errors import run_program

    run_program(__spec__.name)

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_impl.parallel import PLATFORMS, select_device
from spec import bench_worker

TURNS = 5
SIZE, SIZE_ON_CPU = 8192, 2048  # of the matrices: a product takes some tens of milliseconds


class Machine:
    """One device, and how fast it multiplies."""

    def __init__(self, device: jax.Device) -> None:
        self._device = device

    def device(self) -> dict[str, str]:
        """Return the platform and the kind of the device."""
        return {"platform": self._device.platform, "kind": self._device.device_kind}

    def matmul_rate(self) -> float:
        """Return the device's float32 matmul rate, FLOP/s; on a CPU that of NumPy's BLAS."""
        on_cpu = self._device.platform == "cpu"
        return best_rate(blas_product(SIZE_ON_CPU) if on_cpu else device_product(SIZE, self._device))


def best_rate(product: Callable[[], np.ndarray | jax.Array]) -> float:
    """Return the rate of the fastest of some calls of `product`, which multiplies two square matrices, FLOP/s."""
    size = len(product())  # the first compiles
    return 2 * size**3 / min(_seconds(product) for _ in range(TURNS))


def blas_product(size: int) -> Callable[[], np.ndarray]:
    """Return what multiplies a float32 [size, size] by itself with NumPy."""
    square = _square(size)
    return lambda: square @ square


def device_product(size: int, device: jax.Device) -> Callable[[], jax.Array]:
    """Return what multiplies a float32 [size, size] by itself at full width on `device`, and waits for it."""
    square = jax.device_put(_square(size), device)
    product = jax.jit(functools.partial(jnp.matmul, precision="highest"))
    return lambda: product(square, square).block_until_ready()


def _square(size: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Serve the device."""
    parser = argparse.ArgumentParser(prog="python -m jax_impl.machine", description=__doc__, allow_abbrev=False)
    parser.add_argument("--platform", choices=PLATFORMS)
    arguments = parser.parse_args()
    bench_worker.serve(lambda: Machine(select_device(arguments.platform)))

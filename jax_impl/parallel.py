"""Where a program runs: the only file that names devices."""

from __future__ import annotations

import os

import jax

from spec.errors import UserError

PLATFORMS = ("cpu", "gpu", "tpu")


def select_device(platform: str | None) -> jax.Device:
    """Return the first device of `platform`, or of JAX's own choice: an accelerator if there is one, else the CPU.

    Raises UserError when this machine has no such platform.
    """
    try:
        if platform == "cpu":
            jax.config.update("jax_platforms", "cpu")
        return jax.devices(platform)[0]
    except (RuntimeError, AssertionError) as error:  # the assertion is JAX's, of JAX_PLATFORMS=cuda without a GPU
        asked = f"--platform {platform}" if platform else f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        reason = (str(error).strip().splitlines() or ["JAX finds no such device"])[-1]
        raise UserError(
            f"{asked} is not on this machine ({reason}); leave it out, or install the extra of your accelerator "
            "(cuda, tpu)"
        ) from None

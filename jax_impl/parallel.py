"""Where a program runs: the only file that names devices."""

from __future__ import annotations

import jax

from spec.errors import UserError


def select_device(platform: str | None) -> jax.Device:
    """Return the first device of `platform`, or of JAX's own choice: an accelerator if there is one, else the CPU.

    Raises UserError when this machine has no such platform.
    """
    try:
        if platform == "cpu":
            jax.config.update("jax_platforms", "cpu")
        return jax.devices(platform)[0]
    except RuntimeError:
        raise UserError(
            f"--platform {platform} is not on this machine; it has: {jax.default_backend()}. Leave the flag out, or "
            "install the extra of your accelerator (cuda, tpu)"
        ) from None

"""torchvision, mended where its compiled operators do not load.

torchvision's wheels are built against CUDA builds of torch. Beside a CPU-only torch its extension does not load, and
the import fails on `operator torchvision::nms does not exist`. Declaring the schemas of the two operators that it
registers at import is enough: nothing here calls them. Seen with torchvision 0.28 on torch 2.13.
"""

from __future__ import annotations

from contextlib import suppress

import torch


def _declare_missing_operators() -> torch.library.Library:
    """Declare the operators that are not there; they live as long as the returned library does."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        with suppress(RuntimeError):  # declared already
            library.define(schema)
    return library


try:
    import torchvision
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    _DECLARED = _declare_missing_operators()
    import torchvision

__all__ = ["torchvision"]

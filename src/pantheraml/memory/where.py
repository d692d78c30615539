"""Where torch computes for a device of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pantheraml.recipe.kinds import KINDS

if TYPE_CHECKING:
    import torch

    from pantheraml.hardware.device import Device


def torch_device(device: Device | None) -> torch.device:
    """Torch's name for a device. None, or one whose tensors are not torch's (a TPU): where torch puts tensors by itself."""
    import torch

    from pantheraml.hardware.backend import backend_of

    if device is None or KINDS[device.kind].engine != "torch":
        return torch.get_default_device()
    return backend_of(device).torch_device(device.index)

"""Whether torch compiles the layers. Needs no torch."""

from __future__ import annotations

from pantheraml.hardware.device import Device
from pantheraml.recipe.kinds import KINDS

COMPILING = "about a minute"
"""What compiling costs; seen: 35 s for a small model on two cores (torch 2.13), more for a large one."""
WORTH_STEPS = 500
"""Steps of a run from which on it is earned back."""


def choose_compile(asked: str, device: Device, *, fused: bool, steps: int | None) -> tuple[bool, str]:
    """Whether each layer is compiled, and why.

    Args:
        asked: hardware.compile of the recipe. fused: the kernels compute the layers. steps: of the run; None: not known.
    """
    if asked != "auto":
        return asked == "on", f"the recipe asks for it; compiling takes {COMPILING}, once" if asked == "on" else "the recipe asks for it"
    if fused:
        return False, "the kernels compute the layers, which leaves little to fuse"
    if not KINDS[device.kind].compiles:
        return False, f"it seldom pays on {device}"
    if steps is None or steps < WORTH_STEPS:
        return False, f"compiling takes {COMPILING}, and " + (
            "the length of the run is not known" if steps is None else f"{steps} steps are few"
        )
    return True, f"{steps} steps earn back the compiling, which takes {COMPILING}"

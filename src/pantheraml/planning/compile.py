"""Whether torch compiles the layers, and whether steps are recorded. Needs no torch."""

from __future__ import annotations

from pantheraml.errors import RecipeError
from pantheraml.hardware.device import Device
from pantheraml.planning.levels import Levels
from pantheraml.planning.memory import MemoryEstimate
from pantheraml.recipe.kinds import KINDS

COMPILING = "about a minute"
"""What compiling costs; seen: 35 s for a small model on two cores (torch 2.13), more for a large one."""
WORTH_STEPS = 500
"""Steps of a run from which on it is earned back."""
LAYER_TELLING_S = 1e-3
"""How long a host takes to tell a GPU of one layer, forward and backward, about a hundred kernels: a first guess, not measured."""


def choose_compile(asked: str, device: Device, *, fused: bool, steps: int | None) -> tuple[bool, str]:
    """Whether each layer is compiled, and why.

    Args:
        asked: hardware.compile of the recipe. fused: the kernels compute the layers. steps: of the run; None: not known.
    """
    if KINDS[device.kind].engine == "xla":
        return False, "XLA compiles whole steps, once for each shape"
    if asked != "auto":
        return asked == "on", f"the recipe asks for it; compiling takes {COMPILING}, once" if asked == "on" else "the recipe asks for it"
    if fused:
        return False, "the kernels compute the layers, which leaves little to fuse"
    if not KINDS[device.kind].compiles:
        return False, f"it was never tried on {device}" if KINDS[device.kind].unproven else f"it seldom pays on {device}"
    if steps is None or steps < WORTH_STEPS:
        return False, f"compiling takes {COMPILING}, and " + (
            "the length of the run is not known" if steps is None else f"{steps} steps are few"
        )
    return True, f"{steps} steps earn back the compiling, which takes {COMPILING}"


def recording_bytes(memory: MemoryEstimate) -> int:
    """What recordings take beside a plan's memory: a pool of their own for all of them, and gradients thrice while one is checked."""
    return memory.activations_bytes + memory.logits_bytes + 3 * memory.gradients_bytes


def choose_graphs(
    asked: str, device: Device, *, fused: bool, lora: bool, levels: Levels, compiled: bool, fits: bool, micro_batch_s: float | None
) -> tuple[bool, str]:
    """Whether forward and backward are recorded and replayed, and why.

    Args:
        asked: hardware.graphs of the recipe.
        fused, compiled: the kernels, or torch's compiler, compute the layers. lora: not every weight trains.
        fits: there is room for the memory of a recording, which is its own.
        micro_batch_s: what computing a full micro-batch takes; None: not known.
    Raises: RecipeError if it is asked for and cannot be.
    """
    why_not = (
        f"nothing is recorded on {device}"
        if not KINDS[device.kind].records
        else "the kernels do not compute the layers, and what does may draw random numbers or wait for the device"
        if not fused
        else "every weight trains, and to check a recording would take their gradients three times"
        if not lora
        else "torch compiles the layers"
        if compiled
        else "layers' inputs wait in ordinary memory, which a recording cannot take"
        if "offload" in levels
        else "a recording works in memory of its own, and there is no room for it"
        if not fits
        else None
    )
    if asked == "on" and why_not:
        raise RecipeError(f"hardware.graphs=on, but {why_not}", why="then there are no CUDA graphs", fix="set hardware.graphs to auto")
    if asked != "auto":
        return asked == "on", "the recipe asks for it"
    if why_not:
        return False, why_not
    if micro_batch_s is None:
        return False, "how fast the device is was not measured"
    telling_s = len(levels) * LAYER_TELLING_S
    if micro_batch_s > telling_s:
        return False, f"a full micro-batch is computed in about {micro_batch_s * 1e3:.0f} ms, which leaves time to tell the GPU of the next"
    return True, f"to tell the GPU of a micro-batch may take {telling_s * 1e3:.0f} ms, and to compute it {micro_batch_s * 1e3:.0f} ms"

"""What each layer keeps between forward and backward: the order in which levels are tried, and mixing two of them. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from pantheraml.errors import DeviceError, RecipeError
from pantheraml.hardware.device import Device
from pantheraml.planning.memory import Level
from pantheraml.recipe.kinds import KINDS, in_host_memory

Levels = tuple[Level, ...]
"""The level of each layer, from the first to the last."""

ASKED: dict[str, Level] = {"off": "keep", "cheap": "cheap", "on": "all", "tiled": "tiled", "offload": "offload"}
"""hardware.checkpointing of a recipe -> the level of every layer."""
SAID: dict[Level, str] = {
    "keep": "everything that backward needs is kept",
    "cheap": "norms and gates are computed again in backward, which costs nearly nothing",
    "all": "each layer is computed again in backward, which costs about a third more time",
    "tiled": "each layer is computed again in backward, its MLP a piece at a time, which costs about a third more time",
    "offload": "each layer's input waits in ordinary memory, and the layer is computed again in backward, its MLP a piece at a time",
}


def rungs(device: Device, asked: str, *, fused: bool) -> tuple[Level, ...]:
    """The levels that may be used, from the fastest to the one that needs least memory.

    Args:
        asked: hardware.checkpointing of the recipe. fused: the kernels compute the layers; others know two levels.
    Raises: RecipeError, DeviceError for a level that is not to be had.
    """
    if KINDS[device.kind].engine == "xla":
        if asked in ("tiled", "offload"):
            raise DeviceError(
                f"hardware.checkpointing={asked} is not possible on {device}",
                why="layers there keep everything, the results of products, or their input alone",
                fix="set hardware.checkpointing to auto, off, cheap or on",
            )
        return ("keep", "cheap", "all") if asked == "auto" else (ASKED[asked],)
    host, own = in_host_memory(device.kind), KINDS[device.kind].own_memory
    if asked == "auto":
        if not fused:
            return ("keep", "all")
        # Where memory is the processor's own, reading what was kept takes as long as computing it again.
        if host:
            return ("cheap", "all", "tiled")
        return ("keep", "cheap", "all", "tiled", "offload") if own else ("keep", "cheap", "all", "tiled")
    level = ASKED[asked]
    if not fused and level not in ("keep", "all"):
        raise RecipeError(
            f"hardware.checkpointing={asked}, but the kernels do not compute the layers of this model with this adapter",
            why="their own forward, and that of adapters with dropout or DoRA, knows two ways: keep everything, or compute it all again",
            fix="set hardware.checkpointing to auto, on or off",
        )
    if level == "offload" and not own:
        raise DeviceError(
            f"hardware.checkpointing=offload, but {device} works in ordinary memory",
            why="there is nowhere else to put what does not fit",
            fix="set hardware.checkpointing to auto, or tiled",
        )
    return (level,)


def mixed(layers: int, better: Level, worse: Level, fits: Callable[[Levels], bool]) -> Levels:
    """As many layers at the better level as fit, the last ones: they are needed back first. All at the worse one are known to fit."""
    fewest, most = 0, layers
    while fewest < most:
        middle = (fewest + most + 1) // 2
        fewest, most = (middle, most) if fits((worse,) * (layers - middle) + (better,) * middle) else (fewest, middle - 1)
    return (worse,) * (layers - fewest) + (better,) * fewest


def format_levels(levels: Sequence[Level]) -> str:
    """`30 cheap`, or `12 all, 18 cheap`."""
    counts = Counter(levels)
    return ", ".join(f"{n} {level}" for level, n in counts.items())


def lower(levels: Levels, allowed: Sequence[Level]) -> Levels | None:
    """One level down: each layer at the next rung below the best that is in use. None: there is none below."""
    best = min((allowed.index(level) for level in levels if level in allowed), default=len(allowed))
    if best + 1 >= len(allowed):
        return None
    return tuple(allowed[max(best + 1, allowed.index(level))] for level in levels)

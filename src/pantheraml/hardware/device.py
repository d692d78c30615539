"""Facts about a device, and reasons for the absence of others. Unknown is None, never a guess. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from pantheraml.recipe.types import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device that answered a small computation.

    Attributes:
        kind, index: how it is addressed; ``str(device)`` is ``kind:index``.
        name: as the driver or the operating system reports it.
        memory_bytes: all of it. free_bytes: what was free when it was probed.
        dtypes: names of the dtypes that train well here, fastest first ("bfloat16", "float32").
        peak_flops: FLOP/s measured by a matrix product in the first of `dtypes`; None if not measured.
        simulated: True for a stand-in (tests), which every report must say.
    """

    kind: Kind
    index: int
    name: str
    memory_bytes: int
    free_bytes: int
    dtypes: tuple[str, ...]
    peak_flops: float | None = None
    simulated: bool = False

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent:
    """Why a kind of device is not here, and the one thing that would bring it."""

    kind: Kind
    why: str
    fix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """What answered, in order of preference, and what did not."""

    devices: tuple[Device, ...]
    absent: tuple[Absent, ...] = ()

"""Facts about a device, and reasons for the absence of others. Unknown is None, never a guess. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from pantheraml.errors import DeviceError
from pantheraml.recipe.kinds import KINDS, Kind

if TYPE_CHECKING:

    class DeviceType(Enum):
        """Kinds of device: `DeviceType.CUDA.value` is "cuda"."""

else:
    DeviceType = Enum("DeviceType", {kind.upper(): kind for kind in KINDS}, module=__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device that answered a small computation.

    Attributes:
        kind, index: how it is addressed; ``str(device)`` is ``kind:index``.
        name: as the driver or the operating system reports it.
        memory_bytes: all of it. free_bytes: what was free when it was probed. None where nobody tells; of a TPU whose
            memory JAX does not tell, memory_bytes is the vendor's figure.
        dtypes: names of the dtypes that train well here, fastest first ("bfloat16", "float32"). Empty: it answers, but
            no engine of ours trains on it yet.
        peak_flops: FLOP/s measured by a short matrix product in the first of `dtypes`; None if not measured.
        capability: what programs are compiled for: "9.0" on CUDA, "gfx942" on ROCm, "v5e" for a TPU.
        cores: compute units as the vendor counts them (multiprocessors, cores).
        topology: how the chips of a TPU slice are connected ("2x4"). hosts: how many machines they are plugged into, each with as many;
            only those of this one are listed.
        simulated: True for a stand-in (tests, XLA on a CPU), which every report must say.
    """

    kind: Kind
    index: int
    name: str
    memory_bytes: int | None
    free_bytes: int | None
    dtypes: tuple[str, ...]
    peak_flops: float | None = None
    capability: str | None = None
    cores: int | None = None
    topology: str | None = None
    hosts: int = 1
    simulated: bool = False

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}"

    @property
    def device_type(self) -> DeviceType:
        """The kind as an enum, for programs that compare."""
        return DeviceType(self.kind)

    @property
    def label(self) -> str:
        """The name, and that it is simulated, or that nothing of ours has run on its kind yet, if so: what a report shows."""
        said = [word for word, so in (("simulated", self.simulated), ("unproven", KINDS[self.kind].unproven)) if so]
        return f"{self.name} ({', '.join(said)})" if said else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A device that a driver lists but that cannot be used from here; what the driver does not tell is None."""

    index: int
    name: str
    memory_bytes: int | None = None
    free_bytes: int | None = None
    capability: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent:
    """Why a kind of device is not here, the one thing that would bring it, and what its driver lists all the same."""

    kind: Kind
    why: str
    fix: str
    seen: tuple[Seen, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """What answered, in order of preference, and what did not."""

    devices: tuple[Device, ...]
    absent: tuple[Absent, ...] = ()


def parse_device(word: str) -> tuple[str, int | None]:
    """`cuda:1` is ("cuda", 1), `cuda` is ("cuda", None). Raises: DeviceError if it is neither."""
    kind, colon, index = str(word).strip().lower().partition(":")
    if kind not in ("auto", "gpu", *KINDS) or (colon and not index.isdecimal()) or (colon and kind == "auto"):
        raise DeviceError(
            f"{word!r} is no name of a device",
            why=f"a name is auto, gpu, or one of {', '.join(KINDS)}; all but auto with an index if you like (cuda:1)",
            fix="run pantheraml devices to see what is here",
        )
    return kind, int(index) if colon else None

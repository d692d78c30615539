"""What NVIDIA's driver tells of its GPUs, asked without torch: through NVML, or else by running nvidia-smi."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

from pantheraml.hardware.backend import Telemetry
from pantheraml.hardware.device import Seen

PROGRAM = "nvidia-smi"
TIMEOUT_S = 10.0
"""A first answer takes about a second per GPU where the driver has to wake up; a program that hangs is given up."""
MIB = 1 << 20

# The name comes last: it alone may have a comma in it.
_FIELDS = (
    *("index", "uuid", "memory.total", "memory.free", "compute_cap", "mig.mode.current"),
    *("utilization.gpu", "temperature.gpu", "power.draw", "name"),
)
_UNKNOWN_FIELD = re.compile(r'Field "([^"]+)" is not a valid field to query')

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One GPU as the driver describes it. `seen.index` counts in the order of the PCI bus, which need not be torch's.

    Attributes:
        uuid: "GPU-..." (in NVML "MIG-..." for a slice of one); None where the driver does not tell.
        telemetry: at the moment of asking. With MIG on, power and utilization are unknown: nobody tells those of a slice.
    """

    seen: Seen
    uuid: str | None
    telemetry: Telemetry


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Which GPUs the driver lists; no cards and no trouble: there is no NVIDIA driver here.

    Attributes:
        source: who answered, "NVML" or "nvidia-smi". trouble: the driver's first words, where it complains.
    """

    cards: tuple[Card, ...] = ()
    source: str | None = None
    trouble: str | None = None

    @property
    def seen(self) -> tuple[Seen, ...]:
        """The GPUs alone."""
        return tuple(card.seen for card in self.cards)

    @property
    def words(self) -> str:
        """`NVIDIA L4 (22 GiB), 2 x NVIDIA H100 80GB HBM3 (80 GiB)`; empty without a GPU."""
        names = [f"{each.name} ({_gib(each.memory_bytes)})" for each in self.seen]
        counts = {name: names.count(name) for name in names}
        return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())


def list_cards() -> Listing:
    """Every GPU that the driver lists, whether torch can use it or not."""
    by_library = list_by_nvml()
    if by_library.cards:
        return by_library
    program = shutil.which(PROGRAM)
    if program is None:
        return by_library
    by_program = list_by_program(program)
    return by_program if by_program.cards or by_program.trouble else by_library


def telemetry(uuid: str) -> Telemetry:
    """Of the GPU with this UUID, with or without "GPU-" before it, as torch and the driver write it. Unknown to the driver: all None."""
    bare = uuid.removeprefix("GPU-").removeprefix("MIG-")
    nvml, _ = _open_nvml()
    if nvml is not None:
        for prefix in ("GPU-", "MIG-"):
            handle = _told(nvml, lambda name=prefix + bare: nvml.nvmlDeviceGetHandleByUUID(name))
            if handle is not None:
                return _nvml_telemetry(nvml, handle)
        return Telemetry()
    program = shutil.which(PROGRAM)
    cards = list_by_program(program).cards if program else ()
    return next((card.telemetry for card in cards if card.uuid == f"GPU-{bare}"), Telemetry())


# ---- NVML --------------------------------------------------------------------------------------------------------


def list_by_nvml() -> Listing:
    """Through the package nvidia-ml-py, if it is installed and finds the driver's library."""
    nvml, trouble = _open_nvml()
    if nvml is None:
        return Listing(trouble=trouble)
    cards: list[Card] = []
    for index in range(_told(nvml, nvml.nvmlDeviceGetCount) or 0):
        handle = _told(nvml, lambda index=index: nvml.nvmlDeviceGetHandleByIndex(index))
        name = None if handle is None else _told(nvml, lambda of=handle: nvml.nvmlDeviceGetName(of))
        if handle is None or name is None:
            trouble = f"GPU {index} does not answer"
            continue
        memory = _told(nvml, lambda of=handle: nvml.nvmlDeviceGetMemoryInfo(of))
        capability = _told(nvml, lambda of=handle: nvml.nvmlDeviceGetCudaComputeCapability(of))
        cards.append(
            Card(
                seen=Seen(
                    index=index,
                    name=name,
                    memory_bytes=memory and int(memory.total),
                    free_bytes=None if memory is None else int(memory.free),
                    capability=None if capability is None else f"{capability[0]}.{capability[1]}",
                ),
                uuid=_told(nvml, lambda of=handle: nvml.nvmlDeviceGetUUID(of)),
                telemetry=_nvml_telemetry(nvml, handle),
            )
        )
    return Listing(cards=tuple(cards), source="NVML" if cards else None, trouble=trouble)


def _open_nvml() -> tuple[Any, None] | tuple[None, str | None]:
    """(pynvml, None) ready to be asked, or (None, what the driver says); (None, None) without package or driver."""
    try:
        nvml: Any = import_module("pynvml")
    except ImportError:
        return None, None
    try:
        nvml.nvmlInit()  # counted by the driver: cheap from the second time on
    except nvml.NVMLError_LibraryNotFound:
        return None, None
    except nvml.NVMLError as error:
        return None, str(error)
    return nvml, None


def _told(nvml: Any, ask: Callable[[], _Value]) -> _Value | None:
    """The driver's answer; None where it has none (not supported, no permission, GPU is lost)."""
    try:
        return ask()
    except nvml.NVMLError:
        return None


def _nvml_telemetry(nvml: Any, handle: Any) -> Telemetry:
    rates = _told(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
    temperature = _told(nvml, lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
    milliwatts = _told(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(handle))
    mig = _told(nvml, lambda: nvml.nvmlDeviceGetMigMode(handle))
    return _telemetry(
        utilization_percent=None if rates is None else float(rates.gpu),
        temperature_c=None if temperature is None else float(temperature),
        power_w=None if milliwatts is None else milliwatts / 1000,
        sliced=mig is not None and mig[0] == 1,
    )


def _telemetry(*, utilization_percent: float | None, temperature_c: float | None, power_w: float | None, sliced: bool) -> Telemetry:
    """Of a GPU that is cut into slices only the chip's temperature holds for each of them."""
    return Telemetry(
        utilization=None if utilization_percent is None or sliced else utilization_percent / 100,
        temperature_c=temperature_c,
        power_w=None if sliced else power_w,
    )


# ---- nvidia-smi --------------------------------------------------------------------------------------------------


def list_by_program(program: str) -> Listing:
    """By running nvidia-smi. Fields that an old driver does not know are left out, and unknown."""
    fields = list(_FIELDS)
    while True:
        command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, stdin=subprocess.DEVNULL, check=False
            )
        except subprocess.TimeoutExpired:
            return Listing(trouble=f"{PROGRAM} did not answer within {TIMEOUT_S:.0f} s")
        except OSError as error:
            return Listing(trouble=f"{PROGRAM} cannot be run: {error.strerror or error}")
        refused = _UNKNOWN_FIELD.search(done.stdout + done.stderr)
        if not refused or refused[1] not in fields:
            break
        fields.remove(refused[1])
    cards: list[Card] = []
    complaints: list[str] = []
    for line in [*done.stdout.splitlines(), *done.stderr.splitlines()]:
        card = _card(line, fields)
        if card is not None:
            cards.append(card)
        elif line.strip():
            complaints.append(line.strip())
    if not cards and not complaints:
        complaints.append(f"{PROGRAM} answered nothing (exit code {done.returncode})")
    return Listing(cards=tuple(cards), source=PROGRAM if cards else None, trouble=complaints[0] if complaints else None)


def _card(line: str, fields: list[str]) -> Card | None:
    """A line of the table; None for words between the lines."""
    values = dict(zip(fields, line.split(", ", len(fields) - 1), strict=False))
    if len(values) < len(fields) or not values["index"].strip().isdecimal():
        return None
    memory, free = _number(values.get("memory.total")), _number(values.get("memory.free"))
    capability = values.get("compute_cap", "").strip()
    uuid = values.get("uuid", "").strip()
    return Card(
        seen=Seen(
            index=int(values["index"]),
            name=values["name"].strip(),
            memory_bytes=None if memory is None else int(memory * MIB),
            free_bytes=None if free is None else int(free * MIB),
            capability=capability if re.fullmatch(r"\d+\.\d+", capability) else None,
        ),
        uuid=uuid if uuid.startswith("GPU-") else None,
        telemetry=_telemetry(
            utilization_percent=_number(values.get("utilization.gpu")),
            temperature_c=_number(values.get("temperature.gpu")),
            power_w=_number(values.get("power.draw")),
            sliced=values.get("mig.mode.current", "").strip() == "Enabled",
        ),
    )


def _number(text: str | None) -> float | None:
    """None for "[N/A]", "[Not Supported]", "[Unknown Error]", "ERR!", and whatever else is no number."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _gib(size: int | None) -> str:
    return "memory unknown" if size is None else f"{size / (1 << 30):.0f} GiB"

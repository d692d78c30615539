"""What this machine has: every kind of device is asked, and each answers or says why it cannot."""

from __future__ import annotations

from collections.abc import Iterable

from pantheraml.hardware.backend import open_backend
from pantheraml.hardware.device import Absent, Device, Inventory
from pantheraml.recipe.kinds import KINDS, Kind


def detect(kinds: Iterable[Kind] | None = None, *, simulate_tpu: bool = False, named: str = "auto") -> Inventory:
    """Ask the given kinds (default: all) in the order of preference. Takes about a second, most of it torch's import.

    Args:
        named: what was asked for; a kind that yields to another is asked all the same if it is this.
        simulate_tpu: XLA on the CPU answers as a TPU, and its devices say that they are simulated.
    """
    wanted = set(KINDS if kinds is None else kinds)
    devices: list[Device] = []
    absent: list[Absent] = []
    for kind in KINDS:
        if kind not in wanted:
            continue
        first = next((device for device in devices if device.kind == KINDS[kind].yields_to and device.dtypes), None)
        if first is not None and kind != named:
            absent.append(_not_asked(kind, first))
            continue
        try:
            simulate = simulate_tpu and KINDS[kind].engine == "xla"
            answer = (open_backend(kind, simulate=True) if simulate else open_backend(kind)).probe()
        except (ImportError, OSError, RuntimeError) as error:
            # A driver that breaks while it is asked must not hide the other devices.
            answer = Absent(
                kind=kind,
                why=f"it did not answer: {_first_line(error)}",
                fix=f"repair the {kind} driver or torch, then run pantheraml devices",
            )
        for each in (answer,) if isinstance(answer, Absent) else answer:
            if isinstance(each, Absent):
                absent.append(each)
            else:
                devices.append(each)
    return Inventory(devices=tuple(devices), absent=tuple(absent))


def _not_asked(kind: Kind, first: Device) -> Absent:
    return Absent(
        kind=kind,
        why=f"{first} has answered, and the chips serve one library at a time; {first.kind} comes first",
        fix=f"nothing is missing; to use {kind} instead, name it: hardware.kind={kind}",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

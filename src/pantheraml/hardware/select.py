"""Which device a run uses: a pure decision on what is there and what was asked. Never a silent fallback. Needs no torch."""

from __future__ import annotations

from pantheraml.errors import DeviceError
from pantheraml.hardware.device import Device, Inventory
from pantheraml.recipe.types import HardwareAsk


def select(inventory: Inventory, ask: HardwareAsk) -> tuple[Device, str]:
    """The device, and one sentence why.

    `auto` takes the first kind that answered, and says why those before it did not.
    Raises: DeviceError if what was asked is not there: with what is, and how to get the other.
    """
    if not inventory.devices:
        asked = "" if ask.kind == "auto" else f"hardware.kind={ask.kind}, but "
        raise DeviceError(
            f"{asked}no device answered",
            why="; ".join(f"{absent.kind}: {absent.why}" for absent in inventory.absent) or "nothing was asked to answer",
            fix=(inventory.absent[0].fix if inventory.absent else "run pantheraml doctor")
            + ("; or set hardware.kind to auto" if asked else ""),
        )
    kind = inventory.devices[0].kind if ask.kind == "auto" else ask.kind
    of_kind = [device for device in inventory.devices if device.kind == kind]
    here = ", ".join(f"{device} ({device.name})" for device in inventory.devices)
    if not of_kind:
        absent = next((absent for absent in inventory.absent if absent.kind == kind), None)
        other = f"set hardware.kind to {inventory.devices[0].kind}, or auto"
        raise DeviceError(
            f"hardware.kind={kind}, but no {kind} device answered; here is {here}",
            why=absent.why if absent else "it was not looked for, so nothing is known about it",
            fix=f"{absent.fix}; or {other}" if absent else other,
        )
    for device in of_kind:
        if device.index == ask.index:
            return device, _reason(inventory, ask, device)
    indices = ", ".join(str(device.index) for device in of_kind)
    raise DeviceError(
        f"there is no {kind}:{ask.index}; here is {here}",
        why=f"hardware.index={ask.index}, and the {kind} devices that answered have index {indices}",
        fix=f"set hardware.index to {of_kind[0].index}",
    )


def _reason(inventory: Inventory, ask: HardwareAsk, device: Device) -> str:
    if ask.kind != "auto":
        return "the recipe asks for it"
    missing = "; ".join(f"no {absent.kind}: {absent.why}" for absent in inventory.absent)
    return f"the first that answered ({missing})" if missing else "the first that answered"

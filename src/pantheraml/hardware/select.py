"""Which device a run uses: a pure decision on what is there and what was asked. Never a silent fallback. Needs no torch."""

from __future__ import annotations

from pantheraml.errors import DeviceError
from pantheraml.hardware.device import Device, Inventory
from pantheraml.recipe.kinds import KINDS, Kind, kinds_meant
from pantheraml.recipe.types import HardwareAsk


def select(inventory: Inventory, ask: HardwareAsk, asked_by: str = "the recipe", *, training: bool = True) -> tuple[Device, str]:
    """The device, and one sentence why.

    `auto` takes the first kind that answered and is allowed, `gpu` the first kind of GPU; both say why those before it
    were passed over. A kind that is named is taken or refused, and so is an index; where none is, the first that answered is taken.

    Args:
        training: pass over kinds that no engine trains on. Otherwise, what computes is enough.
    Raises: DeviceError if what was asked is not there: with what is, and how to get the other.
    """
    passed: list[str] = []
    for kind in kinds_meant(ask.kind):
        of_kind = [device for device in inventory.devices if device.kind == kind]
        if not of_kind:
            passed += [f"no {absent.kind}: {absent.why}" for absent in inventory.absent if absent.kind == kind]
        elif refusal := _refusal(kind, of_kind[0], ask, training=training):
            passed.append(f"not {kind}: {refusal}")
        else:
            others = [absent.why for absent in inventory.absent if absent.kind == kind]
            return _of_index(of_kind, inventory, ask, asked_by), "; ".join((_reason(ask, asked_by, passed), *others))
    raise _nothing(inventory, ask, asked_by, passed)


def _refusal(kind: Kind, device: Device, ask: HardwareAsk, *, training: bool) -> str | None:
    """Why a kind that answers is not taken."""
    family = KINDS[kind].family
    if ask.kind == "auto" and family == "tpu" and not ask.allow_tpu:
        return "allow_tpu is off"
    if ask.kind == "auto" and family == "cpu" and not ask.allow_cpu:
        return "allow_cpu is off"
    if training and not device.dtypes:
        return "it computes, but no engine of this version trains on it"
    return None


def _of_index(of_kind: list[Device], inventory: Inventory, ask: HardwareAsk, asked_by: str) -> Device:
    if "index" not in ask.model_fields_set:
        return of_kind[0]
    for device in of_kind:
        if device.index == ask.index:
            return device
    kind = of_kind[0].kind
    indices = ", ".join(str(device.index) for device in of_kind)
    raise DeviceError(
        f"there is no {kind}:{ask.index}; here is {_here(inventory)}",
        why=f"{'hardware.index=' if asked_by == 'the recipe' else asked_by + ' asks for index '}{ask.index}, "
        f"and the {kind} devices that answered have index {indices}",
        fix=f"ask for {of_kind[0]}" if asked_by != "the recipe" else f"set hardware.index to {of_kind[0].index}",
    )


def _nothing(inventory: Inventory, ask: HardwareAsk, asked_by: str, passed: list[str]) -> DeviceError:
    """What was asked is not there, or not allowed."""
    asked = "" if ask.kind == "auto" else f"{_named(ask, asked_by)}, but "
    wanted = [absent for absent in inventory.absent if absent.kind in kinds_meant(ask.kind)]
    absent = wanted[0] if wanted else None
    if not inventory.devices:
        return DeviceError(
            f"{asked}no device answered",
            why="; ".join(f"{absent.kind}: {absent.why}" for absent in inventory.absent) or "nothing was asked to answer",
            fix=(absent.fix if absent else "run pantheraml doctor") + ("; or set hardware.kind to auto" if asked else ""),
        )
    usable = next((device for device in inventory.devices if device.dtypes and device.kind not in kinds_meant(ask.kind)), None)
    allowed = usable is None or ask.allow_cpu or KINDS[usable.kind].family != "cpu"
    other = f"set hardware.kind to {', or '.join([*([usable.kind] if usable else []), *(['auto'] if allowed else [])])}"
    if ask.kind == "auto":
        return DeviceError(
            f"no device may be used; here is {_here(inventory)}",
            why="; ".join(passed),
            fix="allow it (hardware.allow_cpu, hardware.allow_tpu, or their variables), or name it with hardware.kind",
        )
    refused = [reason for reason in passed if reason.startswith("not ")]
    whys = "; ".join(absent.why if len(wanted) == 1 else f"{absent.kind}: {absent.why}" for absent in wanted)
    why = refused[0].partition(": ")[2] if refused else whys or "it was not looked for, so nothing is known about it"
    return DeviceError(
        f"{asked}no {ask.kind} device answered; here is {_here(inventory)}"
        if not refused
        else f"{asked}it cannot be used; here is {_here(inventory)}",
        why=why,
        fix=f"{absent.fix}; or {other}" if absent and not refused else other,
    )


def _named(ask: HardwareAsk, asked_by: str) -> str:
    """What was asked, in the words in which it was."""
    return f"hardware.kind={ask.kind}" if asked_by == "the recipe" else f"{asked_by} asks for {ask.kind}"


def _here(inventory: Inventory) -> str:
    return ", ".join(f"{device} ({device.label})" for device in inventory.devices)


def _reason(ask: HardwareAsk, asked_by: str, passed: list[str]) -> str:
    if ask.kind not in ("auto", "gpu"):
        return f"{asked_by} asks for it"
    first = "the first that answered" if ask.kind == "auto" else f"the first GPU that answered, as {asked_by} asks"
    return f"{first} ({'; '.join(passed)})" if passed else first

"""A model that is spread over several GPUs of one process, for answers: which of its parts lies where, by what is really free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pantheraml.errors import DeviceError
from pantheraml.planning.batch import HEADROOM
from pantheraml.planning.memory import format_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

_TRIES = 40
"""Halvings of the share; after so many it is exact to a byte."""


def balanced_device_map(
    model: nn.Module, free_bytes: Mapping[int, int], *, bytes_each: float | None = None, linear_bytes_each: float | None = None
) -> dict[str, int]:
    """Each part of a model on a device, in the order in which they are computed, so that all devices are filled to the same share.

    A layer is never cut, and what shares a weight with something before it lies there.

    Args:
        model: its weights may be on torch's meta device.
        free_bytes: index of a device -> what is free on it.
        bytes_each: of a weight as it will be held, and linear_bytes_each: of one in a linear layer but the head; None: as it is held now.
    Returns: name of a module or parameter -> index, as `device_map` of transformers takes it.
    Raises: DeviceError if it does not fit into 80% of what is free; ValueError if there is no device.
    """
    if not free_bytes:
        raise ValueError("a model lies on at least one device")
    parts = list(_parts(model, bytes_each, linear_bytes_each))
    low, high = 0.0, HEADROOM
    found = _filled(parts, free_bytes, high)
    if found is None:
        needed = sum(size for _, size, _ in parts)
        raise DeviceError(
            f"the model needs {format_bytes(needed)}, and on {len(free_bytes)} devices {format_bytes(sum(free_bytes.values()))} are free",
            why=f"{HEADROOM:.0%} of that may be filled, the rest is for answers, and a layer lies on one device: free are "
            + ", ".join(f"{format_bytes(free)} on {index}" for index, free in free_bytes.items()),
            fix="free memory on them, load it with load_in_4bit=True, or choose a smaller model",
        )
    for _ in range(_TRIES):
        middle = (low + high) / 2
        tried = _filled(parts, free_bytes, middle)
        low, high, found = (middle, high, found) if tried is None else (low, middle, tried)
    return found


def _filled(parts: list[tuple[str, int, str | None]], free_bytes: Mapping[int, int], share: float) -> dict[str, int] | None:
    """One part after the other on the devices, each filled to a share of what is free; None: they do not fit."""
    devices = iter(free_bytes.items())
    device, room = next(devices)
    left = room * share
    found: dict[str, int] = {}
    for name, size, beside in parts:
        if beside is not None:
            found[name] = found[beside]
            continue
        while size > left:
            following = next(devices, None)
            if following is None:
                return None
            device, room = following
            left = room * share
        found[name] = device
        left -= size
    return found


def _parts(model: nn.Module, bytes_each: float | None, linear_bytes_each: float | None) -> Iterator[tuple[str, int, str | None]]:
    """(name, bytes, name of an earlier part with which it shares a weight) of all that lies on one device."""
    from torch import nn

    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList)]
    layers = {id(layer) for layer in max(lists, key=len)} if lists else set[int]()
    kept = set[str](getattr(model, "_no_split_modules", None) or ())
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore[reportCallIssue]
    small = {id(each.weight) for each in model.modules() if isinstance(each, nn.Linear) and each is not head}
    seen: dict[int, str] = {}

    def size(tensor: Tensor) -> int:
        each = linear_bytes_each if id(tensor) in small and linear_bytes_each is not None else bytes_each
        return int(tensor.numel() * (tensor.element_size() if each is None or not tensor.is_floating_point() else each))

    def part(name: str, tensors: list[Tensor]) -> tuple[str, int, str | None]:
        beside = next((seen[id(tensor)] for tensor in tensors if id(tensor) in seen), None)
        new = {id(tensor): tensor for tensor in tensors if id(tensor) not in seen}
        seen.update(dict.fromkeys(new, name))
        return name, sum(map(size, new.values())), beside

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, int, str | None]]:
        if id(module) in layers or type(module).__name__ in kept or not any(True for _ in module.children()):
            yield part(name, [*module.parameters(), *module.buffers()])
            return
        prefix = f"{name}." if name else ""
        for own, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield part(prefix + own, [tensor])
        for own, child in module.named_children():
            yield from walk(prefix + own, child)

    yield from walk("", model)

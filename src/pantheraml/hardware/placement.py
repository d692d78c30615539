"""Where torch puts tensors, under the names that users of PantheraML know. Each asks the device layer; nothing is guessed.

A device may be left out (what the environment asks for, or `auto`), be an index of that kind, or be a name: "cuda:1",
"gpu", a torch.device. What is not here is a DeviceError that lists what is.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch

from pantheraml.errors import DeviceError
from pantheraml.hardware.backend import open_backend
from pantheraml.hardware.detect import detect
from pantheraml.hardware.device import Device, Inventory, parse_device
from pantheraml.hardware.find import Found, find
from pantheraml.hardware.settings import read_settings
from pantheraml.recipe.kinds import KINDS, kinds_meant, torch_type
from pantheraml.recipe.types import HardwareAsk

Name = str | int | torch.device | None
F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", torch.Tensor, torch.nn.Module)


def get_pytorch_device(device: Name = None) -> str:
    """Torch's name for a device that answers: "cpu", "cuda:1"; without an index where none was asked for ("cuda").

    The current device of the driver stays as it is.
    Raises: DeviceError if it is not here, or if torch has no tensors on it (a TPU).
    """
    found = _look(_ask(device), for_torch=True)
    name = torch_type(found.device.kind)
    if KINDS[found.device.kind].family == "cpu":
        return name  # there is one, and its tensors say "cpu"
    return f"{name}:{found.device.index}" if "index" in found.ask.model_fields_set else name


def get_tpu_safe_device(device: Name = None) -> torch.device:
    """`get_pytorch_device` as a torch.device. Raises: DeviceError as there; the CPU never stands in unasked."""
    return torch.device(get_pytorch_device(device))


def get_autocast_device(device: Name = None) -> str:
    """What `torch.autocast(device_type=...)` wants: "cuda", "cpu". Raises: DeviceError as `get_pytorch_device`."""
    return get_tpu_safe_device(device).type


def get_device_with_fallback(primary: Name = None, fallback: Name = "cpu") -> torch.device:
    """The first device if it is here, else the second, with a warning that says why.

    Raises: DeviceError if the second is not here either.
    """
    _ask(primary)  # a name that no device has is a mistake, not an absence
    try:
        return get_tpu_safe_device(primary)
    except DeviceError as error:
        instead = get_tpu_safe_device(fallback)
        # Python shows a warning once for each place in the program that causes it.
        warnings.warn(f"using {instead} instead: {error.what}; {error.why}", UserWarning, stacklevel=2)
        return instead


def safe_device_placement(tensor_or_model: M, target_device: Name = None) -> M:
    """A tensor or a model on a device that has been found to answer; a model is moved itself, as `.to` does.

    Raises: DeviceError as `get_pytorch_device`. An error of the move itself (no memory) is torch's own.
    """
    return tensor_or_model.to(get_tpu_safe_device(target_device))


def get_inference_context(device: Name = None) -> torch.no_grad | torch.inference_mode:
    """No gradients: `torch.inference_mode`, or `torch.no_grad` on devices that torch does not run itself (TPUs).

    A tensor made under inference mode has no version counter, so neither autograd nor a tracer can take it up later.
    A named kind need not be here: `get_inference_context("tpu")` says what would be used.
    Raises: DeviceError if no device is named and none answers.
    """
    ask = _ask(device)
    kinds = kinds_meant(_complete(ask).kind)
    kind = kinds[0] if len(kinds) == 1 else _look(ask, for_torch=False).device.kind
    return torch.inference_mode() if open_backend(kind).engine == "torch" else torch.no_grad()


@overload
def tpu_compatible_inference_mode(function: F) -> F: ...
@overload
def tpu_compatible_inference_mode(function: Name = None) -> torch.no_grad | torch.inference_mode: ...
def tpu_compatible_inference_mode(function: Any = None) -> Any:
    """`get_inference_context` as a decorator: `@tpu_compatible_inference_mode`; the device is looked up at each call.

    With the name of a device, or nothing, it is that context: `with tpu_compatible_inference_mode("tpu"):`.
    """
    if not callable(function):
        return get_inference_context(function)

    @functools.wraps(function)
    def without_gradients(*args: Any, **kwargs: Any) -> Any:
        return get_inference_context()(function)(*args, **kwargs)

    return without_gradients


def initialize_tpu_context() -> Device:
    """The first TPU, after it has computed something. Raises: DeviceError if none answers, with the reason."""
    return _look(HardwareAsk(kind="tpu"), for_torch=False).device


def ensure_tpu_initialization(device: Name = "tpu") -> bool:
    """Whether a TPU is meant and answers. A question: no TPU is no error here."""
    ask = _ask(device)
    if any(KINDS[kind].family != "tpu" for kind in kinds_meant(_complete(ask).kind)):
        return False
    try:
        _look(ask, for_torch=False)
    except DeviceError:
        return False
    return True


def _ask(device: Name) -> HardwareAsk:
    """What was said, and no more: what is left out stays open for the environment."""
    if device is None:
        return HardwareAsk()
    if isinstance(device, int) and not isinstance(device, bool) and device >= 0:
        return HardwareAsk(index=device)
    kind, index = parse_device(str(device))
    return HardwareAsk(kind=kind) if index is None else HardwareAsk(kind=kind, index=index)


def _complete(ask: HardwareAsk) -> HardwareAsk:
    return read_settings().over(ask)[0]


def _look(ask: HardwareAsk, *, for_torch: bool) -> Found:
    complete = _complete(ask)
    named_only = complete.kind in KINDS and KINDS[complete.kind].yields_to is not None
    return find(ask, inventory=None if named_only else _machine(complete.simulate_tpu), training=for_torch)


@functools.cache
def _machine(simulate_tpu: bool) -> Inventory:
    """Everything here, looked at once: these helpers are called in the middle of models."""
    return detect(simulate_tpu=simulate_tpu)

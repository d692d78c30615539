"""What torch needs besides a dtype to compute in few bits, by the device of the tensors: autocast around an
autograd.Function, a gradient scaler, and the driver's current device around a kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from pantheraml.hardware.placement import Name, get_autocast_device


def custom_fwd(forward: Callable[..., Any] | None = None, *, cast_inputs: torch.dtype | None = None) -> Callable[..., Any]:
    """`torch.amp.custom_fwd` for the device of the first tensor, so that one Function serves every device.

    Goes around `forward` of a torch.autograd.Function, as `@custom_fwd` or `@custom_fwd(cast_inputs=torch.float32)`.

    Args:
        cast_inputs: under autocast, floating tensors come in as this dtype, and autocast is off inside.
    Raises: ValueError when it is called without a tensor.
    """
    if forward is None:
        return functools.partial(custom_fwd, cast_inputs=cast_inputs)

    @functools.wraps(forward)
    def cast_forward(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        device_type = _device_type(args, kwargs)
        return torch.amp.custom_fwd(forward, device_type=device_type, cast_inputs=cast_inputs)(ctx, *args, **kwargs)

    return cast_forward


def custom_bwd(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.amp.custom_bwd` for the device of the first gradient: autocast as it was in a forward with `custom_fwd`.

    Raises: ValueError when it is called without a tensor.
    """

    @functools.wraps(backward)
    def cast_backward(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        return torch.amp.custom_bwd(backward, device_type=_device_type(args, kwargs))(ctx, *args, **kwargs)

    return cast_backward


def get_grad_scaler(dtype: torch.dtype | str, device: Name = None) -> torch.amp.GradScaler | None:
    """A gradient scaler for float16, whose gradients would underflow to zero; None for every other dtype.

    Args:
        dtype: the one that autocast computes in, "float16" or torch.float16.
        device: as in `get_pytorch_device`; only asked for where a scaler is needed.
    Raises: DeviceError if the device is not here.
    """
    if str(dtype).removeprefix("torch.") != "float16":
        return None
    return torch.amp.GradScaler(get_autocast_device(device))


def torch_device_context(where: torch.Tensor | torch.device) -> AbstractContextManager[object]:
    """The device of a tensor as the driver's current one, for kernels that are launched on the current device (Triton).

    Does nothing where a driver has no current device (CPU), or where the device has no index and so is the current one.
    """
    device = where.device if isinstance(where, torch.Tensor) else where
    # torch has a module for each kind of device; those with a current device have this context in it.
    enter = getattr(torch.get_device_module(device), "device", None)
    return nullcontext() if enter is None or device.index is None else enter(device.index)


def _device_type(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    for each in (*args, *kwargs.values()):
        if isinstance(each, torch.Tensor):
            return each.device.type
    raise ValueError("none of the arguments is a tensor, so there is no device to go by")

"""What the machine is. The only room that may name a device.

Importing it imports no torch; each name brings its file when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pantheraml.hardware.failures import classify as classify
    from pantheraml.hardware.placement import ensure_tpu_initialization as ensure_tpu_initialization
    from pantheraml.hardware.placement import get_autocast_device as get_autocast_device
    from pantheraml.hardware.placement import get_device_with_fallback as get_device_with_fallback
    from pantheraml.hardware.placement import get_inference_context as get_inference_context
    from pantheraml.hardware.placement import get_pytorch_device as get_pytorch_device
    from pantheraml.hardware.placement import get_tpu_safe_device as get_tpu_safe_device
    from pantheraml.hardware.placement import initialize_tpu_context as initialize_tpu_context
    from pantheraml.hardware.placement import safe_device_placement as safe_device_placement
    from pantheraml.hardware.placement import tpu_compatible_inference_mode as tpu_compatible_inference_mode
    from pantheraml.hardware.precision import custom_bwd as custom_bwd
    from pantheraml.hardware.precision import custom_fwd as custom_fwd
    from pantheraml.hardware.precision import get_grad_scaler as get_grad_scaler
    from pantheraml.hardware.precision import torch_device_context as torch_device_context
    from pantheraml.hardware.recovery import TPUErrorHandler as TPUErrorHandler
    from pantheraml.hardware.recovery import handle_device_oom as handle_device_oom

_HOMES = {
    "get_pytorch_device": "placement",
    "get_autocast_device": "placement",
    "get_tpu_safe_device": "placement",
    "safe_device_placement": "placement",
    "get_device_with_fallback": "placement",
    "get_inference_context": "placement",
    "tpu_compatible_inference_mode": "placement",
    "initialize_tpu_context": "placement",
    "ensure_tpu_initialization": "placement",
    "custom_fwd": "precision",
    "custom_bwd": "precision",
    "get_grad_scaler": "precision",
    "torch_device_context": "precision",
    "handle_device_oom": "recovery",
    "TPUErrorHandler": "recovery",
    "classify": "failures",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

"""What the machine is. The only room that may name a device.

Importing it imports no torch; each name brings its file when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pantheraml.lazy import homes

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
    "get_pytorch_device": "pantheraml.hardware.placement",
    "get_autocast_device": "pantheraml.hardware.placement",
    "get_tpu_safe_device": "pantheraml.hardware.placement",
    "safe_device_placement": "pantheraml.hardware.placement",
    "get_device_with_fallback": "pantheraml.hardware.placement",
    "get_inference_context": "pantheraml.hardware.placement",
    "tpu_compatible_inference_mode": "pantheraml.hardware.placement",
    "initialize_tpu_context": "pantheraml.hardware.placement",
    "ensure_tpu_initialization": "pantheraml.hardware.placement",
    "custom_fwd": "pantheraml.hardware.precision",
    "custom_bwd": "pantheraml.hardware.precision",
    "get_grad_scaler": "pantheraml.hardware.precision",
    "torch_device_context": "pantheraml.hardware.precision",
    "handle_device_oom": "pantheraml.hardware.recovery",
    "TPUErrorHandler": "pantheraml.hardware.recovery",
    "classify": "pantheraml.hardware.failures",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll] - it cannot count them; the table is the one list of the names
__getattr__, __dir__ = homes(__name__, _HOMES)

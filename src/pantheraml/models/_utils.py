"""The torch helpers under the path from which existing programs import them; their home is pantheraml.hardware."""

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

# Their names in Unsloth.
torch_amp_custom_fwd = custom_fwd
torch_amp_custom_bwd = custom_bwd

"""Several devices at once, under the names that users know. Each name brings its file when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pantheraml.lazy import homes

if TYPE_CHECKING:
    from pantheraml.distributed.device_map import balanced_device_map as balanced_device_map
    from pantheraml.distributed.multi_gpu import DistributedState as DistributedState
    from pantheraml.distributed.multi_gpu import MultiGPUConfig as MultiGPUConfig
    from pantheraml.distributed.multi_gpu import cleanup_distributed_training as cleanup_distributed_training
    from pantheraml.distributed.multi_gpu import cleanup_multi_gpu as cleanup_multi_gpu
    from pantheraml.distributed.multi_gpu import get_rank as get_rank
    from pantheraml.distributed.multi_gpu import get_world_size as get_world_size
    from pantheraml.distributed.multi_gpu import is_main_process as is_main_process
    from pantheraml.distributed.multi_gpu import setup_distributed_training as setup_distributed_training
    from pantheraml.distributed.multi_gpu import setup_multi_gpu as setup_multi_gpu
    from pantheraml.distributed.multi_tpu import MultiTPUConfig as MultiTPUConfig
    from pantheraml.distributed.multi_tpu import cleanup_multi_tpu as cleanup_multi_tpu
    from pantheraml.distributed.multi_tpu import get_tpu_device as get_tpu_device
    from pantheraml.distributed.multi_tpu import get_tpu_memory_info as get_tpu_memory_info
    from pantheraml.distributed.multi_tpu import get_tpu_status as get_tpu_status
    from pantheraml.distributed.multi_tpu import setup_multi_tpu as setup_multi_tpu
    from pantheraml.distributed.multi_tpu import synchronize_tpu as synchronize_tpu
    from pantheraml.distributed.tpu_config import TPUConfigManager as TPUConfigManager
    from pantheraml.distributed.tpu_config import cleanup_tpu_training as cleanup_tpu_training
    from pantheraml.distributed.tpu_config import setup_tpu_training as setup_tpu_training
    from pantheraml.distributed.tpu_memory import TPUMemoryManager as TPUMemoryManager
    from pantheraml.distributed.tpu_memory import optimize_tpu_memory as optimize_tpu_memory
    from pantheraml.hardware.recovery import TPUErrorHandler as TPUErrorHandler

_HOMES = {
    "balanced_device_map": "pantheraml.distributed.device_map",
    "DistributedState": "pantheraml.distributed.multi_gpu",
    "MultiGPUConfig": "pantheraml.distributed.multi_gpu",
    "cleanup_distributed_training": "pantheraml.distributed.multi_gpu",
    "cleanup_multi_gpu": "pantheraml.distributed.multi_gpu",
    "get_rank": "pantheraml.distributed.multi_gpu",
    "get_world_size": "pantheraml.distributed.multi_gpu",
    "is_main_process": "pantheraml.distributed.multi_gpu",
    "setup_distributed_training": "pantheraml.distributed.multi_gpu",
    "setup_multi_gpu": "pantheraml.distributed.multi_gpu",
    "MultiTPUConfig": "pantheraml.distributed.multi_tpu",
    "cleanup_multi_tpu": "pantheraml.distributed.multi_tpu",
    "get_tpu_device": "pantheraml.distributed.multi_tpu",
    "get_tpu_memory_info": "pantheraml.distributed.multi_tpu",
    "get_tpu_status": "pantheraml.distributed.multi_tpu",
    "setup_multi_tpu": "pantheraml.distributed.multi_tpu",
    "synchronize_tpu": "pantheraml.distributed.multi_tpu",
    "TPUConfigManager": "pantheraml.distributed.tpu_config",
    "cleanup_tpu_training": "pantheraml.distributed.tpu_config",
    "setup_tpu_training": "pantheraml.distributed.tpu_config",
    "TPUMemoryManager": "pantheraml.distributed.tpu_memory",
    "optimize_tpu_memory": "pantheraml.distributed.tpu_memory",
    "TPUErrorHandler": "pantheraml.hardware.recovery",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll] - it cannot count them; the table is the one list of the names
__getattr__, __dir__ = homes(__name__, _HOMES)

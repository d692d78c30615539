"""Several devices at once, under the names that users know. Each name brings its file when it is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pantheraml.distributed.multi_tpu import MultiTPUConfig as MultiTPUConfig
    from pantheraml.distributed.multi_tpu import cleanup_multi_tpu as cleanup_multi_tpu
    from pantheraml.distributed.multi_tpu import get_tpu_device as get_tpu_device
    from pantheraml.distributed.multi_tpu import get_tpu_memory_info as get_tpu_memory_info
    from pantheraml.distributed.multi_tpu import get_tpu_status as get_tpu_status
    from pantheraml.distributed.multi_tpu import setup_multi_tpu as setup_multi_tpu
    from pantheraml.distributed.multi_tpu import synchronize_tpu as synchronize_tpu

_NAMES = (
    "MultiTPUConfig",
    "cleanup_multi_tpu",
    "get_tpu_device",
    "get_tpu_memory_info",
    "get_tpu_status",
    "setup_multi_tpu",
    "synchronize_tpu",
)
__all__ = [*_NAMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'pantheraml.distributed' has no attribute {name!r}")
    return getattr(import_module("pantheraml.distributed.multi_tpu"), name)

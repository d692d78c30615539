"""Training runs: the main path (run.py), the loop, the losses, checkpoints, and what people see."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pantheraml.api import PantheraMLTPUTrainer as PantheraMLTPUTrainer


def __getattr__(name: str) -> Any:
    if name != "PantheraMLTPUTrainer":  # users import it from here; it stands beside Trainer
        raise AttributeError(f"module 'pantheraml.trainer' has no attribute {name!r}")
    return import_module("pantheraml.api").PantheraMLTPUTrainer

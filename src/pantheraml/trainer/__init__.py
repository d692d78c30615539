"""Training runs: the main path (run.py), the loop, the losses, checkpoints, and what people see."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pantheraml.lazy import homes

if TYPE_CHECKING:
    from pantheraml.api import PantheraMLDistributedTrainer as PantheraMLDistributedTrainer
    from pantheraml.api import PantheraMLTPUTrainer as PantheraMLTPUTrainer

# Users import them from here; they stand beside Trainer.
__getattr__, __dir__ = homes(__name__, {"PantheraMLDistributedTrainer": "pantheraml.api", "PantheraMLTPUTrainer": "pantheraml.api"})

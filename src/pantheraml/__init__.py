"""Fine-tune and run language models on whatever hardware is there.

    import pantheraml

    run = pantheraml.train("Qwen/Qwen3-0.6B", "examples.jsonl")
    print(run.chat("hi"))
    run.export("gguf")

Importing this imports no torch, changes no other module and sets nothing; each name brings its room when it is used.
The shape of the API comes from Unsloth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pantheraml.lazy import homes

if TYPE_CHECKING:
    from pantheraml.api import FastLanguageModel as FastLanguageModel
    from pantheraml.api import PantheraMLDistributedTrainer as PantheraMLDistributedTrainer
    from pantheraml.api import PantheraMLTPUTrainer as PantheraMLTPUTrainer
    from pantheraml.api import Trainer as Trainer
    from pantheraml.api import TrainingArguments as TrainingArguments
    from pantheraml.api import plan as plan
    from pantheraml.api import resume as resume
    from pantheraml.api import train as train
    from pantheraml.distributed.multi_gpu import MultiGPUConfig as MultiGPUConfig
    from pantheraml.engines.xla_optimizer import XLAOptimizer as XLAOptimizer
    from pantheraml.errors import PantheraError as PantheraError
    from pantheraml.manager import DeviceManager as DeviceManager
    from pantheraml.manager import get_device_manager as get_device_manager
    from pantheraml.recipe.types import Recipe as Recipe
    from pantheraml.trainer.runs import Run as Run

__version__ = "0.1.0"

_HOMES = {
    "FastLanguageModel": "pantheraml.api",
    "PantheraMLDistributedTrainer": "pantheraml.api",
    "PantheraMLTPUTrainer": "pantheraml.api",
    "Trainer": "pantheraml.api",
    "TrainingArguments": "pantheraml.api",
    "plan": "pantheraml.api",
    "resume": "pantheraml.api",
    "train": "pantheraml.api",
    "MultiGPUConfig": "pantheraml.distributed.multi_gpu",
    "DeviceManager": "pantheraml.manager",
    "get_device_manager": "pantheraml.manager",
    "XLAOptimizer": "pantheraml.engines.xla_optimizer",
    "PantheraError": "pantheraml.errors",
    "Recipe": "pantheraml.recipe.types",
    "Run": "pantheraml.trainer.runs",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll] - it cannot count them; the table is the one list of the names
__getattr__, __dir__ = homes(__name__, _HOMES)

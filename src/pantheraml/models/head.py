"""How a causal language model ends: which matrix makes the logits, and what its family does to them.

With that known, the loss is computed from the last hidden states without building the logits of a whole batch.
A model that is not known well enough keeps its own forward, logits and all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class Head:
    """logits = softcap * tanh(scale * (backbone(x) @ weight.T + bias) / softcap).

    Attributes:
        backbone: gives the last hidden states.
        linear: holds weight [V, D] and, rarely, a bias [V].
        scale, softcap: 1.0 and None for most families.
    """

    backbone: nn.Module
    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None


_Facts = Callable[[Any], tuple[float, float | None]]


def _plain(config: Any) -> tuple[float, float | None]:
    return 1.0, None


def _softcapped(config: Any) -> tuple[float, float | None]:
    return 1.0, config.final_logit_softcapping


# model_type -> (scale, softcap) from the configuration, read off each family's forward in transformers 5.23.
FAMILIES: dict[str, _Facts] = {
    "llama": _plain,
    "mistral": _plain,
    "gemma": _plain,
    "gemma2": _softcapped,
    "gemma3_text": _softcapped,
    "qwen2": _plain,
    "qwen3": _plain,
    "granite": lambda config: (1.0 / config.logits_scaling, None),
    "cohere": lambda config: (config.logit_scale, None),
    "cohere2": lambda config: (config.logit_scale, None),
    "falcon_h1": lambda config: (config.lm_head_multiplier, None),
    "phi3": _plain,
}


def causal_model(model: Any) -> Any:
    """The Hugging Face model inside a PEFT one; any other as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def output_head(model: Any) -> Head | None:
    """The head of a model whose family is known; None: use its own forward.

    None also where the plain matrix would not be the whole truth: an adapter on the head itself, or learned prompts.
    """
    from torch import nn

    causal = causal_model(model)
    facts = FAMILIES.get(str(causal.config.model_type))
    linear = causal.get_output_embeddings()
    prompts = any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())
    if facts is None or prompts or type(linear) is not nn.Linear or any(True for _ in linear.children()):
        return None
    scale, softcap = facts(causal.config)
    return Head(getattr(causal, causal.base_model_prefix), linear, float(scale), softcap)

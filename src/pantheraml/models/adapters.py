"""Low-rank adapters (LoRA, RSLoRA, DoRA) on a model, through PEFT; the base is frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pantheraml.errors import RecipeError
from pantheraml.recipe.types import LoRA

if TYPE_CHECKING:
    from peft import PeftModel

ALL_LINEAR = "all-linear"


def linear_names(model: Any) -> list[str]:
    """The last names of all linear layers but the output head: what `all-linear` stands for."""
    from torch import nn

    head = model.get_output_embeddings()
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        owner, _, last = name.rpartition(".")
        # Mamba layers use the weights of out_proj in a fused kernel, past any adapter on it; PEFT refuses it too.
        bypassed = last == "out_proj" and hasattr(model.get_submodule(owner), "conv1d")
        if isinstance(module, nn.Linear) and module is not head and not bypassed:
            found[last] = None
    return list(found)


def attach(model: Any, spec: LoRA, *, seed: int) -> PeftModel:
    """The model with a new adapter that changes nothing yet: float32, A drawn from `seed`, B = 0.

    Raises: RecipeError if the targets name no linear layer.
    """
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    linears = linear_names(model)
    targets = linears if spec.targets == (ALL_LINEAR,) else list(spec.targets)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=spec.rank,
        lora_alpha=spec.alpha,  # pyright: ignore[reportArgumentType] - PEFT takes fractions
        lora_dropout=spec.dropout,
        target_modules=targets,
        use_rslora=spec.rslora,
        use_dora=spec.dora,
    )
    try:
        with torch.random.fork_rng():  # the caller's random numbers stay as they are
            torch.manual_seed(seed)
            return get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(
            f"adapter.targets={', '.join(spec.targets)} cannot be used on this model",
            why=str(error).splitlines()[0],
            fix=f"leave adapter.targets out for all linear layers, or choose from {', '.join(linears)}",
        ) from error

"""Low-rank adapters (LoRA, RSLoRA, DoRA) on a model, through PEFT; the base is frozen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantheraml.errors import RecipeError
from pantheraml.recipe.types import LoRA

if TYPE_CHECKING:
    from peft import PeftModel

ALL_LINEAR = "all-linear"


def linear_names(model: Any) -> list[str]:
    """The last names of all linear layers but the output head: what `all-linear` stands for."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, its weight the other way round

    head = model.get_output_embeddings()
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        owner, _, last = name.rpartition(".")
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not bypassed(model.get_submodule(owner), last):
            found[last] = None
    return list(found)


def add_adapter(model: Any, name: str, folder: Path) -> PeftModel:
    """The model with an adapter that was trained before, beside those that it has. name: in the model, without dots.

    Raises: RecipeError if it does not fit.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name=name)
            return model.eval()
        return PeftModel.from_pretrained(model, str(folder), adapter_name=name).eval()
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, SafetensorError) as error:
        raise RecipeError(
            f"the adapter {folder} does not go onto this model",
            why=(str(error).strip() or type(error).__name__).splitlines()[0],
            fix="name an adapter that was trained on the same base",
        ) from error


def bypassed(owner: Any, name: str) -> bool:
    """Whether a layer's weight is read past its forward: Mamba layers give that of out_proj to a fused kernel. PEFT refuses it, too."""
    return name == "out_proj" and hasattr(owner, "conv1d")


def attach(model: Any, spec: LoRA, *, seed: int) -> PeftModel:
    """The model with a new adapter that changes nothing yet: float32, A drawn from `seed`, B = 0.

    Raises: RecipeError if a target names nothing in the model, or something that cannot be adapted.
    """
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers.pytorch_utils import Conv1D

    linears = linear_names(model)
    targets = linears if spec.targets == (ALL_LINEAR,) else list(spec.targets)
    # PEFT is content if one of the names is found, and a typo in the others would go unseen.
    found = {target for target in targets for name, _ in model.named_modules() if f".{name}".endswith(f".{target}")}
    if absent := [target for target in targets if target not in found]:
        raise RecipeError(
            f"adapter.targets: this model has no {', '.join(absent)}",
            why="the adapter would be on less than you asked for",
            fix=_remedy(linears),
        )
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=spec.rank,
        lora_alpha=spec.alpha,  # pyright: ignore[reportArgumentType] - PEFT takes fractions
        lora_dropout=spec.dropout,
        target_modules=targets,
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    try:
        with torch.random.fork_rng(devices=()):  # the caller's random numbers stay as they are; PEFT draws on the CPU
            torch.default_generator.manual_seed(seed)
            return get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(
            f"adapter.targets={', '.join(spec.targets)} cannot be used on this model",
            why=str(error).splitlines()[0],
            fix=_remedy(linears),
        ) from error


def _remedy(linears: list[str]) -> str:
    return f"leave adapter.targets out for all linear layers, or choose from {', '.join(linears)}"

"""Whether a model keeps the examples of a packed row apart, tried on the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pantheraml.recipe.kinds import in_host_memory

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE_TOKENS = 12
# Relative differences of the logits. Alone or packed are other shapes, and round otherwise: about 1e-6 in float32, and up to
# 6e-2 in bfloat16 (mixtures of experts). Another example in front is the same shape: 0, or 1e-6 where experts regroup.
# A state space at its initial weights leaks as little as 2e-3 in float32 and 7e-3 in bfloat16, measured on Falcon-H1.
ALONE = {"float32": 1e-3, "bfloat16": 1e-1, "float16": 5e-2}
IN_FRONT = {"float32": 1e-4, "bfloat16": 3e-3, "float16": 1e-3}


def keeps_apart(model: Any) -> bool:
    """True if an example gets the same logits alone and behind any other in its row, told apart by positions only."""
    import torch

    embedding = model.get_input_embeddings().weight
    rows, device = embedding.shape[0], embedding.device
    # Fixed tokens, spread over the vocabulary: no generator is touched.
    tokens = (torch.arange(3 * EXAMPLE_TOKENS, device=device) * 7919 + 13) % rows
    first, second, example = tokens.split(EXAMPLE_TOKENS)
    positions = torch.arange(EXAMPLE_TOKENS, device=device)

    def logits(*row: Tensor) -> Tensor:
        """Of the last example of the row."""
        ids, restarted = torch.cat(row)[None], positions.repeat(len(row))[None]
        return model(input_ids=ids, position_ids=restarted, use_cache=False).logits[0, -EXAMPLE_TOKENS:].float()

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _there(model, device.type):
            alone, behind, behind_another = logits(example), logits(first, example), logits(second, example)
    finally:
        model.train(was_training)
    size, dtype = alone.norm().clamp_min(1e-30), str(model.dtype).removeprefix("torch.")
    return float((behind - alone).norm() / size) <= ALONE[dtype] and float((behind - behind_another).norm() / size) <= IN_FRONT[dtype]


@contextmanager
def _there(model: Any, type: str) -> Iterator[None]:
    """Within the block the model computes where it lies. In ordinary memory flash_attention_2 does not; plain attention gets the same positions."""
    config, asked = model.config, model.config._attn_implementation
    if asked == "flash_attention_2" and in_host_memory(type):
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = asked

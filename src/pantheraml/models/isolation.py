"""Whether a model keeps the examples of a packed row apart, tried on the model itself."""

from __future__ import annotations

from typing import Any

EXAMPLE_TOKENS = 12
# Relative difference of the logits. Rounding gives about 1e-6 in float32 and 1e-2 in bfloat16; seeing the other
# example gives about 1.
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1, "float16": 5e-2}


def keeps_apart(model: Any) -> bool:
    """True if an example gets the same logits alone and behind another one in its row, told apart by positions only."""
    import torch

    embedding = model.get_input_embeddings().weight
    rows, device = embedding.shape[0], embedding.device
    # Fixed tokens, spread over the vocabulary: no generator is touched.
    tokens = (torch.arange(2 * EXAMPLE_TOKENS, device=device) * 7919 + 13) % rows
    restarted = torch.arange(EXAMPLE_TOKENS, device=device).repeat(2)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed = model(input_ids=tokens[None], position_ids=restarted[None], use_cache=False).logits[0, EXAMPLE_TOKENS:].float()
            alone = model(input_ids=tokens[None, EXAMPLE_TOKENS:], position_ids=restarted[None, EXAMPLE_TOKENS:], use_cache=False).logits[0]
    finally:
        model.train(was_training)
    difference = (packed - alone.float()).norm() / alone.float().norm().clamp_min(1e-30)
    return float(difference) <= TOLERANCE[str(model.dtype).removeprefix("torch.")]

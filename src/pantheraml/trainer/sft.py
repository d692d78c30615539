"""Supervised fine-tuning: the sum of the token losses of the labelled tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pantheraml.models.head import Head, hidden_states, output_head

if TYPE_CHECKING:
    from torch import Tensor

    from pantheraml.engines.engine import LossFn, MicroTensors


def sft_loss(model: Any, linear_cross_entropy: Callable[..., Tensor]) -> LossFn:
    """The loss for this model: from its last hidden states where its head is known, else from its own logits."""
    head = output_head(model)
    if head is None:
        return stock_loss

    def from_hidden(_: Any, batch: MicroTensors) -> Tensor:
        return head_loss(head, batch, linear_cross_entropy)

    return from_hidden


def head_loss(head: Head, batch: MicroTensors, linear_cross_entropy: Callable[..., Tensor]) -> Tensor:
    """Sum of the token losses without the logits of the whole batch."""
    hidden_BTD = hidden_states(head, batch.input_ids, batch.position_ids)
    return linear_cross_entropy(
        hidden_BTD.flatten(0, 1).index_select(0, batch.labelled),
        head.linear.weight,
        batch.labels.flatten().index_select(0, batch.labelled),
        bias_V=head.linear.bias,
        scale=head.scale,
        softcap=head.softcap,
    )


def stock_loss(model: Any, batch: MicroTensors) -> Tensor:
    """Sum of the token losses from the model's own forward; for any causal language model."""
    from torch.nn import functional as F

    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=-100, reduction="sum")

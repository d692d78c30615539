"""Supervised fine-tuning: the sum of the token losses of the labelled tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pantheraml.engines.engine import MicroTensors, RowTensors
from pantheraml.kernels.linear_cross_entropy import linear_cross_entropy
from pantheraml.models.decoder import Decoder, decodes
from pantheraml.models.head import Head, output_head
from pantheraml.planning.memory import loss_chunk

if TYPE_CHECKING:
    from torch import Tensor

    from pantheraml.engines.engine import LossFn


def sft_loss(model: Any, decoder: Decoder | None = None, *, static: bool = False) -> LossFn:
    """The loss for this model: by the kernels where its layers are known, from its own hidden states where its head is, else from its logits.

    Args:
        decoder: what computes the layers; None: one is made, where the kernels can.
        static: each new shape costs a compilation, so none is made: attention by the kernels goes by the lengths of the examples.
    """
    head = output_head(model)
    if head is None:
        return stock_loss
    if decoder is None and not static and decodes(model) is None:
        decoder = Decoder(model)

    def from_hidden(_: Any, batch: RowTensors) -> Tensor:
        if decoder is not None and isinstance(batch, MicroTensors):
            return head_loss(head, decoder.hidden(batch), batch)
        return head_loss(head, hidden_states(head, batch), batch)

    return from_hidden


def head_loss(head: Head, hidden: Tensor, batch: RowTensors) -> Tensor:
    """Sum of the token losses without the logits of the whole batch. hidden: of the labelled tokens [N, D], or of all [B, T, D]."""
    return linear_cross_entropy(
        hidden,
        head.linear.weight,
        batch.labels.flatten().index_select(0, batch.labelled) if isinstance(batch, MicroTensors) else batch.labels,
        bias_V=head.linear.bias,
        scale=head.scale,
        softcap=head.softcap,
        chunk=loss_chunk(len(head.linear.weight), hidden.element_size()),
    )


def hidden_states(head: Head, batch: RowTensors) -> Tensor:
    """[labelled tokens, D] after the last norm, by the model's own forward; of rows alone [B, T, D]."""
    assert not (isinstance(batch, MicroTensors) and batch.cp), "attention of the model's own would see a part of the tokens"
    hidden_BTD = head.backbone(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state
    return hidden_BTD.flatten(0, 1).index_select(0, batch.labelled) if isinstance(batch, MicroTensors) else hidden_BTD


def stock_loss(model: Any, batch: RowTensors) -> Tensor:
    """Sum of the token losses from the model's own forward; for any causal language model."""
    from torch.nn import functional as F

    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=-100, reduction="sum")

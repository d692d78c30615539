"""Cross entropy of rows of logits, whose gradient takes the place of the logits. Letters: C rows, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from pantheraml.kernels.operations import wide


def reference(logits_CV: Tensor, labels_C: Tensor, scale: float, softcap: float, gradient: bool) -> Tensor:
    """The loss of each row, float32 [C]; with `gradient` the logits are overwritten by d loss / d logits, in their dtype.

    z = softcap * tanh(scale * logits / softcap), or scale * logits where softcap is 0; loss = logsumexp(z) - z[label].
    A label of -100 has no loss and no gradient. Called inside linear_cross_entropy, which has the autograd.
    """
    z = logits_CV.to(wide(logits_CV)) * scale
    if softcap:
        z = torch.tanh(z / softcap) * softcap
    counts = labels_C >= 0
    label_C1 = labels_C.clamp_min(0)[:, None]
    lse_C = torch.logsumexp(z, -1)
    loss_C = torch.where(counts, lse_C - z.gather(1, label_C1).squeeze(1), 0.0)
    if gradient:
        grad = torch.exp(z - lse_C[:, None])
        grad.scatter_add_(1, label_C1, grad.new_full(label_C1.shape, -1.0))
        if softcap:
            grad *= 1 - (z / softcap).square()
        logits_CV.copy_(grad.mul_(counts[:, None] * scale))
    return loss_C


def shapes(logits_CV: Tensor, labels_C: Tensor, scale: float, softcap: float, gradient: bool) -> Tensor:
    """An empty tensor like that of `reference`, which writes."""
    return logits_CV.new_empty(logits_CV.shape[0], dtype=wide(logits_CV))

"""Output head and cross entropy as one operation that never holds the logits of a whole batch.

Letters: D hidden, V vocabulary, N labelled tokens, C tokens of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from pantheraml.kernels.operations import ops


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int = 1024,
) -> Tensor:
    """Sum of the token losses, holding the logits of one chunk of labelled tokens at a time.

    logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), loss = logsumexp(logits) - logits[label].
    The gradients of a chunk are computed in forward, while its logits are there; backward only scales them.

    Args:
        hidden_ND: last hidden states of the labelled tokens alone, any float dtype. Which they are is known on the host;
            to look for them here would wait for the device.
        weight_VD: output embedding. Gradients flow to it only if it requires them.
        labels_N: token ids, already shifted. -100 counts for nothing, and is computed all the same.
        bias_V: added to the logits before the scale.
        scale: factor of the logits (Granite, Cohere, Falcon-H1).
        softcap: bound of the logits (Gemma 2); None: none.
        chunk: labelled tokens a block, at most; extra memory is the logits of one chunk in their dtype, and in float32
            beside them on a device without a kernel of its own.
    Returns: scalar float32, the sum over the N tokens; 0 where there are none.
    Source: the idea of arXiv 2411.09009 (never materialise the logits), here in plain torch.
    """
    if has_torch_function_unary(hidden_ND):  # a tensor that is not torch's own, or whoever traces this, may have another way
        how: dict[str, Any] = {"bias_V": bias_V, "scale": scale, "softcap": softcap, "chunk": chunk}
        traced: Tensor = handle_torch_function(linear_cross_entropy, (hidden_ND,), hidden_ND, weight_VD, labels_N, **how)
        return traced
    kind = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_VD.dtype
    if not torch.is_grad_enabled():  # autograd.Function cannot see this, and would compute gradients for nobody
        weight_VD, bias_V = weight_VD.detach(), None if bias_V is None else bias_V.detach()
    result: Tensor = _LinearCrossEntropy.apply(hidden_ND.to(dtype), weight_VD, bias_V, labels_N, scale, softcap, chunk, dtype)
    return result


def _even(tokens: int, chunk: int) -> int:
    """A size of at most `chunk` that makes as many chunks, about equal; a multiple of 64 unless that is more than `chunk`."""
    parts = -(-tokens // chunk)
    return min(chunk, -(-tokens // parts // 64) * 64) if parts > 1 else chunk


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        scale: float,
        softcap: float | None,
        chunk: int,
        dtype: torch.dtype,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        weight = weight_VD.to(dtype)
        bias = None if bias_V is None else bias_V.to(dtype)
        # float32: in bfloat16, 256 + 1 == 256, so a long sum would stop counting tokens.
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND) if need_hidden else None
        grad_weight = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device) if need_weight else None
        grad_bias = torch.zeros(weight_VD.shape[0], dtype=torch.float32, device=weight_VD.device) if need_bias else None

        # The chunks' products are in `dtype` by hand; autocast would cast them once more.
        with torch.autocast(hidden_ND.device.type, enabled=False):
            chunk = _even(len(hidden_ND), chunk)
            # One for all chunks: fresh memory costs a sixth of the product on a CPU.
            room_CV = hidden_ND.new_empty(min(chunk, len(hidden_ND)), len(weight))
            for start in range(0, len(hidden_ND), chunk):
                hidden_CD, labels_C = hidden_ND[start : start + chunk], labels_N[start : start + chunk]
                logits_CV = room_CV[: len(hidden_CD)]
                if bias is None:
                    torch.mm(hidden_CD, weight.T, out=logits_CV)
                else:
                    torch.addmm(bias, hidden_CD, weight.T, out=logits_CV)
                needed = need_hidden or need_weight or need_bias
                total += ops.cross_entropy(logits_CV, labels_C, scale, softcap or 0.0, needed).sum()
                grad_CV = logits_CV  # their gradient has taken their place
                if grad_bias is not None:
                    grad_bias += grad_CV.sum(0, dtype=torch.float32)
                if grad_hidden is not None:
                    torch.matmul(grad_CV, weight, out=grad_hidden[start : start + chunk])
                if grad_weight is not None:
                    grad_weight += grad_CV.T @ hidden_CD
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.parameter_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad_total,) = grads
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            # A 0-d float32 factor does not widen the result, and is not rounded before the product.
            None if grad_hidden is None else grad_hidden * grad_total,
            None if grad_weight is None else (grad_weight * grad_total).to(ctx.parameter_dtype),
            None if grad_bias is None else (grad_bias * grad_total).to(ctx.parameter_dtype),
            None,
            None,
            None,
            None,
            None,
        )

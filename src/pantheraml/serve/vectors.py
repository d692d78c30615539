"""Texts as vectors by the model that is served: the mean of its last hidden states over all tokens, at length 1."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pantheraml.models.head import causal_model

BATCH_TOKENS = 2048
"""Of texts that go through the model at once, padding included."""


class Vectors:
    """The model a second time, in modules of its own with the same weights: nothing but the modules takes memory.

    Made before the model is given to a batcher, which changes layers while it works. One thread at a time.

    Args:
        model: a causal language model, or a PEFT model around it.
    """

    def __init__(self, model: Any) -> None:
        weights = {id(each): each for each in (*model.parameters(), *model.buffers())}
        self._model = copy.deepcopy(model, weights).eval()
        self._causal = causal_model(self._model)
        self.dimensions = int(self._causal.config.get_text_config().hidden_size)

    def embed(
        self, inputs: Sequence[Sequence[int]], *, adapter: str | None = None, gone: threading.Event | None = None
    ) -> NDArray[np.float32]:
        """The vector of each text, [N, D].

        Args:
            inputs: token ids, at least one each. adapter: of the PEFT model; None: the base.
            gone: nobody waits for them any more; what is left is then zeros.
        Raises: RuntimeError, of the device.
        """
        found = np.zeros((len(inputs), self.dimensions), np.float32)
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))  # those of like length together, so that little is padded
        with torch.no_grad(), self._adapted(adapter):
            while order and not (gone and gone.is_set()):
                width = len(inputs[order[-1]])
                rows = max(1, BATCH_TOKENS // width)
                batch, order = order[-rows:], order[:-rows]
                found[batch] = self._means([inputs[i] for i in batch], width)
        return found

    def _means(self, inputs: Sequence[Sequence[int]], width: int) -> NDArray[np.float32]:
        device = self._model.get_input_embeddings().weight.device
        ids_BT = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in inputs], device=device)
        mask_BT = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens in inputs], device=device)
        extra = {"use_cache": False} if hasattr(self._causal.config, "use_cache") else {}
        hidden_BTD = self._causal.base_model(input_ids=ids_BT, attention_mask=mask_BT, **extra).last_hidden_state.float()
        kept = mask_BT[..., None].to(hidden_BTD.dtype)
        means = (hidden_BTD * kept).sum(1) / kept.sum(1)
        return torch.nn.functional.normalize(means, dim=-1).cpu().numpy()

    def _adapted(self, adapter: str | None) -> AbstractContextManager[Any]:
        if not hasattr(self._model, "peft_config"):
            return nullcontext()
        if adapter is None:
            return self._model.disable_adapter()
        self._model.set_adapter(adapter)
        return nullcontext()

"""Any causal language model of Hugging Face as a source of frequencies, on the kind of device where they were made alone.

The last bits of floats depend on shapes, on the number of threads, on the processor and on versions of libraries. So each row is
computed alone, one token at a time, in both directions; and what else could differ is part of the fingerprint.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import blake3
import numpy as np

from pantheraml.errors import RecipeError
from pantheraml.hardware.backend import backend_of
from pantheraml.hardware.device import Device
from pantheraml.memory.container import NEURAL_FLOAT
from pantheraml.memory.record import Origin
from pantheraml.memory.shared import ID_BYTES
from pantheraml.memory.tokens import Tokens

if TYPE_CHECKING:
    import torch

TOTAL = 1 << 31
"""What the frequencies of a token come to, about."""


class FloatPredictor:
    """A `predictor.Predictor` for any causal language model, which is slow: no token waits for another row, and none is saved.

    Args:
        model: of Hugging Face. It is moved to the device. tokenizer: its own.
        context: tokens that it sees at most; None: 1024, or what the model can do if that is less.
    Raises: RecipeError if its tokenizer cannot hold any bytes, or it keeps nothing from token to token; DeviceError if torch has no
        such device.
    """

    number = NEURAL_FLOAT
    rows = 16
    """So many are read in turn; they share nothing."""

    def __init__(self, model: Any, tokenizer: Any, device: Device, *, context: int | None = None) -> None:
        backend = backend_of(device)
        self._place = backend.torch_device(device.index)
        self._model = model.to(self._place).eval()
        self._device = device
        config = model.config.get_text_config()
        vocabulary = int(model.get_output_embeddings().weight.shape[0])
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.tokens = Tokens.of(tokenizer.backend_tokenizer, begin=begin or 0, vocabulary=vocabulary)
        known = getattr(config, "max_position_embeddings", None) or 1024
        self.context = max(2, min(context or 1024, known))
        self._dtype = str(model.dtype).removeprefix("torch.")
        self.fingerprint = _weights_id(model, self.context) + _here_id(device, self._dtype)
        if next(iter(self.begin(1).memories)) is None:
            raise RecipeError(
                f"{config.model_type} cannot encode records",
                why="it keeps nothing from token to token, so that each would take the computation of all before it",
                fix="use a causal language model with a cache",
            )

    def origin(self, batch: int) -> Origin:
        """The device, and the dtype of the weights."""
        return Origin(kind=self._device.kind, name=self._device.label, dtype=self._dtype, batch=batch)

    def intervals(self, contents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Predictor.intervals`; one token after the other, as decoding does."""
        found = []
        for content in contents:
            state, said = self.begin(1), np.zeros((3, len(content)), np.int64)
            for place, token in enumerate(content.tolist()):
                ends = state.ends[0]
                said[:, place] = ends[token] - state.widths[0][token], state.widths[0][token], ends[-1]
                if place + 1 < len(content):
                    state.advance(np.array([token]))
            found.append(said)
        return found

    def begin(self, rows: int) -> FloatState:
        """See `Predictor.begin`."""
        return FloatState(self._model, self._place, rows, self.tokens.begin, self.context)


class FloatState:
    """See `predictor.State`.

    Attributes:
        widths, ends: int64 [V] of each row: the frequencies of its next token, and where each ends.
        memories: what the model keeps of each row.
    """

    def __init__(self, model: Any, place: torch.device, rows: int, begin: int, context: int) -> None:
        self._model, self._place, self._context = model, place, context
        self.memories: list[Any] = [None] * rows
        self._windows: list[list[int]] = [[] for _ in range(rows)]
        self.widths: list[np.ndarray] = []
        self.ends: list[np.ndarray] = []
        self.totals = np.zeros(0, np.int64)
        self.advance(np.full(rows, begin))

    def find(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `State.find`."""
        tokens = np.array([np.searchsorted(ends, target, side="right") for ends, target in zip(self.ends, targets, strict=True)])
        widths = np.array([each[token] for each, token in zip(self.widths, tokens, strict=True)])
        ends = np.array([each[token] for each, token in zip(self.ends, tokens, strict=True)])
        return tokens, ends - widths, widths

    def advance(self, tokens: np.ndarray) -> None:
        """See `State.advance`."""
        self.widths = [self._next(row, token) for row, token in enumerate(tokens.tolist())]
        self.ends = [each.cumsum() for each in self.widths]
        self.totals = np.array([each[-1] for each in self.ends])

    def keep(self, rows: Sequence[int]) -> None:
        """See `State.keep`."""
        self.memories, self._windows = [self.memories[row] for row in rows], [self._windows[row] for row in rows]
        self.widths, self.ends = [self.widths[row] for row in rows], [self.ends[row] for row in rows]
        self.totals = self.totals[list(rows)]

    def _next(self, row: int, token: int) -> np.ndarray:
        """The frequencies behind a token."""
        window = self._windows[row]
        if len(window) == self._context:
            window[:] = window[self._context // 2 :]
            self.memories[row] = None
            for each in window:
                self._logits(row, each)
        window.append(token)
        logits = self._logits(row, token)
        likely = np.exp(logits - logits.max())
        return (likely * ((TOTAL - len(likely)) / likely.sum())).astype(np.int64) + 1

    def _logits(self, row: int, token: int) -> np.ndarray:
        """float64 [V], on the host."""
        import torch

        with torch.inference_mode():
            said = self._model(
                input_ids=torch.tensor([[token]], device=self._place), past_key_values=self.memories[row], use_cache=True, return_dict=True
            )
        self.memories[row] = getattr(said, "past_key_values", None)
        return said.logits[0, -1].double().cpu().numpy()


def _weights_id(model: Any, context: int) -> bytes:
    import torch

    seen = blake3.blake3(json.dumps([model.config.to_json_string(), context]).encode())
    for name, value in sorted(model.state_dict().items()):
        seen.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        seen.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return seen.digest(ID_BYTES)


def _here_id(device: Device, dtype: str) -> bytes:
    """Everything beside the weights that the last bits may depend on."""
    import torch
    import transformers

    here = (device.kind, device.name, device.capability, dtype, torch.__version__, transformers.__version__, np.__version__)
    processor = (torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
    return blake3.blake3(repr((here, processor)).encode()).digest(ID_BYTES)

"""Texts as vectors by a language model on the device: the mean of its last hidden states."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from logging import getLogger
from typing import TYPE_CHECKING, Any

import blake3
import numpy as np

from pantheraml.errors import RecipeError
from pantheraml.hardware.backend import backend_of
from pantheraml.hardware.device import Device
from pantheraml.hardware.recovery import OOM_RETRIES, Recovery, halvings
from pantheraml.memory.features import F32, unit
from pantheraml.memory.record import Origin
from pantheraml.memory.where import torch_device
from pantheraml.planning.batch import BUSY_TOKENS, BUSY_TOKENS_FAST, FAST_FLOPS, HEADROOM, round_lengths
from pantheraml.recipe.kinds import KINDS
from pantheraml.recipe.types import ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

MAX_TOKENS = 512
"""Of a window. A longer text is several windows, all of whose tokens count alike."""
MOST_WINDOWS = 64
"""Of a text; what stands behind them does not count."""
_TINY = "tiny:"
_SAMPLE = 256
_log = getLogger(__name__)


class ModelEmbedder:
    """Any Hugging Face model with a tokenizer. Texts go through it in batches that fit into the device, of like length.

    The mean is over all tokens but padding. Nothing is asked of the model but `last_hidden_state`, so causal models serve as well as
    encoders; those trained for retrieval serve best.

    Args:
        model: a Hub id, a folder, or `tiny:FAMILY`. No code that comes with it runs.
        device: where it computes. On a TPU XLA compiles it, for a few shapes; weights go there with every batch.
        dtype: of its weights; None: the first of the device's.
        prefix: put before each text, where a model was trained so ("passage: ").
        announce: hears when a batch did not fit and is taken in parts.
    Raises: RecipeError if there is no such model, or it cannot be used.
    """

    def __init__(
        self,
        model: str,
        device: Device,
        *,
        revision: str | None = None,
        dtype: str | None = None,
        max_tokens: int = MAX_TOKENS,
        prefix: str = "",
        announce: Callable[[str], None] = _log.warning,
    ) -> None:
        from pantheraml.models.load import load_tokenizer

        spec = ModelSpec(name=model, revision=revision)
        self.name = model
        self._device = device
        self._dtype = dtype or next(iter(device.dtypes), "float32")
        self._tokenizer = load_tokenizer(spec)
        self._model: Any = _load(spec, self._dtype, device)
        config = self._model.config.get_text_config()
        self.dimensions = int(config.hidden_size)
        longest = int(getattr(config, "max_position_embeddings", None) or max_tokens)
        # RoBERTa counts positions from behind its padding token, so the last two of them cannot be used.
        self._max_tokens = min(max_tokens, longest - 2 if longest > 2 else longest)
        self._prefix = prefix
        self._backend = backend_of(device)
        self._recovery = Recovery({"out of memory": OOM_RETRIES}, device=lambda: (self._backend, device.index), announce=announce)
        self._token_bytes = _token_bytes(config)
        self._run = self._runner()
        self._lock = threading.Lock()
        self.fingerprint = self._fingerprint()
        self.origin = Origin(kind=device.kind, name=device.label, dtype=self._dtype, batch=0)

    def embed(self, texts: Sequence[str]) -> F32:
        """[N, D] rows of length 1; zeros for a text of nothing but white space."""
        sums, counts = np.zeros((len(texts), self.dimensions), np.float64), np.zeros(len(texts))
        with self._lock:  # a tokenizer serves one thread at a time, too
            # Windows of like length together, so that little is padded.
            windows = sorted(((i, window) for i, window in self._windows(texts) if window), key=lambda each: len(each[1]))
            while windows:
                width = self._width(len(windows[-1][1]))
                rows = max(1, self._tokens_at_once() // width)
                batch, windows = windows[-rows:], windows[:-rows]
                for (i, window), mean in zip(batch, self._means([window for _, window in batch], width, rows), strict=True):
                    sums[i] += mean.astype(np.float64) * len(window)
                    counts[i] += len(window)
        return unit((sums / np.maximum(counts, 1)[:, None]).astype(np.float32))

    def _windows(self, texts: Sequence[str]) -> Iterator[tuple[int, list[int]]]:
        """(text, token ids): of each text one window or more."""
        wanted = [i for i, text in enumerate(texts) if text.strip()]
        if not wanted:
            return
        prefixed = [self._prefix + texts[i].encode("utf-8", "replace").decode() for i in wanted]
        if self._tokenizer.is_fast:
            found = self._tokenizer(prefixed, truncation=True, max_length=self._max_tokens, return_overflowing_tokens=True)
            number: dict[int, int] = {}
            for text, ids in zip(found["overflow_to_sample_mapping"], found["input_ids"], strict=True):
                number[text] = number.get(text, 0) + 1
                if number[text] <= MOST_WINDOWS:
                    yield wanted[text], ids
            return
        for i, ids in zip(wanted, self._tokenizer(prefixed)["input_ids"], strict=True):
            for begin in range(0, min(len(ids), MOST_WINDOWS * self._max_tokens), self._max_tokens):
                yield i, ids[begin : begin + self._max_tokens]

    def _width(self, longest: int) -> int:
        """To which a batch is padded: one of few, where each new shape costs a compilation."""
        if not self._backend.static_shapes:
            return longest
        return min(round_lengths(longest)[-1], self._max_tokens)

    def _tokens_at_once(self) -> int:
        """As many as keep the device busy, if they fit into what is free."""
        busy = BUSY_TOKENS_FAST if (self._device.peak_flops or 0) > FAST_FLOPS else BUSY_TOKENS
        free = self._backend.memory(self._device.index).free_bytes
        return busy if free is None else min(busy, int(free * HEADROOM) // self._token_bytes)

    def _means(self, windows: list[list[int]], width: int, rows: int) -> F32:
        """[N, D] of some windows, at once or in as many parts as fit."""
        for attempt in self._recovery.attempts(f"embedding {len(windows)} texts", halvings(len(windows))):
            with attempt:
                size = -(-len(windows) // attempt.parts)
                parts = [windows[begin : begin + size] for begin in range(0, len(windows), size)]
                # Shapes stay the same to the last batch, where a new one costs a compilation.
                padded = -(-rows // attempt.parts) if self._backend.static_shapes else size
                means = np.concatenate([self._one(part, width, max(padded, len(part))) for part in parts])
                self.origin = Origin(kind=self._device.kind, name=self._device.label, dtype=self._dtype, batch=size)
                return means
        raise AssertionError("an attempt returns, raises, or has another one after it")

    def _one(self, windows: list[list[int]], width: int, rows: int) -> F32:
        import torch

        ids = torch.zeros(rows, width, dtype=torch.long)
        mask = torch.zeros(rows, width, dtype=torch.long)
        for row, window in enumerate(windows):
            ids[row, : len(window)] = torch.tensor(window)
            mask[row, : len(window)] = 1
        mask[len(windows) :, 0] = 1  # a row without any token has no mean
        with torch.no_grad():
            return self._run(ids, mask)[: len(windows)].float().cpu().numpy()

    def _runner(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        if KINDS[self._device.kind].engine == "torch":
            where = torch_device(self._device)
            return lambda ids, mask: self._model(ids.to(where), mask.to(where))
        from pantheraml.engines.xla_optimizer import XLAOptimizer

        return XLAOptimizer(simulate=self._device.simulated).compile(self._model)

    def _fingerprint(self) -> str:
        """Of what makes the vectors: a sample of each weight, the tokenizer, the length of a window. Not of dtype or device."""
        import torch

        seen = blake3.blake3(f"{self._max_tokens} {self._prefix} {sorted(self._tokenizer.get_vocab().items())}".encode("utf-8", "replace"))
        for name, weight in self._model.named_parameters():
            flat = weight.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].to(torch.bfloat16).float().cpu()
            seen.update(f"{name} {list(weight.shape)}".encode() + sample.numpy().tobytes())
        return seen.hexdigest(8)


def _load(spec: ModelSpec, dtype: str, device: Device) -> nn.Module:
    """The model without its head, on the device; see `_mean_of`."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel

    from pantheraml.models.load import read_config

    config, numbers = read_config(spec), getattr(torch, dtype)
    if spec.name.startswith(_TINY):
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model: Any = AutoModel.from_config(config, dtype=torch.float32).to(numbers)
    else:
        try:
            model = AutoModel.from_pretrained(
                spec.name, revision=spec.revision, dtype=numbers, use_safetensors=True, trust_remote_code=spec.trust_remote_code
            )
        except (OSError, ValueError, KeyError, ImportError, AttributeError, SafetensorError) as error:
            raise RecipeError(
                f"the model {spec.name} cannot be used to embed texts",
                why=(str(error).strip() or type(error).__name__).splitlines()[0],
                fix="name a model with weights in safetensors that transformers knows without code of its own",
            ) from error
    if getattr(config, "is_encoder_decoder", False):
        model = model.get_encoder()
    return _mean_of(model).to(torch_device(device)).eval()


def _mean_of(model: Any) -> nn.Module:
    """A module: ids and mask [B, T] to the mean [B, D] of the last hidden states over the tokens that are no padding."""
    from torch import nn

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            extra = {"use_cache": False} if hasattr(self.config, "use_cache") else {}
            hidden = self.model(input_ids=ids, attention_mask=mask, **extra).last_hidden_state.float()
            kept = mask[..., None].to(hidden.dtype)
            return (hidden * kept).sum(dim=1) / kept.sum(dim=1)

    return Mean()


def _token_bytes(config: Any) -> int:
    """About what a token takes while it goes through a layer: its states, those inside the layer, and one layer's before it, in float32."""
    hidden = int(config.hidden_size)
    inside = getattr(config, "intermediate_size", None) or 4 * hidden
    inside = max(inside) if isinstance(inside, list | tuple) else int(inside)
    return 4 * (8 * hidden + 3 * inside)

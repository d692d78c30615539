"""What computes the next logits of many answers: the model's own forward, over a cache of rows or with a cache for each answer.

Letters: N answers, V vocabulary, T tokens of each.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pantheraml.hardware.backend import Backend, open_backend
from pantheraml.models.cache import PLACES, RowCache, Step, attending, places_for
from pantheraml.models.dense import dense_products
from pantheraml.models.head import causal_model
from pantheraml.models.isolation import ALONE
from pantheraml.models.row_adapters import AdapterChoice, row_adapters
from pantheraml.planning.answers import MOST_ROWS, answer_rows, row_bytes, working_bytes
from pantheraml.recipe.kinds import kind_of

ROW_TOKENS = 4096
"""Of a row unless somebody says otherwise, or as many as the model was made for."""
PROMPT_TOKENS = 512
"""Tokens of prompts that are read at once, while other answers wait for their next token."""
SMALLEST_PIECE = 8
"""A rest of a prompt is read in a shape of at least so many tokens: a power of two, or three quarters of one."""
_SHARED_TOKENS = 16
"""Fewer tokens than so many are not worth waiting for."""
_WIDTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_log = logging.getLogger("pantheraml")


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens of one answer that come next: row, token ids, place of the first one, number of the adapter (0: none)."""

    slot: int
    tokens: Sequence[int]
    start: int
    adapter: int = 0


class Rows(Protocol):
    """Computes answers in rows that keep what was read."""

    count: int
    tokens: int
    """Of a row, prompt and answer together."""
    chunk: int
    """Most tokens of one part."""
    block: int | None
    """Rows copy from each other in multiples of so many tokens; None: they cannot."""
    widths: tuple[int, ...]
    """How many neighbouring rows can be computed at once, ascending, the last is all; empty: it does not matter where rows are."""
    fallback: str | None
    """Why answers are computed one by one; None: they are computed together."""

    def ready(self) -> AbstractContextManager[Any]:
        """Within the block it can compute."""
        ...

    def adapter(self, name: str | None) -> int:
        """The number of an adapter. Raises: ValueError for one that was not named before."""
        ...

    def most(self, width: int) -> int:
        """How many parts of so many tokens can be read at once."""
        ...

    def read(self, parts: Sequence[Part], width: int) -> Tensor:
        """The logits [N, V] behind the last token of each part; a width of 1: the next token of each, otherwise up to so many of prompts."""
        ...

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Copy what was read of some tokens to another row."""
        ...

    def clear(self, slot: int) -> None:
        """A row holds nothing any more."""
        ...


def open_rows(
    model: Any,
    *,
    tokens: int | None = None,
    backend: Backend | None = None,
    count: int | None = None,
    most: int = MOST_ROWS,
    chunk: int | None = None,
    steady: bool = True,
    adapters: Sequence[str] = (),
) -> Rows:
    """Rows of a cache for a model; where its layers cannot use one, a cache for each answer, which is announced.

    Args:
        tokens: of a row, prompt and answer together; None: ROW_TOKENS, or as many as the model was made for.
        backend: says how much memory is free; None: the one of the model's device.
        count: rows; None: as many as fit, see planning/answers.py, up to `most`.
        chunk: tokens of a prompt that are read at once; None: 64 if steady, else `PROMPT_TOKENS`.
        steady: see `StaticRows`.
        adapters: that answers can name.
    """
    made_for = getattr(causal_model(model).config.get_text_config(), "max_position_embeddings", None) or ROW_TOKENS
    tokens, choice = tokens or min(ROW_TOKENS, made_for), AdapterChoice(adapters)
    why = unable(model, tokens)
    if why is None:
        rows = StaticRows(model, tokens=tokens, chunk=chunk or (64 if steady else PROMPT_TOKENS), steady=steady, choice=choice)
        why = rows.wrong()
        if why is None:
            rows.open(count if count is not None else min(most, _fitting(model, rows, backend)))
            return rows
    _log.warning("%s answers one prompt at a time: %s", type(causal_model(model)).__name__, why)
    return SingleRows(model, count=count or 1, tokens=tokens, choice=choice, why=why)


def _fitting(model: Any, rows: StaticRows, backend: Backend | None) -> int:
    """How many rows fit into the memory that is free where the model is."""
    device = model.get_input_embeddings().weight.device
    kind = kind_of(device.type)
    if backend is None and kind is not None:
        backend = open_backend(kind)
    free_bytes = None if backend is None else backend.memory(device.index or 0).free_bytes
    config = causal_model(model).config.get_text_config()
    vocab = model.get_input_embeddings().weight.shape[0]
    one = row_bytes(token_bytes=rows.token_bytes, tokens=places_for(rows.tokens), vocab=vocab)
    intermediate = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    reading = working_bytes(
        tokens=max(PROMPT_TOKENS, rows.chunk),
        hidden=config.hidden_size,
        intermediate=intermediate if isinstance(intermediate, int) else max(intermediate),
        vocab=vocab,
        compute_bytes_each=max(2, causal_model(model).dtype.itemsize),
    )
    return answer_rows(free_bytes, row_bytes=one, working_bytes=reading)


def unable(model: Any, tokens: int) -> str | None:
    """Why the layers of a model cannot keep rows of so many tokens, from what is known of it; None: perhaps they can."""
    causal = causal_model(model)
    config = causal.config.get_text_config()
    if any(each.is_prompt_learning for each in getattr(model, "peft_config", {}).values()):
        return "learned prompts stand before the tokens"
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        return f"it has layers of the kind {sorted(other)[0]!r}, which keep more than keys and values"
    if not getattr(causal, "_supports_attention_backend", False) or not getattr(config, "is_causal", True):
        return "its attention does not go through the interface that transformers has for it"
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(each for each in ropes.values() if isinstance(each, dict))):
        limit = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None) or tokens
        if rope.get("rope_type") in ("longrope", "dynamic") and tokens > limit:
            return f"its positions beyond {limit} turn those of every row"
    return None


class StaticRows:
    """Rows of one cache, through the model's own forward.

    steady: the logits of a row do not depend on the others, bit for bit, as far as the library's products allow. Only shapes are used in
    which the first rows have the same bits as in the widest one, which is measured; prompts are read in pieces that begin at
    multiples of `chunk`, and only whole ones are shared. Mixtures of experts take the tokens of all rows together, and are not steady.
    """

    fallback: str | None = None
    block: int | None

    def __init__(self, model: Any, *, tokens: int, chunk: int, steady: bool, choice: AdapterChoice) -> None:
        self._model, self._causal, self._steady, self._choice = model, causal_model(model), steady, choice
        self._config = self._causal.config.get_text_config()
        self._device = model.get_input_embeddings().weight.device
        self.tokens, self.chunk, self.block = tokens, chunk, chunk if steady else _SHARED_TOKENS
        self._open(2, 2 * SMALLEST_PIECE + 2)

    def open(self, count: int) -> None:
        """Make that many rows."""
        self._open(count, self.tokens)
        if self._steady:
            with _computing(self._model):
                self.widths, self._sizes = self._steady_widths(), self._steady_sizes()
            self._open_cache(self.tokens)  # what was measured is forgotten

    def _open(self, count: int, tokens: int) -> None:
        self.count = count
        self.widths = tuple(range(1, count + 1))
        self._sizes = tuple(range(1, PROMPT_TOKENS // SMALLEST_PIECE + 1))
        self._open_cache(tokens)

    def _open_cache(self, tokens: int) -> None:
        self._cache = RowCache(self.count, tokens)

    @property
    def token_bytes(self) -> int:
        """What the keys and values of one token take, once something was read."""
        return self._cache.token_bytes

    def ready(self) -> AbstractContextManager[Any]:
        """See `Rows.ready`. The model is in evaluation mode."""
        return _answering(self._model, self._choice)

    def adapter(self, name: str | None) -> int:
        """See `Rows.adapter`."""
        return self._choice.number(name)

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """See `Rows.copy`."""
        self._cache.copy(source, target, start, end)

    def clear(self, slot: int) -> None:
        """See `Rows.clear`."""
        self._cache.clear(slot)

    def most(self, width: int) -> int:
        """See `Rows.most`."""
        return max((size for size in self._sizes if size * width <= PROMPT_TOKENS), default=1)

    def read(self, parts: Sequence[Part], width: int) -> Tensor:
        """See `Rows.read`. Shorter parts stand at the end of their line, so that the last column has the last token of each."""
        rows, lines = self._placed(parts, width)
        nowhere = self._cache.places - 1
        ids, positions, places = ([[fill] * width for _ in rows] for fill in (0, 0, nowhere))
        adapters = [0] * len(rows)
        for part, line in zip(parts, lines, strict=True):
            at, end = width - len(part.tokens), part.start + len(part.tokens)
            ids[line][at:] = part.tokens
            positions[line] = [part.start] * at + list(range(part.start, end))
            places[line][at:] = positions[line][at:]
            adapters[line] = part.adapter
        longest = max(part.start + len(part.tokens) for part in parts)
        step = Step(
            rows=rows if isinstance(rows, range) else self._tensor(rows),
            positions_BT=self._tensor(positions),
            places_BT=self._tensor(places),
            length=min(-(-longest // PLACES) * PLACES, self._cache.places),
        )
        self._choice.choose(adapters, self._device)
        with attending(self._config, self._cache, step):
            out = self._causal(
                input_ids=self._tensor(ids),
                position_ids=step.positions_BT,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=min(width, SMALLEST_PIECE),  # a product whose rows keep their bits, too
            )
        if not step.attended:
            raise RuntimeError(f"the attention of {type(self._causal).__name__} does not ask for the rows")
        return out.logits[self._tensor(lines), -1]

    def _placed(self, parts: Sequence[Part], width: int) -> tuple[range | list[int], list[int]]:
        """The rows that are computed, and which line of them each part is."""
        slots = [part.slot for part in parts]
        if width == 1:
            span = max(slots) + 1 - min(slots)
            size = next(each for each in self.widths if each >= span)
            first = min(*slots, self.count - size)
            return range(first, first + size), [slot - first for slot in slots]
        size = next(each for each in self._sizes if each >= len(parts))
        if size == 1:
            return range(slots[0], slots[0] + 1), [0]
        # Lines that only fill the shape write to the last place of a row that is read anyway.
        return slots + slots[:1] * (size - len(parts)), list(range(len(parts)))

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, device=self._device)

    # ---- What is measured ---------------------------------------------------------------------------------------

    def wrong(self) -> str | None:
        """Why the rows cannot be used, by their logits beside those of the model's own forward; None: they are right."""
        half = SMALLEST_PIECE
        drawn = _some_tokens(self._model, 2 * half + 1)
        try:
            with _computing(self._model):
                ids = self._tensor([drawn])
                wanted = [self._causal(input_ids=ids[:, :end], use_cache=False).logits[0, -1].float() for end in (2 * half, None)]
                self.read([Part(1, drawn[:5], 0)], half)  # a neighbour of another length
                self.read([Part(0, drawn[:half], 0)], half)
                found = [self.read([Part(0, drawn[half:-1], half)], half)[0]]
                found.append(self.read([Part(0, drawn[-1:], 2 * half), Part(1, drawn[5:6], 5)], 1)[0])
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            return f"its forward does not take a cache of rows: {(str(error) or type(error).__name__).splitlines()[0]}"
        off = max(float((a.float() - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(found, wanted, strict=True))
        limit = ALONE.get(str(self._causal.dtype).removeprefix("torch."), 0.1)
        return None if off <= limit else f"with a cache of rows its logits are off by {off:.1e}"

    def _steady_widths(self) -> tuple[int, ...]:
        """Of how many rows the first ones have the same bits as of all."""
        few = min(self.count, _WIDTHS[0])
        drawn = _some_tokens(self._model, few)

        def logits(width: int) -> Tensor:
            self.widths = (width,)
            return self.read([Part(slot, drawn[slot : slot + 1], 0) for slot in range(few)], 1)

        wanted = logits(self.count)
        return (*(width for width in _WIDTHS if width < self.count and logits(width).equal(wanted)), self.count)

    def _steady_sizes(self) -> tuple[int, ...]:
        """Of how many parts the first one has the same bits as alone, in the shortest shape and in the longest."""
        drawn = _some_tokens(self._model, min(SMALLEST_PIECE, self.tokens))

        def logits(size: int, width: int) -> Tensor:
            self._sizes = (size,)
            return self.read([Part(0, drawn, 0)], width)

        sizes, shapes = [1], sorted({SMALLEST_PIECE, self.chunk})
        alone = {width: logits(1, width) for width in shapes}
        for power in range(1, (PROMPT_TOKENS // SMALLEST_PIECE).bit_length()):
            size = 1 << power
            if size < 2 * self.count and all(logits(size, width).equal(alone[width]) for width in shapes if size * width <= PROMPT_TOKENS):
                sizes.append(size)
        return tuple(sizes)


class SingleRows:
    """A cache of transformers' own for each answer, which are computed one by one: for any causal language model."""

    chunk = 1 << 30  # layers that hand on a state read a prompt in one piece
    block: int | None = None
    widths: tuple[int, ...] = ()
    fallback: str | None

    def __init__(self, model: Any, *, count: int, tokens: int, choice: AdapterChoice, why: str) -> None:
        self._model, self._causal, self._choice = model, causal_model(model), choice
        self._device = model.get_input_embeddings().weight.device
        self.count, self.tokens, self.fallback = count, tokens, why
        self._caches: dict[int, dict[str, Any]] = {}

    def ready(self) -> AbstractContextManager[Any]:
        """See `Rows.ready`. The model is in evaluation mode."""
        return _answering(self._model, self._choice)

    def adapter(self, name: str | None) -> int:
        """See `Rows.adapter`."""
        return self._choice.number(name)

    def most(self, width: int) -> int:
        """See `Rows.most`."""
        return 1

    def read(self, parts: Sequence[Part], width: int) -> Tensor:
        """See `Rows.read`."""
        return torch.cat([self._read(part) for part in parts])

    def _read(self, part: Part) -> Tensor:
        if part.start == 0:
            self._caches.pop(part.slot, None)
        self._choice.choose([part.adapter], self._device)
        ids = torch.tensor([list(part.tokens)], device=self._device)
        out = self._causal(input_ids=ids, use_cache=True, **self._caches.get(part.slot, {}))
        # Models that are nothing but a state have another name for it.
        self._caches[part.slot] = {name: out[name] for name in ("past_key_values", "cache_params", "state") if out.get(name) is not None}
        return out.logits[:, -1]

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Not asked for: `block` is None."""
        raise NotImplementedError

    def clear(self, slot: int) -> None:
        """See `Rows.clear`."""
        self._caches.pop(slot, None)


@contextmanager
def _answering(model: Any, choice: AdapterChoice) -> Iterator[None]:
    with row_adapters(model, choice) if choice.names else nullcontext(), _computing(model):
        yield


@contextmanager
def _computing(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        # Tensors made in inference mode could stay in the model, which may be trained on.
        with torch.no_grad(), dense_products(model):
            yield
    finally:
        model.train(was_training)


def _some_tokens(model: Any, count: int) -> list[int]:
    """Fixed tokens, spread over the vocabulary: no generator is touched."""
    vocab = model.get_input_embeddings().weight.shape[0]
    return [(i * 7919 + 13) % vocab for i in range(count)]

"""The semantic codec: of a text stay a vector of few bytes, and a summary if one is asked for. What is given back is not what was put,
and how like it is, is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pantheraml.memory.embed import Embedder
from pantheraml.memory.features import F32
from pantheraml.memory.quantise import Book, Kind, decode, encode, fidelity, from_rows, to_rows

SUMMARY_TOKENS = 64
PROMPT = "Say in one or two sentences what the following text says. Keep names and numbers.\n\n"
_MOST_CHARACTERS = 8_000

Summarise = Callable[[Sequence[str]], Sequence[str]]
"""A shorter text for each text."""


@dataclass(frozen=True, slots=True)
class Gist:
    """What is kept of a text.

    Attributes:
        text: the summary; empty: there is none. vector: a row of quantise.py.
        score: cosine between the vector of the whole text and that of what can be given back, 0 to 1: of the summary, or without one
            of the code.
    """

    text: str
    vector: bytes
    score: float

    @property
    def size_bytes(self) -> int:
        """Of both."""
        return len(self.text.encode("utf-8", "surrogatepass")) + len(self.vector)


class GistCodec:
    """Makes gists, many at once.

    Args:
        embedder: whose vectors they have. kind: of their codes; pq takes a book.
        summarise: see `summaries_by`; None: no summaries.
    Raises: ValueError for pq without a book.
    """

    def __init__(self, embedder: Embedder, *, kind: Kind = "int8", book: Book | None = None, summarise: Summarise | None = None) -> None:
        if (kind == "pq") != (book is not None):
            raise ValueError("pq takes a book, and no other kind does")
        self._embedder, self._book, self._summarise = embedder, book, summarise
        self._kind: Kind = kind

    def encode(self, texts: Sequence[str]) -> list[Gist]:
        """The gist of each. A summary that is not shorter than its text is the text."""
        if not texts:
            return []
        whole = self._embedder.embed(texts)
        codes = encode(whole, self._kind, self._book)
        kept, scores = [""] * len(texts), fidelity(codes, self._book)
        if self._summarise is not None:
            made = self._summarise(texts)
            kept = [short if len(short) < len(text) else text for short, text in zip(made, texts, strict=True)]
            alike = np.einsum("nd,nd->n", self._embedder.embed(kept), whole)
            scores = np.where([bool(text) for text in kept], alike, scores)
        rows = to_rows(codes)
        return [Gist(text, row, _share(score)) for text, row, score in zip(kept, rows, scores.tolist(), strict=True)]

    def score(self, text: str, vector: bytes) -> float:
        """The score of a gist that was kept, measured again against its code: of its text, or of the code itself where that is empty.

        Raises: StorageError for bytes that are no code.
        """
        codes = from_rows([vector])
        if not text:
            return _share(float(fidelity(codes, self._book)[0]))
        code = decode(codes, self._book)[0]
        length = float(np.linalg.norm(code))
        return _share(float(self._embedder.embed([text])[0] @ code) / length if length else 0.0)

    def vectors(self, rows: Sequence[bytes]) -> F32:
        """[N, D] what the codes of gists stand for."""
        return decode(from_rows(rows), self._book)


def summaries_by(model: Any, tokenizer: Any, *, max_new_tokens: int = SUMMARY_TOKENS, prompt: str = PROMPT) -> Summarise:
    """Summaries by a language model on its device, in batches, always the likeliest token.

    Args:
        model, tokenizer: of transformers, as models/load.py gives them. prompt: stands before each text, as the user's words where the
            tokenizer knows conversations.
    """

    def summarise(texts: Sequence[str]) -> list[str]:
        from pantheraml.models.generate import generate

        longest = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048) - max_new_tokens
        prompts = [_prompt(tokenizer, prompt, text[:_MOST_CHARACTERS], longest) for text in texts]
        return [answer.strip() for answer in generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens)]

    return summarise


def _prompt(tokenizer: Any, prompt: str, text: str, longest: int) -> list[int]:
    """Token ids; of a text that is too long the beginning."""
    while True:
        if getattr(tokenizer, "chat_template", None):
            asked = [{"role": "user", "content": prompt + text}]
            ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        else:
            ids = tokenizer(prompt + text + "\n\n")["input_ids"]
        if len(ids) <= longest or not text:
            return list(ids)[-longest:]
        text = text[: min(len(text) - 1, len(text) * longest // len(ids))]


def _share(score: float) -> float:
    return min(1.0, max(0.0, score))

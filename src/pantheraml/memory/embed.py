"""Texts as vectors: without a model, by one trained on the store's own texts, or by a language model on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import blake3
import numpy as np
from numpy.typing import NDArray

from pantheraml.errors import DataError, StorageError
from pantheraml.memory.features import F32, I64, U64, Features, chunks, hashed, joined, rotation, unit
from pantheraml.memory.quantise import Codes, decode, encode
from pantheraml.memory.record import Origin

if TYPE_CHECKING:
    from pantheraml.hardware.device import Device

DIMENSIONS = 256
VOCABULARY = 32_768
TRAIN_CHARACTERS = 1 << 26
"""That training looks at; of more text every second, third, ... is taken."""
_LONG_WORD = 12
_PIECE_WEIGHT = 0.3
_HASHED_SHARE = 0.5
"""Length of the hashed part beside the latent one. With less of it, words that stand in few texts are not found again."""
_STATIC_VERSION = 1
_FLATTEN = -0.5
"""Power of the singular value by which a direction is multiplied: the strongest are what all texts have."""


class Embedder(Protocol):
    """Makes vectors whose dot product says how alike texts are. Safe to use from several threads."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    @property
    def dimensions(self) -> int:
        """Numbers in a vector."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex. Vectors with another one cannot be compared with these."""
        ...

    @property
    def origin(self) -> Origin | None:
        """What computed the newest batch; None: no device took part."""
        ...

    def embed(self, texts: Sequence[str]) -> F32:
        """[N, D] rows of length 1; zeros for an empty text."""
        ...


class LexicalEmbedder:
    """Words and pieces of words, hashed with signs (Weinberger et al. 2009, arXiv 0902.2206). It knows no meaning: texts are alike
    if they have words in common, and more so for long words, which are rarer (Zipf 1935). Needs nothing but the text.

    Args:
        dimensions: a power of two; with more of them fewer words share a place.
    """

    origin = None

    def __init__(self, dimensions: int = DIMENSIONS) -> None:
        rotation(dimensions)
        self.dimensions = dimensions
        self.name = f"lexical-{dimensions}"
        self.fingerprint = blake3.blake3(f"pantheraml-lexical-1 {dimensions}".encode()).hexdigest(8)

    def embed(self, texts: Sequence[str]) -> F32:
        """[N, D] rows of length 1; zeros where a text has no word. About 50,000 texts of 100 characters a second on one core."""
        rows = np.zeros((len(texts), self.dimensions), np.float32)
        for begin, found in chunks(texts):
            size = int(found.text.max(initial=-1)) + 1
            weights = _frequency(found) * np.where(found.letters > 0, np.minimum(found.letters, _LONG_WORD) / _LONG_WORD, _PIECE_WEIGHT)
            rows[begin : begin + size] = hashed(found, weights, size, self.dimensions)
        return unit(rows)


class StaticEmbedder:
    """A vector for each word and piece of a word, learned from texts by latent semantic analysis; a text is their weighted sum.

    Beside the latent part stands a hashed one, weighted by how rare a word is, so that names and numbers count that hardly any
    text has, and those that training never saw. Make it with `train` or `from_bytes`.
    """

    origin = None

    def __init__(self, words: U64, rarity: F32, table: Codes, texts: int) -> None:
        self._words, self._rarity, self._coded, self._texts = words, rarity, table, texts
        self._table = decode(table)
        self.dimensions = table.data.shape[1]
        self.name = f"static-{self.dimensions}"
        self.fingerprint = blake3.blake3(self.to_bytes()).hexdigest(8)

    @classmethod
    def train(
        cls,
        texts: Sequence[str],
        *,
        dimensions: int = DIMENSIONS,
        vocabulary: int = VOCABULARY,
        device: Device | None = None,
        seed: int = 0,
    ) -> StaticEmbedder:
        """Learn from texts like those that will be embedded, on the device.

        Args:
            dimensions: a power of two. vocabulary: words and pieces that get a vector, those of most texts; it takes about
                dimensions + 16 bytes for each.
            device: None: where torch puts tensors by itself.
        Raises: DataError if no two texts have a word in common.
        """
        from pantheraml.memory.latent import Counts, singular_vectors
        from pantheraml.memory.where import torch_device

        turn = rotation(dimensions)
        every = max(1, -(-sum(map(len, texts)) // TRAIN_CHARACTERS))
        texts = texts[::every]
        found = joined([replace(found, text=found.text + begin) for begin, found in chunks(texts)])
        words, place, seen = np.unique(found.hash, return_inverse=True, return_counts=True)
        order = np.argsort(-seen, kind="stable")[:vocabulary]
        kept = np.sort(order[seen[order] >= 2])
        if not len(kept):
            raise DataError(
                f"no two of {len(texts)} texts have a word in common",
                why="an embedder learns which words occur together, and here there is nothing to learn",
                fix="train on more texts; until then LexicalEmbedder needs none",
            )
        rarity = _rarity(len(texts), seen[kept])
        number = np.full(len(words), -1)
        number[kept] = np.arange(len(kept))
        column = number[place]
        of_all = np.where(column >= 0, rarity[column], _rarity(len(texts), 0))
        weights = _normalised(found, _frequency(found) * of_all * np.where(found.letters > 0, 1, _PIECE_WEIGHT), len(texts))
        known = column >= 0
        counts = Counts(found.text[known], column[known], weights[known].astype(np.float32), len(texts), len(kept))
        values, vectors = singular_vectors(counts, dimensions, device=torch_device(device), seed=seed)
        # The mean squared length of a text's latent part is 1, like that of its hashed part.
        strength = values**_FLATTEN
        latent = vectors * strength * np.sqrt(len(texts) / np.square(values * strength).sum())
        table = encode((latent @ turn[: len(values)]).astype(np.float32), "int8")
        return cls(words[kept], rarity, table, len(texts))

    def embed(self, texts: Sequence[str]) -> F32:
        """[N, D] rows of length 1; zeros where a text has no word."""
        rows = np.zeros((len(texts), self.dimensions), np.float32)
        for begin, found in chunks(texts):
            size = int(found.text.max(initial=-1)) + 1
            place = np.minimum(np.searchsorted(self._words, found.hash), len(self._words) - 1)
            known = self._words[place] == found.hash
            weights = _frequency(found) * np.where(known, self._rarity[place], _rarity(self._texts, 0))
            weights = _normalised(found, weights * np.where(found.letters > 0, 1, _PIECE_WEIGHT), size).astype(np.float32)
            part = hashed(found, weights * np.float32(_HASHED_SHARE), size, self.dimensions)
            order = np.argsort(found.text[known], kind="stable")
            place, weights = place[known][order], weights[known][order]
            ends = np.searchsorted(found.text[known][order], np.arange(size + 1))
            for i in range(size):  # a product for each text: its words' rows fit into the caches, those of all do not
                part[i] += weights[ends[i] : ends[i + 1]] @ self._table[place[ends[i] : ends[i + 1]]]
            rows[begin : begin + size] = part
        return unit(rows)

    def to_bytes(self) -> bytes:
        """As safetensors; the same embedder gives the same bytes."""
        from safetensors.numpy import save

        numbers = np.array([_STATIC_VERSION, self._texts], np.int64)
        return save(
            {"numbers": numbers, "words": self._words, "rarity": self._rarity, "scale": self._coded.scale, "table": self._coded.data}
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> StaticEmbedder:
        """What `to_bytes` gave. Raises: StorageError for anything else."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            arrays = load(data)
            version, texts = (int(each) for each in arrays["numbers"])
            words, rarity, table = arrays["words"], arrays["rarity"], Codes("int8", arrays["scale"], arrays["table"])
            if version != _STATIC_VERSION or not len(words) == len(rarity) == len(table) == len(table.scale):
                raise ValueError(f"it has version {version}, or its parts do not fit each other")
            return cls(words, rarity, table, texts)
        except (SafetensorError, ValueError, KeyError, IndexError) as error:
            raise StorageError(
                f"{len(data):,} bytes are no embedder",
                why=str(error) or type(error).__name__,
                fix="train it again: `pantheraml memory train`",
            ) from error


def _frequency(found: Features) -> NDArray[np.float64]:
    """How much a feature counts in its text: the second time less than the first."""
    return 1 + np.log(found.count)


def _rarity(texts: int, seen: I64 | int) -> F32:
    """How much a feature counts that so many of the texts have."""
    return (np.log((1 + texts) / (1 + np.asarray(seen))) + 1).astype(np.float32)


def _normalised(found: Features, weights: NDArray[np.float64], texts: int) -> NDArray[np.float64]:
    """Weights such that those of each text have length 1."""
    length = np.sqrt(np.bincount(found.text, weights=np.square(weights), minlength=texts))
    return weights / np.where(length == 0, 1, length)[found.text]

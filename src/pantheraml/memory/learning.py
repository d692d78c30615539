"""What a store learns from its own records: dictionaries, vectors for search, and the model of the neural codec."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from pantheraml.errors import DataError
from pantheraml.memory.embed import TRAIN_CHARACTERS, StaticEmbedder
from pantheraml.memory.finder import SETTING, STATIC_SUFFIX
from pantheraml.memory.ledger import What
from pantheraml.memory.parts import MODEL, TRAINING, Parts
from pantheraml.memory.rows import Row
from pantheraml.memory.upkeep import AT_ONCE, Progress, batches, learn_dictionaries, silent

FEWEST_TEXTS = 100
"""Below it words occur together by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What was learned. embedder: its name; None: the one of before stays, for the reason in `notes`. model: id of the model, and
    bits_per_byte: that it needs for texts it has not seen; None: none was trained."""

    dictionaries: tuple[str, ...]
    embedder: str | None
    model: str | None
    bits_per_byte: float | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    @property
    def said(self) -> str:
        """For a person."""
        parts = [f"a dictionary for {', '.join(self.dictionaries)}"] if self.dictionaries else []
        parts += [f"vectors by {self.embedder}"] if self.embedder else []
        if self.model and self.bits_per_byte:
            parts.append(f"a model, {8 / self.bits_per_byte:.2f} times smaller than the text on records it has not seen")
        return "; ".join([*(parts or ["nothing new was learned"]), *self.notes])


def train(parts: Parts, *, minutes: float, model: bool, progress: Progress = silent) -> Trained:
    """Learn from all records, whatever their tenant.

    Args:
        minutes: for the model, at most. model: train one for the neural codec, which `compact` uses for what is cold from then on.
    Raises: DataError if a model is asked for and there is too little text for one.
    """
    with parts.lock:
        dictionaries = learn_dictionaries(parts)
        notes: list[str] = []
        embedder = _learn_vectors(parts, notes, progress)
        made = _learn_model(parts, minutes) if model else None
        return Trained(
            dictionaries=tuple(dictionaries),
            embedder=embedder,
            model=None if made is None else made[0],
            bits_per_byte=None if made is None else made[1],
            notes=tuple(notes),
        )


def _texts(parts: Parts, most_characters: int) -> Iterator[tuple[Row, str]]:
    """Records with their texts, spread over the whole store."""
    total = sum(row.raw_size for row in _readable(parts))
    every = max(1, -(-total // most_characters))
    rows = (row for i, row in enumerate(_readable(parts)) if i % every == 0)
    for batch in batches(rows, AT_ONCE):
        for row, content in zip(batch, parts.contents.of(batch), strict=True):
            if isinstance(content, bytes):
                yield row, content.decode("utf-8", "replace")


def _readable(parts: Parts) -> Iterator[Row]:
    """Rows whose content is text, once each."""
    for row in parts.records.scan(damaged=lambda id, error: None):
        if row.form != "bytes" and row.same_as is None and row.fidelity == "exact":
            yield row


def _learn_vectors(parts: Parts, notes: list[str], progress: Progress) -> str | None:
    """Vectors of the store's own words, for all records at once. Returns: the embedder's name; None: nothing changed."""
    if parts.finder.name.startswith("model"):
        return None
    if any(row.fidelity == "gist" for row in parts.records.scan(damaged=lambda id, error: None)):
        notes.append("vectors stay as they are, since of gists there is nothing else to make new ones from")
        return None
    texts = [text for _, text in _texts(parts, TRAIN_CHARACTERS)]
    if len(texts) < FEWEST_TEXTS:
        notes.append(f"vectors stay as they are: {len(texts)} texts are too few to learn from ({FEWEST_TEXTS})")
        return None
    try:
        embedder = StaticEmbedder.train(texts, device=parts.device)
    except DataError as error:
        notes.append(f"vectors stay as they are: {error.what}")
        return None
    name = f"static {parts.shared.put(embedder.to_bytes(), STATIC_SUFFIX).hex()}"
    done, of = 0, parts.records.count()
    with parts.warm.write():
        for batch in batches(parts.records.scan(), AT_ONCE):
            contents = parts.contents.of(batch)
            readable = [
                (row, content.decode("utf-8", "replace"))
                for row, content in zip(batch, contents, strict=True)
                if isinstance(content, bytes) and row.form != "bytes"
            ]
            vectors = parts.finder.vectors([text for _, text in readable], by=embedder)
            parts.warm.replace(
                [replace(row, vector=vector if text else b"") for (row, text), vector in zip(readable, vectors, strict=True)], What.MOVE
            )
            done += len(batch)
            progress("vectors", done, of)
        parts.warm.set({SETTING: name.encode()})
    parts.finder.reopen()
    return embedder.name


def _learn_model(parts: Parts, minutes: float) -> tuple[str, float]:
    """A small language model of the store's texts, for the neural codec. Returns: its id, and bits a byte of texts it has not seen."""
    from pantheraml.memory.train import train_model
    from pantheraml.recipe.types import HardwareAsk

    texts: list[str] = []
    kinds: list[str] = []
    for row, text in _texts(parts, TRAIN_CHARACTERS):
        texts.append(text)
        kinds.append(row.kind)
    device = parts.device
    folder = parts.path / TRAINING
    try:
        made = train_model(
            texts,
            folder,
            parts.shared,
            kinds=kinds,
            minutes=minutes,
            hardware=HardwareAsk(kind=device.kind, index=device.index),
            announce=parts.announce,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    parts.warm.set({MODEL: made.id.hex().encode()})
    parts.open_codecs()
    return made.id.hex(), made.measured.bits

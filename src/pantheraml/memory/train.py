"""A small language model for the neural codec, made of the records that it will encode: by this project's own trainer.

train_model
  tokenizer          byte-level BPE of the training texts
  weights            a llama of a size that suits the texts, random
  trainer.run.train  all weights, on whatever device the recipe finds
  calibrate          the same model in whole numbers
  measured           bits a byte on documents that were held out, of both
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from logging import getLogger
from math import ceil, log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pantheraml.errors import DataError
from pantheraml.memory.integer_model import SUFFIX
from pantheraml.memory.shared import Shared
from pantheraml.memory.tokens import END, Tokens, train_tokenizer
from pantheraml.recipe.types import HardwareAsk

if TYPE_CHECKING:
    from rich.console import Console

LEAST_BYTES = 20_000
"""Of texts. Less than that teaches nothing that a dictionary of zstd does not hold."""
HELD_OUT = 0.05
"""Share of the documents that are measured on."""
MOST_MEASURED, MOST_CALIBRATED = 100, 48
"""Texts."""
MOST_EPOCHS = 12
LEAST_SHARE, MOST_COPIES = 0.1, 4
"""Texts of a kind that is rarer than that are seen more often, at most so many times in an epoch."""
_PILOT_STEPS = 12
_log = getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of a model; it has as many bytes as parameters once it is stored.

    Attributes:
        vocabulary: tokens. hidden, layers, heads, inner: as transformers' LlamaConfig calls them; half of the heads have keys of their own.
        context: tokens that it sees.
    """

    vocabulary: int = 2048
    hidden: int = 192
    layers: int = 4
    heads: int = 3
    groups: int = 1
    inner: int = 576
    context: int = 512

    @classmethod
    def for_texts(cls, total_bytes: int) -> Size:
        """One that pays for itself: its bytes are a small part of what it saves, and some minutes on a CPU teach it."""
        if total_bytes < 500_000:
            return cls(vocabulary=1024, hidden=128, layers=3, heads=2, inner=384)
        return cls()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What texts that the model has not seen take.

    Attributes:
        float_bits, bits: a byte, of the model of floats and of that in whole numbers.
    """

    documents: int
    texts: int
    bytes: int
    float_bits: float
    bits: float

    @property
    def loss(self) -> float:
        """Share by which whole numbers make them larger."""
        return self.bits / self.float_bits - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What `train_model` made.

    Attributes:
        id: of the model in `Shared`. folder: the same as a model of Hugging Face, in floats.
        file_bytes: of the model in `Shared`, once.
    """

    id: bytes
    folder: Path
    size: Size
    parameters: int
    file_bytes: int
    steps: int
    tokens: int
    train_s: float
    measured: Measured


def train_model(
    texts: Sequence[str],
    folder: Path,
    shared: Shared,
    *,
    documents: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    minutes: float = 5.0,
    steps: int | None = None,
    size: Size | None = None,
    hardware: HardwareAsk | None = None,
    seed: int = 3407,
    announce: Callable[[str], None] = _log.info,
    console: Console | None = None,
) -> Trained:
    """Trains a model on texts and keeps it.

    Args:
        folder: of the run, new; the model stays in it for other uses. shared: gets the model in whole numbers.
        documents: what each text belongs to; whole documents are held out. None: each is one of its own.
        kinds: of each text. minutes: of training, about; the speed is measured before. steps: of training, and not so many minutes.
        size: None: what suits the texts. hardware: where it trains; None: as `pantheraml train` would choose.
        announce: hears what is done. console: shows the progress of the training; None: nobody sees it.
    Raises: DataError if there is too little text; as `trainer.run.train`.
    """
    names = [str(i) for i in range(len(texts))] if documents is None else documents
    learned, held = _split(names, seed)
    total_bytes = sum(len(texts[i].encode("utf-8", "replace")) for i in learned)
    if total_bytes < LEAST_BYTES or not held:
        raise DataError(
            f"{total_bytes:,} bytes of text in {len(set(names))} documents are too little to train a model on",
            why=f"it learns from {LEAST_BYTES:,} bytes on, in two documents or more: one is held out to see what it is worth",
            fix="put more records first; until then the zstd codec keeps them as small",
        )
    size = size or Size.for_texts(total_bytes)
    clean = [text.encode("utf-8", "replace").decode() for text in texts]
    rows = [{"text": clean[i]} for i in _balanced(learned, clean, kinds)]
    random.Random(seed).shuffle(rows)
    announce(f"{len(learned)} texts ({total_bytes:,} bytes) teach a model, {len(held)} of other documents measure it")
    folder.mkdir(parents=True, exist_ok=True)
    parameters = _make_base(clean, learned, size, folder / "base", seed)
    measured_on = random.Random(seed).sample(held, min(MOST_MEASURED, len(held)))
    run = _Training(folder, rows, [{"text": clean[i]} for i in measured_on], size, hardware or HardwareAsk(), seed, console)
    if steps is None:
        steps = run.steps_in(minutes)
    announce(f"{parameters:,} parameters train for {steps} steps, about {minutes:g} minutes")
    model, tokenizer, report = run.train(steps)
    tokens = Tokens.of(tokenizer.backend_tokenizer, begin=0, vocabulary=size.vocabulary)
    calibrated = random.Random(seed).sample(learned, min(MOST_CALIBRATED, len(learned)))
    data, measured = _in_whole_numbers(model, tokens, [clean[i] for i in calibrated], [clean[i] for i in measured_on], size.context)
    announce(
        f"{measured.bits:.3f} bits a byte on what it has not seen ({measured.float_bits:.3f} in floats); the model takes {len(data):,} bytes"
    )
    return Trained(
        id=shared.put(data, SUFFIX),
        folder=folder / "run" / "model",
        size=size,
        parameters=parameters,
        file_bytes=len(data),
        steps=steps,
        tokens=report["train"]["tokens"],
        train_s=report["train"]["train_s"],
        measured=measured,
    )

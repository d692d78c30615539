"""A small language model for the neural codec, made of the records that it will encode: by this project's own trainer.

train_model
  tokenizer          byte-level BPE of the training texts
  weights            a llama of a size that suits the texts, random
  Stages             trainer.run.train, several times, until the time is over
  calibrate          the same model in whole numbers
  measured           bits a byte on documents that were held out, of both
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from logging import getLogger
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pantheraml.errors import DataError
from pantheraml.hardware.device import Device
from pantheraml.hardware.find import find
from pantheraml.memory.calibrate import calibrate
from pantheraml.memory.integer_model import SUFFIX
from pantheraml.memory.integer_predictor import IntegerPredictor
from pantheraml.memory.predictor import as_inputs, windows
from pantheraml.memory.shared import Shared
from pantheraml.memory.stages import Stages, Texts
from pantheraml.memory.tokens import END, Tokens, train_tokenizer
from pantheraml.recipe.types import HardwareAsk, ModelSpec
from pantheraml.trainer.folder import MODEL

if TYPE_CHECKING:
    from rich.console import Console


LEAST_BYTES = 20_000
"""Of texts. Less than that teaches nothing that a dictionary of zstd does not hold."""
HELD_OUT = 0.05
"""Share of the documents that are measured on."""
MOST_MEASURED, MOST_CALIBRATED = 100, 48
"""Texts."""
TOKEN_CHARACTERS = 3
"""About. Longer texts are learned in pieces that the model sees as a whole."""
BASE = "base"
_log = getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of a model; stored, it has half as many bytes as parameters.

    Attributes:
        vocabulary: tokens. hidden, layers, heads, inner: sizes of a llama. groups: of heads that share keys and values.
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
    import torch

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
    pieces = [(piece, kinds[i] if kinds else "") for i in learned for piece in _pieces(clean[i], TOKEN_CHARACTERS * size.context)]
    announce(f"{len(learned)} texts ({total_bytes:,} bytes) teach a model, {len(held)} of other documents measure it")
    calibrated, measured_on = (
        random.Random(seed).sample(each, min(most, len(each))) for each, most in ((learned, MOST_CALIBRATED), (held, MOST_MEASURED))
    )
    before = torch.get_num_threads()  # a run of the trainer sets the number for the process
    try:
        parameters = _make_base(folder / BASE, [clean[i] for i in learned], size, seed)
        announce(f"{parameters:,} parameters learn")
        stages = Stages(
            folder,
            folder / BASE,
            Texts([piece for piece, _ in pieces], [kind for _, kind in pieces], seed),
            count=len(pieces),
            context=size.context,
            hardware=hardware or HardwareAsk(),
            seed=seed,
            console=console,
            announce=announce,
        )
        taught = stages.for_minutes(minutes) if steps is None else stages.for_steps(steps)
        model, tokens = _read(taught.folder / MODEL, size)
        device = find(hardware, training=False).device
        data, measured = _in_whole_numbers(model, tokens, [clean[i] for i in calibrated], [clean[i] for i in measured_on], device)
        measured = replace(measured, documents=len({names[i] for i in measured_on}))
    finally:
        torch.set_num_threads(before)
    announce(
        f"{measured.bits:.3f} bits a byte of texts that it has not seen ({measured.float_bits:.3f} in floats); it takes {len(data):,} bytes"
    )
    return Trained(
        id=shared.put(data, SUFFIX),
        folder=taught.folder / MODEL,
        size=size,
        parameters=parameters,
        file_bytes=len(data),
        steps=taught.steps,
        tokens=taught.tokens,
        train_s=taught.train_s,
        measured=measured,
    )


def _split(names: Sequence[str], seed: int) -> tuple[list[int], list[int]]:
    """Places of what is learned, and of what is held out: whole documents, a share of them and one at least."""
    known = sorted(set(names))
    random.Random(seed).shuffle(known)
    held = set(known[: max(1, round(HELD_OUT * len(known)))]) if len(known) > 1 else set[str]()
    return [i for i, name in enumerate(names) if name not in held], [i for i, name in enumerate(names) if name in held]


def _pieces(text: str, most: int) -> list[str]:
    """The text in parts of so many characters, without those that are white space alone."""
    return [piece for at in range(0, len(text), most) if (piece := text[at : at + most]).strip()]


def _make_base(folder: Path, texts: Sequence[str], size: Size, seed: int) -> int:
    """Writes the untrained model and its tokenizer, and gives its number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from pantheraml.export.safetensors import save_full

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(texts, size.vocabulary),
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.groups,
        head_dim=size.hidden // size.heads,
        max_position_embeddings=size.context,
        tie_word_embeddings=True,
        # Three times transformers' own for this width: after 700 steps texts take a tenth fewer bits.
        initializer_range=size.hidden**-0.5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    save_full(model, tokenizer, folder, verify=False)
    return sum(parameter.numel() for parameter in model.parameters())


def _read(folder: Path, size: Size) -> tuple[Any, Tokens]:
    """The trained model in float32 on the host, and its tokens."""
    import torch

    from pantheraml.models.load import load_model, load_tokenizer

    spec = ModelSpec(name=str(folder))
    model = load_model(spec, dtype=torch.float32, device=torch.empty(0).device)
    tokenizer: Any = load_tokenizer(spec)
    return model, Tokens.of(tokenizer.backend_tokenizer, begin=0, vocabulary=size.vocabulary)


def _in_whole_numbers(model: Any, tokens: Tokens, samples: Sequence[str], texts: Sequence[str], device: Device) -> tuple[bytes, Measured]:
    """The model's file, and what both models make of the texts."""
    made = calibrate(model, tokens, tokens.encode([text.encode() for text in samples]))
    contents = tokens.encode([text.encode() for text in texts])
    predictor = IntegerPredictor(made.to_bytes(), device)
    bits = sum(float(np.log2(total / width).sum()) for _, width, total in predictor.intervals(contents))
    total_bytes = sum(len(text.encode()) for text in texts)
    measured = Measured(
        documents=0,
        texts=len(texts),
        bytes=total_bytes,
        float_bits=sum(_float_bits(model, content, predictor.context) for content in contents) / total_bytes,
        bits=bits / total_bytes,
    )
    return replace(made, measured={"bits": round(measured.bits, 4), "float_bits": round(measured.float_bits, 4)}).to_bytes(), measured


def _float_bits(model: Any, content: np.ndarray, context: int) -> float:
    """What a content takes by the model of floats, in the same windows."""
    import torch

    bits, inputs = 0.0, torch.from_numpy(as_inputs(content, 0)).long()[None]
    for start, stop, skip in windows(len(content), context):
        with torch.inference_mode():
            likely = model(input_ids=inputs[:, start:stop]).logits[0, skip:].double().log_softmax(-1)
        wanted = torch.from_numpy(content[start + skip : stop]).long()[:, None]
        bits -= float(likely.gather(1, wanted).sum()) / log(2)
    return bits

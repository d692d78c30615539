"""A language model in whole numbers: what it consists of, its file (.nbm), and the tables that follow from it.

Nothing here computes with floats, so that every reader comes to the same tables. docs/nbmf.md says how they are used.
Letters: V vocabulary, D hidden, L layers, H heads, G groups of them that share keys and values, E a head's size, I inner size of an MLP.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from math import isqrt
from typing import Any

import numpy as np

from pantheraml.errors import MissingExtra, StorageError
from pantheraml.memory.tokens import Tokens

SUFFIX = "nbm"
VERSION = 1
LARGEST_FILE = 1 << 30
"""Bytes, once it is decompressed."""
LARGEST_ACTIVATION = 127
LARGEST_OUTPUT = (1 << 15) - 1
"""Of a linear layer; beyond that it stays there."""
LARGEST_SUM = (1 << 20) - 1
"""The same of what layers add up to."""
LONGEST_CONTEXT = 512
"""Sums over so many values with weights of eight bits stay below 2**24, where float32 is exact."""
LARGEST_HEAD = 128

SINE_STEPS = SILU_STEPS = 4096
PEAK_BITS = 14
ROPE_SHIFT, VALUE_SHIFT, GAIN_BITS = 20, 6, 17
SCORE_OCTAVE, LOGIT_OCTAVE = 32, 64
"""Steps in which a weight of attention, and a frequency, becomes half."""
FREQUENCY_BITS = 30
SCORE_STEPS, LOGIT_STEPS = 10 * SCORE_OCTAVE, (FREQUENCY_BITS + 1) * LOGIT_OCTAVE


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a model; see the letters above."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    groups: int
    head: int
    inner: int
    context: int

    @property
    def row(self) -> int:
        """Outputs of queries, keys and values together."""
        return (self.heads + 2 * self.groups) * self.head

    @property
    def vocabulary_bits(self) -> int:
        """Bits of the largest token's number."""
        return (self.vocabulary - 1).bit_length()

    @property
    def square_shift(self) -> int:
        """Bits that what is squared loses, so that D squares are below 2**31."""
        return 4 + max(0, (self.hidden - 1).bit_length() - 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """y = (W x * scale + bias) >> shift, for whole numbers x of at most `LARGEST_ACTIVATION`.

    Attributes:
        weight: int8 [O, I]. scale: uint16 [O]. bias: int32 [O], which rounds as well.
    """

    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    shift: int

    def scaled(self) -> np.ndarray:
        """int64 [O, I]: weights times their scales."""
        return self.weight.astype(np.int64) * self.scale.astype(np.int64)[:, None]

    def fault(self) -> str | None:
        """What of it could leave 32 bits; None: nothing."""
        sums = np.abs(self.scaled()).sum(1) * LARGEST_ACTIVATION
        worst = int((sums + np.abs(self.bias.astype(np.int64))).max())
        return f"sums up to {worst:,}" if worst >= 1 << 31 or not 1 <= self.shift <= 30 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """What is divided by its root mean square, in steps of which `square` and `shift` tell the size; see `root_table`."""

    square: int
    shift: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer.

    Attributes:
        score: uint8 [H], 128 to 255, and score_shift: uint8 [H]: make scores of heads to steps of `SCORE_OCTAVE`.
        gain: of what attention gives, in parts of 2**GAIN_BITS. gated_shift: of the gate times what it lets through.
    """

    attention_norm: Norm
    qkv: Linear
    score: np.ndarray
    score_shift: np.ndarray
    gain: int
    out: Linear
    mlp_norm: Norm
    gate_up: Linear
    gated_shift: int
    down: Linear


@dataclass(frozen=True, kw_only=True)
class IntegerModel:
    """All of it.

    Attributes:
        embedding: int8 [V, D] and embedding_scale: uint16 [V]; None: those of the head.
        embedding_gain: int16 [D]; embedding_shift: x = (weight * scale * gain + half) >> shift.
        phases: uint32 [E / 2], of a full turn in 2**32, by which each pair of a head is turned at each position.
        sine: int16 [SINE_STEPS], of a full turn, in parts of 2**14. silu: int16 [SILU_STEPS], the gate of -2048 .. 2047.
        measured: bits a byte when it was made, and the like; for people.
    """

    shape: Shape
    embedding: np.ndarray | None
    embedding_scale: np.ndarray | None
    embedding_gain: np.ndarray
    embedding_shift: int
    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear
    phases: np.ndarray
    sine: np.ndarray
    silu: np.ndarray
    tokens: Tokens
    measured: dict[str, Any] = field(default_factory=dict[str, Any])

    def embedded(self) -> np.ndarray:
        """int32 [V, D]: what each token begins with."""
        weight, scale = (self.head.weight, self.head.scale) if self.embedding is None else (self.embedding, self.embedding_scale)
        assert scale is not None
        gained = weight.astype(np.int64) * scale.astype(np.int64)[:, None] * self.embedding_gain
        return np.clip(gained + (1 << (self.embedding_shift - 1)) >> self.embedding_shift, -LARGEST_SUM, LARGEST_SUM).astype(np.int32)

    @cached_property
    def turns(self) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines int32 [context, E / 2], in parts of 2**14, of the nearest of SINE_STEPS."""
        angle = np.arange(self.shape.context, dtype=np.uint64)[:, None] * self.phases.astype(np.uint64)[None]
        step = ((angle + (1 << 19)) >> 20).astype(np.int64) % SINE_STEPS
        return self.sine[(step + SINE_STEPS // 4) % SINE_STEPS].astype(np.int32), self.sine[step].astype(np.int32)

    def to_bytes(self) -> bytes:
        """The file: safetensors, with the sizes and shifts as JSON under "nbm"; all of it compressed by zstd."""
        from safetensors.numpy import save

        arrays = self.tokens.to_arrays() | {
            "phases": self.phases,
            "sine": self.sine,
            "silu": self.silu,
            "embedding.gain": self.embedding_gain,
        }
        if self.embedding is not None and self.embedding_scale is not None:
            arrays |= {"embedding.weight": self.embedding, "embedding.scale": self.embedding_scale}
        said: dict[str, Any] = {"version": VERSION, "shape": asdict(self.shape), "embedding_shift": self.embedding_shift}
        said |= {"head": _taken("head", self.head, arrays), "norm": asdict(self.norm), "measured": self.measured, "layers": []}
        for i, layer in enumerate(self.layers):
            said["layers"].append(_taken(f"layers.{i}", layer, arrays))
        return _zstandard().ZstdCompressor(level=19).compress(save(arrays, metadata={"nbm": json.dumps(said, sort_keys=True)}))

    @classmethod
    def from_bytes(cls, data: bytes) -> IntegerModel:
        """What `to_bytes` wrote, checked: no sum of it can leave 32 bits, whatever text comes. Raises: StorageError if it is none."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        zstandard = _zstandard()
        try:
            if zstandard.get_frame_parameters(data).content_size > LARGEST_FILE:
                raise _damaged(f"it says that it holds more than {LARGEST_FILE:,} bytes")
            data = zstandard.ZstdDecompressor().decompress(data)
            length = int.from_bytes(data[:8], "little")
            said = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["nbm"])
            if said["version"] != VERSION:
                raise _damaged(f"its version is {said['version']}, and this program reads {VERSION}")
            arrays = load(data)
            model = cls(
                shape=Shape(**said["shape"]),
                embedding=arrays.get("embedding.weight"),
                embedding_scale=arrays.get("embedding.scale"),
                embedding_gain=arrays["embedding.gain"],
                embedding_shift=said["embedding_shift"],
                layers=tuple(_layer(f"layers.{i}", each, arrays) for i, each in enumerate(said["layers"])),
                norm=Norm(**said["norm"]),
                head=_linear("head", said["head"], arrays),
                phases=arrays["phases"],
                sine=arrays["sine"],
                silu=arrays["silu"],
                tokens=Tokens.from_arrays(arrays),
                measured=said["measured"],
            )
        except (ValueError, KeyError, TypeError, SafetensorError, RecursionError, zstandard.ZstdError) as error:
            raise _damaged(f"{type(error).__name__}: {error}") from error
        if fault := model.fault():
            raise _damaged(fault)
        return model

    def fault(self) -> str | None:
        """What of it no program writes; None: it is sound."""
        s = self.shape
        if not (
            0 < s.context <= LONGEST_CONTEXT
            and s.head <= LARGEST_HEAD
            and s.head % 2 == 0
            and s.heads % s.groups == 0
            and len(self.layers) == s.layers
            and s.vocabulary > 1
        ):
            return f"its sizes cannot be: {s}"
        linears: list[tuple[str, Linear, tuple[int, int]]] = [("head", self.head, (s.vocabulary, s.hidden))]
        for i, layer in enumerate(self.layers):
            sizes = ((s.row, s.hidden), (s.hidden, s.heads * s.head), (2 * s.inner, s.hidden), (s.hidden, s.inner))
            named = zip(("qkv", "out", "gate_up", "down"), (layer.qkv, layer.out, layer.gate_up, layer.down), sizes, strict=True)
            linears += [(f"layer {i} {name}", each, size) for name, each, size in named]
            scores = layer.score.shape == layer.score_shift.shape == (s.heads,) and layer.score.min() >= 128
            if not scores or layer.score_shift.min() < 1 or layer.score_shift.max() > 20 or not 0 < layer.gain < 16 << GAIN_BITS:
                return f"the scores of layer {i} cannot be"
            if not 1 <= layer.gated_shift <= 28:
                return f"a shift of layer {i} cannot be"
        for name, linear, size in linears:
            if (
                linear.weight.shape != size
                or linear.weight.dtype != np.int8
                or linear.scale.shape != size[:1]
                or linear.bias.shape != size[:1]
            ):
                return f"{name} has the shape {linear.weight.shape}, not {size}"
            if said := linear.fault():
                return f"{name} has {said}"
        for norm in (self.norm, *(each for layer in self.layers for each in (layer.attention_norm, layer.mlp_norm))):
            if not (0 < norm.square < 1 << 42 and 1 <= norm.shift <= 20):
                return "a norm cannot be"
        weight = self.head.weight if self.embedding is None else self.embedding
        if weight.shape != (s.vocabulary, s.hidden) or self.embedding_gain.shape != (s.hidden,) or not 1 <= self.embedding_shift <= 30:
            return "its embedding cannot be"
        if (
            len(self.tokens) != s.vocabulary
            or self.phases.shape != (s.head // 2,)
            or len(self.sine) != SINE_STEPS
            or len(self.silu) != SILU_STEPS
        ):
            return "a table has another size"
        return None


def halves(bits: int, octave: int, steps: int) -> np.ndarray:
    """int64 [steps]: the whole part of 2**(bits - i / octave), where octave is a power of two. Exact: roots of whole numbers."""
    table = []
    for i in range(steps):
        root = 1 << bits * octave - i if bits * octave >= i else 0
        for _ in range(octave.bit_length() - 1):
            root = isqrt(root)
        table.append(root)
    return np.array(table, np.int64)


def weights_of_scores() -> np.ndarray:
    """int32 [SCORE_STEPS]: 255 * 2**(-i / SCORE_OCTAVE), rounded; the last is 0."""
    fine = 24
    table = (255 * halves(fine, SCORE_OCTAVE, SCORE_STEPS) + (1 << (fine - 1))) >> fine
    assert table[-1] == 0
    return table.astype(np.int32)


def likelihoods() -> np.ndarray:
    """int32 [LOGIT_STEPS]: of a token so many steps below the likeliest, which has 2**FREQUENCY_BITS; the last is 0."""
    return halves(FREQUENCY_BITS, LOGIT_OCTAVE, LOGIT_STEPS).astype(np.int32)


def root_table(norm: Norm) -> np.ndarray:
    """int32 [4096]: the whole part of sqrt(square / m), for m of 0 (as for 1) to 4095."""
    return np.array([isqrt(norm.square // max(1, m)) for m in range(4096)], np.int32)


def _taken(name: str, part: Any, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The numbers of a part; its arrays go to `arrays`."""
    said: dict[str, Any] = {}
    for each in fields(part):
        value = getattr(part, each.name)
        if isinstance(value, np.ndarray):
            arrays[f"{name}.{each.name}"] = value
        else:
            said[each.name] = value if isinstance(value, int) else _taken(f"{name}.{each.name}", value, arrays)
    return said


def _linear(name: str, said: dict[str, Any], arrays: dict[str, np.ndarray]) -> Linear:
    return Linear(weight=arrays[f"{name}.weight"], scale=arrays[f"{name}.scale"], bias=arrays[f"{name}.bias"], shift=said["shift"])


def _layer(name: str, said: dict[str, Any], arrays: dict[str, np.ndarray]) -> Layer:
    return Layer(
        attention_norm=Norm(**said["attention_norm"]),
        qkv=_linear(f"{name}.qkv", said["qkv"], arrays),
        score=arrays[f"{name}.score"],
        score_shift=arrays[f"{name}.score_shift"],
        gain=said["gain"],
        out=_linear(f"{name}.out", said["out"], arrays),
        mlp_norm=Norm(**said["mlp_norm"]),
        gate_up=_linear(f"{name}.gate_up", said["gate_up"], arrays),
        gated_shift=said["gated_shift"],
        down=_linear(f"{name}.down", said["down"], arrays),
    )


def _damaged(what: str) -> StorageError:
    return StorageError(
        f"a model of the neural codec cannot be read: {what}",
        why="what it has encoded cannot be decoded without it",
        fix="`pantheraml memory verify` names damaged files; restore the model (.nbm) from its copy or a backup",
    )


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtra("zstandard", needed_for="a model of the neural codec", install="'pantheraml[memory]'") from error
    return zstandard

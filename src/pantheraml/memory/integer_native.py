"""The arithmetic of an `IntegerModel` by a compiled kernel for processors: the same whole numbers as `Network`, in one call for all layers.

Letters: B rows, S tokens of a window, T of them that are asked about, V vocabulary; the others as in integer_model.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pantheraml.memory.integer_model import IntegerModel, Linear, Norm, likelihoods, root_table, weights_of_scores

if TYPE_CHECKING:
    from ctypes import CDLL

_LANES, _QUAD = 16, 4
Cache = tuple[np.ndarray, np.ndarray]
"""Keys and values of some rows."""


class NativeNetwork:
    """An `IntegerModel` as integer_cpu.cpp reads it.

    Args:
        library: the kernels, see kernels/native.py.
    """

    def __init__(self, model: IntegerModel, library: CDLL) -> None:
        from ctypes import c_int64, c_void_p

        shape = self.shape = model.shape
        self.begin = model.tokens.begin
        self._kept: list[np.ndarray] = []
        """Arrays whose addresses the kernel has."""
        cosines, sines = model.turns
        words = [shape.vocabulary, shape.hidden, shape.heads, shape.groups, shape.head, shape.inner]
        words += [shape.square_shift, shape.vocabulary_bits, *map(self._at, (model.embedded(), cosines, sines, model.silu))]
        words += [self._at(weights_of_scores()), self._at(likelihoods()), *self._norm(model.norm), *self._linear(model.head), shape.layers]
        for each in model.layers:
            words += [
                *self._norm(each.attention_norm),
                *self._linear(each.qkv),
                self._at(each.score),
                self._at(each.score_shift),
                each.gain,
            ]
            words += [*self._linear(each.out), *self._norm(each.mlp_norm), *self._linear(each.gate_up), each.gated_shift]
            words += self._linear(each.down)
        self._words = np.array(words, np.int64)
        self._windows, self._step = library.integer_windows, library.integer_step
        number, place = c_int64, c_void_p
        self._windows.argtypes = [place, place, number, number, place, place, *[number] * 3, place, number, place]
        self._step.argtypes = [place, place, number, number, place, place, *[number] * 3, place]
        self._windows.restype = self._step.restype = None
        self.places, self.wide = _padded(shape.context, _LANES), _padded(shape.head, _LANES)

    def cache(self, rows: int) -> Cache:
        """Room for keys and values, uint8 and int8 [L, B, ..]."""
        layers, one = self.shape.layers, self.shape.groups * self.places
        keys = np.zeros((layers, rows, one * _padded(self.shape.head, _QUAD)), np.uint8)
        return keys, np.zeros((layers, rows, one * self.wide), np.int8)

    def intervals(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """See `Network.intervals`: int32 [3, B, T] for tokens int32 [B, S] and targets int32 [B, T]."""
        found = np.empty((3, *targets.shape), np.int32)
        self._read(tokens, targets, found, self.cache(len(tokens)))
        return found

    def refill(self, tokens: np.ndarray, cache: Cache) -> None:
        """Keys and values of windows that begin with these tokens, int32 [B, S]."""
        nothing = np.empty((len(tokens), 0), np.int32)
        self._read(tokens, nothing, nothing, cache)

    def _read(self, tokens: np.ndarray, targets: np.ndarray, found: np.ndarray, cache: Cache) -> None:
        tokens, targets = np.ascontiguousarray(tokens, np.int32), np.ascontiguousarray(targets, np.int32)
        keys, values = cache
        where = (keys.ctypes.data, values.ctypes.data, keys.shape[1], self.places, self.wide)
        asked = (targets.ctypes.data, targets.shape[1], found.ctypes.data)
        self._windows(self._words.ctypes.data, tokens.ctypes.data, *tokens.shape, *where, *asked)

    def step(self, tokens: np.ndarray, place: int, cache: Cache) -> np.ndarray:
        """Where the frequencies end behind one more token in each row, int32 [B] at a place of its window: int32 [B, V]."""
        import torch

        tokens, ends = np.ascontiguousarray(tokens, np.int32), np.empty((len(tokens), self.shape.vocabulary), np.int32)
        where = (*(each.ctypes.data for each in cache), self.places, self.wide)
        self._step(self._words.ctypes.data, tokens.ctypes.data, len(tokens), place, *where, torch.get_num_threads(), ends.ctypes.data)
        return ends

    def _at(self, values: np.ndarray) -> int:
        """The address of the same numbers in 32 bits."""
        self._kept.append(np.ascontiguousarray(values, np.int32))
        return self._kept[-1].ctypes.data

    def _norm(self, norm: Norm) -> list[int]:
        return [self._at(root_table(norm)), norm.shift]

    def _linear(self, linear: Linear) -> list[int]:
        """Blocks of 16 outputs, in which four weights of each stand together; what is added is 0."""
        outputs, inputs = linear.weight.shape
        blocks, quads = _padded(outputs, _LANES) // _LANES, _padded(inputs, _QUAD) // _QUAD
        weight = np.zeros((blocks * _LANES, quads * _QUAD), np.int8)
        weight[:outputs, :inputs] = linear.weight
        packed = np.ascontiguousarray(weight.reshape(blocks, _LANES, quads, _QUAD).transpose(0, 2, 1, 3))
        self._kept.append(packed)
        more = (0, len(weight) - outputs)
        rows = [np.pad(each.astype(np.int32), more) for each in (linear.scale, linear.bias)]
        rows.append(128 * weight.sum(1, dtype=np.int32))
        return [packed.ctypes.data, *map(self._at, rows), inputs, outputs, linear.shift]


class NativeState:
    """See `predictor.State`."""

    def __init__(self, network: NativeNetwork, rows: int) -> None:
        self._network = network
        self._cache = network.cache(rows)
        self._window = np.zeros((rows, network.shape.context), np.int32)
        self._place = 0
        self._ends = np.zeros((rows, 0), np.int32)
        self.totals = np.zeros(0, np.int64)
        self.advance(np.full(rows, network.begin))

    def find(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `State.find`."""
        rows, wanted = np.arange(len(targets)), targets.astype(np.int32)
        token = np.array([ends.searchsorted(each, "right") for ends, each in zip(self._ends, wanted, strict=True)])
        start = np.where(token > 0, self._ends[rows, token - 1], 0).astype(np.int64)
        return token, start, self._ends[rows, token] - start

    def advance(self, tokens: np.ndarray) -> None:
        """See `State.advance`."""
        context = self._window.shape[1]
        if self._place == context:
            self._place = context - context // 2
            self._window[:, : self._place] = self._window[:, context // 2 :].copy()
            self._network.refill(self._window[:, : self._place], self._cache)
        self._window[:, self._place] = tokens
        self._ends = self._network.step(self._window[:, self._place], self._place, self._cache)
        self._place += 1
        self.totals = self._ends[:, -1].astype(np.int64)

    def keep(self, rows: Sequence[int]) -> None:
        """See `State.keep`."""
        chosen = list(rows)
        keys, values = self._cache
        self._cache = np.ascontiguousarray(keys[:, chosen]), np.ascontiguousarray(values[:, chosen])
        self._window, self._ends, self.totals = self._window[chosen], self._ends[chosen], self.totals[chosen]


def _padded(size: int, to: int) -> int:
    return -(-size // to) * to


def open_native(model: IntegerModel, network: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> NativeNetwork | None:
    """The kernel, if it is here or can be built, and comes to the same `intervals` as a network of whose sums somebody has looked."""
    from pantheraml.hardware.settings import read_settings
    from pantheraml.kernels import native

    native.prepare(read_settings().cache)
    library = native.opened()
    if library is None:
        return None
    made, length, draw = NativeNetwork(model, library), min(model.shape.context, 64), np.random.default_rng(0)
    tokens, targets = (draw.integers(0, model.shape.vocabulary, (3, each)).astype(np.int32) for each in (length, length // 2))
    return made if np.array_equal(made.intervals(tokens, targets), network(tokens, targets)) else None

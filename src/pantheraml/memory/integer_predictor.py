"""An `IntegerModel` on a device: frequencies that are the same on every device, in any batch.

Letters: R rows, T tokens of a content, V vocabulary; the others as in integer_network.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import blake3
import numpy as np

from pantheraml.errors import DeviceError
from pantheraml.hardware.backend import Backend, backend_of
from pantheraml.hardware.device import Device
from pantheraml.kernels.native import why_not
from pantheraml.memory.container import NEURAL
from pantheraml.memory.integer_model import IntegerModel
from pantheraml.memory.integer_native import NativeState, open_native
from pantheraml.memory.integer_network import HIDDEN, Network, Products, Way
from pantheraml.memory.predictor import State, as_inputs, windows
from pantheraml.memory.record import Origin
from pantheraml.memory.shared import ID_BYTES
from pantheraml.memory.tokens import Tokens
from pantheraml.recipe.kinds import in_host_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MEMORY_SHARE = 4
"""A batch takes a fourth of the memory that is free at most."""
_MOST_TOKENS, _MOST_ROWS = 1 << 16, 1024
_MOST_TOKENS_CPU, _MOST_ROWS_CPU = 1024, 256
"""What lies between the layers of so many tokens stays in the caches of a core."""


class IntegerPredictor:
    """A `predictor.Predictor` that gives the same frequencies everywhere.

    Args:
        data: a model's file (.nbm). device: of any kind that was found.
        way: how it computes, see integer_network.py; None: the fastest that is exact here.
        memory_bytes: that a batch may take; None: a fourth of what is free on the device.
    Raises: StorageError if the file is damaged; DeviceError if no way to compute products is exact on the device.
    """

    number = NEURAL

    def __init__(self, data: bytes, device: Device, *, way: Way | None = None, memory_bytes: int | None = None) -> None:
        import torch

        self.model = IntegerModel.from_bytes(data)
        self.fingerprint = blake3.blake3(data).digest(ID_BYTES)
        self.device = device
        backend = backend_of(device)
        self._compiled = backend.engine == "xla"
        here = torch.empty(0).device if self._compiled else backend.torch_device(device.index)
        self._call = _compiled(device) if self._compiled else _on(here)
        native = in_host_memory(device.kind) and not self._compiled and way in (None, "native")
        wanted = (way,) if way and way != "native" else _ways(backend)
        network = next((each for way in wanted if (each := self._exact(here, way))), None)
        if network is None:
            raise DeviceError(
                f"{device} does not compute exact sums of whole numbers ({', '.join(wanted)})",
                why="what one device encodes another must decode, so that not one bit may differ",
                fix="use another device: the cpu always can",
            )
        self._network = network
        self._native = open_native(self.model, self._read) if native else None
        if way == "native" and self._native is None:
            raise DeviceError(
                f"{device} has no kernel for models in whole numbers",
                why=why_not() or "it came to other numbers than torch",
                fix="leave the way open: torch computes the same, only slower",
            )
        shape = self.model.shape
        free = backend.memory(device.index).free_bytes if memory_bytes is None else memory_bytes * _MEMORY_SHARE
        room = (free or 1 << 30) // _MEMORY_SHARE
        widest = 4 * max(shape.vocabulary, shape.heads * shape.context, 2 * shape.inner)
        cpu = in_host_memory(device.kind)
        self._tokens_at_once = max(shape.context, min(_MOST_TOKENS_CPU if cpu else _MOST_TOKENS, room // (5 * widest)))
        per_row = 2 * shape.layers * shape.groups * shape.head * shape.context * network.floats.itemsize + 5 * widest
        self.rows = max(1, min(_MOST_ROWS_CPU if cpu else _MOST_ROWS, room // per_row))

    @property
    def tokens(self) -> Tokens:
        """Of the model."""
        return self.model.tokens

    @property
    def context(self) -> int:
        """Tokens of a window."""
        return self.model.shape.context

    def origin(self, batch: int) -> Origin:
        """The device, and how products are computed there."""
        return Origin(kind=self.device.kind, name=self.device.label, dtype="int8" if self._native else self._network.products, batch=batch)

    def intervals(self, contents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Predictor.intervals`: all tokens of a window at once, windows of about the same length together."""
        found = [np.zeros((3, len(each)), np.int64) for each in contents]
        cuts = [_Window(i, *cut) for i, each in enumerate(contents) if len(each) for cut in windows(len(each), self.context)]
        for batch in self._batches(cuts):
            longest = max(each.stop - each.start for each in batch)
            rows, length, skip = len(batch), longest, batch[0].skip
            if self._compiled:
                length = min(self.context, max(16, 1 << (longest - 1).bit_length()))
                rows = max(1, self._tokens_at_once // length)
            tokens, targets = np.zeros((rows, length), np.int32), np.zeros((rows, length - skip), np.int32)
            for row, each in enumerate(batch):
                content = contents[each.content]
                tokens[row, : each.stop - each.start] = as_inputs(content, self.tokens.begin)[each.start : each.stop]
                targets[row, : each.stop - each.start - skip] = content[each.start + skip : each.stop]
            said = self._native.intervals(tokens, targets) if self._native else self._read(tokens, targets)
            for row, each in enumerate(batch):
                found[each.content][:, each.start + skip : each.stop] = said[:, row, : each.stop - each.start - skip]
        return found

    def _read(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """`Network.intervals`, from the host and back to it."""
        net = self._network
        return self._call(net.intervals, net.tensors, _tensor(tokens), _tensor(targets), net.hidden(tokens.shape[1], 0)).cpu().numpy()

    def begin(self, rows: int) -> State:
        """See `Predictor.begin`."""
        if self._native:
            return NativeState(self._native, rows)
        return IntegerState(self._network, self._call, rows, static=self._compiled)

    def _batches(self, cuts: list[_Window]) -> Iterator[list[_Window]]:
        """Of the same skip, together no more tokens than are taken at once."""
        batch: list[_Window] = []
        for each in sorted(cuts, key=lambda cut: (cut.skip, cut.start - cut.stop)):
            longest = batch[0].stop - batch[0].start if batch else 0
            if batch and (each.skip != batch[0].skip or (len(batch) + 1) * longest > self._tokens_at_once):
                yield batch
                batch = []
            batch.append(each)
        if batch:
            yield batch

    def _exact(self, here: torch.device, products: Products) -> Network | None:
        """The network, if sums with the model's own weights come out right, those as large as they get among them."""
        import torch

        draw, parts = np.random.default_rng(0), {"head": self.model.head}
        for i, layer in enumerate(self.model.layers[:1]):
            parts |= {f"{i}.qkv": layer.qkv, f"{i}.down": layer.down}
        try:
            network = Network(self.model, here, products)
            for name, linear in parts.items():
                signs = np.sign(linear.weight[np.abs(linear.weight.astype(np.int64)).sum(1).argmax()]).astype(np.int64)
                inputs = np.concatenate([[127 * signs, -127 * signs], draw.integers(-127, 128, (30, len(signs)))])
                expected = torch.from_numpy(inputs @ linear.weight.astype(np.int64).T)
                found = self._call(network.product, _tensor(inputs), network.tensors[f"{name}.weight"])
                if not torch.equal(found.cpu().long(), expected):
                    return None
        except (RuntimeError, TypeError, NotImplementedError):  # as devices say that they have no such numbers
            return None
        return network


@dataclass(frozen=True, slots=True)
class _Window:
    """Of a content, by its place among them; see `windows`."""

    content: int
    start: int
    stop: int
    skip: int


class IntegerState:
    """See `predictor.State`. Keys and values lie on the device; where shapes are static, on the host, with room for the whole window."""

    def __init__(self, network: Network, call: Callable[..., Any], rows: int, *, static: bool) -> None:
        import torch

        self._network, self._call, self._static = network, call, static
        shape = network.model.shape
        self._past = torch.zeros(
            2, shape.layers, rows, shape.groups, shape.context, shape.head, dtype=network.floats, device=network.device
        )
        self._window = np.zeros((rows, shape.context), np.int32)
        self._place = 0
        self._alive = np.arange(rows)
        """Which rows somebody still reads. Where shapes are static the others are computed on."""
        self._ends: Any = None
        self.totals = np.zeros(0, np.int64)
        self.advance(np.full(rows, network.model.tokens.begin))

    def find(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `State.find`."""
        import torch

        wanted = torch.from_numpy(targets.astype(np.int32))[:, None].to(self._ends.device)
        token = (self._ends <= wanted).sum(-1, keepdim=True)
        stop = self._ends.gather(1, token)
        start = self._ends.gather(1, (token - 1).clamp(min=0)) * (token > 0)
        found = torch.cat([token, start, stop - start], 1).cpu().numpy().astype(np.int64)
        return found[:, 0], found[:, 1], found[:, 2]

    def advance(self, tokens: np.ndarray) -> None:
        """See `State.advance`."""
        context = self._window.shape[1]
        if self._place == context:
            self._place = context - context // 2
            self._window[:, : self._place] = self._window[:, context // 2 :].copy()
            self._refill()
        self._window[self._alive, self._place] = tokens
        self._ends = self._step()
        self._place += 1
        self.totals = self._ends[:, -1].cpu().numpy().astype(np.int64)

    def keep(self, rows: Sequence[int]) -> None:
        """See `State.keep`."""
        import torch

        chosen = list(rows)
        self._ends = self._ends.index_select(0, torch.tensor(chosen, device=self._ends.device))
        self.totals = self.totals[chosen]
        if self._static:
            self._alive = self._alive[chosen]
            return
        self._past = self._past.index_select(2, torch.tensor(chosen, device=self._past.device))
        self._window, self._alive = self._window[chosen], np.arange(len(chosen))

    def _step(self) -> Tensor:
        """Where the frequencies behind the newest token end, int32 [R, V] of the rows that somebody reads."""
        import torch

        net, place = self._network, self._place
        shape = net.model.shape
        seen = self._past.view(2, shape.layers, -1, shape.context, shape.head)
        mask = None
        if self._static:
            mask = net.hidden(1, shape.context)
            mask[:, place:-1] = HIDDEN
        else:
            seen = seen[:, :, :, :place]
        tokens, start = _tensor(self._window[:, place : place + 1]), _tensor(np.array([place]))
        ends, keys, values = self._call(net.step, net.tensors, tokens, start, mask, seen[0], seen[1])
        self._write(keys, values, place, 0)
        return ends.index_select(0, torch.from_numpy(self._alive).to(ends.device)) if self._static else ends

    def _refill(self) -> None:
        """Keys and values of the tokens with which a window begins, of a few rows at once."""
        net, length, rows = self._network, self._place, len(self._window)
        at_once = max(1, _MOST_TOKENS_CPU // length)
        for at in range(0, rows, at_once):
            tokens = self._window[at : at + at_once, :length]
            if self._static:
                tokens = np.pad(tokens, ((0, at_once - len(tokens)), (0, 0)))
            args = (_tensor(tokens), _tensor(np.zeros(1)), net.hidden(length, 0), None, 0)
            _, keys, values = self._call(net.frequencies, net.tensors, *args)
            self._write(keys, values, 0, at)

    def _write(self, keys: Tensor, values: Tensor, place: int, row: int) -> None:
        """Those [L, rows * G, S, E] of S tokens from a place on, of some rows."""
        layers, rows, groups = self._past.shape[1:4]
        for past, new in zip(self._past, (keys, values), strict=True):
            new = new.view(layers, -1, groups, *new.shape[2:])[:, : rows - row].to(past.device)
            past[:, row : row + new.shape[1], :, place : place + new.shape[3]] = new


def _tensor(values: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values, np.int32))


def _ways(backend: Backend) -> tuple[Products, ...]:
    """How products can be computed, the fastest first. Processors that have no instructions for it may cut sums of int8 at 16 bits."""
    if backend.engine != "torch":
        return ("float32",)
    int8: tuple[Products, ...] = ("int8",) if in_host_memory(backend.kind) and "int8" in backend.quantizers else ()
    return (*int8, "float32", "float64")


def _on(device: torch.device) -> Callable[..., Any]:
    """What calls a function with its tensors on a device of torch."""
    import torch

    def call(function: Callable[..., Any], *args: Any) -> Any:
        with torch.inference_mode():
            return function(*(each.to(device) if isinstance(each, torch.Tensor) else each for each in args))

    return call


def _compiled(device: Device) -> Callable[..., Any]:
    """What calls a function compiled by XLA, from the host and back to it."""
    from pantheraml.engines.xla_optimizer import XLAOptimizer

    optimizer, lock = XLAOptimizer(simulate=device.simulated), threading.Lock()

    def call(function: Callable[..., Any], *args: Any) -> Any:
        with lock:  # torch's functions stand for other ones while a function is traced
            return optimizer.compile(function)(*args)

    return call

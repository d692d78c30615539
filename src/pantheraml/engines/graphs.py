"""Forward and backward of a micro-batch recorded once a shape, and replayed: the host says one thing instead of thousands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pantheraml.data.pack import next_length
from pantheraml.engines.engine import MicroTensors
from pantheraml.hardware.backend import Recorder

MOST_SHAPES = 32
TOLERANCE = 1e-2
"""How far a recording's loss, and its gradients in the 2-norm, may be from the usual ones: attention's gradient on a GPU adds up in
another order each time, in bfloat16."""

Compute = Callable[[MicroTensors, Tensor], Tensor]
"""(batch, divisor) -> the sum of its losses; the gradients of it / divisor were added to those that are there."""


@dataclass(frozen=True, slots=True)
class _Recording:
    """What it reads, where its result stands, and what runs it."""

    batch: MicroTensors
    divisor: Tensor
    loss: Tensor
    replay: Callable[[], None]

    def run(self, batch: MicroTensors, divisor: Tensor) -> Tensor:
        for mine, given in zip(_tensors(self.batch), _tensors(batch), strict=True):
            mine.copy_(given)
        self.divisor.copy_(divisor)
        self.replay()
        return self.loss


class Graphs:
    """Recordings by shape. A shape is computed as usual when it comes first, recorded when it comes again, and then replayed.

    A recording must first come to the loss and the gradients that the usual way came to with the same micro-batch; that
    waits for the device, once a shape. If it does not, or cannot be made, nothing is recorded from then on. Nothing random may be in
    it, and nothing that the host decides by what stands in a batch: with another batch of the same shape that would not be found out.

    Args:
        record: see `Backend.recorder`.

    Attributes:
        trouble: why nothing is recorded any more. recorded: shapes so far. replayed, usual: micro-batches computed this way and that.
    """

    def __init__(self, record: Recorder) -> None:
        self._record = record
        self._recordings: dict[tuple[object, ...], _Recording] = {}
        self._seen: set[tuple[object, ...]] = set()
        self._gradients: Tensor | None = None
        self.trouble: str | None = None
        self.recorded = self.replayed = self.usual = 0

    def forget(self) -> None:
        """Let go of all recordings and their memory, as what they read or write is no longer there."""
        self._recordings.clear()
        self._seen.clear()
        self._gradients = None

    def stop(self, why: str) -> str | None:
        """Record and replay nothing from here on, and say so; None: that is so already."""
        if self.trouble is not None:
            return None
        self.trouble = why
        self.forget()
        return "without recorded steps"

    def backward(self, batch: MicroTensors, divisor: Tensor, compute: Compute, gradients: Tensor) -> Tensor:
        """compute(batch, divisor), by a recording where there is one. The result is overwritten by the next call.

        Args:
            divisor: a float32 scalar on the device. gradients: all that `compute` adds to.
        """
        if gradients is not self._gradients:
            self.forget()
            self._gradients = gradients
        shape = _shape(batch)
        known = self._recordings.get(shape)
        if known is not None:
            self.replayed += 1
            return known.run(batch, divisor)
        self.usual += 1
        if self.trouble or shape not in self._seen or len(self._recordings) == MOST_SHAPES:
            self._seen.add(shape)
            return compute(batch, divisor)
        before = gradients.clone()
        loss, found = compute(batch, divisor), gradients.clone()
        try:
            self._recordings[shape] = self._recording(batch, divisor, compute)
            gradients.copy_(before)
            again = self._recordings[shape].run(batch, divisor)
            self.recorded += 1
            if not (_close(again, loss) and _close(gradients - before, found - before)):
                self.stop("a recording came to another loss or other gradients")
        except (RuntimeError, MemoryError) as error:
            self.stop((str(error).strip() or type(error).__name__).splitlines()[0])
        gradients.copy_(found)
        return loss

    @property
    def said(self) -> str:
        """What came of it, for a report."""
        many = f"recorded shapes: {self.recorded}; replayed micro-batches: {self.replayed} of {self.replayed + self.usual}"
        return many if self.trouble is None else f"{many}; then all were computed in the usual way: {self.trouble}"

    def _recording(self, batch: MicroTensors, divisor: Tensor, compute: Compute) -> _Recording:
        mine = replace(batch, **{name: getattr(batch, name).clone() for name in _TENSORS})
        by = divisor.clone()
        loss, run = self._record(lambda: compute(mine, by))
        return _Recording(mine, by, loss, run)


def recurring(batch: MicroTensors) -> MicroTensors:
    """The same batch, with tensors of sizes that come again soon: examples without tokens, and labelled tokens whose label counts for nothing.

    The number of tokens is the layout's matter; see `lengthened`.
    """
    examples, labelled = len(batch.starts) - 1, len(batch.labelled)
    longest = min(_power(batch.longest), batch.input_ids.numel())
    starts = torch.nn.functional.pad(batch.starts, (0, _power(examples) - examples), value=batch.input_ids.numel())
    # The last token has no label: it is the end of an example.
    spare = batch.input_ids.numel() - 1
    more = next_length(labelled) - labelled if labelled else 0
    return replace(batch, starts=starts, longest=longest, labelled=torch.nn.functional.pad(batch.labelled, (0, more), value=spare))


_TENSORS = tuple(field.name for field in fields(MicroTensors) if field.name not in ("longest", "cp"))


def _tensors(batch: MicroTensors) -> list[Tensor]:
    return [getattr(batch, name) for name in _TENSORS]


def _shape(batch: MicroTensors) -> tuple[object, ...]:
    return (batch.longest, *(tensor.shape for tensor in _tensors(batch)))


def _power(number: int) -> int:
    """The power of two that is not less."""
    return 1 << (number - 1).bit_length()


def _close(found: Tensor, wanted: Tensor) -> bool:
    """Where both are what they should not be, that is for the step to find out."""
    apart = torch.linalg.vector_norm((found - wanted).double())
    near = apart <= TOLERANCE * torch.linalg.vector_norm(wanted.double()) + 1e-12
    return bool(near | ~wanted.isfinite().all())

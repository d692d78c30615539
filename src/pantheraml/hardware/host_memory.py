"""What autograd keeps, in ordinary memory instead of the device's, copied while the device goes on working."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class _Away:
    """A tensor in ordinary memory; `back` is it on the device again, once it was asked for."""

    host: Tensor
    copied: Any
    back: Tensor | None = None


class HostMemory:
    """Contexts in which tensors saved for backward go to ordinary memory: `with host(): y = f(x)`.

    Copies run on a stream of their own. When backward asks for one, the one saved before it, which is asked for next, is
    already started on its way back. Not run on a GPU yet; on a device without streams the copies are plain ones.

    Args:
        device: where the tensors come from. pinned: see `Backend.pinned_memory`.
    """

    def __init__(self, device: torch.device, *, pinned: bool) -> None:
        self._device, self._pinned = device, pinned
        self._stream: Any = torch.Stream(device=device) if pinned else None
        # Weak, as the graph owns them: one that is dropped without a backward leaves nothing here.
        self._away: list[weakref.ref[_Away]] = []

    def __call__(self) -> AbstractContextManager[Any]:
        """One context; they may follow each other, as layers do."""
        return torch.autograd.graph.saved_tensors_hooks(self._put_away, self._bring_back)

    def waiting(self) -> int:
        """How many tensors are away and not asked for yet."""
        self._last()
        return sum(away() is not None for away in self._away)

    def _put_away(self, tensor: Tensor) -> Any:
        if tensor.device != self._device or not tensor.is_floating_point() or not tensor.numel() or isinstance(tensor, torch.nn.Parameter):
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned)
        if self._stream is None:
            host.copy_(tensor)
            away = _Away(host, None)
        else:
            self._stream.wait_stream(torch.accelerator.current_stream(self._device))
            with self._stream:
                host.copy_(tensor, non_blocking=True)
                copied = self._stream.record_event()
            tensor.record_stream(self._stream)
            away = _Away(host, copied)
        self._away.append(weakref.ref(away))
        return away

    def _bring_back(self, kept: Any) -> Tensor:
        if not isinstance(kept, _Away):
            return kept
        self._start(kept)
        at = next((i for i, each in enumerate(self._away) if each() is kept), None)
        if at is not None:
            del self._away[at:]  # backward goes from the last to the first: what came later is done with
            if (before := self._last()) is not None:
                self._start(before)
        back, kept.back = kept.back, None
        assert back is not None
        if self._stream is not None:
            torch.accelerator.current_stream(self._device).wait_event(kept.copied)
            back.record_stream(torch.accelerator.current_stream(self._device))
        return back

    def _last(self) -> _Away | None:
        """The one saved last of those that some graph still has."""
        while self._away:
            away = self._away[-1]()
            if away is not None:
                return away
            self._away.pop()
        return None

    def _start(self, away: _Away) -> None:
        """Begin the copy back, if nobody has."""
        if away.back is not None:
            return
        if self._stream is None:
            away.back = away.host.to(self._device, copy=True)
            return
        with self._stream:  # behind the copy out, on the same stream
            away.back = away.host.to(self._device, non_blocking=True)
            away.copied = self._stream.record_event()

"""What of the CUDA backend is plain Python, with stand-ins for the driver; test_gpu.py asks a real device."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from pantheraml.hardware.cuda import CudaBackend


class Recorded:
    """What a CUDA graph tells of itself."""

    at: int = 0

    def pool(self) -> int:
        return self.at

    def replay(self) -> None:
        return


def test_recordings_share_a_pool_as_long_as_one_of_them_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    handles, streams, current = iter(range(1, 100)), [], "the usual stream"

    @contextmanager
    def capture(graph: Any, *, pool: int, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"  # the monitor asks the driver at any time
        graph.at = pool
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: current)
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    record = CudaBackend().recorder(0)
    (one, replay), (two, again) = record(lambda: torch.ones(1)), record(lambda: torch.zeros(1))
    assert one.item() == 1 and two.item() == 0
    assert replay.__self__.at == again.__self__.at == 1
    del replay, again
    gc.collect()
    _, replay = record(lambda: torch.ones(1))
    assert replay.__self__.at == 2

    def fails() -> torch.Tensor:
        raise RuntimeError("operation not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):
        record(fails)
    assert streams == [current] * 4

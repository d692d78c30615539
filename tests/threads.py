"""A `World` of threads in the place of processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from torch import Tensor

from pantheraml.distributed.world import World, gave_up

T = TypeVar("T")


class Thread:
    """A `World` of threads, which read what the others wrote on a board."""

    called = "host"

    def __init__(self, rank: int, size: int, board: dict[Any, Any], changed: threading.Condition) -> None:
        self.rank, self.size, self._board, self._changed, self._round = rank, size, board, changed, 0

    def _write(self, value: Any) -> None:
        with self._changed:
            self._board[self._round, self.rank] = value
            self._changed.notify_all()

    def _all(self, value: Any) -> list[Any]:
        self._write(value)
        found = []
        for rank in range(self.size):
            with self._changed:
                assert self._changed.wait_for(lambda rank=rank: (self._round, rank) in self._board, timeout=20)
                found.append(self._board[self._round, rank])
            if isinstance(found[-1], Exception):
                raise gave_up(rank, self.size, str(found[-1]), self.called)
        self._round += 1
        return found

    def gathered(self, text: str) -> list[str]:
        return self._all(text)

    def give_up(self, why: str) -> None:
        self._write(Exception(why))

    def shared(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        every = self._all(tensors)
        kinds = [{name: (tensor.shape, tensor.dtype) for name, tensor in each.items()} for each in every]
        assert all(each == kinds[0] for each in kinds)
        return dict(every[0])


def on_hosts(do: Callable[[World], T], hosts: int = 2) -> list[T | Exception]:
    """What each of the hosts returned or raised."""
    board: dict[Any, Any] = {}
    changed = threading.Condition()

    def run(rank: int) -> T | Exception:
        try:
            return do(Thread(rank, hosts, board, changed))
        except Exception as error:  # noqa: BLE001 - compared by the test
            return error

    with ThreadPoolExecutor(hosts) as pool:
        return list(pool.map(run, range(hosts)))

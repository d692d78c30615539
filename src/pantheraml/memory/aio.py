"""The memory for programs of asyncio: each call runs in a thread, one write after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pantheraml.memory.intake import Stored
from pantheraml.memory.record import JSON, Content, Decoded, Hit, Info, Record
from pantheraml.memory.store import Memory

if TYPE_CHECKING:
    from pantheraml.memory.census import Stats
    from pantheraml.memory.learning import Trained
    from pantheraml.memory.same import Likeness
    from pantheraml.memory.seal import Keys
    from pantheraml.memory.upkeep import Compacted, Verified

T = TypeVar("T")
READERS = 4


class AsyncMemory:
    """The methods of `Memory` that wait for a disk or a device, as coroutines.

    Args:
        memory: used by its own threads alone from here on.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._writing = ThreadPoolExecutor(1, "memory-write")
        self._reading = ThreadPoolExecutor(READERS, "memory-read")

    @classmethod
    @asynccontextmanager
    async def open(cls, path: Path | str, **how: Any) -> AsyncIterator[AsyncMemory]:
        """`Memory.open`, closed at the end of the block."""
        opened = cls(await asyncio.to_thread(partial(Memory.open, path, **how)))
        try:
            yield opened
        finally:
            await opened.close()

    async def put(self, key: str, content: Content, **how: Any) -> Stored:
        """See `Memory.put`."""
        return await self._in(self._writing, partial(self.memory.put, key, content, **how))

    async def put_many(self, records: Iterable[Record]) -> list[Stored]:
        """See `Memory.put_many`."""
        return await self._in(self._writing, partial(self.memory.put_many, list(records)))

    async def delete(self, key: str) -> bool:
        """See `Memory.delete`."""
        return await self._in(self._writing, partial(self.memory.delete, key))

    async def delete_many(self, keys: Sequence[str]) -> int:
        """See `Memory.delete_many`."""
        return await self._in(self._writing, partial(self.memory.delete_many, list(keys)))

    async def compact(self, **how: Any) -> Compacted:
        """See `Memory.compact`."""
        return await self._in(self._writing, partial(self.memory.compact, **how))

    async def train(self, **how: Any) -> Trained:
        """See `Memory.train`."""
        return await self._in(self._writing, partial(self.memory.train, **how))

    async def rotate(self, keys: Keys) -> None:
        """See `Memory.rotate`."""
        await self._in(self._writing, partial(self.memory.rotate, keys))

    async def verify(self, **how: Any) -> Verified:
        """See `Memory.verify`; it writes what it puts into quarantine."""
        return await self._in(self._writing, partial(self.memory.verify, **how))

    async def get_many(self, keys: Sequence[str]) -> dict[str, Decoded]:
        """See `Memory.get_many`."""
        return await self._in(self._reading, partial(self.memory.get_many, list(keys)))

    async def near(self, key: str) -> list[tuple[str, Likeness]]:
        """See `Memory.near`."""
        return await self._in(self._reading, partial(self.memory.near, key))

    async def infos(self) -> list[Info]:
        """See `Memory.infos`; all of them at once."""
        return await self._in(self._reading, lambda: list(self.memory.infos()))

    async def stats(self) -> Stats:
        """See `Memory.stats`."""
        return await self._in(self._reading, self.memory.stats)

    async def export(self, path: Path | str) -> int:
        """See `Memory.export`."""
        return await self._in(self._reading, partial(self.memory.export, path))

    async def get(self, key: str) -> Decoded:
        """See `Memory.get`."""
        return await self._in(self._reading, partial(self.memory.get, key))

    async def search(
        self,
        text: str,
        k: int = 10,
        *,
        kind: str | None = None,
        metadata: Mapping[str, JSON] | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> list[Hit]:
        """See `Memory.search`."""
        return await self._in(self._reading, partial(self.memory.search, text, k, kind=kind, metadata=metadata, since=since, until=until))

    async def close(self) -> None:
        """See `Memory.close`; what was begun is ended before. Cancelled, it ends all the same: a store left open stays locked."""
        await asyncio.shield(asyncio.ensure_future(asyncio.to_thread(self._close)))

    def _close(self) -> None:
        self._writing.shutdown()
        self._reading.shutdown()
        self.memory.close()

    async def _in(self, threads: ThreadPoolExecutor, deed: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, deed)

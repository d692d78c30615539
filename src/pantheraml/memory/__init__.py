"""NBMF: records kept small, searchable and trustworthy, encoded on the device. See docs/memory.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pantheraml.lazy import homes

if TYPE_CHECKING:
    from pantheraml.memory.aio import AsyncMemory as AsyncMemory
    from pantheraml.memory.policy import Budgets as Budgets
    from pantheraml.memory.record import Decoded as Decoded
    from pantheraml.memory.record import Hit as Hit
    from pantheraml.memory.record import Info as Info
    from pantheraml.memory.record import Record as Record
    from pantheraml.memory.seal import Keys as Keys
    from pantheraml.memory.store import Memory as Memory

_HOMES = {
    "AsyncMemory": "pantheraml.memory.aio",
    "Budgets": "pantheraml.memory.policy",
    "Decoded": "pantheraml.memory.record",
    "Hit": "pantheraml.memory.record",
    "Info": "pantheraml.memory.record",
    "Record": "pantheraml.memory.record",
    "Keys": "pantheraml.memory.seal",
    "Memory": "pantheraml.memory.store",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll] - it cannot count them; the table is the one list of the names
__getattr__, __dir__ = homes(__name__, _HOMES)

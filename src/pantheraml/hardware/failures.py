"""What a device's error means. The texts are those of the drivers; nobody else looks into a message."""

from __future__ import annotations

from typing import Literal

FailureKind = Literal["out of memory", "compilation", "device lost", "communication", "version counter", "other"]


def classify(error: BaseException) -> FailureKind:
    """The kind of an error that a device raised."""
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "out of memory"
    return "other"

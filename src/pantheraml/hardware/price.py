"""What an hour of a device costs. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from pantheraml.hardware.catalog import lookup
from pantheraml.hardware.device import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """US dollars for an hour of one device, None where nobody says, and who says so."""

    usd_per_hour: float | None
    source: str

    def of(self, seconds: float) -> float | None:
        """US dollars for so many seconds."""
        return None if self.usd_per_hour is None else self.usd_per_hour * seconds / 3600


def price_of(device: Device, own_usd_per_hour: float | None = None) -> Price:
    """Your own price, or the catalog's. A simulated device has none: nobody rents it."""
    if own_usd_per_hour is not None:
        return Price(usd_per_hour=own_usd_per_hour, source="your own price")
    if device.simulated:
        return Price(usd_per_hour=None, source="simulated: nobody rents it")
    entry = lookup(device.kind, device.name, device.memory_bytes)
    if entry is None or entry.usd_per_hour is None:
        return Price(usd_per_hour=None, source="not in the catalog; set hardware.usd_per_hour")
    return Price(usd_per_hour=entry.usd_per_hour, source=f"{entry.price_source}, {entry.price_date}")

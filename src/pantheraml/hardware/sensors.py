"""Sensors that Linux keeps as files with one number in them: energy counters and temperatures."""

from __future__ import annotations

from pathlib import Path


def read_number(path: Path) -> int | None:
    """The integer in a file; None if there is no such file, it may not be read, or it holds something else."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


class PowerMeter:
    """Watts from an energy counter: the mean between a reading and the one before."""

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None

    def watts(self, energy_uj: int | None, now_s: float) -> float | None:
        """None at the first reading, without one, and when the counter began anew.

        Args:
            energy_uj: microjoules since some time in the past. now_s: a clock that only goes forward.
        """
        before, self._last = self._last, None if energy_uj is None else (energy_uj, now_s)
        if energy_uj is None or before is None or energy_uj < before[0] or now_s <= before[1]:
            return None
        return (energy_uj - before[0]) / 1e6 / (now_s - before[1])


def package_energy(root: Path = Path("/sys/class/powercap")) -> int | None:
    """Microjoules of all processor packages (RAPL). Most systems let only root read it: None."""
    total: int | None = None
    for package in sorted(root.glob("intel-rapl:*")):  # AMD's are called so too
        if not (package.name.count(":") == 1 and _word(package / "name").startswith("package")):
            continue  # a part of a package, or the whole platform
        energy = read_number(package / "energy_uj")
        if energy is None:
            return None
        total = energy + (total or 0)
    return total


def intel_gpus(device_id: int, root: Path = Path("/sys/class/drm")) -> tuple[Path, ...]:
    """The hwmon folders of Intel's GPUs with this PCI device id, of the drivers i915 and xe."""
    cards = [card for card in root.glob("card*") if card.name[4:].isdecimal()]  # card0-DP-1 is a plug
    cards = [card / "device" for card in sorted(cards, key=lambda card: int(card.name[4:]))]
    same = [card for card in cards if (_word(card / "vendor"), _word(card / "device")) == ("0x8086", f"{device_id:#06x}")]
    return tuple(folder for card in same for folder in sorted(card.glob("hwmon/hwmon*")) if _word(folder / "name") in ("i915", "xe"))


def intel_temperature_c(hwmon: Path) -> float | None:
    """Of the package: temp2 of the driver xe (temp1 is something else there), temp1 of i915."""
    milli = read_number(hwmon / ("temp2_input" if _word(hwmon / "name") == "xe" else "temp1_input"))
    return None if milli is None else milli / 1000


def intel_energy_uj(hwmon: Path) -> int | None:
    """Microjoules of the whole card, or of its package where only that is counted."""
    card = read_number(hwmon / "energy1_input")
    return read_number(hwmon / "energy2_input") if card is None else card


def _word(path: Path) -> str:
    try:
        return path.read_text().strip().lower()
    except OSError:
        return ""

"""Which records belong in which tier: pure arithmetic on what is known of them, so that a plan can be tested and explained.

hot: the content also lies decoded in memory. warm: it is in the database. cold: in segments, as small as can be. What is hot stays in the
database as well. Vectors are always in memory: every record can be found, whatever its tier.

The heat of a record is (uses + 1) * 2 ** (-age / half_life), its age counted from its last use. Where space is short those stay that have most heat
for each byte, in that order up to the first that does not fit. So more use, later use, or more space never brings a record lower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from pantheraml.memory.features import I64
from pantheraml.memory.record import Tier

TIERS: tuple[Tier, ...] = get_args(Tier)
"""hot, warm, cold; in columns their places here."""
_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """How much may lie where, and for how long.

    Attributes:
        hot_bytes: of decoded content in memory. warm_bytes: of containers in the database; None: no limit.
        hot_heat: below it nothing is hot; the heat of a record that was just used for the first time is 2.
        warm_heat: what a cold record needs to come back to the database: one use in the last half-life.
        cold_after_s: seconds without use after which a record is cold. half_life_s: in which heat falls by half.
    """

    hot_bytes: int = 64 << 20
    warm_bytes: int | None = None
    hot_heat: float = 1.5
    warm_heat: float = 1.0
    cold_after_s: float = 30 * _DAY_S
    half_life_s: float = 7 * _DAY_S

    def __post_init__(self) -> None:
        if self.hot_bytes < 0 or (self.warm_bytes or 0) < 0:
            raise ValueError("a budget is a number of bytes, and not below 0")
        if self.cold_after_s < 0 or self.half_life_s <= 0:
            raise ValueError("times are in seconds, and the half-life is above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """What is known of some records, a column [N] each.

    Attributes:
        tier: places in TIERS. raw_bytes: decoded. stored_bytes: of the container; 0 where it is another record's.
        touched: when it was used last, or put if it never was, in seconds. uses: how often it was read.
    """

    id: I64
    tier: NDArray[np.integer]
    raw_bytes: I64
    stored_bytes: I64
    touched: NDArray[np.float64]
    uses: I64


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """Ids of records by the tier that they are to go to, each in one at most; what should go first stands first."""

    hot: I64
    warm: I64
    cold: I64

    def __len__(self) -> int:
        return len(self.hot) + len(self.warm) + len(self.cold)


def heat(entries: Entries, half_life_s: float, now: float) -> NDArray[np.floating]:
    """[N] how much each is used of late. A time in the future counts as now."""
    age = np.maximum(0.0, now - entries.touched)
    return np.exp2(-age / half_life_s) * (entries.uses + 1.0)


def plan_moves(entries: Entries, budgets: Budgets, now: float) -> Moves:
    """What to move so that every record is where it belongs. now: seconds, by the clock of `entries.touched`.

    The same records in another order give the same plan, and one that was carried out gives no more moves.
    """
    warmth = heat(entries, budgets.half_life_s, now)
    hot, warm, cold = range(len(TIERS))
    fresh = now - entries.touched <= budgets.cold_after_s
    # One that is cold and stays so has its place in the order all the same: it must not depend on what the last plan did.
    fits = _fitting(fresh, warmth, entries.stored_bytes, entries.id, budgets.warm_bytes)
    stays = fits & ((entries.tier != cold) | (warmth >= budgets.warm_heat))
    # Those that do not stay have a place in this order too: else more space in the database could take space in memory from others.
    lies = stays & _fitting(fresh & (warmth >= budgets.hot_heat), warmth, entries.raw_bytes, entries.id, budgets.hot_bytes)
    wanted = np.where(lies, hot, np.where(stays, warm, cold))
    hottest = np.lexsort((entries.id, -warmth))
    moved = hottest[(wanted != entries.tier)[hottest]]
    return Moves(
        hot=entries.id[moved[wanted[moved] == hot]],
        warm=entries.id[moved[wanted[moved] == warm]],
        cold=entries.id[moved[wanted[moved] == cold][::-1]],
    )


def worn_segments(size_bytes: Mapping[int, int], live_bytes: Mapping[int, int], *, least_live: float = 0.5) -> list[int]:
    """Segments that are worth writing again: less than such a share of them is pointed at.

    Args:
        size_bytes: of each segment's file. live_bytes: of the containers in it to which rows point.
    """
    return sorted(segment for segment, size in size_bytes.items() if live_bytes.get(segment, 0) < least_live * size)


def _fitting(
    which: NDArray[np.bool_], warmth: NDArray[np.floating], size_bytes: I64, ids: I64, budget_bytes: int | None
) -> NDArray[np.bool_]:
    """Of those, the ones with most heat a byte, up to the first that does not fit."""
    if budget_bytes is None:
        return which
    candidates = np.flatnonzero(which)
    density = warmth[candidates] / np.maximum(1, size_bytes[candidates])
    order = candidates[np.lexsort((ids[candidates], -density))]
    fits = np.zeros(len(which), bool)
    fits[order[np.cumsum(size_bytes[order]) <= budget_bytes]] = True
    return fits

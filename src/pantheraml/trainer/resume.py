"""The plan of a run that goes on: the one it began with, where that still holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantheraml.planning.levels import format_levels
from pantheraml.planning.plan import Plan
from pantheraml.recipe.types import Recipe
from pantheraml.trainer.folder import PLAN, read_json

if TYPE_CHECKING:
    from rich.console import Console


def stored_plan(folder: Path, fresh: Plan, recipe: Recipe, console: Console) -> Plan:
    """The plan that the run began with, so that it goes on bit by bit, but for what the recipe asks for now.

    A new plan on another device.
    """
    values: Mapping[str, Any] | None = read_json(folder / PLAN)
    if values is None:
        return fresh
    try:
        stored = Plan.from_dict(dict(values))
    except ValueError:
        console.print(f"{folder / PLAN} is not a plan of this version: a new one is made.", markup=False)
        return fresh
    if (stored.device.kind, stored.device.index, stored.device.name) != (fresh.device.kind, fresh.device.index, fresh.device.name):
        began = f"{stored.device} ({stored.device.label})"
        console.print(f"The run began on {began} and goes on on {fresh.device} ({fresh.device.label}), not bit by bit.", markup=False)
        return fresh
    asked: dict[str, Any] = {}
    if recipe.hardware.checkpointing != "auto":
        asked["levels"] = fresh.levels
    if recipe.hardware.threads is not None:
        asked["threads"] = fresh.threads
    if recipe.hardware.compile != "auto":
        asked["compile"] = fresh.compile
    if recipe.hardware.graphs != "auto":
        asked["graphs"] = fresh.graphs
    if recipe.batch.micro_tokens != "auto":
        asked["micro_tokens"] = fresh.micro_tokens
    if fresh.mesh != stored.mesh:  # other devices are here, or asked for
        asked |= {
            choice: getattr(fresh, choice) for choice in ("mesh", "world_size", "micro_tokens", "levels", "threads", "compile", "graphs")
        }
    changed = {choice: value for choice, value in asked.items() if getattr(stored, choice) != value}
    following: dict[str, Any] = {}
    if changed.keys() & {"mesh", "levels", "compile", "micro_tokens"}:  # what a plan makes of them
        following = {"graphs": fresh.graphs, "whole": fresh.whole, "memory": fresh.memory}
    if changed:
        said = ", ".join(f"{choice}={format_levels(value) if choice == 'levels' else value}" for choice, value in changed.items())
        console.print(f"From here on with {said}, as asked: the result is the same but for rounding, not bit by bit.", markup=False)
    # The device as it is now: its free memory, speed and price are not those of the first start.
    cost = replace(stored.cost, usd_per_hour=fresh.cost.usd_per_hour)
    return replace(
        stored,
        device=fresh.device,
        cost=cost,
        **(following | changed),
        reasons={
            **stored.reasons,
            **{choice: fresh.reasons[choice] for choice in ("devices", "graphs", "base_dtype", "memory") if following},
            **dict.fromkeys(changed, "asked for when the run was resumed"),
        },
    )

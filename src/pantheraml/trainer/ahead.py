"""A run on a TPU slice that is not here: the plan, and what the TPU's own compiler makes of a step for it. No weights, no data, no TPU."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from pantheraml.errors import DeviceError, MissingExtra, RecipeError
from pantheraml.hardware.device import Inventory
from pantheraml.hardware.slices import inventory_of
from pantheraml.hardware.tpu import TpuSlice, larger_slices, parse_slice
from pantheraml.hardware.xla import XlaBackend, installed
from pantheraml.hardware.xla_mesh import mesh_of_slice
from pantheraml.models.adapters import attach
from pantheraml.models.load import empty_model, read_config, shape_of
from pantheraml.planning.batch import HEADROOM
from pantheraml.planning.levels import ASKED, format_levels
from pantheraml.planning.memory import format_bytes
from pantheraml.planning.plan import Plan, make_plan
from pantheraml.planning.shape import ModelShape
from pantheraml.planning.sharding import row_shares
from pantheraml.recipe.types import LoRA, Recipe
from pantheraml.trainer.ahead_report import Ahead, Cheapest, Fit, Refusal, format_rows
from pantheraml.trainer.sft import sft_loss

if TYPE_CHECKING:
    from pantheraml.engines.xla_ahead import Compiled

GENERATIONS = ("v5e", "v6e", "v4", "v5p", "tpu7x")
"""Those that are suggested. v2 and v3 hold the scores of whole rows: JAX's attention kernel has no program for them."""
_LOWER = ("off", "cheap", "on")
"""hardware.checkpointing, from the fastest to the one that needs least memory."""
_ROOMY = 1 << 60
"""Bytes that make the arithmetic agree to anything, so that the compiler is the one who says no."""

CompileStep = Callable[[TpuSlice, Plan], "tuple[Compiled, ...]"]
"""What the compiler makes of a step of a plan on a slice. Raises: NoRoom (engines/xla_ahead.py) if it does not fit."""

_log = logging.getLogger("pantheraml")


def plan_ahead(
    recipe: Recipe,
    word: str,
    *,
    suggest: bool = False,
    announce: Callable[[str], None] = _log.warning,
    compile_step: CompileStep | None = None,
) -> Ahead:
    """Plan for a slice ("v5e-8"), and compile a step for it with libtpu. Takes a minute or two for a large model.

    Where a step does not fit, layers keep less, then fewer rows are taken at once, but for what the recipe fixes, until one
    fits or nothing is left. A refusal takes seconds.

    Args:
        suggest: ask the compiler for the cheapest slice as well, which takes as long again.
        announce: hears of each step that was refused, and of what is asked next.
        compile_step: asks the compiler; None: libtpu, for the model of the recipe.
    Raises: DeviceError if there is no such slice, or libtpu is not installed; MissingExtra without JAX; RecipeError.
    """
    tpu = parse_slice(word)
    changes: dict[str, Any] = {"kind": "tpu"}
    if tpu.slices > 1 and recipe.hardware.dcn == 1:
        changes["dcn"] = tpu.slices
    recipe = recipe.model_copy(update={"hardware": recipe.hardware.model_copy(update=changes)})
    for package in ("jax", "torchax"):
        if not installed(package):
            raise MissingExtra(package, needed_for="compiling for a TPU", install="pantheraml[tpu]")
    model: Any = empty_model(recipe.model, read_config(recipe.model))
    shape = shape_of(model, recipe.model.name)
    compile_step = compile_step or _compiler(recipe, model)
    fit = fitted(recipe, tpu, shape, compile_step, announce)
    cheapest = _cheapest(recipe, shape, tpu)
    if suggest:
        cheapest = _proven(recipe, shape, fit, cheapest.unpriced, compile_step, announce)
    return Ahead(fit=fit, cheapest=cheapest, hint=None if fit.fits else _hint(recipe, tpu, shape))


def fitted(recipe: Recipe, tpu: TpuSlice, shape: ModelShape, compile_step: CompileStep, announce: Callable[[str], None]) -> Fit:
    """The first step that the compiler finds room for, or the last one that it refused. Raises: DeviceError, RecipeError."""
    from pantheraml.engines.xla_ahead import NoRoom

    refused: tuple[Refusal, ...] = ()
    fit: Fit | None = None
    for fit in _steps(recipe, tpu, shape):
        rows, tokens, levels = fit.rows, fit.plan.row_tokens[-1], format_levels(fit.plan.levels)
        if refused:
            announce(f"{tpu} refused {refused[-1]}; now {format_rows(rows, tokens)}, layers at {levels}")
        start = time.perf_counter()
        try:
            done = replace(fit, compiled=compile_step(tpu, fit.plan), refused=refused)
        except NoRoom as error:
            why = str(error)
        else:
            # The compiler counts what a program takes, and nothing that waits beside it.
            if (done.peak_bytes or 0) <= (done.memory_bytes or 0):
                return done
            why = f"{format_bytes(done.peak_bytes)} with what waits on a device, of {format_bytes(done.memory_bytes)}"
        refused += (Refusal(rows=rows, tokens=tokens, levels=levels, why=why, took_s=time.perf_counter() - start),)
    assert fit is not None
    return replace(fit, refused=refused)


def _steps(recipe: Recipe, tpu: TpuSlice, shape: ModelShape) -> Iterator[Fit]:
    """What to ask the compiler for, one after the other.

    First what a run would do, then layers that keep less, then half of the rows, down to one for each part into which rows are
    divided. Where nothing fits by arithmetic, which leaves a margin, the least that the recipe allows is asked for all the same.
    """
    level, free_rows = recipe.hardware.checkpointing, recipe.batch.micro_tokens == "auto"
    try:
        plan = _planned(recipe, inventory_of(tpu), shape)
    except DeviceError as error:
        plan = _planned(recipe, inventory_of(tpu, free_bytes=_ROOMY), shape)  # raises what is not about memory
        least = row_shares(plan.mesh)
        rows = least if free_rows else plan.micro_tokens // plan.row_tokens[-1]
        fit = _forced(recipe, tpu, shape, "on" if level == "auto" else level, rows, plan.row_tokens[-1])
        yield replace(fit, doubt=error.what)
        return
    yield Fit(tpu=tpu, plan=plan)
    rows, tokens, least = plan.micro_tokens // plan.row_tokens[-1], plan.row_tokens[-1], row_shares(plan.mesh)
    if level == "auto":
        used = {_LOWER.index(word) for word in _LOWER if ASKED[word] in plan.levels}
        for level in _LOWER[max(used) + (len(used) == 1) :]:  # after a mixture, all of them at its lower level
            yield _forced(recipe, tpu, shape, level, rows, tokens)
        level = _LOWER[-1]
    while free_rows and rows > least:
        rows = max(rows // 2 // least, 1) * least
        yield _forced(recipe, tpu, shape, level, rows, tokens)


def _forced(recipe: Recipe, tpu: TpuSlice, shape: ModelShape, level: str, rows: int, tokens: int) -> Fit:
    """With these layers and rows, whatever the arithmetic says of their memory."""
    asked = recipe.model_copy(
        update={
            "hardware": recipe.hardware.model_copy(update={"checkpointing": level}),
            "batch": recipe.batch.model_copy(update={"micro_tokens": rows * tokens}),
        }
    )
    plan = _planned(asked, inventory_of(tpu, free_bytes=_ROOMY), shape)
    settings = (f"hardware.checkpointing={level}", f"batch.micro_tokens={rows * tokens}")
    try:
        _planned(asked, inventory_of(tpu), shape)
    except DeviceError:
        settings = ()  # a run would refuse them, by its own arithmetic
    reasons = {**plan.reasons, "micro_tokens": "so the compiler was asked", "checkpointing": "so the compiler was asked"}
    plan = replace(plan, device=inventory_of(tpu).devices[0], reasons=reasons)
    return Fit(tpu=tpu, plan=plan, settings=settings)


def _planned(recipe: Recipe, inventory: Inventory, shape: ModelShape) -> Plan:
    plan = make_plan(
        recipe,
        inventory,
        shape,
        longest_example=recipe.model.max_tokens if isinstance(recipe.model.max_tokens, int) else None,
        attention=XlaBackend.attention,
        quantizers=XlaBackend.quantizers,
    )
    # Devices that share rows get equally many, and the engine fills up with empty ones.
    rows, shares = -(-plan.micro_tokens // plan.row_tokens[-1]), row_shares(plan.mesh)
    return replace(plan, micro_tokens=-(-rows // shares) * shares * plan.row_tokens[-1])


def _compiler(recipe: Recipe, model: Any) -> CompileStep:
    """libtpu, for a model without weights."""
    import torch

    from pantheraml.engines.xla_engine import XlaEngine

    @cache
    def adapted(dtype: str) -> Any:
        held = model.to(getattr(torch, dtype))
        return attach(held, recipe.adapter, seed=recipe.run.seed) if isinstance(recipe.adapter, LoRA) else held

    def compile_step(tpu: TpuSlice, plan: Plan) -> tuple[Compiled, ...]:
        engine = XlaEngine(mesh_of_slice(tpu, plan.mesh))
        ready = adapted(plan.base_dtype)
        engine.prepare(ready, sft_loss(ready, static=XlaBackend.static_shapes), recipe.optim, plan, seed=recipe.run.seed)
        return engine.compile_ahead(plan.micro_tokens // plan.row_tokens[-1], plan.row_tokens[-1])

    return compile_step


# ---- The cheapest slice ----------------------------------------------------------------------------------------------


def _cheapest(recipe: Recipe, shape: ModelShape, asked: TpuSlice) -> Cheapest:
    """By arithmetic, as a run plans: the smallest slice of each generation, and of these the one with the lowest price an hour."""
    found = list(_smallest(recipe, shape, asked))
    priced = [(plan.cost.usd_per_hour, tpu, plan) for tpu, plan in found if plan.cost.usd_per_hour is not None]
    unpriced = tuple(tpu for tpu, plan in found if plan.cost.usd_per_hour is None)
    if not priced:
        return Cheapest(tpu=None, plan=None, unpriced=unpriced)
    _, tpu, plan = min(priced, key=lambda each: each[0])
    return Cheapest(tpu=tpu, plan=plan, unpriced=unpriced)


def _smallest(recipe: Recipe, shape: ModelShape, asked: TpuSlice) -> Iterator[tuple[TpuSlice, Plan]]:
    for generation in GENERATIONS:
        plain = _plain(recipe, generation, asked)
        for tpu in larger_slices(generation):
            try:
                yield tpu, _planned(plain, inventory_of(tpu), shape)
            except (DeviceError, RecipeError):
                continue
            break


def _proven(
    recipe: Recipe,
    shape: ModelShape,
    known: Fit,
    unpriced: tuple[TpuSlice, ...],
    compile_step: CompileStep,
    announce: Callable[[str], None],
) -> Cheapest:
    """The first slice, in the order of prices, on which the compiler finds room. By arithmetic it may fill all of the memory.

    Args:
        known: what the compiler said of the slice that was asked for.
    """
    priced: list[tuple[float, int, TpuSlice, Plan]] = []
    for generation in GENERATIONS:
        plain = _plain(recipe, generation, known.tpu)
        for tpu in larger_slices(generation):
            try:
                plan = _planned(plain, inventory_of(tpu, free_bytes=int((tpu.program_bytes or 0) / HEADROOM)), shape)
            except (DeviceError, RecipeError):
                continue
            if plan.cost.usd_per_hour is not None:
                priced.append((plan.cost.usd_per_hour, len(priced), tpu, plan))
    passed: list[TpuSlice] = []
    for _, _, tpu, plan in sorted(priced, key=lambda each: each[:2]):
        if (tpu, plan.mesh) == (known.tpu, known.plan.mesh):
            fit = known
        else:
            announce(f"asking the compiler for {tpu}, which may be the cheapest")
            try:
                fit = fitted(_plain(recipe, tpu.generation, known.tpu), tpu, shape, compile_step, announce)
            except DeviceError as error:
                announce(f"{tpu} is left out: {error.what}")
                continue
        if fit.fits:
            return Cheapest(tpu=tpu, plan=fit.plan, fit=fit, passed=tuple(passed), unpriced=unpriced)
        passed.append(tpu)
    return Cheapest(tpu=None, plan=None, passed=tuple(passed), unpriced=unpriced)


def _plain(recipe: Recipe, generation: str, asked: TpuSlice) -> Recipe:
    """The recipe for a whole slice of a generation; the user's own price is that of the generation that was asked for."""
    own = recipe.hardware.usd_per_hour if generation == asked.generation else None
    plain = {"devices": "auto", "dcn": 1, "dp": 1, "fsdp": "auto", "tp": 1, "usd_per_hour": own}
    return recipe.model_copy(update={"hardware": recipe.hardware.model_copy(update=plain)})


def _hint(recipe: Recipe, tpu: TpuSlice, shape: ModelShape) -> str | None:
    """What of the recipe to change so that it fits on the slice by arithmetic: a base in eight bits; None: that does not do it."""
    model = recipe.model
    if not isinstance(recipe.adapter, LoRA) or model.load_in_4bit or model.load_in_8bit or model.load_in_fp8:
        return None
    eight = recipe.model_copy(update={"model": model.model_copy(update={"load_in_8bit": True})})
    try:
        _planned(eight, inventory_of(tpu, free_bytes=int((tpu.program_bytes or 0) / HEADROOM)), shape)
    except (DeviceError, RecipeError):
        return None
    return "model.load_in_8bit=true"

"""What makes a run fast: the kernels in the place of the model's own layers, and examples without padding between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from pantheraml.data.chat import Example
from pantheraml.data.pack import StepBatch, pack_step, share_step
from pantheraml.data.prepare import Prepared
from pantheraml.engines.engine import Engine
from pantheraml.engines.graphs import Graphs
from pantheraml.engines.parallel import Parallel
from pantheraml.hardware.backend import Backend
from pantheraml.hardware.host_memory import HostMemory
from pantheraml.hardware.settings import read_settings
from pantheraml.kernels import native
from pantheraml.kernels.table import CPU_ROOM, installed, only_references
from pantheraml.models.compiled import compiled_layers, keep_graphs
from pantheraml.models.decoder import Decoder, decodes
from pantheraml.models.lora import fused_lora, stock_layers
from pantheraml.models.quantize import keep_whole, let_go
from pantheraml.planning.levels import rungs
from pantheraml.planning.memory import format_bytes
from pantheraml.planning.plan import Plan
from pantheraml.recipe.types import Recipe

TIGHT = 0.5
"""Share of the free memory above which a plan is rehearsed at its largest shape."""


def prepare_kernels(plan: Plan, say: Callable[[str], None]) -> None:
    """What is built or compiled once is kept in the cache. say: hears of a build before it begins."""
    cache = read_settings().cache
    if any(target.startswith(CPU_ROOM) for target in installed(plan.device.kind).values()):
        why_not = native.prepare(cache, say)
        if why_not is not None:
            say(
                f"Torch computes norms, gates and attention, which is slower: {why_not}. "
                "The C++ kernels need a compiler (c++, g++ or clang++) and a folder to keep them in (PANTHERAML_CACHE)."
            )
    if plan.compile:
        keep_graphs(cache)


def decoder_of(model: Any, plan: Plan, recipe: Recipe, backend: Backend, parallel: Parallel | None = None) -> Decoder | None:
    """What computes the layers by the kernels, at the plan's levels; None: the model keeps its own forward."""
    if backend.engine != "torch" or backend.static_shapes or decodes(model) is not None:
        return None
    allowed = rungs(plan.device, recipe.hardware.checkpointing, fused=True)
    away = HostMemory(backend.torch_device(plan.device.index), pinned=backend.pinned_memory) if "offload" in allowed else None
    tp, hooked = (None, False) if parallel is None else (parallel.tp, parallel.hooks)
    return Decoder(model, plan.levels, allowed=allowed, in_host_memory=away, compile=plan.compile, tp=tp, hooked=hooked)


@contextmanager
def whole_matrices(model: Any, plan: Plan) -> Iterator[None]:
    """Where the plan has room for it, matrices in four bits are kept whole."""
    if plan.whole:
        keep_whole(model)
    try:
        yield
    finally:
        let_go(model)


def relief(model: Any, decoder: Decoder | None, graphs: Graphs | None) -> str | None:
    """Keep less in memory from here on, and what that is; None: there is nothing that can be done without."""
    stopped = graphs.stop("memory ran out") if graphs else None
    return stopped or let_go(model) or (decoder.lower() if decoder else None)


@contextmanager
def made_fast(model: Any, decoder: Decoder | None, plan: Plan, backend: Backend) -> Iterator[None]:
    """Where torch computes and the model keeps its own forward: its adapted layers by the kernels at least, and its layers compiled if the plan says so."""
    with ExitStack() as stack:
        if decoder is None and backend.engine == "torch":
            stack.enter_context(fused_lora(model))
            if plan.compile:
                stack.enter_context(compiled_layers(model))
        yield


def slower_than_could_be(model: Any, decoder: Decoder | None, plan: Plan, backend: Backend) -> list[str]:
    """What was not computed by the fastest kernels, and why: for the report."""
    if backend.engine != "torch":
        return []
    found: list[str] = []
    if decoder is None:
        why = "each example's own length would be a shape to compile" if backend.static_shapes else decodes(model)
        found.append(f"the model's own forward computed the layers: {why}")
    if stock := stock_layers(model):
        found.append(f"{stock} adapted layers were computed by PEFT itself: the kernels have no dropout, DoRA or several adapters")
    if (why := native.why_not()) is not None:
        found.append(f"torch computed norms, gates, attention and adapters, not the C++ kernels: {why}")
    if only_references(plan.device.kind):
        found.append("torch computed norms, gates and attention: there are no kernels for this device here (GPUs need the package triton)")
    return found


def rehearse(
    engine: Engine,
    layout: Callable[[Iterable[Any]], StepBatch],
    plan: Plan,
    backend: Backend,
    held_bytes: int | None,
    say: Callable[[str], None],
) -> None:
    """Where a plan is tight, its largest shape is tried before the first step: what does not fit shows now, and less is kept.

    Args:
        held_bytes: what the process held before the model, which the plan does not count. say: hears what it took.
    """
    if plan.memory.total_bytes <= TIGHT * (plan.room_bytes or 0):
        return
    engine.rehearse(layout(largest(plan)))
    peak = backend.memory(plan.device.index).peak_bytes
    taken = None if peak is None or held_bytes is None else peak - held_bytes
    say(f"Rehearsed at the largest shape: it took {format_bytes(taken)}, {format_bytes(plan.memory.total_bytes)} were planned.")


def largest(plan: Plan) -> list[Example]:
    """Examples that fill the largest micro-batch of a plan, every token with a label."""
    length = plan.row_tokens[-1]
    rows = max(1, plan.micro_tokens // length)
    return [Example(np.zeros(length, dtype=np.int32), np.ones(length, dtype=bool), "a rehearsal") for _ in range(rows)]


def layout_of(plan: Plan, tokenizer: Any, *, trim: bool, rows: bool = True) -> Callable[[Iterable[Any]], StepBatch]:
    """What lays the examples of a step into the plan's shapes.

    Args:
        trim: see `pack_step`. rows: False where the layers know where examples begin: they stand one after the other in a single
            row, with no padding in between.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    row_tokens = plan.row_tokens if rows or not (trim and plan.packing) else (plan.micro_tokens,)
    return lambda examples: pack_step(
        list(examples), row_tokens=row_tokens, micro_tokens=plan.micro_tokens, packing=plan.packing, pad_id=pad, trim=trim
    )


def shared(layout: Callable[[Iterable[Any]], StepBatch], parallel: Parallel | None) -> Callable[[Iterable[Any]], StepBatch]:
    """The same for this process's share of the examples."""
    if parallel is None:
        return layout
    rank, size, in_step = parallel.data_rank, parallel.data_size, parallel.in_step
    return lambda examples: share_step(list(examples), layout, rank=rank, size=size, in_step=in_step)


def batches_of(data: Prepared, plan: Plan, layout: Callable[[Iterable[Any]], StepBatch]) -> list[StepBatch]:
    """The held-out examples, as many at a time as a training step takes."""
    held = data.held_out
    return [
        layout(held[i] for i in range(start, min(start + plan.batch_size, len(held)))) for start in range(0, len(held), plan.batch_size)
    ]

"""The main path: a recipe becomes a run. Start reading here.

train(recipe)
  opened           runs/<name>, locked; on a slice of several hosts they meet here
  survey           what is here, how large the model is, what the data holds -> the plan
  load, attach     the model, and its adapter
  fit              engine, checkpoints, the loop, answers before and after
  export, report   what is taken away, and what was seen
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantheraml.data.prepare import Records
from pantheraml.distributed.heartbeat import open_heartbeat
from pantheraml.distributed.world import Alone, World, most, together, told
from pantheraml.engines.graphs import Graphs
from pantheraml.engines.open import loading_device, open_engine, open_parallel
from pantheraml.engines.piece import read_whole
from pantheraml.errors import DeviceError, RecipeError
from pantheraml.export.safetensors import save_adapter, save_full
from pantheraml.hardware.backend import Backend, backend_of
from pantheraml.hardware.cpu import keep_freed_memory, return_freed_memory, usable_memory
from pantheraml.hardware.monitor import Monitor
from pantheraml.hardware.processes import read_processes
from pantheraml.hardware.recovery import Recovery
from pantheraml.models.adapters import attach
from pantheraml.models.decoder import decodes
from pantheraml.models.isolation import keeps_apart
from pantheraml.models.load import load_model, load_tokenizer
from pantheraml.models.quantize import quantization, to_eight_bits
from pantheraml.models.tiny import PREFIX as TINY
from pantheraml.planning.base import BYTES_EACH, Dtype, base_bytes_each
from pantheraml.planning.levels import rungs
from pantheraml.planning.memory import format_bytes
from pantheraml.planning.plan import Plan
from pantheraml.planning.shape import ModelShape
from pantheraml.planning.sharding import format_mesh
from pantheraml.recipe.kinds import KINDS, in_host_memory
from pantheraml.recipe.types import LoRA, Recipe
from pantheraml.trainer import loop
from pantheraml.trainer.checkpoint import Checkpoints, Damaged
from pantheraml.trainer.fast import (
    batches_of,
    decoder_of,
    layout_of,
    made_fast,
    prepare_kernels,
    rehearse,
    relief,
    shared,
    slower_than_could_be,
    whole_matrices,
)
from pantheraml.trainer.folder import ADAPTER, BAD_ROWS, BASE, BEFORE, CHECKPOINTS, MODEL, PLAN, fingerprint, learned, write_json
from pantheraml.trainer.hosts import KeptByFirst, Opened, agreed, check_same, check_started, hand_over, identity, keeping_up, opened
from pantheraml.trainer.report import monitored, summary, write_report
from pantheraml.trainer.resume import stored_plan
from pantheraml.trainer.runs import Run
from pantheraml.trainer.samples import answers, ask, read_samples, with_answers, write_samples
from pantheraml.trainer.sft import sft_loss
from pantheraml.trainer.survey import Survey, survey
from pantheraml.trainer.watch import Watch, open_reporters

if TYPE_CHECKING:
    from rich.console import Console


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    console: Console | None = None,
    rows: Records | None = None,
    held_out: Records | None = None,
) -> Run:
    """Train as the recipe says, and return the run. With `resume`, go on from its newest sound checkpoint.

    Args:
        console: where progress is shown; None: standard error.
        rows, held_out: rows from memory, instead of those that the recipe's data names.
    Raises: PantheraError of the kind that fits; see errors.py.
    """
    with opened(recipe, resume=resume, console=console or default_console()) as run:
        folder, recipe, console, world = run.folder, run.recipe, run.console, run.world
        if run.ended:
            console.print(f"The run {folder} has ended already.", markup=False)
            return Run(folder)
        console.print(f"Run folder: {folder}", markup=False, highlight=False)
        with together(world):
            if not world.rank:  # transformers writes nothing in other processes
                _with_local_base(recipe, folder)
        if recipe.model.name.startswith(TINY):
            hand_over(world, folder / BASE)
        local = _with_local_base(recipe, folder)
        view = survey(local, found=run.found, folder=folder, console=console, rows=rows, held_out=held_out, world=world)
        plan = agreed(stored_plan(folder, view.plan, recipe, console) if resume else view.plan, world)
        check_started(plan, world)
        backend = backend_of(plan.device)
        backend.set_threads(plan.threads)
        import torch

        dtype = loading_dtype(recipe, plan, view.stored_dtype)
        if divided(plan):
            check_host_room(view.shape, dtype, view.stored_dtype, plan.quantizer)
        model: Any = load_model(
            local.model,
            dtype=getattr(torch, dtype),
            device=loading_device(backend, plan.device.index, divided=divided(plan)),
            attention=plan.attention,
            quantization=quantization(plan.quantizer, getattr(torch, plan.dtype)),
        )
        plan = agreed(plan if world.rank else isolated(model, plan, local, console), world)
        if isinstance(local.adapter, LoRA):
            model = attach(model, local.adapter, seed=local.run.seed)
        if plan.quantizer in ("int8", "fp8") and backend.engine == "torch":  # the other engine does it when it takes the weights
            to_eight_bits(model, plan.quantizer)
        write_json(folder / PLAN, plan.to_dict())
        return fit(replace(view, recipe=recipe, plan=plan), model, backend, folder, console, run)


def fit(view: Survey, model: Any, backend: Backend, folder: Path, console: Console, begun: Opened | None = None) -> Run:
    """Train the model that is here, and leave results and report in the folder. Goes on where checkpoints are found.

    Args:
        begun: with the hosts that take part; None: this one alone.
    """
    world, kept = (begun.world, begun.kept) if begun else (Alone(), folder)
    stop = loop.Stop(None if world.size == 1 else partial(most, world))
    with stop.listening(), whole_matrices(model, view.plan):
        try:
            return _fit(view, model, backend, folder, kept, console, stop, world)
        finally:
            backend.empty_cache()  # what was kept for a next step


def _fit(view: Survey, model: Any, backend: Backend, folder: Path, kept: Path, console: Console, stop: loop.Stop, world: World) -> Run:
    recipe, plan, data, tokenizer = view.recipe, view.plan, view.data, view.tokenizer
    source = data.source(batch_size=plan.batch_size, seed=recipe.run.seed, epochs=recipe.optim.epochs, steps=recipe.optim.steps)
    if world.size > 1:
        held = [example.tokens.tobytes() for example in data.held_out]
        check_same(world, repr((source.fingerprint, held, data.questions)), "has read other rows")
        check_same(world, identity(model), "has loaded other weights")
    parallel = open_parallel(backend, plan, world)
    decoder = decoder_of(model, plan, recipe, backend, parallel)
    own_layout = layout_of(plan, tokenizer, trim=not backend.static_shapes, rows=decoder is None)
    layout = shared(own_layout, parallel)
    # Processes cannot go on each in its own way, and one may run out of memory alone.
    retries = recipe.hardware.oom_retries if world.size == 1 else 0
    recovery = Recovery({"out of memory": retries}, device=lambda: (backend, plan.device.index))
    record = backend.recorder(plan.device.index) if plan.graphs and decoder else None
    graphs = Graphs(record) if record else None
    allowed = rungs(plan.device, recipe.hardware.checkpointing, fused=False) if backend.engine != "torch" else ()
    engine = open_engine(backend, plan, recovery, graphs, allowed, parallel)
    prepare_kernels(plan, lambda said: console.print(said, markup=False, highlight=False))
    host = in_host_memory(plan.device.kind)
    gives_back = host and plan.checkpointing and return_freed_memory()
    if host and not plan.checkpointing:
        keep_freed_memory()

    def lighter() -> str | None:
        if host:
            return_freed_memory()
        return relief(model, decoder, graphs)

    engine.prepare(model, sft_loss(model, decoder, static=backend.static_shapes), recipe.optim, plan, seed=recipe.run.seed, relief=lighter)

    # Before a checkpoint is loaded: a run that goes on may ask other questions, and "before" is the model as it came.
    samples, asked = ask(data.questions, recipe.eval.prompts, data.encoder)
    stored = read_samples(folder / BEFORE)
    other = stored is None or [replace(sample, before=None) for sample in stored] != samples
    if told(world, lambda: other):
        stored = with_answers(samples, answers(engine, tokenizer, asked, recipe.eval.max_new_tokens), after=False)
        write_samples(folder / BEFORE, stored)
    stored = stored or samples

    own = Checkpoints(folder / CHECKPOINTS, fingerprint=fingerprint(recipe, source.fingerprint), keep=recipe.run.keep)
    checkpoints = own if world.size == 1 else KeptByFirst(own, world, kept)
    if isinstance(checkpoints, KeptByFirst) and divided(plan) and not isinstance(recipe.adapter, LoRA):
        checkpoints.check_shared()
    found = checkpoints.newest(console.print)
    position = loop.Position()
    if found:
        position = loop.Position(**{key: value for key, value in found.state.items() if key in loop.Position.__slots__})
        if parallel and parallel.in_step:  # parts of a micro-batch would be as many as each process's own examples allow
            position.parts = 1
        engine.load_state_dict(found.tensors)
        recovery.restore(position.parts, position.recoveries, position.reliefs)
        for _ in range(position.reliefs):
            engine.lower()
        checkpoints.discard_after(found.step)
        console.print(f"Going on after step {found.step} of {source.total_steps}.", markup=False)

    index = plan.device.index
    monitor, monitored_from = Monitor(backend, index, recipe.run.monitor_every_s), position.step
    watch = Watch(
        folder,
        console,
        total=source.total_steps,
        start=position.step,
        memory_bytes=lambda: backend.memory(index).used_bytes,
        reporters=open_reporters(() if world.rank else recipe.run.reporters, folder, learned(recipe)),
        monitor=monitor,
        team=keeping_up(world, parallel.sums.take_s) if parallel else None,
    )
    recovery.announce = watch.say
    if parallel:
        parallel.sums.take_s()  # what was waited for until now
    backend.empty_cache()  # what loading and answering let go of
    backend.reset_peak(index)
    held_out = batches_of(data, plan, layout)
    rhythm = loop.Rhythm.of(recipe, source.total_steps)
    where = f"{plan.device} ({plan.device.label})" + (f", {format_mesh(plan.mesh)}" if plan.world_size > 1 else "")
    console.print(f"Training on {where}, in {plan.dtype}.", markup=False, highlight=False)
    rate = loop.schedule(recipe.optim, plan.lr, source.total_steps)
    try:
        with monitor, made_fast(model, decoder, plan, backend), open_heartbeat() as pulse:
            rehearse(engine, own_layout, plan, backend, view.held_bytes, watch.say)
            position = loop.run(engine, source, layout, held_out, rate, rhythm, position, checkpoints, watch, stop, recovery, pulse)
    finally:
        watch.close()
        if data.bad.rows:  # a stream meets them while training
            data.bad.write(folder / BAD_ROWS)
    peak_bytes = backend.memory(index).peak_bytes
    if graphs:
        graphs.forget()

    notes = [*data.notes, *([monitor.trouble] if monitor.trouble else [])]
    notes += slower_than_could_be(model, decoder, plan, backend)
    notes += [graphs.said] if graphs else []
    notes += ["layers are computed again, so this process gives memory back as soon as it is freed, from now on"] if gives_back else []
    best = position.step
    if rhythm.keep_best and position.best_step not in (None, position.step):
        try:
            engine.load_weights(checkpoints.load(position.best_step).tensors)
            best = position.best_step
        except Damaged as error:
            notes.append(f"{error}; the weights of the last step are kept instead of the best ones")
            console.print(notes[-1], markup=False)
    with made_fast(model, decoder, plan, backend):
        final = engine.evaluate(held_out) if held_out else None
    notes += recovery.said
    samples = with_answers(stored, answers(engine, tokenizer, asked, recipe.eval.max_new_tokens), after=True)
    if (asked_to := stop.asked(position.step, boundary=True)) is not None:
        raise loop.stopped(asked_to, position.step, source.total_steps, kept)

    engine.hand_back()
    run = Run(folder)
    with together(world):  # the first host leaves the results, and the others wait until it has
        if world.rank:
            return run
        _save(model, view, folder, checkpoints=own, step=best)
        report = summary(
            view,
            model,
            position,
            samples,
            name=folder.name,
            kept_step=best,
            final_loss=final,
            peak_bytes=peak_bytes,
            since_step=monitored_from,
            notes=notes,
        )
        report["monitor"] = monitored(monitor, since_step=monitored_from)
        exports = [run.export("merged")] if recipe.export.merged else []
        exports += [run.export("gguf", type=kind) for kind in recipe.export.gguf]
        for exported in exports:
            console.print(f"Exported {exported.path}: {exported.said}", markup=False, highlight=False)
        write_report(folder, report, plan, samples)
    return run


def isolated(model: Any, plan: Plan, recipe: Recipe, console: Console) -> Plan:
    """The plan, without packing if this model turns out to mix the examples of a row. Raises: RecipeError if packing was asked for.

    What will be divided is still in ordinary memory, where a large model takes minutes to try. Of families that the kernels know that
    is left out: tests have tried them, and the kernels are told where examples begin.
    """
    if not plan.packing or (divided(plan) and decodes(model) is None) or keeps_apart(model):
        return plan
    why = "tried on the model: an example behind another one in its row gets other logits than alone"
    if recipe.data.packing == "on":
        raise RecipeError(
            f"data.packing=on, but {recipe.model.name} does not keep packed examples apart", why=why, fix="set data.packing to off, or auto"
        )
    console.print(f"Packing is off ({why}).", markup=False)
    return replace(plan, packing=False, reasons={**plan.reasons, "packing": why})


def default_console() -> Console:
    """Progress goes to standard error, so that results can be piped."""
    from rich.console import Console

    return Console(stderr=True)


def _with_local_base(recipe: Recipe, folder: Path) -> Recipe:
    """A `tiny:` model is written into the run folder, so that its adapter has a base that anybody can load."""
    if not recipe.model.name.startswith(TINY):
        return recipe
    import torch

    base = folder / BASE
    if not base.exists():
        model = load_model(recipe.model, dtype=torch.float32, device=torch.empty(0).device, seed=recipe.run.seed)
        save_full(model, load_tokenizer(recipe.model), base, verify=False)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(base)})})


def divided(plan: Plan) -> bool:
    """Whether each process has a part of the weights only."""
    return max(plan.mesh.get("fsdp", 1), plan.mesh.get("tp", 1)) > 1 and KINDS[plan.device.kind].engine == "torch"


def loading_dtype(recipe: Recipe, plan: Plan, stored: str) -> Dtype:
    """In which numbers a model is read.

    One that is divided and trains as a whole is read as it is stored, and becomes float32 part by part: what is read unchanged are
    pages of a file, which the processes of a machine have in common.

    Args:
        stored: dtype of the weights as their authors store them.
    """
    unchanged: dict[str, Dtype] = {dtype: dtype for dtype in BYTES_EACH} if divided(plan) and not isinstance(recipe.adapter, LoRA) else {}
    return unchanged.get(stored, plan.base_dtype)


def check_host_room(shape: ModelShape, dtype: Dtype, stored: str, quantizer: str | None) -> None:
    """Ask this before each process of this machine reads a whole model into ordinary memory, of which it will keep a part.

    Args:
        dtype, quantizer: in which they read it. stored: dtype of the weights in their files.
    Raises: DeviceError if there is no room for that.
    """
    if dtype == stored and quantizer is None:  # pages of the files, which go again when others need the room
        return
    here, (_, free) = read_processes().local_world_size, usable_memory()
    needed = round(here * shape.parameters * base_bytes_each(shape, dtype, quantizer))
    if needed > free:
        raise DeviceError(
            f"{here} processes would read all of {shape.name} in {quantizer or dtype}, which takes {format_bytes(needed)}, and "
            f"{format_bytes(free)} of this machine's memory are free",
            why=f"each makes its part from the whole. It is stored in {stored}, and read unchanged it would be there once for all of them",
            fix=f"set model.dtype to {stored}{' and leave load_in_4bit out' if quantizer else ''}, or start fewer processes on a machine",
        )


def _save(model: Any, view: Survey, folder: Path, *, checkpoints: Checkpoints, step: int) -> None:
    """The results. checkpoints: hold the weights of this step, of which a process may have a part only."""
    if isinstance(view.recipe.adapter, LoRA):
        save_adapter(model, view.tokenizer, folder / ADAPTER, overwrite=True, divided=divided(view.plan))
        return
    import torch

    if divided(view.plan):  # on the host, one tensor after the other; a part of a model may have stayed frozen
        base = folder / BASE
        spec = view.recipe.model.model_copy(update={"name": str(base)}) if base.exists() else view.recipe.model
        whole = load_model(spec, dtype=torch.float32, device=torch.empty(0).device)
        whole.config = model.config  # somebody may have given it more tokens
        stored = checkpoints.load(step).tensors
        with torch.no_grad():
            for name, parameter in whole.named_parameters():
                if f"weight/{name}" in stored:
                    parameter.data = read_whole(stored[f"weight/{name}"])
        model = whole
    save_full(model, view.tokenizer, folder / MODEL, dtype=getattr(torch, view.stored_dtype), overwrite=True)

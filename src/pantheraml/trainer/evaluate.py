"""Loss and exact match of a model that is there, on rows, without training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pantheraml.engines.open import open_engine
from pantheraml.errors import DataError, DeviceError
from pantheraml.hardware.backend import backend_of
from pantheraml.hardware.recovery import Recovery
from pantheraml.recipe.types import Recipe
from pantheraml.trainer.fast import batches_of, layout_of
from pantheraml.trainer.runs import Loaded
from pantheraml.trainer.samples import answers, ask, exact_match, with_answers
from pantheraml.trainer.sft import sft_loss
from pantheraml.trainer.survey import survey


def evaluate(recipe: Recipe, loaded: Loaded) -> dict[str, Any]:
    """Loss and exact match of a model on the recipe's held-out rows, without training. Exact match is None for plain text.

    Raises: DataError if nothing is held out.
    """
    view = survey(_without_training(recipe), model=loaded.model, tokenizer=loaded.tokenizer)
    data, plan = view.data, view.plan
    if not len(data.held_out):
        raise DataError(
            "there are no rows to evaluate on",
            why="the run held none out, or none of them could be used",
            fix="name a file with rows: pantheraml eval RUN FILE",
        )
    if plan.device.hosts > 1:
        raise DeviceError(
            f"an evaluation runs on one host, and {plan.device} is of {plan.device.hosts}",
            why="the hosts of a slice meet for training alone",
            fix="set hardware.kind to the CPU, or evaluate on a smaller slice",
        )
    backend = backend_of(plan.device)
    recovery = Recovery({"out of memory": recipe.hardware.oom_retries}, device=lambda: (backend, plan.device.index))
    engine = open_engine(backend, plan, recovery)
    engine.prepare(loaded.model, sft_loss(loaded.model, static=backend.static_shapes), None, plan, seed=recipe.run.seed)
    layout = layout_of(replace(plan, packing=False), view.tokenizer, trim=not backend.static_shapes)
    samples, asked = ask(data.questions, (), data.encoder)
    samples = with_answers(samples, answers(engine, loaded.tokenizer, asked, recipe.eval.max_new_tokens), after=True)
    return {
        "rows": len(data.held_out),
        "loss": engine.evaluate(batches_of(data, plan, layout)),
        "answered_rows": len(data.questions),
        "exact_match": exact_match(samples, after=True),
        "samples": [{"prompt": sample.prompt, "expected": sample.expected, "answer": sample.after} for sample in samples],
    }


def _without_training(recipe: Recipe) -> Recipe:
    """The same questions of the same rows, and nothing that was chosen for training: this may be another device."""
    weights: dict[str, Any] = dict.fromkeys(("load_in_4bit", "load_in_8bit", "load_in_fp8"), False)
    hardware: dict[str, Any] = dict.fromkeys(("checkpointing", "compile", "graphs"), "auto")
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update=weights),
            "hardware": recipe.hardware.model_copy(update=hardware),
            "batch": recipe.batch.model_copy(update={"micro_tokens": "auto"}),
        }
    )

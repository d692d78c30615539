"""A service from a model's name: the model and its adapters are loaded, rows are made, and one answer is tried."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pantheraml.data.chat import Encoder
from pantheraml.errors import RecipeError
from pantheraml.hardware.find import find
from pantheraml.models.adapters import add_adapter
from pantheraml.models.batch import Batcher
from pantheraml.models.head import causal_model
from pantheraml.models.request import Request
from pantheraml.models.row_adapters import AdapterChoice, row_adapters
from pantheraml.recipe.types import HardwareAsk, ModelSpec
from pantheraml.serve.engine import Engine
from pantheraml.serve.limits import Limits
from pantheraml.serve.metrics import Metrics
from pantheraml.serve.service import Service
from pantheraml.serve.vectors import Vectors
from pantheraml.trainer.folder import RECIPE, adapter_folder, is_run
from pantheraml.trainer.runs import Loaded, Run, load_target

if TYPE_CHECKING:
    from pantheraml.council.persona import Persona
    from pantheraml.memory.store import Memory

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
OWN = "default"
"""PEFT's name for the adapter of a run."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def open_service(
    target: str,
    *,
    name: str | None = None,
    dtype: Dtype = "auto",
    adapters: Mapping[str, Path] | None = None,
    rows: int | None = None,
    tokens: int | None = None,
    limits: Limits | None = None,
    personas: Sequence[Persona] | None = None,
    keys: Mapping[str, str] | None = None,
    memory: Memory | None = None,
    key: str | None = None,
    hosts: frozenset[str] | None = None,
) -> Service:
    """Load what is to be served.

    Args:
        target: a run folder, a model folder, a Hub id, or tiny:FAMILY. name: its model id; None: the last part of a folder's path, else
            the target itself. The base of a run has the name of its model.
        dtype: of the weights; auto: the fastest of the device's, or what a run was trained with.
        adapters: model id -> folder of a LoRA adapter, or of a run that trained one. rows, tokens: see `Batcher`.
    Raises: RecipeError, DeviceError, StorageError: it cannot be loaded, or its adapters cannot be chosen answer by answer.
    """
    limits = limits or Limits()
    loaded, ask, base = _load(target, dtype)
    model, models, names = loaded.model, dict[str, str | None](), list[str]()
    own = name or (Path(target).resolve().name if Path(target).is_dir() else target)
    if loaded.can_compare:
        models[own], names = OWN, [OWN]
        if base != own:
            models[base] = None
    else:
        models[own] = None
    for each, path in (adapters or {}).items():
        if each in models or each == OWN or not _NAME.fullmatch(each):
            raise RecipeError(
                f"an adapter cannot be served as {each!r}",
                why="that name is taken, or is not made of letters, digits, - and _",
                fix="choose another NAME in --adapter NAME=PATH",
            )
        model = add_adapter(model, each, adapter_folder(path))
        models[each] = each
        names.append(each)
    if names:
        try:
            with row_adapters(model, AdapterChoice(names)):
                pass  # says at once what cannot be chosen answer by answer
        except RecipeError:
            if names != [OWN]:
                raise
            models, names = {own: None}, []  # then the run is served as it is, without its base
    vectors = Vectors(model)
    batcher = Batcher(model, loaded.tokenizer, rows=rows, tokens=tokens, adapters=names)
    batcher.run([Request(prompt=(0,), max_new_tokens=1, adapter=names[0] if names else None)])
    return Service(
        models=models,
        engine=Engine(batcher, limits, Metrics()),
        encoder=Encoder(copy.deepcopy(loaded.tokenizer), "assistant", loaded.encoder.format),
        vectors=vectors,
        tokenizer=copy.deepcopy(loaded.tokenizer),
        device=find(ask).device,
        dtype=str(causal_model(model).dtype).removeprefix("torch."),
        limits=limits,
        personas=personas,
        keys=keys or {},
        memory=memory,
        key=key,
        hosts=hosts,
    )


def _load(target: str, dtype: Dtype) -> tuple[Loaded, HardwareAsk, str]:
    """The model, the device that was asked for it, and the name of what is under its adapter."""
    if not is_run(Path(target)):
        return load_target(ModelSpec(name=target, dtype=dtype)), HardwareAsk(), target
    if dtype != "auto":
        raise RecipeError(
            f"the weights of a run are not loaded in {dtype}",
            why="its recipe says how they are loaded, and it was evaluated so",
            fix=f"set model.dtype in {Path(target) / RECIPE}, or leave --dtype out",
        )
    run = Run(target)
    return run.loaded, run.recipe.hardware, Path(run.base).name if Path(run.base).is_dir() else run.base

"""The Python face, in the shapes that people know: three functions, `FastLanguageModel`, and `Trainer`.

It is the main path of trainer/run.py with the steps in the user's hands.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal, cast

from pantheraml.data.prepare import IN_MEMORY
from pantheraml.errors import DataError, PantheraError, RecipeError
from pantheraml.hardware.processes import read_processes
from pantheraml.recipe.kinds import KINDS, in_host_memory, kind_of
from pantheraml.recipe.load import load_recipe, recipe_from
from pantheraml.recipe.types import HardwareAsk, LoRA, ModelSpec, Recipe
from pantheraml.trainer.run import fit, isolated
from pantheraml.trainer.run import train as train_recipe
from pantheraml.trainer.runs import Run
from pantheraml.trainer.survey import survey

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from pantheraml.distributed.multi_gpu import MultiGPUConfig
    from pantheraml.distributed.multi_tpu import MultiTPUConfig
    from pantheraml.hardware.device import Device
    from pantheraml.planning.plan import Plan

Rows = Iterable[Mapping[str, Any]]
Paths = str | PathLike[str] | Sequence[str | PathLike[str]]


def train(
    model: str | PathLike[str], data: Paths | Rows | None = None, *, resume: bool = False, console: Console | None = None, **settings: Any
) -> Run:
    """Fine-tune a model on data, and return the run.

    Args:
        model: a Hub id, a folder, `tiny:llama`, or the path of a recipe (then without `data`).
        data: a file, several, `hub:ORG/SET`, or rows in memory (dicts, a `datasets.Dataset`).
        resume: go on with the run of this recipe, if there is one.
        console: where progress is shown; None: standard error.
        settings: keys of a recipe with `__` for the dot, or whole sections:
            `optim__lr=1e-4`, `batch={"size": 8}`, `adapter="full"`.
    Raises: PantheraError; its text says what, why, and what to do.
    """
    recipe, rows = _recipe(model, data, settings)
    return train_recipe(recipe, resume=resume, console=console, rows=rows)


def plan(model: str | PathLike[str], data: Paths | Rows | None = None, **settings: Any) -> Plan:
    """What `train` would do, and why; loads no weight. Arguments as for `train`."""
    recipe, rows = _recipe(model, data, settings)
    return survey(recipe, rows=rows).plan


def resume(run: str | Path, *, console: Console | None = None) -> Run:
    """Go on with the run in a folder, from its newest sound checkpoint. For runs that read their data from files."""
    folder = Path(run).resolve()
    recipe = Run(folder).recipe
    where = recipe.run.model_copy(update={"folder": str(folder.parent), "name": folder.name})
    return train_recipe(recipe.model_copy(update={"run": where}), resume=True, console=console)


def _recipe(model: str | PathLike[str], data: Paths | Rows | None, settings: Mapping[str, Any]) -> tuple[Recipe, Rows | None]:
    model = os.fspath(model)
    sections: dict[str, Any] = {}
    for name, value in settings.items():
        section, dot, key = name.partition("__")
        if not dot:
            sections[section] = value
        elif isinstance(sections.setdefault(section, {}), dict):
            sections[section][key] = value
        else:
            raise RecipeError(
                f"{name} and {section}={sections[section]!r} are both given",
                why="one is a key of the section, the other replaces the whole section",
                fix=f"pass {section} as a dict with all of its keys",
            )
    if data is None:
        if not model.endswith((".yaml", ".yml")):
            raise RecipeError("train needs data", why=f"{model} is no recipe file that names some", fix='train("MODEL", "examples.jsonl")')
        return load_recipe(Path(model), list(_as_words(sections))), None
    paths = _as_paths(data)
    rows = None if paths is not None else _as_rows(cast("Rows", data))
    sections["model"] = _with("name", model, sections.get("model"))
    sections["data"] = _with("train", [IN_MEMORY] if paths is None else paths, sections.get("data"))
    return recipe_from(sections), rows


def _as_paths(data: object) -> list[str] | None:
    """The paths that are meant; None if it is not paths that were given."""
    if isinstance(data, str | PathLike):
        return [os.fspath(cast("str | PathLike[str]", data))]
    if isinstance(data, list | tuple) and data and all(isinstance(path, str | PathLike) for path in cast("Sequence[object]", data)):
        return [os.fspath(path) for path in cast("Sequence[str | PathLike[str]]", data)]
    return None


def _as_rows(data: Rows) -> list[dict[str, Any]]:
    """Rows from memory. Raises: DataError if one is no mapping."""
    if isinstance(data, Mapping):
        raise DataError("the data is one mapping", why="a data set is many rows", fix="pass a list of such mappings, or the path of a file")
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(data, 1):
        if not isinstance(cast("object", row), Mapping):
            raise DataError(
                f"row {number} of the data is a {type(row).__name__}",
                why="a row is a mapping with named fields, as a line of a JSONL file is",
                fix="pass dicts such as {'messages': [...]}, or the path of a file",
            )
        rows.append(dict(row))
    return rows


def _with(key: str, value: Any, section: Any) -> dict[str, Any]:
    """The section as it was given, with the key that an argument of its own says."""
    given = cast("dict[str, Any]", section) if isinstance(section, dict) else {}
    return {**given, key: value}


def _as_words(sections: Mapping[str, Any]) -> Iterator[str]:
    """The settings as a command line would say them: JSON is YAML."""
    for section, value in sections.items():
        if isinstance(value, Mapping):
            for key, inner in cast("Mapping[str, Any]", value).items():
                yield f"{section}.{key}={json.dumps(inner, default=str)}"
        else:
            yield f"{section}={json.dumps(value, default=str)}"


class FastLanguageModel:
    """Loading and adapting, step by step. The models are plain Hugging Face and PEFT models with two more methods:
    `save_pretrained_merged` and `save_pretrained_gguf`."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int | None = None,
        dtype: Any = None,
        load_in_4bit: bool = False,
        *,
        load_in_8bit: bool = False,
        load_in_fp8: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
        device: str = "auto",
        attn_implementation: str | None = None,
        seed: int = 3407,
        use_multi_gpu: bool | None = None,
        auto_device_map: bool | None = None,
        use_tpu: bool | None = None,
    ) -> tuple[Any, Any]:
        """(model, tokenizer), the model on the best device that answers; under torchrun, on this process's own one.

        Args:
            model_name: a Hub id, a folder, or `tiny:llama`.
            max_seq_length: longest example in tokens, kept for the Trainer; None: 2048, or what the model can do.
            dtype: a torch dtype or its name; None: bfloat16 where the device is fast in it, else float32.
            load_in_4bit: hold the weights in NF4 (needs bitsandbytes); train it with an adapter.
            load_in_8bit, load_in_fp8: hold them in eight bits (whole numbers or floats) as soon as `get_peft_model` has put an
                adapter on them, and multiply in eight bits.
            device: a kind ("cuda"), or one device for this process ("cuda:1").
            seed: of the weights of a `tiny:` model.
            use_multi_gpu: more than one device is wanted. Under torchrun that is so, and the model is loaded as a whole in each process, on
                the host if its device has no room for it: training makes copies or parts of it. In one process that has several GPUs, the
                model is spread over them, for answers; a Trainer refuses it. One process with one device is an error.
            auto_device_map: spread the model over the GPUs of this process, by what is free on them; with a single one, it lies there. None:
                as use_multi_gpu says. Under torchrun, and on a TPU, the plan of the training decides where what lies.
            use_tpu: True: the model waits on the host for the chips of a TPU. False: "auto" means no TPU.
        Raises: RecipeError if there is no such model, or arguments contradict each other; DeviceError if there is no such device, or
            it cannot hold weights so.
        """
        import torch

        from pantheraml.distributed.multi_gpu import device_for_model
        from pantheraml.hardware.backend import backend_of
        from pantheraml.models.load import load_model, load_tokenizer
        from pantheraml.models.quantize import available, quantization
        from pantheraml.planning.base import quantizer_of

        found, spread = device_for_model(device, use_multi_gpu=use_multi_gpu, auto_device_map=auto_device_map, use_tpu=use_tpu)
        chosen = found.device
        backend = backend_of(chosen)
        name = str(dtype).removeprefix("torch.") if dtype is not None else chosen.dtypes[0]
        arithmetic = getattr(torch, name, None)
        if not isinstance(arithmetic, torch.dtype) or name not in chosen.dtypes:
            raise RecipeError(
                f"dtype={name} does not train on {chosen}",
                why=f"it trains well in {', '.join(chosen.dtypes)}",
                fix=f"pass dtype=None, or one of {', '.join(chosen.dtypes)}",
            )
        # Through the recipe and the plan, which say what does not go together, and what this device cannot.
        bits = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit, "load_in_fp8": load_in_fp8}
        checked = recipe_from({"model": {"name": model_name, **bits}, "data": "checked"})
        quantizer = quantizer_of(checked, chosen, available(backend.quantizers))
        spec = ModelSpec(name=model_name, revision=revision, trust_remote_code=trust_remote_code)
        place = _loading_device(spec, chosen, name, quantizer)
        model = load_model(
            spec,
            dtype=arithmetic,
            device=place,
            attention=attn_implementation,
            quantization=quantization(quantizer, arithmetic),
            seed=seed,
            device_map=_device_map(spec, spread, arithmetic, quantizer) if spread else None,
        )
        waits = kind_of(place.type) != chosen.kind
        origin = _Origin(
            spec=spec, max_tokens=max_seq_length, dtype=name, device=chosen.kind, index=chosen.index, on_host=waits, quantizer=quantizer
        )
        _note(model, origin)
        return _with_savers(model), load_tokenizer(spec)

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: str | Sequence[str] = "all-linear",
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        *,
        use_rslora: bool = False,
        use_dora: bool = False,
        use_gradient_checkpointing: bool | str = False,
        random_state: int = 3407,
        **rest: Any,
    ) -> Any:
        """The model with a LoRA on its linear layers, as a PEFT model. The arguments are those of PEFT's LoraConfig.

        Args:
            use_gradient_checkpointing: True: each layer is computed again in backward. "unsloth": the same in other trainers;
                ours plans what each layer keeps, and computes again only what would not fit.
        Raises: RecipeError for targets that are no linear layers, or an argument that is not known here.
        """
        from pantheraml.models.adapters import attach
        from pantheraml.models.quantize import to_eight_bits

        if unknown := [name for name, value in rest.items() if not (name in _HARMLESS and value in _HARMLESS[name])]:
            raise RecipeError(
                f"get_peft_model does not know {', '.join(f'{name}={rest[name]!r}' for name in unknown)}",
                why="an argument that nothing reads would change nothing",
                fix="leave it out, or make the adapter with peft.get_peft_model: it trains here just as well",
            )
        targets = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
        asked = {"rank": r, "alpha": float(lora_alpha), "dropout": float(lora_dropout), "targets": list(targets), "rslora": use_rslora}
        # Through the recipe, which says what is wrong with a value.
        checked = recipe_from({"model": "checked", "data": "checked", "adapter": {"kind": "lora", "dora": use_dora, **asked}})
        spec = cast("LoRA", checked.adapter)
        adapted: Any = attach(model, spec, seed=random_state)
        if use_gradient_checkpointing:
            adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            adapted.enable_input_require_grads()
        origin = _origin(model)
        if (origin.quantizer == "int8" or origin.quantizer == "fp8") and not origin.on_host:  # else the engine does it
            to_eight_bits(adapted, origin.quantizer)
        _note(adapted, replace(origin, adapter=spec, checkpointing=use_gradient_checkpointing is True))
        return _with_savers(adapted)

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Evaluation mode with the key-value cache on; returns the same model."""
        model.config.use_cache = True
        return model.eval()

    @staticmethod
    def for_training(model: Any) -> Any:
        """Training mode; returns the same model."""
        return model.train()


# Arguments of snippets written for Unsloth that ask for what is so anyway.
_HARMLESS: dict[str, tuple[Any, ...]] = {"bias": ("none",), "loftq_config": (None,), "max_seq_length": (None,), "task_type": ("CAUSAL_LM",)}


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """Where a model came from; kept on the instance, for its Trainer and for merging."""

    spec: ModelSpec
    max_tokens: int | None = None
    dtype: str = "float32"
    device: str = "auto"
    index: int = 0
    on_host: bool = False
    """It waits on the host for its device: torch has no tensors there, or there is no room for the whole of it."""
    quantizer: str | None = None
    adapter: LoRA | None = None
    checkpointing: bool = False
    divided: bool = False
    """Each process has only a part of it since it was trained."""


def _loading_device(spec: ModelSpec, device: Device, dtype: Any, quantizer: str | None) -> torch.device:
    """Where this process loads a model. One of several waits on the host where the whole has no room: it will be divided.

    Raises: DeviceError if the host has no room for it either.
    """
    from pantheraml.engines.open import loading_device
    from pantheraml.hardware.backend import backend_of
    from pantheraml.models.load import read_config, read_shape
    from pantheraml.planning.base import base_bytes_each
    from pantheraml.planning.batch import HEADROOM
    from pantheraml.trainer.run import check_host_room

    too_large = False
    if read_processes().world_size > 1 and not in_host_memory(device.kind) and device.free_bytes is not None:
        shape = read_shape(spec)
        too_large = shape.parameters * base_bytes_each(shape, dtype, quantizer) > HEADROOM * device.free_bytes
        if too_large:
            check_host_room(shape, dtype, str(read_config(spec).dtype or "float32").removeprefix("torch."), quantizer)
    return loading_device(backend_of(device), device.index, divided=too_large)


def _device_map(spec: ModelSpec, devices: Sequence[Device], dtype: torch.dtype, quantizer: str | None) -> dict[str, torch.device]:
    """Where each part of a model lies that is spread over devices. Raises: DeviceError if they have no room for it."""
    from pantheraml.distributed.device_map import balanced_device_map
    from pantheraml.hardware.backend import backend_of
    from pantheraml.models.load import empty_model, read_config

    if quantizer in ("int8", "fp8"):
        raise RecipeError(
            "a model in eight bits cannot be spread over several GPUs",
            why="they begin with an adapter that is trained, and a model that is spread is for answers",
            fix="leave load_in_8bit and load_in_fp8 out, or auto_device_map and use_multi_gpu",
        )
    backend = backend_of(devices[0])
    free = {each.index: backend.memory(each.index).free_bytes or each.free_bytes or 0 for each in devices}
    four_bits = 0.5 + 4 / 64 if quantizer == "nf4" else None  # with a float32 scale for each 64 weights
    placed = balanced_device_map(empty_model(spec, read_config(spec)), free, bytes_each=dtype.itemsize, linear_bytes_each=four_bits)
    places = {each.index: backend.torch_device(each.index) for each in reversed(devices)}  # the first stays the current one
    return {name: places[index] for name, index in placed.items()}


def _checkpointing(args: TrainingArguments, origin: _Origin) -> str:
    """What was asked: of the Trainer, else of get_peft_model, else nothing."""
    if args.gradient_checkpointing is None:
        return "on" if origin.checkpointing else "auto"
    return "on" if args.gradient_checkpointing else "off"


def _note(model: Any, origin: _Origin) -> None:
    model.pantheraml_origin = origin


def _origin(model: Any) -> _Origin:
    """What is known of a model; one that somebody else loaded is known by its own words."""
    for each in (model, model.get_base_model() if hasattr(model, "get_base_model") else model):
        found: object = each.__dict__.get("pantheraml_origin")
        if isinstance(found, _Origin):
            return found
    name = str(model.config.name_or_path or "model")
    return _Origin(spec=ModelSpec(name=name), dtype=str(model.dtype).removeprefix("torch."), device=_kind(model))


def _kind(model: Any) -> str:
    """The kind of the device that a model is on; torch's name for it where it is none of ours."""
    return kind_of(model.device.type) or model.device.type


def _index(model: Any, origin: _Origin) -> int:
    """Of the device of the first process of this machine, behind which those of the others come. Raises: RecipeError if this one is not there."""
    index, kind = (origin.index, origin.device) if origin.on_host else (model.device.index or 0, _kind(model))
    own = read_processes().local_rank if kind in KINDS and KINDS[kind].family == "gpu" else 0
    if index < own:
        raise RecipeError(
            f"process {own} of this machine has its model on {kind}:{index}",
            why="each process trains on a GPU of its own, and they are numbered as the processes are",
            fix="load it with FastLanguageModel.from_pretrained and without an index, or move it to the GPU of its process before",
        )
    return index - own


def _check_trainable(model: Any) -> None:
    """Raises: RecipeError for a model that no process can train alone, or divide."""
    if _origin(model).divided:
        raise RecipeError(
            "each process has only a part of this model",
            why="it was divided when it was trained",
            fix="load it again, and for what was trained: PeftModel.from_pretrained(model, run.folder / 'adapter'), or run.folder / 'model'",
        )
    places = {str(parameter.device) for parameter in model.parameters()}
    if len(places) > 1:
        raise RecipeError(
            f"this model lies on {', '.join(sorted(places))}",
            why="a model that is spread over devices is for answers: in training, each device has a process of its own",
            fix="load it without auto_device_map and device_map, and start the script with torchrun --nproc-per-node DEVICES SCRIPT.py",
        )


def _check_whole(model: Any) -> None:
    """Raises: RecipeError for a model of which this process has a part, which nobody could load."""
    if _origin(model).divided:
        raise RecipeError(
            "this process has only a part of the model",
            why="it was divided when it was trained, so there is nothing whole to save here",
            fix="take it from the run's folder, in the first process: run.export('merged') or run.export('gguf')",
        )


def _with_savers(model: Any) -> Any:
    model.save_pretrained_merged = MethodType(save_pretrained_merged, model)
    model.save_pretrained_gguf = MethodType(save_pretrained_gguf, model)
    return model


def save_pretrained_merged(model: Any, save_directory: str | Path, tokenizer: Any, *, overwrite: bool = False) -> Path:
    """Write the model, its adapter merged in, as a folder for transformers; read back and compared before it is there.

    Of several processes the first one writes, and the others do not wait for it.
    Raises: StorageError if the disk refuses or the logits differ; RecipeError if this process has only a part of the model.
    """
    from pantheraml.export.safetensors import merge_model, save_full

    _check_whole(model)
    out = Path(save_directory)
    if read_processes().rank:
        return out
    trusted = _origin(model).spec.trust_remote_code
    if hasattr(model, "get_base_model"):
        return merge_model(model, tokenizer, out, trust_remote_code=trusted, overwrite=overwrite).path
    return save_full(model, tokenizer, out, overwrite=overwrite).path


def save_pretrained_gguf(
    model: Any, save_directory: str | Path, tokenizer: Any, quantization_method: str = "q8_0", *, overwrite: bool = False
) -> Path:
    """Write `save_directory/model.TYPE.gguf` for llama.cpp, and let llama.cpp check it where it is installed.

    Of several processes the first one writes, and the others do not wait for it.
    Args:
        quantization_method: f32, f16, bf16, q8_0, or a K-quant (q4_k_m) where a quantiser is installed.
    Raises: as the export room; see `pantheraml export`.
    """
    import tempfile
    from typing import get_args

    from pantheraml.export.gguf import export_gguf
    from pantheraml.recipe.types import GgufType

    kind = quantization_method.lower()
    if kind not in get_args(GgufType):
        raise RecipeError(
            f"quantization_method={quantization_method!r} is not known",
            why="these are: " + ", ".join(get_args(GgufType)),
            fix="choose one of them",
        )
    _check_whole(model)
    file = Path(save_directory) / f"model.{kind}.gguf"
    if read_processes().rank:
        return file
    if file.exists() and not overwrite:
        raise PantheraError(f"{file} is there already", why="it may be of another model", fix="pass overwrite=True, or another folder")
    with tempfile.TemporaryDirectory(prefix="pantheraml-merged-") as room:
        merged = save_pretrained_merged(model, Path(room) / "merged", tokenizer)
        return export_gguf(merged, file, cast("GgufType", kind)).path


@dataclass(frozen=True, kw_only=True)
class TrainingArguments:
    """What a Trainer is told, in the words of Hugging Face's trainers. None: the recipe's default.

    `per_device_train_batch_size * gradient_accumulation_steps` examples make one step, over all devices; how many a device takes at
    once is planned. Rates, steps and epochs are as in `pantheraml recipe explain`.
    """

    output_dir: str = "runs"
    run_name: str | None = None
    per_device_train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = None
    num_train_epochs: float = 1.0
    max_steps: int = -1
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optim: str = "adamw_torch"
    bf16: bool | None = None
    fp16: bool | None = None
    max_length: int | None = None
    packing: bool | None = None
    assistant_only_loss: bool = True
    gradient_checkpointing: bool | None = None
    logging_steps: int = 10
    eval_steps: int | None = None
    save_steps: int | None = None
    save_total_limit: int = 2
    seed: int = 3407
    report_to: str | Sequence[str] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Any other keys of a recipe, by section: `{"eval": {"generate_rows": 0}}`."""


class Trainer:
    """Trains a model that is here, on rows that are here. Started by torchrun, all processes train it together, each with its share of a step.

    Args:
        model: from FastLanguageModel, PEFT or transformers; what requires gradients is trained, in place.
        tokenizer: or `processing_class`, as TRL names it.
        train_dataset, eval_dataset: a `datasets.Dataset`, a list of dicts, or a path.
        args: how; see TrainingArguments.
    Raises: RecipeError if an argument is missing, no parameter of the model trains, or it lies on several devices.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        train_dataset: Paths | Rows | None = None,
        eval_dataset: Paths | Rows | None = None,
        args: TrainingArguments | None = None,
        *,
        processing_class: Any = None,
        console: Console | None = None,
    ) -> None:
        tokenizer = tokenizer if tokenizer is not None else processing_class
        if tokenizer is None or train_dataset is None:
            missing = "tokenizer" if tokenizer is None else "train_dataset"
            raise RecipeError(
                f"Trainer needs a {missing}", why="it encodes the rows itself, with the model's chat template", fix=f"pass {missing}=..."
            )
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise RecipeError(
                "no parameter of this model trains",
                why="all of them are frozen, so nothing could be learned",
                fix="add an adapter with FastLanguageModel.get_peft_model(model), or call model.requires_grad_(True)",
            )
        _check_trainable(model)
        self.model, self.tokenizer, self.console = model, tokenizer, console
        self.args = args or TrainingArguments()
        self._train, self._train_rows = _paths_and_rows(train_dataset)
        self._eval, self._eval_rows = _paths_and_rows(eval_dataset)
        self.recipe = self._as_recipe()

    def train(self, resume_from_checkpoint: bool = False) -> Run:
        """Train in place, and return the run. With `resume_from_checkpoint`, go on from its newest sound checkpoint.

        Of several processes each has the same model and rows, and calls this. Afterwards each has the trained model, unless the plan
        divided it (hardware.parallel fsdp or tp): then each has a part, which only what is in the run's folder makes whole. That
        folder is the first process's, and all of them get it, whether they see it or are on another machine.
        Raises: PantheraError, if other processes have other rows or weights, or fewer were started than devices were asked for.
        """
        from pantheraml.distributed.world import together
        from pantheraml.hardware.backend import backend_of
        from pantheraml.hardware.find import find_own
        from pantheraml.models.quantize import to_eight_bits
        from pantheraml.trainer.folder import PLAN, write_json
        from pantheraml.trainer.hosts import agreed, check_started, opened
        from pantheraml.trainer.resume import stored_plan
        from pantheraml.trainer.run import default_console, divided

        with opened(self.recipe, resume=resume_from_checkpoint, console=self.console or default_console()) as begun:
            folder, recipe, console, world = begun.folder, begun.recipe, begun.console, begun.world
            view = survey(
                recipe,
                # Now that all have their model, memory is looked at again.
                found=begun.found if world.size == 1 else find_own(recipe.hardware),
                folder=folder,
                console=console,
                rows=self._train_rows,
                held_out=self._eval_rows,
                model=self.model,
                tokenizer=self.tokenizer,
                world=world,
            )
            planned = agreed(stored_plan(folder, view.plan, recipe, console) if resume_from_checkpoint else view.plan, world)
            check_started(planned, world)
            backend = backend_of(planned.device)
            if (planned.quantizer == "int8" or planned.quantizer == "fp8") and backend.engine == "torch":
                to_eight_bits(self.model, planned.quantizer)  # which get_peft_model has done, unless PEFT made the adapter
            planned = agreed(planned if world.rank else isolated(self.model, planned, recipe, console), world)
            backend.set_threads(planned.threads)
            write_json(folder / PLAN, planned.to_dict())
            with together(world):
                if not world.rank:  # transformers writes nothing in other processes
                    self._keep_base(folder, divided=divided(planned))
            if divided(planned):
                _note(self.model, replace(_origin(self.model), divided=True))
            run = fit(replace(view, plan=planned), self.model, backend, folder, console, begun)
            return run if world.rank == 0 else Run(begun.kept)

    def _keep_base(self, folder: Path, *, divided: bool) -> None:
        """An adapter on a model that exists only here is useless without it, so its base is written beside it.

        Also what is made whole again from parts must begin with a whole one.
        """
        from pantheraml.export.safetensors import save_full
        from pantheraml.models.quantize import to_matrices
        from pantheraml.models.tiny import PREFIX
        from pantheraml.trainer.folder import BASE

        named, adapted = self.model.config.name_or_path, hasattr(self.model, "get_base_model")
        if not (adapted or divided) or (folder / BASE).exists() or (named and not named.startswith(PREFIX)):
            return
        bare = copy.deepcopy(self.model)
        bare = bare.unload() if adapted else bare
        to_matrices(bare)
        bare.config.name_or_path = str(folder / BASE)
        save_full(bare, self.tokenizer, folder / BASE, verify=False)

    def _as_recipe(self) -> Recipe:
        args, origin = self.args, _origin(self.model)
        length = args.max_length or origin.max_tokens
        steps = args.max_steps if args.max_steps > 0 else None
        warmup = args.warmup_ratio
        if args.warmup_steps is not None:
            if not steps:
                raise RecipeError(
                    f"warmup_steps={args.warmup_steps} is given without max_steps",
                    why="a recipe holds the warm-up as a share of the steps, and how many there are is not known before the rows are read",
                    fix="pass warmup_ratio, or max_steps as well",
                )
            warmup = min(args.warmup_steps / steps, 0.999)
        _check_precision(args, origin)
        adapted = hasattr(self.model, "get_base_model")
        said: dict[str, dict[str, Any]] = {
            "model": {
                "name": origin.spec.name,
                "revision": origin.spec.revision,
                "trust_remote_code": origin.spec.trust_remote_code,
                "dtype": origin.dtype,
                **({_BITS[origin.quantizer]: True} if origin.quantizer else {}),
                **({"max_tokens": length} if length else {}),
            },
            "data": {
                "train": self._train,
                "eval": self._eval,
                **({} if args.packing is None else {"packing": "on" if args.packing else "off"}),
            },
            "method": {"kind": "sft", "loss_on": "assistant" if args.assistant_only_loss else "all"},
            "adapter": _adapter_of(self.model, origin) if adapted else {"kind": "full"},
            "batch": {"size": args.per_device_train_batch_size * args.gradient_accumulation_steps},
            "optim": {
                "lr": args.learning_rate if args.learning_rate is not None else "auto",
                "epochs": float(args.num_train_epochs),
                "steps": steps,
                "schedule": args.lr_scheduler_type,
                "warmup": warmup,
                "weight_decay": args.weight_decay,
                "clip_norm": args.max_grad_norm,
                "states": _ADAMW[args.optim],
            },
            "eval": {} if args.eval_steps is None else {"every": args.eval_steps},
            "hardware": {
                "kind": origin.device if origin.on_host else _kind(self.model),
                "index": _index(self.model, origin),
                "checkpointing": _checkpointing(args, origin),
            },
            "run": {
                "folder": args.output_dir,
                "name": args.run_name,
                "seed": args.seed,
                "log_every": args.logging_steps,
                "keep": args.save_total_limit,
                **({} if args.save_steps is None else {"save_every": args.save_steps}),
                "reporters": [] if args.report_to in ("none", "") else args.report_to,
            },
        }
        for section, keys in args.recipe.items():
            said[section] = {**said.get(section, {}), **keys} if isinstance(keys, Mapping) else keys
        return recipe_from(said)


class PantheraMLTPUTrainer(Trainer):
    """`Trainer` on the chips that `tpu_config` names; the model may have been loaded anywhere on the host.

    Args:
        tpu_config: a `pantheraml.distributed.MultiTPUConfig`; None: all chips that are here.
        args, more: those of `Trainer`.
    """

    def __init__(self, *args: Any, tpu_config: MultiTPUConfig | None = None, **more: Any) -> None:
        from pantheraml.distributed.multi_tpu import MultiTPUConfig

        self._tpu = tpu_config or MultiTPUConfig()
        super().__init__(*args, **more)

    def _as_recipe(self) -> Recipe:
        recipe = super()._as_recipe()
        hardware = {**recipe.hardware.model_dump(exclude_unset=True), **self._tpu.hardware(), "index": 0}
        return recipe.model_copy(update={"hardware": HardwareAsk.model_validate(hardware)})


class PantheraMLDistributedTrainer(Trainer):
    """`Trainer` of the processes that torchrun has started, which it joins when it is made. One process trains alone.

    Args:
        multi_gpu_config: a `pantheraml.distributed.MultiGPUConfig`; None: as many devices as processes, shared as the plan says.
        args, more: those of `Trainer`.

    Attributes:
        state: this process among the others.
    Raises: as `setup_distributed_training`; RecipeError if the configuration contradicts the other arguments.
    """

    def __init__(self, *args: Any, multi_gpu_config: MultiGPUConfig | None = None, **more: Any) -> None:
        from pantheraml.distributed.multi_gpu import MultiGPUConfig, join
        from pantheraml.hardware.find import find_own

        self.multi_gpu_config = multi_gpu_config or MultiGPUConfig()
        super().__init__(*args, **more)
        self.state = join(self.multi_gpu_config, find_own(self.recipe.hardware))

    def _as_recipe(self) -> Recipe:
        recipe = super()._as_recipe()
        said, asked = recipe.hardware.model_dump(exclude_unset=True), self.multi_gpu_config.hardware()
        for name, value in asked.items():
            if said.get(name, "auto") not in ("auto", value):
                raise RecipeError(
                    f"multi_gpu_config asks for hardware.{name}={value}, and the other arguments for {said[name]}",
                    why="both say how the devices work together, and they contradict each other",
                    fix="say it once",
                )
        return recipe.model_copy(update={"hardware": HardwareAsk.model_validate({**said, **asked})})


_BITS = {"nf4": "load_in_4bit", "int8": "load_in_8bit", "fp8": "load_in_fp8"}
"""How the base is held -> the field of a recipe that asks for it."""
_ADAMW = {
    **dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused"), "float32"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "8bit"),
    "paged_adamw_8bit": "paged",
}
"""Names that Hugging Face's trainers have for it -> optim.states of a recipe."""


def _check_precision(args: TrainingArguments, origin: _Origin) -> None:
    """Arguments of other trainers that name what is decided elsewhere here: they may agree, and are not overridden in silence."""
    if args.fp16 or (args.bf16 and origin.dtype != "bfloat16"):
        asked = "fp16" if args.fp16 else "bf16"
        raise RecipeError(
            f"{asked}=True, but the model was loaded to compute in {origin.dtype}",
            why="the arithmetic is that of the model"
            + ("; float16 is not trained, since it overflows without loss scaling" if args.fp16 else ""),
            fix="leave fp16 and bf16 out" + ("" if args.fp16 else ', or load the model with dtype="bfloat16"'),
        )
    if args.optim not in _ADAMW:
        raise RecipeError(
            f"optim={args.optim!r} is not known",
            why=f"the optimizer is AdamW, under one of these names: {', '.join(_ADAMW)}",
            fix="leave optim out",
        )


def _adapter_of(model: Any, origin: _Origin) -> dict[str, Any]:
    """The adapter as a recipe says it, also where PEFT made it."""
    if origin.adapter is not None:
        return {**origin.adapter.model_dump(), "targets": list(origin.adapter.targets)}
    config = model.peft_config[model.active_adapter]
    targets = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules or ())
    return {
        "kind": "lora",
        "rank": getattr(config, "r", 1),
        "alpha": float(getattr(config, "lora_alpha", 1)),
        "dropout": getattr(config, "lora_dropout", 0.0),
        "targets": targets,
        "rslora": getattr(config, "use_rslora", False),
        "dora": getattr(config, "use_dora", False),
    }


def _paths_and_rows(dataset: Paths | Rows | None) -> tuple[list[str], list[dict[str, Any]] | None]:
    if dataset is None:
        return [], None
    paths = _as_paths(dataset)
    return (paths, None) if paths is not None else ([IN_MEMORY], _as_rows(cast("Rows", dataset)))

"""Every key of a recipe by its dotted name, what it may be, and the nearest one to a name that is not among them."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pantheraml.recipe.types import Recipe

SECTIONS: tuple[str, ...] = tuple(Recipe.model_fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One thing that can be asked.

    Attributes:
        name: dotted, as on the command line: `optim.lr`.
        allowed: what the value may be, in words.
        default: its value where the recipe is silent; None for the required ones.
        kinds: the kinds of its section that know this key (`lora`); empty where a section has one kind.
        many: the value is a list.
    """

    name: str
    allowed: str
    description: str
    default: Any
    required: bool
    kinds: tuple[str, ...]
    many: bool

    @property
    def section(self) -> str:
        """`optim` of `optim.lr`."""
        return self.name.split(".")[0]

    @property
    def last(self) -> str:
        """`lr` of `optim.lr`."""
        return self.name.split(".")[-1]


@cache
def keys() -> Mapping[str, Key]:
    """All keys, in the order in which the recipe declares them."""
    return {key.name: key for section, field in Recipe.model_fields.items() for key in _section(section, _models(field.annotation))}


def _section(section: str, variants: tuple[type[BaseModel], ...]) -> list[Key]:
    """The keys of a section; one that several kinds share stands once, as its first kind has it."""
    leaves: dict[str, FieldInfo] = {}
    for model in variants:
        for last, leaf in model.model_fields.items():
            leaves.setdefault(last, leaf)
    kinds: dict[str, list[str]] = {last: [] for last in leaves}
    if len(variants) > 1:
        for model in variants:
            for last in model.model_fields:
                kinds[last].append(model.model_fields["kind"].default)
    return [
        Key(
            name=f"{section}.{last}",
            allowed="one of " + ", ".join(kinds[last]) if last == "kind" and kinds[last] else _allowed(leaf),
            description=leaf.description or "Which of them: it decides which keys there are beside it.",
            default=None if leaf.is_required() else leaf.default,
            required=leaf.is_required(),
            kinds=tuple(kinds[last]),
            many=get_origin(leaf.annotation) is tuple,
        )
        for last, leaf in leaves.items()
    ]


def _models(annotation: Any) -> tuple[type[BaseModel], ...]:
    """The models of a section: one, or those of a union."""
    return tuple(_models(part)[0] for part in get_args(annotation)) if get_args(annotation) else (annotation,)


def _allowed(field: FieldInfo) -> str:
    """What a field may be, in words."""
    filled = any(isinstance(limit, MinLen) for limit in field.metadata)
    return ", or ".join(_words(field.annotation, tuple(field.metadata))) + (", not empty" if filled else "")


def _words(annotation: Any, metadata: tuple[Any, ...] = ()) -> list[str]:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [m for part in parts[1:] for m in (part.metadata if isinstance(part, FieldInfo) else (part,))]
        return _words(parts[0], (*metadata, *inner))
    if origin in (Union, types.UnionType):
        return [word for part in parts for word in _words(part, metadata)]
    if origin is Literal:
        return [parts[0] if len(parts) == 1 else "one of " + ", ".join(parts)]
    if origin is tuple:
        (word,) = _words(parts[0])
        return [word, "a list of " + ("them" if word.startswith("one of") else "texts")]
    if annotation is type(None):
        return ["null"]
    if annotation is bool:
        return ["true or false"]
    if annotation is str:
        return ["text"]
    assert annotation in (int, float), f"a recipe field of type {annotation} has no words yet"
    return [("a whole number" if annotation is int else "a number") + _range(metadata)]


def _range(metadata: Iterable[Any]) -> str:
    above = least = below = None
    for limit in metadata:
        match limit:
            case Gt():
                above = limit.gt
            case Ge():
                least = limit.ge
            case Lt():
                below = limit.lt
            case _:
                pass
    if below is not None:
        return f" from {least} to below {below}"
    if above is not None:
        return f" above {above}"
    return f", {least} or more" if least is not None else ""


# What other trainers call the same thing.
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    name: tuple(targets.split())
    for names, targets in {
        "model_name model_name_or_path model_id base_model pretrained checkpoint": "model.name",
        "torch_dtype precision bf16 fp16 mixed_precision": "model.dtype",
        "attn_implementation flash_attention use_flash_attention": "model.attention",
        "max_seq_length max_seq_len max_length seq_len sequence_length sequence_len cutoff_len block_size context_length": "model.max_tokens",
        "quantization quantize bits qlora": "model.load_in_4bit model.load_in_8bit",
        "fp8 use_fp8": "model.load_in_fp8",
        "r lora_r lora_rank": "adapter.rank",
        "lora_alpha": "adapter.alpha",
        "lora_dropout": "adapter.dropout",
        "target_modules lora_target lora_target_modules modules": "adapter.targets",
        "use_rslora": "adapter.rslora",
        "use_dora": "adapter.dora",
        "peft peft_type finetuning_type lora use_lora full": "adapter.kind",
        "stage trainer": "method.kind",
        "train_on_inputs train_on_responses_only assistant_only_loss completion_only_loss": "method.loss_on",
        "dataset datasets dataset_name dataset_path train_dataset train_file train_files train_data path files": "data.train",
        "eval_dataset eval_file validation validation_file val_data eval_data": "data.eval",
        "val_size val_set_size test_size validation_split eval_split": "data.eval_fraction",
        "max_eval_samples eval_rows": "data.max_eval_rows",
        "dataset_format data_format prompt_style": "data.format",
        "sample_packing": "data.packing",
        "template": "data.chat_template",
        "batch_size train_batch_size per_device_train_batch_size gradient_accumulation_steps global_batch_size": "batch.size",
        "micro_batch_size per_device_eval_batch_size": "batch.micro_tokens",
        "learning_rate peak_lr max_lr": "optim.lr",
        "num_train_epochs num_epochs n_epochs": "optim.epochs",
        "max_steps num_steps iters iterations max_iters": "optim.steps",
        "lr_scheduler lr_scheduler_type scheduler": "optim.schedule",
        "warmup_ratio warmup_steps num_warmup_steps": "optim.warmup",
        "wd decay": "optim.weight_decay",
        "adam_beta1": "optim.beta1",
        "adam_beta2": "optim.beta2",
        "betas": "optim.beta1 optim.beta2",
        "adam_epsilon adam_eps epsilon": "optim.eps",
        "max_grad_norm grad_clip gradient_clip_val clip_grad_norm": "optim.clip_norm",
        "optimizer optimizer_states optim_bits": "optim.states",
        "eval_steps eval_every eval_interval evaluation_strategy eval_strategy": "eval.every",
        "early_stopping early_stopping_patience patience": "eval.early_stop",
        "gpu device device_type accelerator": "hardware.kind",
        "device_index gpu_id local_rank": "hardware.index",
        "num_threads": "hardware.threads",
        "gradient_checkpointing use_gradient_checkpointing activation_checkpointing": "hardware.checkpointing",
        "torch_compile use_compile torch_compile_mode": "hardware.compile",
        "cuda_graphs cuda_graph use_cuda_graphs": "hardware.graphs",
        "output_dir out_dir output save_dir": "run.folder",
        "run_name project experiment": "run.name",
        "random_state random_seed": "run.seed",
        "logging_steps log_steps log_interval": "run.log_every",
        "save_steps save_strategy save_interval checkpoint_every": "run.save_every",
        "save_total_limit": "run.keep",
        "load_best_model_at_end": "run.best",
        "report_to logger wandb tensorboard": "run.reporters",
        "merge merge_lora save_merged": "export.merged",
        "gguf_type quantization_method": "export.gguf",
    }.items()
    for name in names.split()
}


def nearest(unknown: str) -> tuple[str, ...]:
    """Known keys that `unknown` (dotted) was probably meant to be, likeliest first, at most three.

    Tried in this order: one slip of the finger in the same section; another trainer's word for it; the right
    word in a wrong section; then whatever is close. Empty where nothing is.
    """
    name = _snake(unknown)
    section, _, last = name.rpartition(".")
    last = last or section
    known = list(keys().values())
    slips = [key.name for key in known if _distance(key.name, name) <= 1]
    words = SYNONYMS.get(last, ())
    elsewhere = [key.name for key in known if key.last == last]
    likely = [*slips, *words, *sorted(elsewhere, key=lambda other: not other.startswith(f"{section}."))]
    if not likely:
        # Two slips in a word of six letters; words of three letters have too many neighbours.
        near = [(_distance(key.last, last), key.section != section, key.name) for key in known]
        likely = [other for distance, _, other in sorted(near) if distance * 3 <= len(last)]
    if not likely and section not in SECTIONS:
        likely = [key.name for key in known if key.last == last or _distance(key.name, name) <= 2]
    return tuple(dict.fromkeys(likely))[:3]


def nearest_section(unknown: str) -> str | None:
    """The section that a misspelt one was meant to be."""
    distance, name = min((_distance(section, _snake(unknown)), section) for section in SECTIONS)
    return name if distance * 3 <= max(len(unknown), 3) else None


def _snake(name: str) -> str:
    """`learningRate`, `learning-rate` and `Learning_Rate` are `learning_rate`."""
    apart = "".join(f"_{c}" if c.isupper() and i and name[i - 1].islower() else c for i, c in enumerate(name))
    return apart.lower().replace("-", "_")


def _distance(a: str, b: str) -> int:
    """Slips between two words: a letter more, less or other, or two neighbours swapped (optimal string alignment)."""
    before: list[int] = []
    above: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, above, row = above, row, [i] + [0] * len(b)
        for j, y in enumerate(b, 1):
            row[j] = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                row[j] = min(row[j], before[j - 2] + 1)
    return row[-1]

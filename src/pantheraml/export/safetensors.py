"""Weights onto disk as safetensors: the adapter alone, the base with the adapter merged in, or a fully trained model.

Nothing is called done before stock transformers has read it back and given the same logits. A folder appears whole
or not at all.
"""

from __future__ import annotations

import copy
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantheraml.errors import PantheraError, StorageError
from pantheraml.models.tiny import PREFIX as TINY

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MERGE_TOLERANCE = 1e-4  # float32 against float32: only the order of additions differs
# Relative error of the logits that rounding weights and activations to the stored dtype may cause. One rounding is
# 2^-8 (bfloat16) or 2^-11 (float16); errors of the layers add up like a random walk. The weights themselves are
# compared bit for bit, so these only have to catch a model that is read back as something else.
RELOAD_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
PROBES = (
    "The capital of France is",
    "def area(width, height):\n    return width * height\n",
    "Zwölf Boxkämpfer jagen 1234 große Hühner; 你好, мир!",
)


@dataclass(frozen=True)
class MergeReport:
    """What was saved and how far it was checked; an error of None was not measured."""

    path: Path
    dtype: str
    bytes: int
    merge_error: float | None  # relative: float32 merged against float32 base + adapter
    reload_error: float | None  # relative: the saved folder, in its dtype, against the model it was saved from
    max_abs_error: float | None  # of the logits, saved folder against the model it was saved from
    notes: tuple[str, ...] = ()


@contextmanager
def atomic_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder that appears at `out` whole or not at all: write into the one given here.

    Raises: StorageError if `out` holds something and `overwrite` is not set, or if the disk refuses.
    """
    _refuse_occupied(out, overwrite)
    unfinished = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
        yield unfinished
        for file in unfinished.rglob("*"):
            _fsync(file)
        _fsync(unfinished)
        if out.exists():
            old = unfinished.with_name(unfinished.name + ".old")
            out.rename(old)
            unfinished.rename(out)
            shutil.rmtree(old)
        else:
            unfinished.rename(out)
        _fsync(out.parent)
    except OSError as error:
        raise not_written(out, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def atomic_file(out: Path) -> Iterator[Path]:
    """The same for one file, which replaces what stood at `out`."""
    unfinished = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        _fsync(unfinished)
        unfinished.replace(out)
        _fsync(out.parent)
    except OSError as error:
        raise not_written(out, error) from error
    finally:
        unfinished.unlink(missing_ok=True)


def not_written(out: Path, error: Exception) -> StorageError:
    """The error for a disk that refuses: full, read-only, not a folder."""
    return StorageError(
        f"{out} could not be written: {getattr(error, 'strerror', None) or error}",
        why="an export is written next to its place and moved there when complete; nothing half-written was left",
        fix="free space, or name a folder that you may write to",
    )


def save_adapter(model: Any, tokenizer: Any, out: Path, *, overwrite: bool = False, divided: bool = False) -> Path:
    """Write the adapter of a PEFT model, with its tokenizer and chat template, for stock `PeftModel.from_pretrained`.

    Args:
        divided: the base is not here as a whole. PEFT would add its embeddings to an adapter of theirs; they are those of the base on disk.
    """
    with atomic_folder(out, overwrite=overwrite) as folder, _safetensors_errors(out):
        model.save_pretrained(folder, save_embedding_layers=False if divided else "auto")
        tokenizer.save_pretrained(folder)
    return out


def merge(
    base: str | Path,
    adapter: Path,
    out: Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
    overwrite: bool = False,
) -> MergeReport:
    """Add the adapter to its 16 or 32-bit base in float32, and save the sum in the base's dtype.

    Merging into quantised weights would add their rounding error for good, so the base is read again as it was published.
    Needs about 4 bytes a parameter while merging, then twice the stored size while checking.

    Raises:
        PantheraError: the base is only there quantised.
        StorageError: the disk refuses, or the merged or reloaded logits differ; says by how much. Nothing is left behind.
    """
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    _refuse_occupied(out, overwrite)
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(base, **where)
    if getattr(config, "quantization_config", None) is not None:
        raise PantheraError(
            f"{base} is stored quantised",
            why="an adapter added to rounded weights gives another model than the one that was trained",
            fix="name the 16-bit model that it was made from as the base",
        )
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype="auto", use_safetensors=True, **where)
    stored = loaded.dtype
    tokenizer_at = adapter if (adapter / "tokenizer_config.json").exists() else base
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_at, **(where if tokenizer_at is base else {}))
    model = PeftModel.from_pretrained(loaded.float(), str(adapter))
    return _merge_loaded(model, tokenizer, out, stored, verify=verify, overwrite=overwrite)


def merge_model(
    model: Any, tokenizer: Any, out: Path, *, trust_remote_code: bool = False, verify: bool = True, overwrite: bool = False
) -> MergeReport:
    """Merge a PEFT model that is in memory; its base is read again from where it came from, and `model` is not touched.

    A `tiny:` base, or one without a name, exists only in memory: then a float32 copy of it is merged.
    """
    from pantheraml.models.quantize import held_in_eight_bits

    config = model.peft_config[model.active_adapter]
    base = config.base_model_name_or_path
    if base and not base.startswith(TINY):
        with tempfile.TemporaryDirectory(prefix="pantheraml-adapter-") as room:
            adapter = save_adapter(model, tokenizer, Path(room) / "adapter")
            return merge(
                base, adapter, out, revision=config.revision, trust_remote_code=trust_remote_code, verify=verify, overwrite=overwrite
            )
    inner = model.get_base_model()
    if getattr(inner, "is_quantized", False) or held_in_eight_bits(inner):
        raise PantheraError(
            "the base of this adapter is quantised and has no name to read it from again",
            why="an adapter added to rounded weights gives another model than the one that was trained",
            fix="save the adapter, and call merge(base, adapter, out) with the 16-bit base",
        )
    return _merge_loaded(copy.deepcopy(model).cpu().float(), tokenizer, out, inner.dtype, verify=verify, overwrite=overwrite)


def save_full(
    model: Any, tokenizer: Any, out: Path, *, dtype: torch.dtype | None = None, verify: bool = True, overwrite: bool = False
) -> MergeReport:
    """Save a model without adapter in `dtype` (its own if None), read it back and compare.

    Raises: PantheraError for a model in eight bits; StorageError as `merge` does.
    """
    from pantheraml.models.quantize import held_in_eight_bits

    _refuse_occupied(out, overwrite)
    if held_in_eight_bits(model):
        raise PantheraError(
            "a model that is held in eight bits cannot be saved whole",
            why="its weights were rounded when it was loaded, and the rounded ones are not the model",
            fix="save its adapter: it fits the base on disk, and save_pretrained_merged or pantheraml export merge the two",
        )
    reference = _logits(model, _probes(tokenizer, model)) if verify else None
    return _save_checked(model, tokenizer, out, dtype or model.dtype, reference, overwrite=overwrite)


def _merge_loaded(model: Any, tokenizer: Any, out: Path, stored: torch.dtype, *, verify: bool, overwrite: bool) -> MergeReport:
    """`model` is a float32 PEFT model on the CPU, and is used up."""
    probes = _probes(tokenizer, model)
    reference = _logits(model, probes) if verify else None
    was_tied = model.get_base_model().config.get_text_config().tie_word_embeddings
    merged = model.merge_and_unload()
    notes = _settle_ties(merged) if was_tied else ()
    error = None
    if reference is not None:
        after = _logits(merged, probes)
        error, _ = _differences(after, reference)
        if not error <= MERGE_TOLERANCE:  # also when it is nan
            raise StorageError(
                f"the merged model differs from base + adapter: relative error of the logits {error:.2g}, at most {MERGE_TOLERANCE:g}",
                why="what would be saved is not the model that was trained; nothing was written",
                fix="keep the adapter apart (it loads with peft), or retrain it without adapting tied embeddings",
            )
        reference = after
    saved = _save_checked(merged, tokenizer, out, stored, reference, overwrite=overwrite)
    return MergeReport(saved.path, saved.dtype, saved.bytes, error, saved.reload_error, saved.max_abs_error, notes)


def _save_checked(
    model: Any, tokenizer: Any, out: Path, dtype: torch.dtype, reference: list[Tensor] | None, *, overwrite: bool
) -> MergeReport:
    """Save in `dtype`; with `reference` logits, let stock transformers read it back and compare before it takes its place."""
    name = str(dtype).removeprefix("torch.")
    if name not in RELOAD_TOLERANCE:
        raise PantheraError(
            f"a model stored as {name} cannot be saved",
            why=f"full weights are stored as {', '.join(RELOAD_TOLERANCE)}",
            fix="start from the 16-bit version of the base",
        )
    error, max_abs = None, None
    state = _cast(model, dtype)
    with atomic_folder(out, overwrite=overwrite) as folder, _safetensors_errors(out):
        model.save_pretrained(folder, state_dict=dict(state))  # transformers takes tied tensors out of what it is given
        tokenizer.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps({**config, "dtype": name}, indent=2) + "\n", "utf-8")
        if reference is not None:
            again = type(model).from_pretrained(folder, dtype="auto")  # not Auto: code from the Hub is not in the folder
            read = again.state_dict()
            changed = [key for key, value in state.items() if key not in read or not value.equal(read[key])]
            error, max_abs = _differences(_logits(again, _probes(tokenizer, again)), reference)
            if changed or not error <= RELOAD_TOLERANCE[name]:
                raise StorageError(
                    f"the saved model does not read back as it was: relative error of the logits {error:.2g}"
                    f" (at most {RELOAD_TOLERANCE[name]:g} for {name}), {len(changed)} of {len(state)} tensors changed"
                    + (f", first {changed[0]}" if changed else ""),
                    why="who loads this folder would get another model; it was removed",
                    fix="check the disk and try again; if it stays, keep the adapter and report this",
                )
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return MergeReport(out, name, size, None, error, max_abs)


def _cast(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state in `dtype` on the CPU; tensors that are one in the model stay one, or tied weights would be saved twice."""
    seen: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        identity = (value.data_ptr(), tuple(value.shape))
        if identity not in seen:
            seen[identity] = value.detach().cpu().to(dtype if value.is_floating_point() else value.dtype).contiguous()
        state[key] = seen[identity]
    return state


def _settle_ties(model: Any) -> tuple[str, ...]:
    """Say in the config whether input and output embedding are still one: `modules_to_save` may have trained them apart."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if inputs.weight is outputs.weight:
        return ()
    tied = inputs.weight.equal(outputs.weight)
    if tied:
        outputs.weight = inputs.weight
    # peft 0.21 says so itself when it merges, older ones do not.
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = tied
    return () if tied else ("the embeddings were tied in the base and were trained apart: saved as two tensors",)


def _probes(tokenizer: Any, model: Any) -> list[Tensor]:
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    return [torch.tensor([tokenizer(text)["input_ids"]]).clamp(max=rows - 1) for text in PROBES]


def _logits(model: Any, probes: list[Tensor]) -> list[Tensor]:
    import torch

    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    with torch.no_grad():
        logits = [model(input_ids=ids.to(device), use_cache=False).logits.float().cpu() for ids in probes]
    model.train(was_training)
    return logits


def _differences(these: list[Tensor], those: list[Tensor]) -> tuple[float, float]:
    """Relative error in the 2-norm, the worst of the probes, and the largest absolute difference."""
    relative = max(float((a - b).norm() / b.norm()) for a, b in zip(these, those, strict=True))
    return relative, max(float((a - b).abs().max()) for a, b in zip(these, those, strict=True))


@contextmanager
def _safetensors_errors(out: Path) -> Iterator[None]:
    """safetensors reports a full disk as its own error, not as OSError."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise not_written(out, error) from error


def _refuse_occupied(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and (overwrite or not any(out.iterdir()))):
        return
    raise StorageError(
        f"{out} is not empty" if out.is_dir() else f"{out} is a file",
        why="an export replaces the whole folder, and what is in it may not be ours",
        fix="name another folder, or pass --overwrite (overwrite=True from Python)",
    )


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

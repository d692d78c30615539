"""A Hugging Face folder into one GGUF file for llama.cpp and Ollama, tensor by tensor.

Names come from the `gguf` package; what is ours is, for each family, the facts it states about itself and the few
tensors that llama.cpp stores otherwise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantheraml.errors import PantheraError, StorageError
from pantheraml.export.llamacpp import Verified, quantize, require_agreement, verify_gguf
from pantheraml.export.safetensors import atomic_file
from pantheraml.export.vocabulary import write_vocabulary

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter
    from torch import Tensor

    from pantheraml.recipe.types import GgufType

__all__ = ["FAMILIES", "GgufReport", "Verified", "export_gguf", "verify_gguf"]

K_QUANTS = ("q4_k_m", "q5_k_m", "q6_k")


@dataclass(frozen=True)
class GgufReport:
    """What was written. `fallbacks` counts tensors kept in a wider type because their rows do not fill its blocks."""

    path: Path
    type: str
    bytes: int
    tensors: int
    fallbacks: int
    verified: Verified | None  # None: not asked for
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: where it comes from, and what is done to it (also to a meta tensor, for its shape)."""

    name: str
    source: str | Tensor
    change: Callable[[Tensor], Tensor]


def _no_facts(writer: GGUFWriter, config: Any) -> None:
    pass


def _unchanged(name: str, tensor: Tensor, config: Any) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Family:
    """How one model_type of transformers is said in GGUF."""

    arch: str  # llama.cpp's name
    facts: Callable[[GGUFWriter, Any], None] = _no_facts  # beyond those that all families state
    change: Callable[[str, Tensor, Any], Tensor] = _unchanged  # by HF name, float32
    window_period: int | None = None  # every so manieth layer sees everything, the others a window; None: no windows
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")


def export_gguf(folder: Path, out: Path, type: GgufType, *, verify: bool = True) -> GgufReport:
    """Write the merged model in `folder` to the file `out`, and let llama.cpp read it where it is installed.

    Holds one tensor in memory at a time. K-quants are made by llama.cpp's own quantiser from a 16-bit file.

    Raises:
        PantheraError: a family, a rope or a tokenizer that GGUF has no words for; or llama.cpp disagrees.
        MissingExtra: a K-quant where no quantiser is installed.
        StorageError: the disk refuses, or llama.cpp cannot load the file. No half-written file is left.
    """
    from transformers import AutoConfig

    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if missing:
        raise _not_a_model(folder, missing[0])
    config = AutoConfig.from_pretrained(folder)
    family = _family(config)
    with atomic_file(out) as unfinished:
        if type in K_QUANTS:
            wide = unfinished.with_name(unfinished.name + ".16bit")
            try:
                notes = _write(folder, wide, "bf16" if "bfloat16" in str(config.dtype) else "f16", config, family)
                quantize(wide, unfinished, type.upper())
            finally:
                wide.unlink(missing_ok=True)
        else:
            notes = _write(folder, unfinished, type, config, family)
        verified = None
        if verify:
            verified = verify_gguf(unfinished, folder, longest=_alike_up_to(config, family))
            require_agreement(verified, type.upper())
        tensors, fallbacks = _count(unfinished, type)
    return GgufReport(out, type, out.stat().st_size, tensors, fallbacks, verified, tuple(notes))


def _write(folder: Path, out: Path, type: str, config: Any, family: Family) -> list[str]:
    import gguf

    weights = _weights_of(folder)
    tensors = _plan(weights, config, family)
    writer = gguf.GGUFWriter(None, family.arch)
    rows = next(tensor for tensor in tensors if tensor.name == "token_embd.weight")
    notes = _write_facts(writer, folder, type, config, family)
    notes += write_vocabulary(writer, folder, _shape(rows, weights)[0])
    wanted = gguf.GGMLQuantizationType[type.upper()]
    kinds = [_kind(tensor.name, _shape(tensor, weights), wanted) for tensor in tensors]
    for tensor, kind in zip(tensors, kinds, strict=True):
        shape = _shape(tensor, weights)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(tensor.name, shape, _float32(), math.prod(shape) // block * block_bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file(out)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, kind in zip(tensors, kinds, strict=True):
            source = weights.read(tensor.source) if isinstance(tensor.source, str) else tensor.source
            writer.write_tensor_data(_encode(tensor.name, tensor.change(source.float()), kind))
    finally:
        writer.close()
    return notes


# --- weights -----------------------------------------------------------------------------------------------------


class _Weights:
    """The safetensors of a folder, opened shard by shard, read tensor by tensor."""

    def __init__(self, files: dict[str, Path]) -> None:
        self.files = files

    def _open(self, name: str) -> Any:
        from safetensors import safe_open

        return safe_open(self.files[name], framework="pt")

    def read(self, name: str) -> Tensor:
        with self._open(name) as shard:
            return shard.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        with self._open(name) as shard:
            return tuple(shard.get_slice(name).get_shape())


def _weights_of(folder: Path) -> _Weights:
    from safetensors import safe_open

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        return _Weights({name: folder / file for name, file in weight_map.items()})
    if not single.exists():
        raise _not_a_model(folder, single.name)
    with safe_open(single, framework="pt") as shard:
        return _Weights(dict.fromkeys(shard.keys(), single))


def _not_a_model(folder: Path, missing: str) -> StorageError:
    return StorageError(
        f"{folder} holds no {missing}",
        why="GGUF is written from a merged model with its tokenizer, not from an adapter",
        fix="merge the adapter first, and give the merged folder",
    )


def _plan(weights: _Weights, config: Any, family: Family) -> list[_Tensor]:
    """Every tensor of the file, in order. Raises: PantheraError for a weight that the family has no place for."""
    import gguf

    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    planned = []
    for source in weights.files:
        if source == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(source.replace(".dt_bias", ".dt_proj.bias"), try_suffixes=(".weight", ".bias"))
        if name is None:
            raise PantheraError(
                f"{source} has no place in a GGUF file of the family {family.arch}",
                why="without it llama.cpp would run another model",
                fix="serve the merged folder with transformers instead",
            )
        planned.append(_Tensor(name, source, lambda tensor, source=source: family.change(source, tensor, config)))
    for name, tensor in _rope_factors(config).items():
        planned.append(_Tensor(name, tensor, lambda tensor: tensor))
    return planned


def _shape(tensor: _Tensor, weights: _Weights) -> tuple[int, ...]:
    import torch

    shape = weights.shape(tensor.source) if isinstance(tensor.source, str) else tuple(tensor.source.shape)
    return tuple(tensor.change(torch.empty(shape, device="meta")).shape)


def _kind(name: str, shape: tuple[int, ...], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """What a tensor is stored as: vectors and the state space's own parameters stay float32, as llama.cpp expects."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if _stays_float32(name, len(shape)):
        return GGMLQuantizationType.F32
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else GGMLQuantizationType.F16


def _stays_float32(name: str, dimensions: int) -> bool:
    return dimensions == 1 or (".ssm_" in name and not name.endswith(("ssm_in.weight", "ssm_out.weight")))


def _encode(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    import gguf

    if kind == gguf.GGMLQuantizationType.F16 and bool(tensor.abs().max() > 65504):
        raise PantheraError(
            f"{name} holds {float(tensor.abs().max()):.3g}, and float16 ends at 65504",
            why="it would be stored as infinity",
            fix="export as bf16 or f32",
        )
    return gguf.quants.quantize(tensor.contiguous().numpy(), kind)


def _float32() -> np.dtype:
    import numpy

    return numpy.dtype(numpy.float32)


def _count(file: Path, type: str) -> tuple[int, int]:
    """How many tensors the finished file has, and how many matrices are not of the type that was asked for."""
    import gguf

    # llama.cpp's recipes for K-quants mix these on purpose.
    asked = {"Q4_K", "Q5_K", "Q6_K"} if type in K_QUANTS else {type.upper()}
    tensors = gguf.GGUFReader(file).tensors
    matrices = [tensor for tensor in tensors if not _stays_float32(tensor.name, len(tensor.shape))]
    return len(tensors), sum(tensor.tensor_type.name not in asked for tensor in matrices)


# --- facts -------------------------------------------------------------------------------------------------------


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope(config: Any) -> dict[str, Any]:
    """The rope of the layers that see everything."""
    rope = config.rope_parameters
    return rope.get("full_attention", rope)


def _write_facts(writer: GGUFWriter, folder: Path, type: str, config: Any, family: Family) -> list[str]:
    import gguf

    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if type == "f32" else gguf.LlamaFileType[f"MOSTLY_{type.upper()}"])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_vocab_size(config.vocab_size)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.layer_norm_eps)
    _write_rope(writer, config, family)
    notes = _write_window(writer, config, family)
    family.facts(writer, config)
    return notes


def _write_rope(writer: GGUFWriter, config: Any, family: Family) -> None:
    import gguf

    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    odd = {key for key in ("mscale", "mscale_all_dim", "attention_factor", "beta_fast", "beta_slow") if rope.get(key) is not None}
    if kind not in family.rope_types or (kind == "yarn" and odd):
        raise PantheraError(
            f"rope of the kind {kind}{' with ' + ', '.join(sorted(odd)) if odd else ''} cannot be written for {config.model_type}",
            why="llama.cpp would place the tokens elsewhere",
            fix="serve the merged folder with transformers instead",
        )
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(_head_dim(config) * rope.get("partial_rotary_factor", 1.0)))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    if kind == "longrope":
        original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
        stretch = config.max_position_embeddings / original
        known = rope.get("attention_factor")
        computed = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(computed if known is None else known)


def _rope_factors(config: Any) -> dict[str, Tensor]:
    """Divisors of the rope frequencies: Llama 3's smooth ones, or those that longrope lists."""
    import torch

    rope = _rope(config)
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"]) for length in ("long", "short")}
    if rope.get("rope_type") != "llama3":
        return {}
    half = torch.arange(0, _head_dim(config), 2, dtype=torch.float64) / _head_dim(config)
    turns = rope["original_max_position_embeddings"] / (2 * math.pi * rope["rope_theta"] ** half)  # within the first context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: as trained at first, 0: slowed down by the whole factor
    return {"rope_freqs.weight": (1 / (kept + (1 - kept) / rope["factor"])).float()}


def _windows(config: Any) -> list[str]:
    """What each layer sees: "sliding_attention" or "full_attention"."""
    window = getattr(config, "sliding_window", None)
    known = getattr(config, "layer_types", None) if window else None
    return list(known or ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers)


def _alike_up_to(config: Any, family: Family) -> int | None:
    """How many tokens llama.cpp reads as the model does, where it knows no sliding window for the family."""
    limited = family.window_period is None and "sliding_attention" in _windows(config)
    return config.sliding_window if limited and config.sliding_window < config.max_position_embeddings else None


def _write_window(writer: GGUFWriter, config: Any, family: Family) -> list[str]:
    limit = _alike_up_to(config, family)
    if limit is not None:
        return [f"llama.cpp ignores the sliding window of this family: the same model up to {limit} tokens, another beyond"]
    kinds, window = _windows(config), getattr(config, "sliding_window", None)
    if family.window_period is None or not window:
        return []
    expected = ["full_attention" if (layer + 1) % family.window_period == 0 else "sliding_attention" for layer in range(len(kinds))]
    if kinds != expected:
        raise PantheraError(
            f"the sliding windows of this {config.model_type} are on other layers than llama.cpp expects",
            why=f"llama.cpp lets every layer but each {family.window_period}th see {window} tokens only",
            fix="serve the merged folder with transformers instead",
        )
    writer.add_sliding_window(window)
    return []


def _gemma_facts(writer: GGUFWriter, config: Any) -> None:
    """Softcaps, the second rope of Gemma 3, and a check of the attention scale, which llama.cpp does not read."""
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if "sliding_attention" in config.rope_parameters:
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    largest = {"gemma2": 46, "gemma3_text": 62}.get(config.model_type) == config.num_hidden_layers
    known = config.hidden_size // config.num_attention_heads if largest else _head_dim(config)
    if getattr(config, "query_pre_attn_scalar", known) != known:
        raise PantheraError(
            f"query_pre_attn_scalar={config.query_pre_attn_scalar} cannot be written for {config.model_type}",
            why=f"llama.cpp always scales attention for {known} in a model of this size",
            fix="serve the merged folder with transformers instead",
        )


def _granite_facts(writer: GGUFWriter, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _cohere_facts(writer: GGUFWriter, config: Any) -> None:
    writer.add_logit_scale(config.logit_scale)


def _falcon_h1_facts(writer: GGUFWriter, config: Any) -> None:
    if config.mamba_rms_norm and config.mamba_norm_before_gate:
        raise PantheraError(
            "mamba_norm_before_gate cannot be written",
            why="llama.cpp normalises after the gate",
            fix="serve the merged folder with transformers instead",
        )
    writer.add_ssm_conv_kernel(config.mamba_d_conv)
    writer.add_ssm_inner_size(config.mamba_d_ssm)
    writer.add_ssm_state_size(config.mamba_d_state)
    writer.add_ssm_time_step_rank(config.mamba_n_heads)
    writer.add_ssm_group_count(config.mamba_n_groups)


# --- tensors that llama.cpp stores otherwise ----------------------------------------------------------------------


def _pair_rope_rows(name: str, tensor: Tensor, config: Any) -> Tensor:
    """transformers turns row i of a head with row i + half, llama.cpp row 2i with row 2i + 1: weave the halves."""
    if ".q_proj." in name:
        heads = config.num_attention_heads
    elif ".k_proj." in name:
        heads = config.num_key_value_heads
    else:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _add_one_to_norms(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Gemma multiplies by 1 + weight."""
    return tensor + 1 if name.endswith("norm.weight") else tensor


def _falcon_h1_change(name: str, tensor: Tensor, config: Any) -> Tensor:
    """The multipliers between the layers are folded into the weights; llama.cpp knows none of them."""
    import torch

    attention, gate_down = config.attention_in_multiplier, config.mlp_multipliers
    match name.split("."):
        case ["model", "embed_tokens", _]:
            return tensor * config.embedding_multiplier
        case ["lm_head", _]:
            return tensor * config.lm_head_multiplier
        case [*_, "q_proj" | "v_proj", "weight"]:
            return tensor * attention
        case [*_, "k_proj", "weight"]:
            return tensor * attention * config.key_multiplier
        case [*_, "k_proj", "bias"]:
            return tensor * config.key_multiplier
        case [*_, "o_proj", _]:
            return tensor * config.attention_out_multiplier
        case [*_, "gate_proj", _]:
            return tensor * gate_down[0]
        case [*_, "down_proj", _]:
            return tensor * gate_down[1]
        case [*_, "mamba", "out_proj", _]:
            return tensor * config.ssm_out_multiplier
        case [*_, "mamba", "in_proj", kind]:
            groups = config.mamba_n_groups * config.mamba_d_state
            widths = (config.mamba_d_ssm, config.mamba_d_ssm, groups, groups, config.mamba_n_heads)
            parts = [torch.full((width,), scale) for width, scale in zip(widths, config.ssm_multipliers, strict=True)]
            scale = torch.cat(parts).to(tensor.device)
            return tensor * scale[:, None] * config.ssm_in_multiplier if kind == "weight" else tensor * scale
        case [*_, "mamba", "A_log"]:
            return -torch.exp(tensor)[:, None]
        case [*_, "mamba", "D"]:
            return tensor[:, None]
        case [*_, "mamba", "conv1d", "weight"]:
            return tensor.squeeze(1)
        case [*_, "mamba", "norm", "weight"]:
            return tensor.unflatten(0, (config.mamba_n_groups, -1))
    return tensor


_LLAMA = Family("llama", change=_pair_rope_rows, rope_types=("default", "linear", "yarn", "llama3"))
_GEMMA = Family("gemma", _gemma_facts, _add_one_to_norms, rope_types=("default", "linear"))
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, arch="gemma2", window_period=2),
    "gemma3_text": replace(_GEMMA, arch="gemma3", window_period=6),
    "phi3": Family("phi3", rope_types=("default", "longrope")),
    "granite": Family("granite", _granite_facts, _pair_rope_rows),
    "cohere": Family("command-r", _cohere_facts),
    "cohere2": Family("cohere2", _cohere_facts, window_period=4),
    "falcon_h1": Family("falcon-h1", _falcon_h1_facts, _falcon_h1_change),
}


def _family(config: Any) -> Family:
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise PantheraError(
            f"models of the type {config.model_type} cannot be written as GGUF here",
            why="each family stores its weights in its own way, and only these are checked against llama.cpp: " + ", ".join(FAMILIES),
            fix="use llama.cpp's own converter on the merged folder",
        )
    return family

"""A causal language model and its tokenizer, from the Hub, from a folder, or made here; and its size before that.

What comes back is a plain Hugging Face model. Weights are read from safetensors only, and no code that comes
with a model runs unless the recipe says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantheraml.errors import RecipeError
from pantheraml.models.decoder import decodes
from pantheraml.models.lora import stock_layers
from pantheraml.models.quantize import EightBitLinear, keep_format, leave_file
from pantheraml.models.tiny import PREFIX, family_of, tiny_config, tiny_tokenizer
from pantheraml.planning.shape import ModelShape
from pantheraml.recipe.types import ModelSpec

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Layers that carry a state along the row: the next example of a packed row would see it. Nearly all of them begin with
# a convolution along the row, whatever they are called; these are the others, by the names of their classes.
_CARRIES_STATE = re.compile(r"mamba|ssm|rwkv|deltanet|recurrent|linearattention|lightningattention|retention|xlstm|mlstm", re.IGNORECASE)


def quiet_library() -> None:
    """From here on Transformers and bitsandbytes keep their bars and notes to themselves: a command has a progress line of its own."""
    from logging import ERROR, getLogger

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("bitsandbytes").setLevel(ERROR)


def read_config(spec: ModelSpec) -> PretrainedConfig:
    """The configuration of the model's text part; a `tiny:` one is made here. Raises: RecipeError if there is none."""
    from transformers import AutoConfig

    if spec.name.startswith(PREFIX):
        return tiny_config(family_of(spec.name))
    with _explained(spec):
        return AutoConfig.from_pretrained(spec.name, **_where(spec))


def read_shape(spec: ModelSpec) -> ModelShape:
    """The size of the model, counted on torch's meta device: no weight is read or allocated.

    Raises: RecipeError if there is no such model, or it is not a causal language model.
    """
    return shape_of(empty_model(spec, read_config(spec)), spec.name)


def shape_of(model: Any, name: str) -> ModelShape:
    """The same for a model that is there; what an adapter added to it is not counted."""
    import torch

    fused = decodes(model) is None and not (hasattr(model, "peft_config") and stock_layers(model))
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    config = model.config
    text: Any = config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    heads = int(getattr(text, "num_attention_heads", 1) or 1)
    hidden = int(text.hidden_size)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else getattr(torch, str(config.dtype), None)
    linears = {
        module: size
        for name, module in model.named_modules()
        if module is not head and not _is_adapter(name) and (size := _linear_size(module)) is not None
    }
    own_head = 0 if head is None or head.weight is embedding.weight else head.weight.numel()
    return ModelShape(
        name=name,
        family=str(text.model_type),
        # A tied one is named once. A layer in fewer bits has its weights elsewhere, or several in one value.
        parameters=sum(parameter.numel() for name, parameter in model.named_parameters() if not _is_adapter(name))
        + sum(n_in * n_out - _stored(module) for module, (n_in, n_out) in linears.items()),
        embedding_parameters=embedding.weight.numel() + own_head,
        linears=tuple(linears.values()),
        layers=int(text.num_hidden_layers),
        hidden=hidden,
        vocab=int(embedding.weight.shape[0]),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or hidden // heads),
        intermediate=_widest(getattr(text, "intermediate_size", None) or 4 * hidden),
        max_tokens=int(getattr(text, "max_position_embeddings", None) or 2048),
        packs=not carries_state(model),
        weight_bytes_each=dtype.itemsize if dtype else 4,
        fused=fused,
        attention=_attention_of(type(model)),
    )


def _widest(size: int | Sequence[int]) -> int:
    """Gemma 3n says a size for each layer."""
    return size if isinstance(size, int) else max(size)


def carries_state(model: Any) -> bool:
    """Whether layers hand a state from token to token, beside what attention sees."""
    from torch import nn

    return any(isinstance(module, nn.Conv1d) or _CARRIES_STATE.search(type(module).__name__) for module in model.modules())


def weight_bytes(model: Any) -> int:
    """What the weights of a model that is there take, in whatever form they are held."""
    eight_bits = (module for module in model.modules() if isinstance(module, EightBitLinear))  # a byte for each direction
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) + sum(
        2 * module.in_features * module.out_features for module in eight_bits
    )


def _linear_size(module: Any) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, in whatever form it is held; None: it is none."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, its weight the other way round

    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return (module.in_features, module.out_features) if isinstance(module, nn.Linear | EightBitLinear) else None


def _stored(linear: Any) -> int:
    """How many values its weight has as a parameter."""
    weight = getattr(linear, "weight", None)
    return 0 if weight is None else weight.numel()


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer, with a token to pad with. Raises: RecipeError if there is none."""
    from transformers import AutoTokenizer

    if spec.name.startswith(PREFIX):
        family_of(spec.name)
        return tiny_tokenizer()
    with _explained(spec):
        tokenizer = AutoTokenizer.from_pretrained(spec.name, **_where(spec))
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        # Padding is never learned nor attended to, so any token that is there will do.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None = None,
    quantization: Any = None,
    seed: int = 0,
    device_map: Mapping[str, torch.device] | None = None,
) -> PreTrainedModel:
    """The model on its device, in evaluation mode.

    Args:
        dtype: of all its weights. attention: attn_implementation; None: transformers chooses.
        device_map: where each of its parts lies; None: all of it on the device.
        quantization: a quantization_config of transformers, or None.
        seed: for the weights of a `tiny:` model; nothing else is random here.
    Raises: RecipeError if it cannot be loaded, with the reason.
    """
    import torch
    from transformers import AutoModelForCausalLM

    extra = {} if attention is None else {"attn_implementation": attention}
    if spec.name.startswith(PREFIX):
        if quantization is not None:
            raise RecipeError(
                f"{spec.name} cannot be loaded in 4 bits",
                why="it is made here, and bitsandbytes rounds weights while they are read from a folder",
                fix='train it with pantheraml.train("tiny:...", rows, model__load_in_4bit=True), which writes it into one first',
            )
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(tiny_config(family_of(spec.name)), dtype=torch.float32, **extra)
        model.config.name_or_path = spec.name
        if device_map is None:
            return model.to(device=device, dtype=dtype).eval()
        from accelerate import dispatch_model

        dispatch_model(model.to(dtype=dtype), device_map=dict(device_map), skip_keys=model._skip_keys_device_placement)
        return model.eval()
    with _explained(spec):
        model = AutoModelForCausalLM.from_pretrained(
            spec.name,
            dtype=dtype,
            device_map={"": device} if device_map is None else dict(device_map),
            use_safetensors=True,
            quantization_config=quantization,
            **extra,
            **_where(spec),
        ).eval()
    if quantization is not None:
        keep_format(model)
        leave_file(model)
    return model


def _where(spec: ModelSpec) -> dict[str, Any]:
    return {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}


def empty_model(spec: ModelSpec, config: PretrainedConfig) -> PreTrainedModel:
    """The modules of the model on torch's meta device: without weights. Raises: RecipeError if there is no such model."""
    import torch
    from transformers import AutoModelForCausalLM

    if spec.name.startswith(PREFIX):
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    with _explained(spec), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
    model.tie_weights()
    return model


def _attention_of(kind: Any) -> tuple[str, ...]:
    """What the class says of itself; remote code may say nothing."""
    offers = {"flash_attention_2": "_supports_flash_attn", "sdpa": "_supports_sdpa"}
    return (*(name for name, flag in offers.items() if getattr(kind, flag, False)), "eager")


def _check_reachable(spec: ModelSpec) -> None:
    """Say at once that there is no network, where the Hub's client would try again for a minute."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if Path(spec.name).is_dir():
        return
    try:
        validate_repo_id(spec.name)
    except HFValidationError as error:
        raise RecipeError(
            f"there is no model folder {spec.name}",
            why="it is no folder here, and it cannot be a name on the Hugging Face Hub (ORG/MODEL) either",
            fix="check the path; it counts from the current folder. tiny:llama works without a network",
        ) from error
    if getproxies() or constants.HF_HUB_OFFLINE:
        return
    if isinstance(try_to_load_from_cache(spec.name, "config.json", revision=spec.revision), str):
        return
    host = urlsplit(constants.ENDPOINT).hostname or ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        raise RecipeError(
            f"the model {spec.name} is not here, and the Hugging Face Hub cannot be reached",
            why=f"it is neither a folder nor in the Hub's local cache, and {host} does not resolve: {error.strerror or error}",
            fix="check the name and the network, or name a folder; tiny:llama works without a network",
        ) from error


@contextmanager
def _explained(spec: ModelSpec) -> Iterator[None]:
    """What transformers raises when it cannot find or read a model, as one error for a person."""
    from safetensors import SafetensorError

    _check_reachable(spec)
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, AttributeError, SafetensorError) as error:
        text = str(error).strip()
        first = text.splitlines()[0] if text else type(error).__name__
        if "trust_remote_code" in text:
            raise RecipeError(
                f"{spec.name} comes with its own Python code",
                why="that code could do anything on this machine, so it does not run unless you say so",
                fix="read it, then set model.trust_remote_code=true; or choose a model that transformers knows",
            ) from error
        if Path(spec.name).is_dir():
            raise RecipeError(
                f"the folder {spec.name} does not hold a model that can be loaded",
                why=first,
                fix="name the folder with config.json, tokenizer.json and the safetensors files of a causal language model",
            ) from error
        if "safetensors" in text:
            raise RecipeError(
                f"{spec.name} has no weights in safetensors format",
                why="the older format (pickle) can run code when it is loaded, so it is not read",
                fix="choose a revision with safetensors files, or convert it with transformers on a machine you trust",
            ) from error
        raise RecipeError(
            f"the model {spec.name} was not found, or cannot be used",
            why=f"it is no folder here, and the Hugging Face Hub says: {first}",
            fix="check the name (ORG/MODEL), the network, and for a gated model your login (hf auth login); "
            "tiny:llama works without a network",
        ) from error

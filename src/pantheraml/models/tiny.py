"""Small models made from nothing: `tiny:llama` and its like, for a smoke run, the demo and the tests.

Each is the real architecture of its family at a size that trains on a laptop, with random weights and a
byte-level tokenizer that knows every text. Nothing is downloaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pantheraml.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

PREFIX = "tiny:"
SPECIAL_TOKENS = ("<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if tools %}{{ '<|system|>' + (tools | tojson) + eos_token }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + (message['content'] or '') }}"
    "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_HEAD_DIM = {"head_dim": 32}

# model_type of transformers -> what differs from _SIZES.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 64, **_HEAD_DIM},
    "gemma": {"hidden_activation": "gelu_pytorch_tanh", **_HEAD_DIM},
    "gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 32, **_HEAD_DIM},
    "gemma3_text": {"sliding_window": 64, "query_pre_attn_scalar": 32, **_HEAD_DIM},
    "qwen2": {},
    "qwen3": _HEAD_DIM,
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "attention_multiplier": 0.2},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 64, **_HEAD_DIM},
    "falcon_h1": {
        "mamba_d_ssm": 128,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
        "lm_head_multiplier": 0.5,
        **_HEAD_DIM,
    },
    "phi3": {},
}
ALIASES = {"gemma3": "gemma3_text", "qwen2.5": "qwen2", "phi4": "phi3", "falcon-h1": "falcon_h1"}


def family_of(name: str) -> str:
    """`tiny:qwen3` -> `qwen3`. Raises: RecipeError with the known families."""
    asked = name.removeprefix(PREFIX)
    family = ALIASES.get(asked, asked)
    if family not in FAMILIES:
        raise RecipeError(
            f"there is no tiny model of the family {asked!r}",
            why="tiny models are made here, so their sizes must be known",
            fix="use one of " + ", ".join(PREFIX + known for known in FAMILIES),
        )
    return family


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a few for the chat: 263 tokens, no text it cannot hold."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(family: str, **sizes: Any) -> PretrainedConfig:
    """The configuration of a small model of `family`; `sizes` overrule any field."""
    from transformers import AutoConfig

    vocab_size = len(SPECIAL_TOKENS) + 256
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    fields = {"vocab_size": vocab_size, "dtype": "float32", **ends, **_SIZES, **FAMILIES[family], **sizes}
    return AutoConfig.for_model(family, **fields)

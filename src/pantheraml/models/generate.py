"""Answers from a model, as text: many prompts at once, greedy or sampled; or one, piece by piece.

The simple way in for evaluations, samples and conversations. models/batch.py computes them, for services as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pantheraml.models.head import causal_model
from pantheraml.models.stops import stop_tokens

BATCH_ROWS = 32
# What a model's generation config may say without changing which token comes next.
_HARMLESS = {
    "_from_model_config",
    "bos_token_id",
    "cache_implementation",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "pad_token_id",
    "temperature",
    "top_k",
    "top_p",
    "transformers_version",
    "use_cache",
}


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """The answer to each prompt, without the token that ended it.

    Args:
        prompts: token ids; at least one each.
        temperature: 0: always the likeliest token. Otherwise drawn, from seeds that come from torch's generator.
        on_text: for one prompt, is given the answer piece by piece.
    Raises: ValueError for an empty prompt, or `on_text` with several.
    """
    import torch

    from pantheraml.models.batch import Batcher
    from pantheraml.models.request import Request

    if not all(prompts) or (on_text and len(prompts) != 1):
        raise ValueError("every prompt needs a token, and on_text takes one prompt")
    if not prompts:
        return []
    # Unless the model says so, all tokens can be drawn: transformers would take the 50 likeliest.
    top_k = (causal_model(model).generation_config.top_k or 0) if temperature != 0 else 0
    longest = max(len(prompt) for prompt in prompts)
    batcher = None
    if not _has_ways_of_its_own(model):
        rows = min(len(prompts), BATCH_ROWS)
        batcher = Batcher(model, tokenizer, rows=rows, tokens=longest + max_new_tokens, steady=rows > 1)
    if batcher is None or batcher.fallback is not None:
        how: dict[str, Any] = {"do_sample": False}
        if temperature != 0:
            how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        return _by_transformers(model, tokenizer, prompts, max_new_tokens=max_new_tokens, on_text=on_text, **how)
    seeds = torch.randint(1 << 62, (len(prompts),)).tolist() if temperature != 0 else [0] * len(prompts)
    requests = [
        Request(
            prompt=tuple(prompt),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            on_text=on_text,
        )
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    # Those of like length together, so that they are read in one shape.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = dict(zip(order, batcher.run([requests[i] for i in order]), strict=True))
    return [answers[i].text for i in range(len(prompts))]


def _has_ways_of_its_own(model: Any) -> bool:
    """Whether a model's generation config asks for more than the likeliest token, such as a penalty for repetition."""
    said = causal_model(model).generation_config.to_diff_dict()
    return any(value is not None for name, value in said.items() if name not in _HARMLESS)


def _by_transformers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    on_text: Callable[[str], None] | None,
    **how: Any,
) -> list[str]:
    """The same by transformers' own generate, left-padded, for models that the rows of a cache do not suit."""
    import torch

    stops = stop_tokens(model, tokenizer)
    # Padding is masked, so any token will do.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(stops), 0)
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
    answers = [""] * len(prompts)
    # Prompts of like length together, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    try:
        for start in range(0, len(order), BATCH_ROWS):
            rows = order[start : start + BATCH_ROWS]
            width = max(len(prompts[i]) for i in rows)
            ids = torch.tensor([[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in rows], device=device)
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows], device=device)
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=max_new_tokens,
                    eos_token_id=stops or None,
                    pad_token_id=pad,
                    streamer=_streamer(tokenizer, on_text, stops) if on_text else None,
                    use_cache=True,
                    **how,
                )
            for i, tokens in zip(rows, out[:, width:].tolist(), strict=True):
                end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
                answers[i] = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    finally:
        model.train(was_training)
    return answers


def _streamer(tokenizer: Any, on_text: Callable[[str], None], stops: Sequence[int]) -> Any:
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def put(self, value: Any) -> None:
            # What ends the answer is no part of it, even where the tokenizer does not call it special.
            if self.next_tokens_are_prompt or value.flatten().tolist()[0] not in stops:
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)

"""Answers from a model: many prompts at once, left-padded, greedy or sampled; or one, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pantheraml.models.head import causal_model

BATCH_ROWS = 32
# Ends of a turn that some tokenizers know without calling them their end-of-text token.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|END_OF_TURN_TOKEN|>", "<|end_of_role|>")


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: what the model's generation config says, the tokenizer's end of text, known ends of a turn."""
    configured = causal_model(model).generation_config.eos_token_id
    known = tokenizer.get_vocab()
    stops = [configured] if isinstance(configured, int) else list(configured or ())
    stops += [tokenizer.eos_token_id] + [known[end] for end in _TURN_ENDS if end in known]
    return list(dict.fromkeys(stop for stop in stops if stop is not None))


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
        temperature: 0: always the likeliest token. Otherwise drawn from torch's generator.
        on_text: for one prompt, is given the answer piece by piece.
    Raises: ValueError for an empty prompt, or `on_text` with several.
    """
    import torch

    if not all(prompts) or (on_text and len(prompts) != 1):
        raise ValueError("every prompt needs a token, and on_text takes one prompt")
    stops = stop_tokens(model, tokenizer)
    # Padding is masked, so any token will do.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(stops), 0)
    how: dict[str, Any] = {"do_sample": False}
    if temperature != 0:
        # Unless the model says so, all tokens can be drawn: transformers would take the 50 likeliest.
        top_k = causal_model(model).generation_config.top_k or 0
        how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
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

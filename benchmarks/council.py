"""A debate of 8 advisors in 2 rounds: in batches, one advisor at a time through the same engine, and one by one through transformers' generate.

    python benchmarks/council.py [--quick] [--kind KIND] [--dtype NAME] [--advisors N] [--new TOKENS] [--rounds N] [--threads N] [--adapters]

A Llama of 100 million parameters with random weights, the shape of benchmarks/generate.py, and a tokenizer made here whose tokens are
letters, so that what one advisor says can be read by the next. All advisors are greedy and answer in the same number of tokens;
the second round reads the first. With --adapters each has a LoRA of its own, of rank 16, and nothing that they read can be shared.

Contestants, all of them through the same `debate`, prompts and all: batched (as it is), single (the same batcher, which is given one request
at a time and forgets the last one), transformers (model.generate for one prompt after the other; with adapters PEFT's, switched to before
each). They take turns, and the best of all rounds counts. What was said is compared token for token: in float32 all must be equal. In
bfloat16 a sum in another order may choose another token; then everything that follows differs, and the share of equal answers is printed.

The last line is JSON. The exit status is 1 if an answer in float32 differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

from generate import QUICK, SIZES, adapted

if TYPE_CHECKING:
    from pantheraml.council import Local, Transcript
    from pantheraml.models.request import Answer, Request

QUESTION = "The harbour of a town of ten thousand people silts up every winter. Should it be dredged each spring, moved, or given up?"


def main() -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model and shorter answers, for a check of the benchmark itself")
    parser.add_argument("--kind", default="auto", help="kind of device, as in hardware.kind of a recipe")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--advisors", type=int, default=8)
    parser.add_argument("--new", type=int, metavar="TOKENS", help="default: 64, quick: 12")
    parser.add_argument("--rounds", type=int, help="of measuring; default: 3, quick: 1")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--adapters", action="store_true", help="a LoRA for each advisor")
    asked = parser.parse_args()
    result = measure(asked, new=asked.new or (12 if asked.quick else 64), rounds=asked.rounds or (1 if asked.quick else 3))
    print(json.dumps(result))
    return 0 if result["ok"] else 1


def letters(vocab: int) -> Any:
    """A tokenizer of bytes, pairs and triples of letters, filled up to `vocab` tokens with four of them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from pantheraml.models.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS

    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    pairs = ["".join(each) for each in product(ascii_lowercase, repeat=2)]
    for left, right in (*product(ascii_lowercase, repeat=2), *product(pairs, ascii_lowercase), *product(pairs, pairs)):
        if len(tokens) == vocab:
            break
        tokens.append(left + right)
        merges.append((left, right))
    made = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(each, special=True) for each in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<|pad|>", bos_token="<|begin|>", eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


class Single:
    """A batcher that is given one request at a time, and remembers nothing of the last one."""

    def __init__(self, batcher: Any) -> None:
        self._batcher = batcher

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batcher, name)

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """One after the other."""
        found: list[Answer] = []
        for request in requests:
            self._batcher.forget()
            found += self._batcher.run([request])
        return found


class Generate(Single):
    """The same by transformers' own generate. Its work is not counted."""

    def __init__(self, batcher: Any, model: Any, tokenizer: Any, *, adapters: bool) -> None:
        super().__init__(batcher)
        self._model, self._tokenizer, self._adapters = model, tokenizer, adapters

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """One prompt after the other."""
        import torch

        from pantheraml.models.request import Answer

        found: list[Answer] = []
        end = self._tokenizer.eos_token_id
        for request in requests:
            if self._adapters:
                self._model.set_adapter(request.adapter)
            ids = torch.tensor([request.prompt], device=self._model.device)
            begun = time.perf_counter()
            with torch.no_grad():
                out = self._model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=request.max_new_tokens,
                    do_sample=False,
                    eos_token_id=end,
                    pad_token_id=0,
                )
            tokens = out[0, ids.shape[1] :].tolist()
            stopped = end in tokens
            kept = tuple(tokens[: tokens.index(end)] if stopped else tokens)
            found.append(
                Answer(
                    text=self._tokenizer.decode(kept, skip_special_tokens=True),
                    tokens=kept,
                    logprobs=None,
                    finished="stop" if stopped else "length",
                    prompt_tokens=len(request.prompt),
                    shared_tokens=0,
                    waited_s=0.0,
                    first_s=None,
                    total_s=time.perf_counter() - begun,
                )
            )
        return found


def measure(asked: argparse.Namespace, *, new: int, rounds: int) -> dict[str, Any]:
    """All contestants, in turns."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from pantheraml.council import Local, Persona, Settings, debate
    from pantheraml.hardware.backend import backend_of
    from pantheraml.hardware.find import find
    from pantheraml.recipe.types import HardwareAsk

    device = find(HardwareAsk(kind=asked.kind, threads=asked.threads)).device
    backend = backend_of(device)
    threads = backend.set_threads(asked.threads)
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", bos_token_id=1, eos_token_id=2, pad_token_id=0, **(SIZES | (QUICK if asked.quick else {})))
    model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, asked.dtype)).eval()
    model = model.to(backend.torch_device(device.index))
    parameters = sum(each.numel() for each in model.parameters())
    names = [f"advisor{i}" for i in range(asked.advisors)]
    if asked.adapters:
        model = adapted(model, names)
    tokenizer = letters(config.vocab_size)
    personas = [
        Persona(
            name=name,
            prompt=f"You answer for quarter {number} of the town, and think of what it would lose.",
            temperature=0.0,
            adapter=name if asked.adapters else None,
        )
        for number, name in enumerate(names)
    ]
    settings = Settings(rounds=2, max_new_tokens=new, stop_early=False, synthesis="extract")
    # A row has room for the question, what all have said, and an answer; a token of letters may be read as two.
    tokens = 256 + 2 * new * (len(names) + 1)
    called = {name: name for name in names} if asked.adapters else None

    def local(rows: int) -> Local:
        return Local.of(model, tokenizer, "random Llama", rows=rows, tokens=tokens, called=called, device=device)

    batched, alone = local(len(names)), local(1)
    generate: Any = Generate(alone.batcher, model, tokenizer, adapters=asked.adapters)
    single: Any = Single(alone.batcher)
    contestants = {
        "batched": batched,
        "single": replace(alone, batcher=single),
        "transformers": replace(alone, batcher=generate),
    }
    seconds: dict[str, list[float]] = {}
    said: dict[str, Transcript] = {}
    for round in range(rounds + 1):  # the first does not count
        for name, voice in contestants.items():
            batched.batcher.forget()
            begun = time.perf_counter()
            said[name] = debate(QUESTION, personas, settings, local=voice)
            backend.synchronize()
            if round:
                seconds.setdefault(name, []).append(time.perf_counter() - begun)
                print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr)

    wanted = said["transformers"].turns
    work = said["batched"].work
    assert work is not None
    print(
        f"{parameters / 1e6:.0f}M parameters, {asked.dtype}, {device.name}, {threads} threads; {len(names)} advisors x 2 rounds, "
        f"{new} new tokens each{', an adapter each' if asked.adapters else ''}; {rounds} rounds of measuring"
    )
    read = [turn.prompt_tokens or 0 for turn in wanted]
    print(f"read: {min(read)} to {max(read)} tokens; batched: {work.shared_tokens} of {work.shared_tokens + work.read_tokens} copied")
    print(f"{'':14} {'seconds':>9} {'to transformers':>16} {'equal answers':>14}")
    equal, best = {}, {name: min(each) for name, each in seconds.items()}
    for name, found in said.items():
        same = [(one.text, one.tokens) == (other.text, other.tokens) for one, other in zip(found.turns, wanted, strict=True)]
        equal[name] = sum(same) / len(same)
        print(f"{name:14} {best[name]:9.2f} {best['transformers'] / best[name]:15.2f}x {sum(same):>8} of {len(same)}")
    return {
        "benchmark": "council",
        "ok": asked.dtype != "float32" or all(share == 1 for share in equal.values()),
        "quick": asked.quick,
        "device": device.label,
        "dtype": asked.dtype,
        "threads": threads,
        "parameters": parameters,
        "advisors": len(names),
        "adapters": asked.adapters,
        "new_tokens": new,
        "prompt_tokens": [min(read), max(read)],
        "shared_tokens": work.shared_tokens,
        "read_tokens": work.read_tokens,
        "rounds": rounds,
        "seconds": seconds,
        "speed_up": {name: best["transformers"] / each for name, each in best.items()},
        "equal": equal,
    }


if __name__ == "__main__":
    sys.exit(main())

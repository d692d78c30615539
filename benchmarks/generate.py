"""Tokens per second of answers: one by one through transformers' generate, and ours at 1, 8 and 32 rows, and with 8 adapters.

    python benchmarks/generate.py [--quick] [--kind KIND] [--dtype NAME] [--prompt TOKENS] [--new TOKENS] [--rounds N] [--threads N] [--cpu-time]

A Llama of 100 million parameters with random weights. All contestants answer prompts of the same length, greedily, to the same number of
new tokens, with the model and all that is made once already in memory. They take turns, and the best of all rounds counts: another
process on the machine only ever makes one slower. Prompts differ from their first token on, but in the row `shared`, where 32 prompts
begin with the same three quarters.

Contestants: transformers (model.generate, one prompt after the other), peft (the same with 8 LoRA adapters of rank 16, one after the
other, each switched to before its prompt), ours-1, ours-8, ours-32 (as many rows as prompts), ours-8-adapters (8 rows, each with its own),
ours-shared, and ours-1-quick (one row, not steady). The tokens are compared with those of transformers, one by one: in float32 all must
be equal; in bfloat16 a sum in another order may choose another token, and the share of equal answers is printed.

--cpu-time counts seconds of the processor instead of those of the clock, for a machine that others use at the same time.

The last line is JSON. The exit status is 1 if an answer in float32 differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

ADAPTERS = 8
RANK = 16
SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    # At the usual 0.02, logits are so alike that rounding alone decides between them.
    "initializer_range": 0.06,
}
QUICK = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}


class Endless:
    """A tokenizer without an end, which writes tokens as numbers: every answer has the same length."""

    eos_token_id = pad_token_id = None

    def get_vocab(self) -> dict[str, int]:
        """No token that anybody knows."""
        return {}

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        """The numbers."""
        return " ".join(map(str, tokens))


def main() -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model and shorter answers, for a check of the benchmark itself")
    parser.add_argument("--kind", default="auto", help="kind of device, as in hardware.kind of a recipe")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--prompt", type=int, metavar="TOKENS", help="default: 96, quick: 24")
    parser.add_argument("--new", type=int, metavar="TOKENS", help="default: 64, quick: 8")
    parser.add_argument("--rounds", type=int, help="default: 3, quick: 1")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu-time", action="store_true")
    asked = parser.parse_args()
    prompt, new, rounds = asked.prompt or (24 if asked.quick else 96), asked.new or (8 if asked.quick else 64), asked.rounds or 3
    result = measure(asked, prompt=prompt, new=new, rounds=1 if asked.quick and not asked.rounds else rounds)
    print(json.dumps(result))
    return 0 if result["ok"] else 1


def adapted(model: Any, names: Sequence[str]) -> Any:
    """The model with a LoRA of each name, of rank 16 and with random weights, in its own dtype."""
    import torch

    from pantheraml.models.adapters import attach
    from pantheraml.recipe.types import LoRA

    tuned = attach(model, LoRA(rank=RANK), seed=0)
    for name in names:
        tuned.add_adapter(name, tuned.peft_config["default"])
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.02)
    return tuned.to(model.dtype).eval()


def measure(asked: argparse.Namespace, *, prompt: int, new: int, rounds: int) -> dict[str, Any]:
    """All contestants, in turns."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from pantheraml.hardware.backend import backend_of
    from pantheraml.hardware.find import find
    from pantheraml.models.batch import Batcher
    from pantheraml.models.request import Request
    from pantheraml.recipe.types import HardwareAsk

    device = find(HardwareAsk(kind=asked.kind, threads=asked.threads)).device
    backend = backend_of(device)
    threads = backend.set_threads(asked.threads)
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", bos_token_id=None, eos_token_id=None, pad_token_id=0, **(SIZES | (QUICK if asked.quick else {})))
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, asked.dtype)).eval()
    model = model.to(backend.torch_device(device.index))
    parameters = sum(each.numel() for each in model.parameters())
    draw = torch.Generator().manual_seed(1)
    drawn = torch.randint(7, config.vocab_size, (32, prompt), generator=draw).tolist()
    shared = [drawn[0][: prompt * 3 // 4] + each[prompt * 3 // 4 :] for each in drawn]
    names = [f"advisor{i}" for i in range(ADAPTERS)]

    def one_by_one(of: Any, rows: list[list[int]], adapters: list[str] | None = None) -> list[tuple[int, ...]]:
        found = []
        for i, tokens in enumerate(rows):
            if adapters is not None:
                of.set_adapter(adapters[i])
            ids = torch.tensor([tokens], device=model.device)
            with torch.no_grad():
                out = of.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0)
            found.append(tuple(out[0, prompt:].tolist()))
        return found

    def ours(of: Any, rows: list[list[int]], adapters: list[str] | None = None, **how: Any) -> Callable[[], list[tuple[int, ...]]]:
        tokens = prompt + new
        batcher = Batcher(of, Endless(), backend=backend, rows=len(rows), tokens=tokens, adapters=names if adapters else (), **how)

        def answer() -> list[tuple[int, ...]]:
            asks = [Request(prompt=tuple(row), max_new_tokens=new, adapter=adapters[i] if adapters else None) for i, row in enumerate(rows)]
            batcher.forget()
            return [each.tokens for each in batcher.run(asks)]

        return answer

    contestants: dict[str, tuple[list[list[int]], Callable[[], list[tuple[int, ...]]]]] = {
        "transformers": (drawn[:2], lambda: one_by_one(model, drawn[:2])),
        "ours-1": (drawn[:1], ours(model, drawn[:1])),
        "ours-1-quick": (drawn[:1], ours(model, drawn[:1], steady=False)),
        "ours-8": (drawn[:8], ours(model, drawn[:8])),
        "ours-32": (drawn, ours(model, drawn)),
        "ours-shared": (shared, ours(model, shared)),
    }
    clock = time.process_time if asked.cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = {}
    answers: dict[str, list[tuple[int, ...]]] = {}
    turns(contestants, rounds, seconds, answers, backend.synchronize, clock)
    wanted = {
        "transformers": answers["transformers"],
        "ours-1": answers["transformers"][:1],
        "ours-1-quick": answers["transformers"][:1],
        "ours-8": one_by_one(model, drawn[:8]),
        "ours-shared": one_by_one(model, shared[:4]),
    }
    wanted["ours-32"] = wanted["ours-8"]
    tuned = adapted(model, names)
    contestants |= {
        "peft": (drawn[:2], lambda: one_by_one(tuned, drawn[:2], names)),
        "ours-8-adapters": (drawn[:8], ours(tuned, drawn[:8], names)),
    }
    turns({name: contestants[name] for name in ("peft", "ours-8-adapters")}, rounds, seconds, answers, backend.synchronize, clock)
    wanted["peft"], wanted["ours-8-adapters"] = answers["peft"], one_by_one(tuned, drawn[:8], names)

    rates = {name: len(contestants[name][0]) * new / min(each) for name, each in seconds.items()}
    print(
        f"{parameters / 1e6:.0f}M parameters, {asked.dtype}, {device.name}, {threads} threads; {prompt} tokens read, {new} new; {rounds} rounds"
    )
    print(f"{'':16} {'tokens/s':>10} {'to one by one':>14} {'equal answers':>14}")
    equal = {}
    for name, rate in rates.items():
        base = rates["peft" if "adapters" in name or name == "peft" else "transformers"]
        same = [found == right for found, right in zip(answers[name], wanted[name], strict=False)]
        equal[name] = sum(same) / len(same)
        print(f"{name:16} {rate:10.1f} {rate / base:13.2f}x {sum(same):>8} of {len(same)}")
    return {
        "benchmark": "generate",
        "ok": asked.dtype != "float32" or all(share == 1 for share in equal.values()),
        "quick": asked.quick,
        "clock": "processor" if asked.cpu_time else "wall",
        "device": device.label,
        "dtype": asked.dtype,
        "threads": threads,
        "parameters": parameters,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "rounds": rounds,
        "tokens_per_s": rates,
        "ratio": {name: rate / rates["peft" if "adapters" in name or name == "peft" else "transformers"] for name, rate in rates.items()},
        "seconds": seconds,
        "equal": equal,
    }


def turns(
    contestants: dict[str, tuple[list[list[int]], Callable[[], Any]]],
    rounds: int,
    seconds: dict[str, list[float]],
    answers: dict[str, Any],
    synchronize: Callable[[], None],
    clock: Callable[[], float],
) -> None:
    """Each contestant in each round, after one answer that does not count."""
    for round in range(rounds + 1):
        for name, (_, answer) in contestants.items():
            begun = clock()
            answers[name] = answer()
            synchronize()
            if round:
                seconds.setdefault(name, []).append(clock() - begun)
                print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

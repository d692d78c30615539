"""Side by side with TRL's SFTTrainer and PEFT: the same curve, and how fast each gets through the same tokens.

    python benchmarks/parity_trl.py [--quick] [--model FOLDER_OR_HUB_ID] [--threads N]

Both train the same LoRA, from the same initial weights, on the same rows in the same order (no shuffling), in float32 on
the CPU, with the same AdamW, linear schedule, clipping and loss on the completions only.

1. The curve. Before anything is compared, the labels of both must agree token for token. Then the losses of each step
   must agree to 1e-4, relative. Ours is the main path as it is (`pantheraml train`), theirs is `SFTTrainer.train()`.
2. The speed. Both run the same steps in turns, in one process, with the same threads; only steps after a warm-up are
   timed, and only real tokens are counted. The result is the median of the ratios of the pairs. TRL runs three times:
   as it comes (padded batches), with padding_free, and with packing. One thread unless more are asked for: threads that
   wait for each other measure what else the machine is doing.
   What TRL does by default and is switched off here, because it would cost it speed or change its numbers: gradient
   checkpointing and bfloat16. What stays on, because it comes with it: the entropy and accuracy it measures.

Examples have 16 to 200 tokens, so that padding matters as it does with real data. The last line is JSON. The exit status
is 1 if the curves differ, or if any median ratio is below 1; with --quick the speed is shown, but not judged.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOLERANCE = 1e-4  # relative: float32, and sums in another order
SEED = 3407
RANK, ALPHA = 8, 16.0
BATCH = 8
OPTIM: dict[str, Any] = {"lr": 1e-3, "schedule": "linear", "warmup": 0.0, "weight_decay": 0.01, "clip_norm": 1.0}
MAX_TOKENS = 512
SHORTEST, LONGEST = 16, 200  # tokens of an example; the tiny tokenizer has one a byte
PACKED_TOKENS = 512
WARM_UP = 2
WORDS = ("red", "green", "blue", "stone", "river", "cloud", "maple", "copper", "violet", "amber", "north", "south", "quick", "slow")
# Large enough that products of matrices take most of the time, and a head whose share is that of a real small model.
SPEED_MODEL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": 8192}


@dataclass(frozen=True, slots=True)
class Curve:
    """The losses of each step, and the adapter at the end."""

    losses: list[float]
    adapter: dict[str, Any]


def main() -> int:
    """Compare, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 steps and 3 short pairs instead of 50 steps and 7 pairs")
    parser.add_argument("--model", help="a folder or Hub id for both parts (default: small models made here)")
    parser.add_argument("--threads", type=int, default=1, help="of both; more than one only on a machine that does nothing else")
    asked = parser.parse_args()
    steps, pairs, timed = (10, 3, 3) if asked.quick else (50, 7, 8)
    # Before transformers and TRL are imported: they would tell their makers about this run.
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    quiet()

    import torch

    threads = asked.threads
    with tempfile.TemporaryDirectory(prefix="pantheraml-parity-") as name:
        room = Path(name)
        small = asked.model or write_model(room / "small")
        fast = asked.model or write_model(room / "fast", **SPEED_MODEL)
        torch.set_num_threads(threads)
        rows = make_rows(max(steps, WARM_UP + timed) * BATCH)
        (room / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

        compared = check_labels(room, small, rows)
        print(f"labels agree token for token: {compared} tokens of {len(rows)} examples\n")
        ours, theirs = our_curve(room, small, steps, threads), their_curve(room, small, rows[: steps * BATCH])
        worst = max(abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True))
        apart = adapter_difference(ours.adapter, theirs.adapter)
        print(f"{'step':>4}  {'ours':>12}  {'TRL':>12}  {'relative':>9}")
        for k in sorted({*range(0, steps, max(1, steps // 10)), steps - 1}):
            a, b = ours.losses[k], theirs.losses[k]
            print(f"{k + 1:>4}  {a:>12.7f}  {b:>12.7f}  {abs(a - b) / abs(b):>9.1e}")
        print(f"largest difference of {steps} losses: {worst:.1e} relative (allowed: {TOLERANCE:.0e})")
        print(f"final adapters: {apart:.1e} relative\n")

        racers: dict[str, Callable[[], float]] = {"ours": our_racer(room, fast, timed, threads)}
        for label, settings in TRL_SETTINGS.items():
            racers[label] = their_racer(room, fast, rows[: (WARM_UP + timed) * BATCH], settings)
        speeds = race(racers, pairs)

    ratios = {label: [mine / other for mine, other in zip(speeds["ours"], speeds[label], strict=True)] for label in TRL_SETTINGS}
    medians = {label: statistics.median(each) for label, each in ratios.items()}
    print(f"{'':22}  {'tokens/s':>9}  {'ours is faster by':>18}  of each pair")
    print(f"{'ours':22}  {statistics.median(speeds['ours']):>9,.0f}")
    for label, median in medians.items():
        each = " ".join(f"{ratio:.2f}" for ratio in ratios[label])
        print(f"{'TRL, ' + label:22}  {statistics.median(speeds[label]):>9,.0f}  {median:>18.2f}  {each}")
    print(f"{pairs} pairs of {timed} steps of {BATCH} examples; {threads} threads; tokens are real ones, without padding")

    same_curve = worst <= TOLERANCE
    slower = [label for label, median in medians.items() if median < 1]
    if not same_curve:
        print("FALLS SHORT: the curves differ")
    for label in slower:
        print(f"FALLS SHORT: slower than TRL, {label}" + (" (not judged with --quick)" if asked.quick else ""))
    ok = same_curve and (asked.quick or not slower)
    result = {
        "benchmark": "parity_trl",
        "ok": ok,
        "quick": asked.quick,
        "model": asked.model or "made here",
        "labels_compared": compared,
        "steps": steps,
        "max_relative_difference": worst,
        "tolerance": TOLERANCE,
        "adapter_relative_difference": apart,
        "pairs": pairs,
        "threads": threads,
        "median_ratio": {label: round(median, 4) for label, median in medians.items()},
        "ratios": {label: [round(ratio, 4) for ratio in each] for label, each in ratios.items()},
        "tokens_per_s": {label: round(statistics.median(each), 1) for label, each in speeds.items()},
    }
    print(json.dumps(result))
    return 0 if ok else 1


# What both get.


def make_rows(count: int) -> list[dict[str, str]]:
    """Prompts and completions of different lengths, always the same."""
    chance = random.Random(0)
    rows: list[dict[str, str]] = []
    for _ in range(count):
        # Short ones are more common than long ones, as in real data. One token is the end of the text.
        room = SHORTEST + (LONGEST - SHORTEST) * chance.random() ** 2 - 1
        prompt = say(chance, int(room * chance.uniform(0.2, 0.6)) - 3) + " ->"
        rows.append({"prompt": prompt, "completion": " " + say(chance, max(1, int(room) - len(prompt) - 1))})
    return rows


def say(chance: random.Random, letters: int) -> str:
    """Words, cut to a length."""
    text = ""
    while len(text) < letters:
        text += chance.choice(WORDS) + " "
    return text[: max(1, letters)].strip() or "a"


def write_model(folder: Path, **sizes: int) -> str:
    """A small Llama with random weights, and its tokenizer, as a folder that both load."""
    import torch
    from transformers import AutoModelForCausalLM

    from pantheraml.models.tiny import tiny_config, tiny_tokenizer

    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(tiny_config("llama", **sizes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def recipe_for(room: Path, model: str, steps: int, threads: int, name: str) -> Any:
    """Our recipe."""
    from pantheraml.recipe.load import recipe_from

    return recipe_from(
        {
            "model": {"name": model, "dtype": "float32", "max_tokens": MAX_TOKENS},
            "data": {"train": str(room / "rows.jsonl"), "format": "prompt-completion", "eval_fraction": 0.0, "shuffle": False},
            "adapter": {"kind": "lora", "rank": RANK, "alpha": ALPHA},
            "batch": {"size": BATCH},
            "optim": {"steps": steps, **OPTIM},
            "eval": {"generate_rows": 0},
            "hardware": {"kind": "cpu", "threads": threads, "checkpointing": "off"},
            "run": {"folder": str(room / "runs"), "name": name, "seed": SEED, "log_every": 1, "save_every": "end"},
        }
    )


def adapted(model: str) -> Any:
    """The model with its LoRA, as ours starts with it."""
    import torch

    from pantheraml.models.adapters import attach
    from pantheraml.models.load import load_model
    from pantheraml.recipe.types import LoRA, ModelSpec

    base = load_model(ModelSpec(name=model), dtype=torch.float32, device=torch.empty(0).device)
    return attach(base, LoRA(rank=RANK, alpha=ALPHA), seed=SEED)


def their_trainer(room: Path, model: str, rows: list[dict[str, str]], **settings: Any) -> Any:
    """TRL's trainer on a model adapted by PEFT alone, with the initial weights of ours copied into it."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ours = adapted(model)
    targets = ours.peft_config["default"].target_modules
    lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=int(ALPHA), lora_dropout=0.0, target_modules=targets)
    theirs = get_peft_model(base, lora)
    set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours))
    asked: dict[str, Any] = {
        "output_dir": str(room / "trl"),
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "learning_rate": OPTIM["lr"],
        "lr_scheduler_type": OPTIM["schedule"],
        "warmup_steps": 0,
        "weight_decay": OPTIM["weight_decay"],
        "max_grad_norm": OPTIM["clip_norm"],
        "max_length": MAX_TOKENS,
        "completion_only_loss": True,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": SEED,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainer = SFTTrainer(
        model=theirs,
        args=SFTConfig(**{**asked, **settings}),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def quiet() -> None:
    """No bars, and no advice about settings that are chosen on purpose."""
    import warnings

    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(trl|transformers|torch|accelerate)(\.|$)")


# 1. The curve.


def check_labels(room: Path, model: str, rows: list[dict[str, str]]) -> int:
    """The number of tokens compared. Raises: SystemExit at the first that differs in token or label."""
    from pantheraml.trainer.survey import survey

    ours = survey(recipe_for(room, model, 1, 1, "labels")).data.train
    theirs = their_trainer(room, model, rows).train_dataset
    assert ours is not None
    if len(ours) != len(theirs):
        sys.exit(f"ours has {len(ours)} examples, TRL {len(theirs)}")
    for example, row in zip(ours, theirs, strict=True):
        labels = [int(token) if learned else -100 for token, learned in zip(example.tokens, example.loss, strict=True)]
        if example.tokens.tolist() != row["input_ids"] or labels != row["labels"]:
            sys.exit(f"{example.where}: the labels differ\nours {labels}\nTRL  {row['labels']}")
    return int(ours.lengths.sum())


def our_curve(room: Path, model: str, steps: int, threads: int) -> Curve:
    """The main path, as `pantheraml train` takes it."""
    from rich.console import Console
    from safetensors.torch import load_file

    from pantheraml.trainer.run import train
    from pantheraml.trainer.watch import METRICS, read_metrics

    run = train(recipe_for(room, model, steps, threads, "curve"), console=Console(quiet=True))
    losses = [line["loss"] for line in read_metrics(run.folder / METRICS) if "loss" in line]
    return Curve(losses, load_file(run.folder / "adapter" / "adapter_model.safetensors"))


def their_curve(room: Path, model: str, rows: list[dict[str, str]]) -> Curve:
    """`SFTTrainer.train()`; its own log rounds nothing, but averages since the last line, so each step has one."""
    from peft import get_peft_model_state_dict

    trainer = their_trainer(room, model, rows, logging_steps=1)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return Curve(losses, get_peft_model_state_dict(trainer.model))


def adapter_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Norm of the difference over the norm, of all tensors together."""
    assert ours.keys() == theirs.keys(), "the adapters name their tensors differently"
    apart = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in ours)
    whole = sum(float(theirs[name].double().square().sum()) for name in theirs)
    return math.sqrt(apart / whole)


# 2. The speed. A racer runs the same steps each time it is called, and returns real tokens per second.

TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "padding_free": {"padding_free": True, "max_length": None},
    # As many tokens a step as the others have on average, from the whole data at once.
    "packing": {"packing": True, "max_length": PACKED_TOKENS, "per_device_train_batch_size": 1},
}


def race(racers: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each, in turns; every other round the other way about."""
    speeds: dict[str, list[float]] = {label: [] for label in racers}
    for number in range(rounds):
        for label in list(racers) if number % 2 == 0 else reversed(racers):
            speeds[label].append(racers[label]())
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return speeds


def our_racer(room: Path, model: str, timed: int, threads: int) -> Callable[[], float]:
    """The loop of the main path, without saving."""
    from rich.console import Console

    from pantheraml.engines.torch_engine import TorchEngine
    from pantheraml.hardware.backend import open_backend
    from pantheraml.trainer import loop
    from pantheraml.trainer.checkpoint import Checkpoints
    from pantheraml.trainer.fast import decoder_of, layout_of, prepare_kernels
    from pantheraml.trainer.sft import sft_loss
    from pantheraml.trainer.survey import survey
    from pantheraml.trainer.watch import Watch

    total = WARM_UP + timed
    view = survey(recipe_for(room, model, total, threads, "speed"))
    recipe, plan, backend = view.recipe, view.plan, open_backend("cpu")
    adapter = adapted(model)
    decoder = decoder_of(adapter, plan, recipe, backend)
    layout = layout_of(plan, view.tokenizer, trim=True, rows=decoder is None)
    prepare_kernels(plan, lambda said: print(said, file=sys.stderr))
    engine = TorchEngine(backend)
    engine.prepare(adapter, sft_loss(adapter, decoder), recipe.optim, plan, seed=SEED)
    source = view.data.source(batch_size=plan.batch_size, seed=SEED, epochs=1.0, steps=total)
    rate = loop.schedule(recipe.optim, plan.lr, total)
    folder = room / "runs" / "speed"
    folder.mkdir(parents=True)

    class Unsaved(Checkpoints):
        def save(self, *args: Any, **kwargs: Any) -> Path:
            return folder

    def go(start: int, end: int) -> float:
        """Seconds for the steps from start to end."""
        watch = Watch(folder, Console(quiet=True), total=total, start=start, memory_bytes=lambda: 0)
        began = time.perf_counter()
        loop.run(
            engine,
            source,
            layout,
            [],
            rate,
            loop.Rhythm(total=end, log=10, eval=None, save=None, early_stop=None, keep_best=False),
            loop.Position(step=start),
            Unsaved(folder / "checkpoints", fingerprint="", keep=1),
            watch,
            loop.Stop(),
        )
        took = time.perf_counter() - began
        watch.close()
        return took

    assert view.data.train is not None
    tokens = int(view.data.train.lengths[WARM_UP * BATCH : total * BATCH].sum())

    def racer() -> float:
        go(0, WARM_UP)
        return tokens / go(WARM_UP, total)

    return racer


def their_racer(room: Path, model: str, rows: list[dict[str, str]], settings: dict[str, Any]) -> Callable[[], float]:
    """`SFTTrainer.train()`, timed from the end of the warm-up to the end of the last step."""
    from transformers import TrainerCallback

    times: dict[int, float] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times[state.global_step] = time.perf_counter()

    trainer = their_trainer(room, model, rows, logging_steps=10, **settings)
    trainer.add_callback(Clock())
    lengths = [len(tokens) for tokens in trainer.train_dataset["input_ids"]]
    tokens = sum(lengths[WARM_UP * trainer.args.per_device_train_batch_size :])

    def racer() -> float:
        times.clear()
        trainer.train()
        return tokens / (times[max(times)] - times[WARM_UP])

    return racer


if __name__ == "__main__":
    sys.exit(main())

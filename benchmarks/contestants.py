"""The trainers that the speed benchmarks compare: the same weights, LoRA, AdamW and tokens, one step at a time.

A trainer is a function of a Task and a Lane. It loads, says `ready`, and takes `task.steps` optimizer steps, each between
`lane.begin()` and `lane.end(...)`; what the lane does there (wait for its turn, look at a clock) is the benchmark's
business. Batches are laid out before `begin`, by ours and by the others, so they are in no timing.

Tokens are the same for all because a row is written as words, and each word is the number of its token.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

SEED = 3407
RANK, ALPHA = 16, 32.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OPTIM: dict[str, float] = {"lr": 2e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "clip_norm": 1.0, "weight_decay": 0.0}
IGNORED = -100
PAD, END, UNKNOWN = 0, 1, 2  # tokens; all others are words
FIRST_WORD = 3
SHORTEST = 16  # tokens of an example of the length mix
SIGMA = 0.9  # of the logarithm of its lengths

_ROPE_1B = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "family": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "rms_norm_eps": 1e-5,
    },
    "qwen2.5-0.5b": {
        "family": "qwen2",
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "rms_norm_eps": 1e-6,
    },
    "llama-3.2-1b": {
        "family": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "rope_parameters": _ROPE_1B,
        "rms_norm_eps": 1e-5,
    },
    "llama-3.1-8b": {
        "family": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "rope_parameters": {**_ROPE_1B, "factor": 8.0},
        "rms_norm_eps": 1e-5,
    },
    "tiny": {
        "family": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 192,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.1,  # large enough that losses depend on what stands before
    },
}
"""Published configurations, for random weights; `tiny` only shows that everything runs."""


class Absent(Exception):
    """A contestant that cannot take part here: its package is not installed, or we do not have that yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a trainer is to do.

    Attributes:
        model, rows, room: folder of the weights, file of the rows, folder to write in.
        step_rows: examples of an optimizer step. micro_rows: how many of them the peers take at once.
        longest: tokens of the longest example allowed.
        threads: of torch on the CPU; None: torch chooses.
        settings: what differs between contestants; each trainer says what it understands.
    """

    model: str
    rows: str
    room: str
    steps: int
    step_rows: int
    micro_rows: int
    longest: int
    device: str = "cpu"
    threads: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


class Lane(Protocol):
    """Where a trainer runs: who says when, and what is written down."""

    def ready(self, settings: str) -> None:
        """All is loaded; `settings` names in a few words what was chosen."""
        ...

    def begin(self) -> None:
        """Returns when the next step may begin."""
        ...

    def end(self, loss: Callable[[], float], tokens: int, labels: int) -> None:
        """The step is done, or on its way on the device: mean loss over `labels`, and real tokens, without padding."""
        ...


# The rows.


@dataclass(frozen=True, slots=True)
class Data:
    """Which rows: full ones of `longest` tokens with loss on all, or lengths as in real data with the prompts masked.

    `mixed`: lognormal lengths with a mean of longest / 5 (about 200 of 1024), of which the first half is the prompt.
    """

    longest: int
    step_rows: int
    micro_rows: int
    mixed: bool


def write_rows(path: Path, data: Data, steps: int, vocab: int) -> None:
    """The rows of so many steps, always the same; a run of fewer steps has the first of them."""
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(steps * data.step_rows):
            # The end of the text is one token more.
            words = [str(chance.randrange(FIRST_WORD, vocab)) for _ in range(_length(chance, data) - 1)]
            half = (len(words) + 1) // 2
            row = {"prompt": " ".join(words[:half]), "completion": " ".join(words[half:])} if data.mixed else {"text": " ".join(words)}
            file.write(json.dumps(row) + "\n")


def _length(chance: random.Random, data: Data) -> int:
    if not data.mixed:
        return data.longest
    middle = math.log(data.longest / 5) - SIGMA**2 / 2
    return min(data.longest, max(SHORTEST, int(chance.lognormvariate(middle, SIGMA))))


def read_rows(path: str | Path) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` of each row, as transformers takes them: labels in place, -100 where nothing is learned."""
    found: list[dict[str, list[int]]] = []
    for line in Path(path).read_text("utf-8").splitlines():
        row = json.loads(line)
        prompt = [int(word) for word in row.get("prompt", "").split()]
        answer = [int(word) for word in row.get("completion", row.get("text", "")).split()] + [END]
        found.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    return found


def label_count(row: dict[str, list[int]]) -> int:
    """Tokens that are predicted: the first one never is."""
    return sum(label != IGNORED for label in row["labels"][1:])


def flops_per_token(shape: str, rows: Sequence[dict[str, list[int]]]) -> float:
    """Useful FLOP a real token in these rows, whatever a trainer really computes.

    Frozen base 4 N (forward and input gradient), LoRA 6 a parameter, head 4 h V for labelled tokens only, causal
    attention 3.5 times its forward of 2 h T^2 a layer; nothing for recomputation and padding.
    """
    size = SHAPES[shape]
    hidden, layers, wide = size["hidden_size"], size["num_hidden_layers"], size["intermediate_size"]
    head_dim = size.get("head_dim", hidden // size["num_attention_heads"])
    queries, keys = head_dim * size["num_attention_heads"], head_dim * size["num_key_value_heads"]
    linears = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden), (hidden, wide), (hidden, wide), (wide, hidden)]
    base = layers * sum(a * b for a, b in linears)
    lora = layers * RANK * sum(a + b for a, b in linears)
    lengths = [len(row["input_ids"]) for row in rows]
    head = 4 * hidden * size["vocab_size"] * sum(label_count(row) for row in rows)
    attention = 3.5 * layers * 2 * queries * sum(length**2 for length in lengths)
    return 4 * base + 6 * lora + (head + attention) / sum(lengths)


# The model.


def write_weights(shape: str, folder: Path, device: str = "cpu") -> None:
    """Random weights in bfloat16, the configuration, and a tokenizer whose words are the numbers of its tokens."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    sizes = dict(SHAPES[shape])
    ends = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": END}
    config = AutoConfig.for_model(sizes.pop("family"), dtype="bfloat16", **ends, **sizes)
    torch.manual_seed(SEED)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    specials = {"<pad>": PAD, "</s>": END, "<unk>": UNKNOWN}
    words = Tokenizer(models.WordLevel({**specials, **{str(i): i for i in range(FIRST_WORD, config.vocab_size)}}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)


def adapted(base: Any, *, full_precision: bool = True) -> Any:
    """The model with its LoRA, with the same initial numbers for everybody.

    full_precision: float32 adapters on a bfloat16 base, as PEFT makes them; otherwise they are bfloat16 too.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(SEED)
    lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=int(ALPHA), lora_dropout=0.0, target_modules=list(TARGETS))
    return get_peft_model(base, lora, autocast_adapter_dtype=full_precision)


def load_base(task: Task, attention: str | None = None, weights: str = "bfloat16") -> Any:
    """The model in bfloat16, as it is stored and as `from_pretrained` gives it, or in another dtype."""
    from transformers import AutoModelForCausalLM

    quiet()
    extra: dict[str, Any] = {"dtype": weights, **({"attn_implementation": attention} if attention else {})}
    if task.device != "cpu":
        extra["device_map"] = {"": task.device}  # straight there, as ours does
    return AutoModelForCausalLM.from_pretrained(task.model, **extra)


def quiet() -> None:
    """No bars, and no advice about settings that are chosen on purpose."""
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(trl|transformers|torch|accelerate|peft)(\.|$)")


# Ours.


def ours(task: Task, lane: Lane) -> None:
    """The main path, `pantheraml.train`, as it is.

    Settings: `model` and `hardware` are fields of those sections of the recipe, `micro_tokens` that of batch.
    Raises: Absent for a field or a value that the recipe does not know, and for what the plan says cannot be done here.
    """
    from rich.console import Console

    from pantheraml.engines.torch_engine import TorchEngine
    from pantheraml.errors import DeviceError, MissingExtra, RecipeError
    from pantheraml.recipe.load import recipe_from
    from pantheraml.trainer import run
    from pantheraml.trainer.folder import PLAN

    quiet()
    try:
        recipe = recipe_from(_recipe(task))
    except RecipeError as error:
        raise Absent(error.what.replace("\n", "; ")) from error
    step, begun = TorchEngine.step, False

    def in_turn(engine: TorchEngine, batch: Any, *rest: Any, **named: Any) -> Any:
        nonlocal begun
        if not begun:
            lane.ready(_planned(Path(task.room) / "runs" / "ours" / PLAN))
            begun = True
        lane.begin()
        metrics = step(engine, batch, *rest, **named)
        lane.end(lambda: float(metrics.loss), batch.tokens, batch.label_count)
        return metrics

    # The loop has no place at which a stranger could wait, and needs none but here. This process does nothing else.
    TorchEngine.step = in_turn  # pyright: ignore[reportAttributeAccessIssue]
    read_words()
    try:
        run.train(recipe, console=Console(stderr=True))
    except (MissingExtra, DeviceError) as error:
        if begun:
            raise
        raise Absent(error.what) from error


def read_words() -> None:
    """From here on ours takes the tokenizer that lies in the folder: to some families (Qwen 2) transformers gives another one."""
    from transformers import PreTrainedTokenizerFast

    from pantheraml.trainer import survey

    survey.load_tokenizer = lambda spec: PreTrainedTokenizerFast.from_pretrained(spec.name)


def _recipe(task: Task) -> dict[str, Any]:
    settings = task.settings
    return {
        "model": {"name": task.model, "dtype": "bfloat16", "max_tokens": task.longest, **settings.get("model", {})},
        "data": {"train": task.rows, "eval_fraction": 0.0, "shuffle": False},
        "adapter": {"kind": "lora", "rank": RANK, "alpha": ALPHA},
        "batch": {"size": task.step_rows, "micro_tokens": settings.get("micro_tokens", "auto")},
        "optim": {**OPTIM, "steps": task.steps, "schedule": "constant", "warmup": 0.0},
        "eval": {"generate_rows": 0},
        "hardware": {"kind": task.device, **({"threads": task.threads} if task.threads else {}), **settings.get("hardware", {})},
        "run": {
            "folder": str(Path(task.room) / "runs"),
            "name": "ours",
            "seed": SEED,
            "save_every": "end",
            "monitor_every_s": 0.0,  # it would wake up during the steps of the others
        },
    }


def _planned(path: Path) -> str:
    """What the plan chose, in a few words; what is said of each layer is counted."""
    plan = json.loads(path.read_text("utf-8"))
    said = [f"{choice}={plan[choice]}" for choice in ("dtype", "quantizer", "micro_tokens", "packing")]
    said += [choice for choice in ("whole", "compile", "graphs") if plan[choice]]
    layers = Counter(plan.get("levels", ()))
    return ", ".join(said + [f"{count} layers {level}" for level, count in layers.items()])


# The peers.


def peft(task: Task, lane: Lane) -> None:
    """transformers and PEFT in the loop that everybody writes. Settings: `checkpointing`, `attention`."""
    plain_loop(task, lane, adapted(load_base(task, task.settings.get("attention"))), "bfloat16, adapters float32")


def plain_loop(task: Task, lane: Lane, model: Any, said: str) -> None:
    """Forward, backward, clip, AdamW; padded micro-batches whose losses are weighted by their labels."""
    import torch

    if task.settings.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        said += ", checkpointing"
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    betas = (OPTIM["beta1"], OPTIM["beta2"])
    optimizer = torch.optim.AdamW(trained, lr=OPTIM["lr"], betas=betas, eps=OPTIM["eps"], weight_decay=OPTIM["weight_decay"], fused=True)
    rows = read_rows(task.rows)
    model.train()
    lane.ready(f"{said}, {task.micro_rows} rows at once")
    for number in range(task.steps):
        chosen = rows[number * task.step_rows : (number + 1) * task.step_rows]
        labels = sum(label_count(row) for row in chosen)
        micro = [*_micro_batches(chosen, task)]
        lane.begin()
        optimizer.zero_grad(set_to_none=True)
        losses: list[Any] = []
        for batch, count in micro:
            loss = model(**batch, use_cache=False).loss * (count / labels)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, OPTIM["clip_norm"])
        optimizer.step()
        lane.end(lambda losses=losses: float(sum(losses)), sum(len(row["input_ids"]) for row in chosen), labels)


def _micro_batches(rows: Sequence[dict[str, list[int]]], task: Task) -> Iterator[tuple[dict[str, Any], int]]:
    """Padded tensors, and how many labels they have. Without padding there is no mask: attention is faster then."""
    import torch

    for start in range(0, len(rows), task.micro_rows):
        part = rows[start : start + task.micro_rows]
        longest = max(len(row["input_ids"]) for row in part)

        def padded(name: str, value: int, part: Any = part, longest: int = longest) -> Any:
            return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in part], device=task.device)

        batch = {"input_ids": padded("input_ids", PAD), "labels": padded("labels", IGNORED)}
        if any(len(row["input_ids"]) < longest for row in part):
            mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in part]
            batch["attention_mask"] = torch.tensor(mask, device=task.device)
        yield batch, sum(label_count(row) for row in part)


def liger(task: Task, lane: Lane) -> None:
    """The plain loop with Liger's kernels. Settings: `checkpointing`. Raises: Absent."""
    try:
        from liger_kernel.transformers import AutoLigerKernelForCausalLM  # pyright: ignore[reportMissingImports] - optional
    except ImportError as error:
        raise Absent("liger-kernel is not installed") from error
    quiet()
    base = AutoLigerKernelForCausalLM.from_pretrained(task.model).to(task.device)
    plain_loop(task, lane, adapted(base), "bfloat16, adapters float32")


def unsloth(task: Task, lane: Lane) -> None:
    """The plain loop with Unsloth's model. Settings: `recompute` (False, True or "unsloth": offloaded), `load_in_4bit`. Raises: Absent."""
    try:
        from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports] - optional
    except (ImportError, NotImplementedError) as error:  # the second where it finds no GPU that it knows
        raise Absent("unsloth is not installed, or finds no GPU that it knows") from error
    import torch

    recompute, four_bits = task.settings["recompute"], bool(task.settings.get("load_in_4bit"))
    base, _ = FastLanguageModel.from_pretrained(task.model, max_seq_length=task.longest, dtype=torch.bfloat16, load_in_4bit=four_bits)
    model = FastLanguageModel.get_peft_model(
        base,
        r=RANK,
        lora_alpha=int(ALPHA),
        lora_dropout=0,
        bias="none",
        target_modules=list(TARGETS),
        use_gradient_checkpointing=recompute,
        random_state=SEED,
    )
    plain_loop(task, lane, model, f"{'nf4' if four_bits else 'bfloat16'}, use_gradient_checkpointing={recompute}")


# TRL.

# A model that is given by its name TRL loads in float32 (create_model_from_path), whatever its authors store.
TRL_DEFAULTS: dict[str, Any] = {"weights": "float32", "attention": None, "adapters": "float32", "layout": "padded", "arguments": {}}
OTHER_STEPS = ("batch_rebalance", "group_by_length", "packing")  # layouts whose steps have other examples than those of the rest


def trl_layouts(task: Task) -> dict[str, dict[str, Any]]:
    """Ways in which TRL can lay out examples of different lengths, as arguments of SFTConfig."""
    tokens = sum(len(row["input_ids"]) for row in read_rows(task.rows))
    rows_a_step = max(1, round(tokens / task.steps / task.longest))
    return {
        "padded": {},
        "batch_rebalance": {"train_sampling_strategy": "batch_rebalance"},
        "group_by_length": {"train_sampling_strategy": "group_by_length"},
        "one at a time": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": task.step_rows},
        "padding_free": {"padding_free": True, "max_length": None},
        "packing": {
            "packing": True,
            "max_length": task.longest,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": rows_a_step,
        },
    }


def trl(task: Task, lane: Lane) -> None:
    """TRL's SFTTrainer. Settings: those of TRL_DEFAULTS; `arguments` are SFTConfig's. Its metrics (entropy) cannot be switched off."""
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    disable_progress_bars()
    settings = {**TRL_DEFAULTS, **task.settings}
    step: dict[str, Any] = {"losses": [], "tokens": 0, "labels": 0}

    class Counting(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            mask = inputs.get("attention_mask")
            step["tokens"] += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            step["labels"] += int((inputs["labels"][:, 1:] != IGNORED).sum())
            loss = super().training_step(model, inputs, *rest, **named)
            step["losses"].append(loss.detach())
            return loss

    class InTurn(TrainerCallback):
        def on_step_begin(self, *rest: Any, **named: Any) -> None:
            step.update(losses=[], tokens=0, labels=0)
            lane.begin()

        def on_step_end(self, *rest: Any, **named: Any) -> None:
            lane.end(lambda losses=step["losses"]: float(sum(losses)), step["tokens"], step["labels"])

    base = load_base(task, settings["attention"], settings["weights"])
    trainer = Counting(
        model=adapted(base, full_precision=settings["adapters"] == "float32"),
        args=SFTConfig(**{**_sft_arguments(task), **trl_layouts(task)[settings["layout"]], **settings["arguments"]}),
        train_dataset=Dataset.from_list(read_rows(task.rows)),
        processing_class=AutoTokenizer.from_pretrained(task.model),
        callbacks=[InTurn()],
    )
    trainer.remove_callback(PrinterCallback)
    lane.ready(trl_said(settings))
    trainer.train()


def trl_said(settings: dict[str, Any]) -> str:
    """Settings in a few words: what differs from TRL's defaults."""
    changed = [f"{name}={value}" for name, value in settings["arguments"].items()]
    changed += [
        f"{name}={settings[name]}" for name in ("weights", "attention", "adapters", "layout") if settings[name] != TRL_DEFAULTS[name]
    ]
    return ", ".join(changed) or "defaults: float32 weights, autocast, checkpointing"


def _sft_arguments(task: Task) -> dict[str, Any]:
    """What is the same for everybody, and silence; all else stays TRL's default."""
    return {
        "output_dir": str(Path(task.room) / "trl"),
        "max_steps": task.steps,
        "per_device_train_batch_size": task.micro_rows,
        "gradient_accumulation_steps": task.step_rows // task.micro_rows,
        "max_length": task.longest,
        "learning_rate": OPTIM["lr"],
        "lr_scheduler_type": "constant",
        "adam_beta1": OPTIM["beta1"],
        "adam_beta2": OPTIM["beta2"],
        "adam_epsilon": OPTIM["eps"],
        "max_grad_norm": OPTIM["clip_norm"],
        "weight_decay": OPTIM["weight_decay"],
        "train_sampling_strategy": "sequential",
        "use_cpu": task.device == "cpu",
        "dataloader_pin_memory": task.device != "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
    }


TRAINERS: dict[str, Callable[[Task, Lane], None]] = {"ours": ours, "peft": peft, "trl": trl, "liger": liger, "unsloth": unsloth}

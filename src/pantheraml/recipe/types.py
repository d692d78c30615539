"""The recipe: everything a user can ask for, with its default, unit and reason at the field.

Only `model` and `data` are required. The models are frozen and refuse unknown keys. `auto`
means that the planner decides from the machine and the model, and says why in the plan.
The description of each field is what `pantheraml recipe explain` prints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pantheraml.recipe.kinds import KINDS

if TYPE_CHECKING:
    AskedKind = str
else:
    AskedKind = Literal["auto", "gpu", *KINDS]  # made from the table, so that a new device is one row

Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text"]
GgufType = Literal["f32", "f16", "bf16", "q8_0", "q4_k_m", "q5_k_m", "q6_k"]
Reporter = Literal["tensorboard", "trackio", "wandb"]


class _Part(BaseModel):
    # Strict: "3" is not 3. A typo in a recipe costs hours, so nothing is coerced in silence.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _listed(value: Any) -> Any:
    """One path, or several: both are lists inside. A YAML list becomes the tuple that is stored."""
    if isinstance(value, str):
        return (value,)
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


Strings = Annotated[tuple[str, ...], BeforeValidator(_listed, json_schema_input_type=str | list[str])]


class ModelSpec(_Part):
    """Which weights, and how they are held in memory."""

    name: str = Field(min_length=1, description="A Hub id, a folder, or tiny:FAMILY for a small model made from nothing.")
    revision: str | None = Field(default=None, description="Hub branch, tag or commit. Default: the repository's main branch.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Arithmetic. auto: bfloat16 where the device computes it faster than float32, else float32."
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        default="auto", description="Attention implementation of transformers. auto: the first one that the device offers."
    )
    max_tokens: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(
        default="auto", description="Longest example in tokens. auto: 2048, or what the model can do if that is less."
    )
    load_in_4bit: bool = Field(default=False, description="Hold the frozen base in 4 bits (NF4, needs bitsandbytes). LoRA only.")
    load_in_8bit: bool = Field(
        default=False, description="Hold the frozen base in 8-bit whole numbers and multiply in them; faster. LoRA only."
    )
    load_in_fp8: bool = Field(
        default=False,
        description="Hold the frozen base in 8-bit floats and multiply in them (NVIDIA GPUs from 8.9 on: Ada, Hopper). LoRA only.",
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model. Off: it can do anything.")


class LoRA(_Part):
    """Train low-rank additions to the linear layers; the base stays as it is."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=16, gt=0, description="Rank of each addition. 8 to 32 suits most tasks.")
    alpha: float = Field(default=16.0, gt=0, description="Strength: the addition is scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the input of each addition. 0 is fastest and usually as good.")
    targets: Strings = Field(default=("all-linear",), description="Module names. all-linear: every linear layer but the output head.")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) (rank-stabilised LoRA).")
    dora: bool = Field(default=False, description="Weight-decomposed LoRA: learns magnitudes too; slower.")


class Full(_Part):
    """Train every weight."""

    kind: Literal["full"] = "full"


class SFT(_Part):
    """Supervised fine-tuning: predict the next token of the answers."""

    kind: Literal["sft"] = "sft"
    loss_on: Literal["assistant", "last", "all"] = Field(
        default="assistant", description="Which tokens count: all assistant turns, only the last one, or every token."
    )


class DataSpec(_Part):
    """Which rows, how they are read, and what happens to those that cannot be used."""

    train: Strings = Field(min_length=1, description="Files (jsonl, json, csv, parquet), folders, or hub:ORG/SET[:SPLIT].")
    eval: Strings = Field(default=(), description="Rows kept for evaluation. Default: eval_fraction of train.")
    eval_fraction: float = Field(
        default=0.05, ge=0, lt=1, description="Held out from train where eval is not given. Equal rows stay together."
    )
    max_eval_rows: int = Field(default=200, gt=0, description="At most so many rows are held out or evaluated.")
    format: Format = Field(default="auto", description="auto: detected from the first rows, and reported.")
    streaming: Literal["auto", "on", "off"] = Field(
        default="auto", description="Read while training. auto: on when the files exceed a quarter of free memory."
    )
    shuffle: bool = Field(default=True, description="A new order each epoch, from run.seed. Off: as in the file.")
    packing: Literal["auto", "on", "off"] = Field(
        default="auto", description="Put several examples into one row, isolated. auto: on where the model keeps them apart."
    )
    too_long: Literal["truncate", "drop", "split", "error"] = Field(
        default="truncate", description="For examples over model.max_tokens. Always counted."
    )
    on_bad_row: Literal["fail", "skip"] = Field(
        default="fail", description="fail: stop at the first unusable row. skip: leave it out and write it to bad_rows.jsonl."
    )
    max_bad_rows: int = Field(default=100, ge=0, description="With skip: stop after so many.")
    chat_template: str | None = Field(default=None, description="A Jinja file used instead of the tokenizer's own template.")


class BatchSpec(_Part):
    """How many examples make one step, and how the device takes them."""

    size: int = Field(default=16, gt=0, description="Examples in one optimizer step, over all devices. Changes what is learned.")
    micro_tokens: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(
        default="auto", description="Tokens the device takes at once. Changes memory and speed only. auto: what fits."
    )


class OptimSpec(_Part):
    """AdamW and its schedule."""

    lr: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        default="auto", description="Peak learning rate. auto: 2e-4 for LoRA, 2e-5 for full."
    )
    epochs: float = Field(default=1.0, gt=0, description="Passes over the training rows.")
    steps: int | None = Field(default=None, gt=0, description="Optimizer steps; overrules epochs.")
    schedule: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="From the peak to zero, after the warm-up.")
    warmup: float = Field(default=0.03, ge=0, lt=1, description="Share of the steps in which the rate rises to its peak.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled decay, on matrices only (not on norms and biases).")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's first moment.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's second moment.")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    clip_norm: float = Field(default=1.0, ge=0, description="Gradients are scaled down to this norm. 0: never.")
    states: Literal["float32", "8bit", "paged"] = Field(
        default="float32",
        description="AdamW's moments: 8 bytes a trained weight in float32, 2 in 8bit (needs bitsandbytes). "
        "paged: 8bit, and moved to the host where a GPU's memory is full.",
    )


class EvalSpec(_Part):
    """What is measured on the held-out rows."""

    every: Annotated[int, Field(gt=0)] | Literal["auto", "end"] = Field(
        default="auto", description="Steps between evaluations. auto: ten times a run."
    )
    early_stop: int | None = Field(default=None, gt=0, description="Stop after so many evaluations without a better loss.")
    generate_rows: int = Field(default=8, ge=0, description="Held-out rows answered before and after training, scored by exact match.")
    max_new_tokens: int = Field(default=256, gt=0, description="Longest answer in tokens.")
    prompts: Strings = Field(default=(), description="Your own prompts, answered before and after.")


class HardwareAsk(_Part):
    """Where to run. What is not said here, the environment may say; see hardware/settings.py."""

    kind: AskedKind = Field(default="auto", description="auto: the first of TPU, CUDA, XPU, MPS, CPU that answers. gpu: the first GPU.")
    index: int = Field(default=0, ge=0, description="Which of them.")
    devices: Annotated[int, Field(gt=0)] | Literal["auto", "all"] = Field(
        default="auto",
        description="How many train together. all: those that are here. auto: all chips of a TPU; of other kinds as many as dp, fsdp, cp and "
        "tp come to, or as processes were started, and else one. On a CPU they are processes that share it.",
    )
    parallel: Literal["auto", "ddp", "fsdp", "cp", "tp", "fsdp_tp"] = Field(
        default="auto",
        description="How several GPUs or CPU processes share the work. ddp: copies. fsdp: parts of the weights, each with its share of the "
        "examples. cp: parts of every row. tp: parts of the products. auto: copies where the model fits on each, else fsdp, else these "
        "with cp, else fsdp with tp.",
    )
    dcn: int = Field(default=1, gt=0, description="Slices of a TPU (pods), connected by the slower network: each has a copy of the model.")
    dp: int = Field(
        default=1, gt=0, description="Copies of the model, each with its share of a step. 1 leaves it open but on a TPU (see parallel)."
    )
    fsdp: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(
        default="auto",
        description="Parts of every weight, each with its share of a step. auto: the devices that dcn, dp and tp leave, or see parallel.",
    )
    cp: int = Field(
        default=1,
        gt=0,
        description="Parts of every row, for long ones (context parallel). Divides the heads of keys. Not on a TPU. 1 leaves it open (see parallel).",
    )
    tp: int = Field(
        default=1,
        gt=0,
        description="Parts of every product (tensor parallel). Divides the heads of keys. 1 leaves it open but on a TPU (see parallel).",
    )
    threads: int | None = Field(
        default=None, gt=0, description="CPU threads. Default: OMP_NUM_THREADS, else all cores this process may use."
    )
    checkpointing: Literal["auto", "off", "cheap", "on", "tiled", "offload"] = Field(
        default="auto",
        description="What is computed again in backward to save memory. off: nothing. cheap: norms and gates. on: whole layers. "
        "tiled: on, with the MLP in pieces. offload: on, with inputs in ordinary memory. auto: the fastest that fits, layer by layer.",
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Compile each layer with torch.compile, about a minute once. auto: on for a long run on a GPU, off where our kernels compute the layers.",
    )
    graphs: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Record forward and backward once a shape and replay them (CUDA graphs). auto: on where telling the GPU takes longer than computing.",
    )
    allow_cpu: bool = Field(default=True, description="auto may take the CPU. Off: a machine without an accelerator is an error.")
    allow_tpu: bool = Field(default=True, description="auto may take a TPU.")
    simulate_tpu: bool = Field(default=False, description="Treat XLA on the CPU as a TPU, for trying things out; every report says so.")
    oom_retries: int = Field(
        default=6,
        ge=0,
        description="When memory runs out, keep less of each layer, then take half of the micro-batch, at most so often. 0: stop.",
    )
    restarts: int = Field(
        default=0,
        ge=0,
        description="How often all local processes are started again, from the last checkpoint, after one has crashed or hung.",
    )
    min_devices: Annotated[int, Field(gt=0)] | None = Field(
        default=None,
        description="So many GPUs or CPU processes may do where fewer answer than devices asks for, or where one has ended the run twice "
        "(see restarts). Default: with devices=all any number, else as many as asked for.",
    )
    timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="Seconds without a sign of one of several processes until the run is ended, with the stacks of all.",
    )
    usd_per_hour: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="What an hour of the device costs, in US dollars. Default: the catalog's price, where it has one."
    )
    tpu_batch_factor: int = Field(
        default=128, gt=0, description="Batch on a TPU for a base batch of 1, where DeviceManager.get_batch_config knows no model."
    )
    gpu_batch_factor: int = Field(default=4, gt=0, description="The same for a GPU.")
    cpu_batch_factor: int = Field(default=1, gt=0, description="The same for a CPU.")

    @property
    def least_devices(self) -> int | None:
        """With how few a run may go on; None: with no fewer than asked for."""
        return 1 if self.min_devices is None and self.devices == "all" else self.min_devices


class RunSpec(_Part):
    """The run folder and the rhythm of the loop."""

    folder: str = Field(default="runs", description="Run folders are made in here.")
    name: str | None = Field(default=None, description="Name of the run folder. Default: from the model and the data.")
    seed: int = Field(default=3407, ge=0, description="Fixes order, initial adapter and dropout.")
    log_every: int = Field(default=10, gt=0, description="Steps between log lines. Metrics stay on the device in between.")
    monitor_every_s: float = Field(
        default=5.0, ge=0, description="Seconds between looks at the device's memory, load, temperature and power. 0: never."
    )
    save_every: Annotated[int, Field(gt=0)] | Literal["auto", "end"] = Field(
        default="auto", description="Steps between checkpoints. auto: ten times a run."
    )
    keep: int = Field(default=2, gt=0, description="Checkpoints kept, besides the best one.")
    best: bool = Field(default=True, description="End with the weights of the best evaluation rather than the last step.")
    reporters: Annotated[tuple[Reporter, ...], BeforeValidator(_listed, json_schema_input_type=Reporter | list[Reporter])] = Field(
        default=(), description="Also send metrics to these, if installed."
    )


class ExportSpec(_Part):
    """What is written at the end besides the adapter."""

    merged: bool = Field(default=False, description="The base with the adapter merged in, as a folder for transformers.")
    gguf: Annotated[tuple[GgufType, ...], BeforeValidator(_listed, json_schema_input_type=GgufType | list[GgufType])] = Field(
        default=(), description="GGUF files for llama.cpp and Ollama."
    )


Adapter = Annotated[LoRA | Full, Field(discriminator="kind")]


SHORTHAND = {"model": "name", "data": "train", "method": "kind", "adapter": "kind"}
"""`model: Qwen/Qwen3-0.6B` is short for `model: {name: Qwen/Qwen3-0.6B}`, `adapter: full` for `adapter: {kind: full}`."""


def expanded(section: str, value: Any) -> Any:
    """The long form of a section that may be written short; anything else as it is."""
    if section in SHORTHAND and isinstance(value, str | list | tuple):
        return {SHORTHAND[section]: cast("str | list[Any] | tuple[Any, ...]", value)}
    if section == "adapter" and isinstance(value, dict) and "kind" not in value:
        return {"kind": "lora", **cast("dict[str, Any]", value)}
    return cast("Any", value)


def _short(section: str, accepts: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: expanded(section, value), json_schema_input_type=accepts)


class Recipe(_Part):
    """What the user asked. Frozen; the same recipe, data and machine give the same weights."""

    model: Annotated[ModelSpec, _short("model", str | ModelSpec)] = Field(description="Which weights.")
    data: Annotated[DataSpec, _short("data", str | list[str] | DataSpec)] = Field(description="Which rows.")
    method: Annotated[SFT, _short("method", Literal["sft"] | SFT)] = Field(default=SFT(), description="How to learn.")
    adapter: Annotated[Adapter, _short("adapter", Literal["lora", "full"] | LoRA | Full)] = Field(
        default=LoRA(), description="What to train: {kind: lora, ...} or {kind: full}."
    )
    batch: BatchSpec = Field(default=BatchSpec(), description="How many examples a step.")
    optim: OptimSpec = Field(default=OptimSpec(), description="How far each step goes.")
    eval: EvalSpec = Field(default=EvalSpec(), description="What is measured.")
    hardware: HardwareAsk = Field(default=HardwareAsk(), description="Where to run.")
    run: RunSpec = Field(default=RunSpec(), description="Where results go.")
    export: ExportSpec = Field(default=ExportSpec(), description="What to write at the end.")

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        asked = [name for name in ("load_in_4bit", "load_in_8bit", "load_in_fp8") if getattr(self.model, name)]
        if len(asked) > 1:
            raise ValueError(f"model.{' and model.'.join(asked)} are asked for at once, and a base is held in one form")
        if asked and isinstance(self.adapter, Full):
            raise ValueError(f"model.{asked[0]} freezes the base, so adapter.kind must be lora")
        most, least = self.hardware.devices, self.hardware.min_devices
        if least is not None and isinstance(most, int) and least > most:
            raise ValueError(f"hardware.min_devices={least} is more than hardware.devices={most}")
        return self

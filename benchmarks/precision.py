"""What a base in fewer bits costs: the same LoRA learns the same task on a base in float32, bfloat16, int8, NF4 and FP8.

    python benchmarks/precision.py [--quick] [--seeds N ...] [--threads N]

1. A small Llama is trained from nothing on the four simple tasks of the demo, so that its weights have learnt something.
2. A LoRA learns the demo's new task (orders in plain words, answered as JSON) on that base, once for each form and seed.
   Rows, their order, the adapter's initial weights and every setting are the same; only the base is held in another form.
   All but the first compute everything else in bfloat16, so that what is apart from `bfloat16` is the form of the base.
3. Printed are the held-out loss as it falls, the exact matches at the end, and both once more with the adapter on the base
   in bfloat16: what merging or serving it gives. A difference is that of the same seed, and the spread over seeds stands
   beside it: a difference that is no larger says nothing.

A form that the plan refuses on this machine is left out; but FP8, which needs a GPU, is then computed on the CPU with the same
rounding and without its speed, and called "numerics only". The last line is JSON. The exit status is 1 if a form did not
learn (its loss did not fall to a tenth); with --quick nothing is judged.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import runpy
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FORMS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "load_in_8bit": True},
    "nf4": {"dtype": "bfloat16", "load_in_4bit": True},
    "fp8": {"dtype": "bfloat16", "load_in_fp8": True},
}
"""Name -> the section `model` of its recipe."""
MAX_TOKENS = 192
ADAPTER = {"kind": "lora", "rank": 16, "alpha": 32}
LEARNT = 0.1


@dataclass(frozen=True, slots=True)
class Size:
    """How much is trained, and on how many rows it is judged."""

    base_steps: int
    steps: int
    every: int
    rows: int


FULL = Size(base_steps=500, steps=240, every=40, rows=100)
QUICK = Size(base_steps=12, steps=8, every=4, rows=4)


def main() -> int:
    """Train, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps on a base that has learnt nothing")
    parser.add_argument("--seeds", type=int, nargs="+", help="of data order and adapter (default: 1 2; quick: 1)")
    parser.add_argument("--threads", type=int, help="of all runs (default: all cores)")
    asked = parser.parse_args()
    size = QUICK if asked.quick else FULL
    seeds = asked.seeds or ([1] if asked.quick else [1, 2])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    quiet()

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="pantheraml-precision-") as name:
        room = Path(name)
        runpy.run_path(str(ROOT / "recipes" / "demo_data.py"))["main"](room)
        test = (room / "test.jsonl").read_text("utf-8").splitlines(keepends=True)
        (room / "held.jsonl").write_text("".join(test[: size.rows]), "utf-8")
        say(f"a base from nothing, {size.base_steps} steps")
        base = train_base(room, size, asked.threads)
        for form in FORMS:
            found = [one_run(room, base, size, form, seed, asked.threads) for seed in seeds]
            results[form] = together(found) if all("absent" not in each for each in found) else found[0]

    compare(results)
    print(table(results, seeds))
    missing = [form for form, each in results.items() if "absent" not in each and not learnt(each)]
    for form in missing:
        print(f"FALLS SHORT: with {form} the loss did not fall to a tenth" + (" (not judged with --quick)" if asked.quick else ""))
    ok = asked.quick or not missing
    line = {"benchmark": "precision", "ok": ok, "quick": asked.quick, "seeds": seeds, "steps": size.steps, "held_out_rows": size.rows}
    print(json.dumps({**line, **machine(), "forms": results}))
    return 0 if ok else 1


# Training.


def said(room: Path, model: dict[str, Any], name: str, seed: int, threads: int | None, **sections: Any) -> dict[str, Any]:
    """A recipe, as a dict."""
    return {
        "model": {"max_tokens": MAX_TOKENS, **model},
        "data": {"train": str(room / "train.jsonl"), "eval": str(room / "held.jsonl")},
        "hardware": {"kind": "cpu", "threads": threads},
        "run": {"folder": str(room / "runs"), "name": name, "seed": seed, "log_every": 1, "save_every": "end"},
        **sections,
    }


def train_base(room: Path, size: Size, threads: int | None) -> str:
    """The demo's first half: every weight of a small Llama learns four simple tasks. Returns the model's folder."""
    recipe = said(
        room,
        {"name": "tiny:llama", "dtype": "float32"},
        "base",
        1,
        threads,
        data={"train": str(room / "base.jsonl")},
        adapter="full",
        batch={"size": 32},
        optim={"lr": 3e-3, "steps": size.base_steps, "warmup": 0.05},
        eval={"every": "end", "generate_rows": 0},
    )
    return str(fine_tune(recipe).folder / "model")


def one_run(room: Path, base: str, size: Size, form: str, seed: int, threads: int | None) -> dict[str, Any]:
    """The demo's second half on a base in one form; {"absent": why} if this machine does not hold it so."""
    from pantheraml.errors import DeviceError, MissingExtra

    recipe = said(
        room,
        {"name": base, **FORMS[form]},
        f"{form}-{seed}",
        seed,
        threads,
        adapter=ADAPTER,
        batch={"size": 16},
        optim={"lr": 3e-3, "steps": size.steps, "warmup": 0.05},
        eval={"every": size.every, "generate_rows": size.rows, "max_new_tokens": 80},
    )
    through = "the plan"
    try:
        run = fine_tune(recipe)
    except (DeviceError, MissingExtra) as error:
        if form != "fp8":
            return {"absent": error.why}
        through, run = "numerics only", fine_tune_directly(recipe, "fp8")
    after = on_the_base(run)
    held = (run.report or {})["eval"]
    curve = {line["step"]: line["eval_loss"] for line in metrics(run) if "eval_loss" in line}
    say(f"{form}, seed {seed}: loss {held['loss_after']:.4f}, exact match {held['exact_match_after']:.2f} ({through})")
    return {
        "through": through,
        "losses": curve,
        "final_loss": held["loss_after"],
        "exact_match": held["exact_match_after"],
        "on_bfloat16_loss": after["loss"],
        "on_bfloat16_exact_match": after["exact_match"],
    }


def fine_tune(recipe: dict[str, Any]) -> Any:
    """The main path, as `pantheraml train` takes it."""
    from rich.console import Console

    from pantheraml.recipe.load import recipe_from
    from pantheraml.trainer.run import train

    return train(recipe_from(recipe), console=Console(quiet=True))


def fine_tune_directly(recipe: dict[str, Any], bits: Any) -> Any:
    """The same steps by hand, for a form that the plan does not allow here: its arithmetic, wherever it is computed."""
    import torch
    from rich.console import Console

    from pantheraml.hardware.backend import open_backend
    from pantheraml.models.adapters import attach
    from pantheraml.models.load import load_model
    from pantheraml.models.quantize import to_eight_bits
    from pantheraml.recipe.load import recipe_from
    from pantheraml.trainer.folder import PLAN, open_folder, write_json
    from pantheraml.trainer.run import fit
    from pantheraml.trainer.survey import survey

    model = {key: value for key, value in recipe["model"].items() if not key.startswith("load_in_")}
    named = {**recipe["run"], "name": recipe["run"]["name"] + "-directly"}
    with open_folder(recipe_from({**recipe, "model": model, "run": named}), resume=False) as (folder, checked):
        view = survey(checked, folder=folder)
        backend = open_backend(view.plan.device.kind)
        backend.set_threads(view.plan.threads)
        place = backend.torch_device(view.plan.device.index)
        base = load_model(checked.model, dtype=getattr(torch, view.plan.dtype), device=place, attention=view.plan.attention)
        adapted = attach(base, checked.adapter, seed=checked.run.seed)  # pyright: ignore[reportArgumentType] - it is a LoRA
        to_eight_bits(adapted, bits)
        write_json(folder / PLAN, view.plan.to_dict())
        return fit(view, adapted, backend, folder, Console(quiet=True))


def on_the_base(run: Any) -> dict[str, Any]:
    """Loss and exact match of the adapter on the base in bfloat16 (float32 for a run in float32)."""
    from pantheraml.trainer.evaluate import evaluate

    plain = {"load_in_4bit": False, "load_in_8bit": False, "load_in_fp8": False}
    recipe = run.recipe.model_copy(update={"model": run.recipe.model.model_copy(update=plain)})
    return evaluate(recipe, run.loaded)


def metrics(run: Any) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    from pantheraml.trainer.watch import METRICS, read_metrics

    return read_metrics(run.folder / METRICS)


# What is printed.


def together(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs of a form, a list of each figure in the order of the seeds."""
    figures = [name for name in found[0] if name not in ("through", "losses")]
    steps = list(found[0]["losses"])
    return {
        "through": found[0]["through"],
        "losses": {str(step): [each["losses"][step] for each in found] for step in steps},
        **{name: [each[name] for each in found] for name in figures},
    }


def compare(results: dict[str, Any]) -> None:
    """Adds what each final loss is above that of bfloat16 with the same seed."""
    for each in results.values():
        if "absent" not in each:
            pairs = zip(each["final_loss"], results["bfloat16"]["final_loss"], strict=True)
            each["above_bfloat16"] = [mine - other for mine, other in pairs]


def learnt(result: dict[str, Any]) -> bool:
    """Whether each seed's loss fell to a tenth of the first that was measured."""
    first = next(iter(result["losses"].values()))
    return all(math.isfinite(last) and last <= LEARNT * start for last, start in zip(result["final_loss"], first, strict=True))


def table(results: dict[str, Any], seeds: list[int]) -> str:
    """Markdown; figures are means over the seeds, the spread is between the least and the most."""
    present = [each for each in results.values() if "absent" not in each]
    steps = list(present[0]["losses"])
    head = ["base", *(f"loss at {step}" for step in steps), "final", "above bfloat16 (each seed)", "exact", "on bfloat16: loss", "exact"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for form, each in results.items():
        if "absent" in each:
            lines.append(f"| {form} | not here: {each['absent']} |" + " |" * (len(head) - 2))
            continue
        cells = [form if each["through"] == "the plan" else f"{form} ({each['through']})"]
        cells += [f"{statistics.mean(each['losses'][step]):.4f}" for step in steps]
        cells += [f"{statistics.mean(each['final_loss']):.4f}", " ".join(f"{apart:+.4f}" for apart in each["above_bfloat16"])]
        cells += [f"{statistics.mean(each['exact_match']):.2f}", f"{statistics.mean(each['on_bfloat16_loss']):.4f}"]
        cells += [f"{statistics.mean(each['on_bfloat16_exact_match']):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    spread = max(max(each["final_loss"]) - min(each["final_loss"]) for each in present)
    return "\n".join([*lines, f"means of seeds {seeds}; from seed to seed the final loss of a form differs by up to {spread:.4f}"])


def machine() -> dict[str, Any]:
    """What it ran on."""
    from importlib.metadata import version

    from pantheraml.hardware.cpu import cpu_name

    return {"cpu": cpu_name(), "versions": {name: version(name) for name in ("torch", "transformers", "peft")}}


def quiet() -> None:
    """No bars, and no advice of libraries."""
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(transformers|torch|peft)(\.|$)")


def say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

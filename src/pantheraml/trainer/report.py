"""What a run leaves for people and for programs: report.md, report.json and loss.png."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantheraml.export.safetensors import atomic_file
from pantheraml.hardware.monitor import Monitor
from pantheraml.planning.cost import format_dollars, format_seconds
from pantheraml.planning.memory import format_bytes
from pantheraml.planning.plan import Plan
from pantheraml.trainer.samples import Sample, exact_match
from pantheraml.trainer.watch import read_metrics

if TYPE_CHECKING:
    from pantheraml.trainer.loop import Position
    from pantheraml.trainer.survey import Survey

REPORT, REPORT_PAGE, PLOT = "report.json", "report.md", "loss.png"
SHOWN_SAMPLES = 5


def summary(
    view: Survey,
    model: Any,
    position: Position,
    samples: Sequence[Sample],
    *,
    name: str,
    kept_step: int,
    final_loss: float | None,
    peak_bytes: int | None,
    since_step: int,
    notes: Sequence[str],
) -> dict[str, Any]:
    """What report.json says of a run, besides its samples."""
    recipe, plan, data = view.recipe, view.plan, view.data
    speed = position.tokens / position.train_s if position.train_s else None
    return {
        "run": name,
        "pantheraml": version("pantheraml"),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "model": recipe.model.name,
        "method": recipe.method.kind,
        "adapter": recipe.adapter.kind,
        "device": asdict(plan.device),
        "dtype": plan.dtype,
        "data": {
            "format": data.detected.format,
            "train_rows": len(data.train) if data.train is not None else None,
            "eval_rows": len(data.held_out),
            "bad_rows": len(data.bad.rows),
            "in_both": len(data.shared),
        },
        "train": {
            "steps": position.step,
            "kept_step": kept_step,
            "batch_size": plan.batch_size,
            "tokens": position.tokens,
            "tokens_per_s": speed,
            "train_s": position.train_s,
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "parameters": view.shape.parameters,
        },
        "eval": {
            "rows": len(data.questions),
            "loss_before": position.first_eval,
            "loss_after": final_loss,
            "exact_match_before": exact_match(samples, after=False),
            "exact_match_after": exact_match(samples, after=True),
        },
        "plan": {
            **measured_beside(plan, tokens_per_s=speed, train_s=position.train_s),
            "memory_bytes": memory_beside(plan, held_bytes=view.held_bytes, peak_bytes=peak_bytes, since_step=since_step),
        },
        "notes": list(notes),
    }


def memory_beside(plan: Plan, *, held_bytes: int | None, peak_bytes: int | None, since_step: int) -> dict[str, int | None]:
    """Planned and measured: both are what training took beyond `held_before`, since the last start, which was after `since_step`."""
    known = held_bytes is not None and peak_bytes is not None
    measured = (peak_bytes or 0) - (held_bytes or 0) if known else None
    return {"planned": plan.memory.total_bytes, "measured": measured, "held_before": held_bytes, "since_step": since_step}


def measured_beside(plan: Plan, *, tokens_per_s: float | None, train_s: float | None) -> dict[str, dict[str, Any]]:
    """What was planned and what came of it, in the same units; dollars are the measured time at the price that the plan knew."""
    price = plan.cost.usd_per_hour
    usd = None if price is None or train_s is None else price * train_s / 3600
    return {
        "tokens_per_s": {"planned": plan.cost.tokens_per_s, "measured": tokens_per_s},
        "train_s": {"planned": plan.cost.time_s, "measured": train_s},
        "usd": {"planned": plan.cost.usd, "measured": usd},
    }


def monitored(monitor: Monitor, *, since_step: int) -> dict[str, Any] | None:
    """What was seen of the device while this process trained; None if it was not looked at. Values nobody tells are left out."""
    seen = monitor.whole()
    if not seen.samples:
        return None
    return {"every_s": monitor.interval_s, "samples": seen.samples, "since_step": since_step, "mean": seen.mean, "peak": seen.peak}


def write_report(folder: Path, report: dict[str, Any], plan: Plan, samples: Sequence[Sample]) -> None:
    """All three files. `report` is what report.json holds besides the samples."""
    # The curve is worth less than the report: where it cannot be drawn, that is all that is missing.
    try:
        plot_loss(read_metrics(folder / "metrics.jsonl"), folder / PLOT)
    except (ImportError, MemoryError, RuntimeError, OSError) as error:
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
        report = {**report, "notes": [*report["notes"], f"{PLOT} could not be drawn: {words}"]}
    values = {**report, "samples": [asdict(sample) for sample in samples]}
    with atomic_file(folder / REPORT_PAGE) as unfinished:
        unfinished.write_text(_page(report, plan, samples), "utf-8")
    with atomic_file(folder / REPORT) as unfinished:  # last: a run that has this file has ended
        unfinished.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", "utf-8")


def plot_loss(metrics: Sequence[dict[str, Any]], out: Path) -> None:
    """Loss of each step, its running mean, and the held-out loss."""
    from matplotlib.figure import Figure

    steps = [line["step"] for line in metrics if "loss" in line]
    losses = [line["loss"] for line in metrics if "loss" in line]
    held = [(line["step"], line["eval_loss"]) for line in metrics if "eval_loss" in line]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9bb7d4", linewidth=0.8, label="loss of each step")
    if len(losses) >= 20:
        axes.plot(steps, _smoothed(losses), color="#1f5a94", linewidth=1.8, label="running mean")
    if held:
        axes.plot(*zip(*held, strict=True), color="#c44e2b", marker="o", markersize=4, label="held-out rows")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic_file(out) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a twentieth of the run, corrected for its start."""
    keep = 1 - 1 / max(2.0, len(values) / 20)
    mean, weight, smooth = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(mean / weight)
    return smooth


def _page(report: dict[str, Any], plan: Plan, samples: Sequence[Sample]) -> str:
    held, train, data = report["eval"], report["train"], report["data"]
    lines = [f"# {report['run']}", ""]
    lines += [
        f"{report['method'].upper()} of `{report['model']}` ({report['adapter']}) on {plan.device} ({plan.device.label}), {plan.dtype}.",
        "",
    ]
    lines += ["| result | before | after |", "|---|---|---|"]
    lines += [f"| held-out loss | {_number(held['loss_before'])} | {_number(held['loss_after'])} |"]
    if held["rows"]:
        lines += [
            f"| exact match on {held['rows']} held-out rows | {_share(held['exact_match_before'])} | {_share(held['exact_match_after'])} |"
        ]
    lines += ["", "![loss](loss.png)", "", "| what | planned | measured |", "|---|---|---|"]
    beside = report["plan"]
    lines += [f"| memory | {format_bytes(beside['memory_bytes']['planned'])} | {format_bytes(beside['memory_bytes']['measured'])} |"]
    lines += [f"| tokens/s | {_count(beside['tokens_per_s']['planned'])} | {_count(beside['tokens_per_s']['measured'])} |"]
    lines += [f"| time | {format_seconds(beside['train_s']['planned'])} | {format_seconds(beside['train_s']['measured'])} |"]
    lines += [f"| price | {format_dollars(beside['usd']['planned'])} | {format_dollars(beside['usd']['measured'])} |"]
    lines += _device_rows(report.get("monitor"))
    lines += ["", "## What ran", ""]
    lines += [
        f"- {train['steps']} steps of {train['batch_size']} examples, {train['tokens']:,} tokens; the weights are those of step {train['kept_step']}"
    ]
    lines += [f"- {train['trainable_parameters']:,} of {train['parameters']:,} parameters trained"]
    lines += [
        f"- data: {data['train_rows']} rows learned, {data['eval_rows']} held out, {data['bad_rows']} unusable; format {data['format']}"
    ]
    lines += [f"- {note}" for note in report["notes"]]
    lines += ["", "## The plan", "", "| choice | value | why |", "|---|---|---|"]
    lines += [f"| {choice} | {value} | {_cell(reason)} |" for choice, value, reason in plan.lines()]
    if samples:
        lines += ["", "## Samples", ""]
    for sample in samples[:SHOWN_SAMPLES]:
        parts = [("prompt", sample.prompt), ("expected", sample.expected), ("before", sample.before), ("after", sample.after)]
        lines += [f"- {name}: {_code(text)}" for name, text in parts if text is not None] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _device_rows(seen: dict[str, Any] | None) -> list[str]:
    """A row for each value that was known of the device."""
    if seen is None or not seen["peak"]:
        return []
    rows = [
        f"| {title} | {show(seen['mean'][name])} | {show(seen['peak'][name])} |"
        for name, (title, show) in _DEVICE_ROWS.items()
        if name in seen["peak"]
    ]
    return ["", f"| device, looked at {seen['samples']} times after step {seen['since_step']} | mean | peak |", "|---|---|---|", *rows]


_DEVICE_ROWS: dict[str, tuple[str, Callable[[float], str]]] = {
    "utilization": ("utilization", lambda value: f"{value:.0%}"),
    "temperature_c": ("temperature", lambda value: f"{value:.0f} °C"),
    "power_w": ("power", lambda value: f"{value:.0f} W"),
    "memory_used_bytes": ("memory used", lambda value: format_bytes(round(value))),
    "memory_reserved_bytes": ("memory reserved", lambda value: format_bytes(round(value))),
}


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _code(text: str) -> str:
    """Text of any kind on one line of Markdown."""
    shown = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"')
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in shown).split()), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {shown} {fence}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _count(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}"

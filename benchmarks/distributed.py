"""Several devices: whether they learn the same as one, what a step sends, and how fast many GPUs would be.

    python benchmarks/distributed.py [--quick]
    python benchmarks/distributed.py --paper [--quick]

Without --paper: 20 steps on a small model in 2 and 4 processes of this CPU (gloo), with copies (dp), FSDP2 (fsdp), context parallel
(cp), tensor parallel (tp), and FSDP2 with each of these, with LoRA, with every weight, and with LoRA on a base in four bits; packed,
in several micro-batches, some examples without a label. Each run is compared with one process: the losses must be within 1e-6 of it
(relative), what was trained within 1e-5. Every byte that a process hands to a collective is counted, and must be as many as the
formula of docs/distributed.md says.

--paper: for Qwen2.5-0.5B, Llama-3.1-8B and Llama-3.1-70B on 1 to 1024 H100 (eight in a machine), with LoRA and with every
weight, what the planner would choose, how long a step would take, and which share of the devices' speed is left; with every
weight also where each machine has a copy of its own, and with rows of 131,072 tokens that the devices of a machine share; both
have to be asked for. Every figure of it is predicted, from formulas (docs/distributed.md) and figures of vendors: no GPU takes part.

--quick: fewer runs, or fewer devices. The last line is JSON. The exit status is 1 if a run is not as it must be, or a line on
paper contradicts itself: more devices that are slower in all than fewer, or a share of speed over 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

STEPS = 20
LOSS_TOLERANCE, WEIGHTS_TOLERANCE = 1e-6, 1e-5
RATES = {"lora": 1e-3, "nf4": 1e-3, "full": 1e-4}
"""Learning rates as people take them for each: Adam divides each gradient by its size, so rounding moves a weight in proportion to them."""
MESHES: tuple[dict[str, int], ...] = (
    *({axis: 2} for axis in ("dp", "fsdp", "cp", "tp")),
    *({axis: 4} for axis in ("dp", "fsdp", "cp", "tp")),
    {"fsdp": 2, "cp": 2},
    {"fsdp": 2, "tp": 2},
)
RUNS = (
    *((adapter, mesh, level) for adapter, level in (("lora", "cheap"), ("full", "all")) for mesh in MESHES),
    *(("nf4", mesh, "cheap") for mesh in MESHES[:3]),
)
QUICK_RUNS = (
    *(("lora", {axis: 2}, "cheap") for axis in ("dp", "cp", "tp")),
    ("full", {"fsdp": 2}, "all"),
    ("nf4", {"fsdp": 2}, "cheap"),
)
PATIENCE_S = 600

DEVICES = (1, 2, 8, 16, 64, 256, 1024)
QUICK_DEVICES = (1, 8, 1024)
TOKENS_EACH = (16_384, 2048)
"""Tokens of a step for each device: as many as keep one busy, and as few as come of a step that does not grow with the devices."""
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {
        "family": "qwen2",
        "layers": 24,
        "hidden": 896,
        "intermediate": 4864,
        "heads": 14,
        "kv_heads": 2,
        "vocab": 151_936,
        "max_tokens": 32_768,
    },
    "Llama-3.1-8B": {
        "family": "llama",
        "layers": 32,
        "hidden": 4096,
        "intermediate": 14_336,
        "heads": 32,
        "kv_heads": 8,
        "vocab": 128_256,
        "max_tokens": 131_072,
    },
    "Llama-3.1-70B": {
        "family": "llama",
        "layers": 80,
        "hidden": 8192,
        "intermediate": 28_672,
        "heads": 64,
        "kv_heads": 8,
        "vocab": 128_256,
        "max_tokens": 131_072,
    },
}
"""As their config.json has them."""
TIED = ("Qwen2.5-0.5B",)
LONG_ROW = 131_072
PREDICTED = "predicted, not measured"


def main() -> int:
    """Print what was asked for, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="predict, for up to 1024 GPUs; nothing is run")
    parser.add_argument("--quick", action="store_true", help="fewer runs, or fewer numbers of devices")
    parser.add_argument("--process", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.process:
        from one_process import run

        run(asked.process)
        return 0
    return paper(quick=asked.quick) if asked.paper else measured(quick=asked.quick)


def measured(*, quick: bool) -> int:
    """The table of what several processes learn and send, beside one."""
    lines: list[dict[str, Any]] = []
    names = (
        "trained",
        "mesh",
        "processes",
        "losses apart",
        "weights apart",
        "bytes of the first process",
        "by the formula",
        "collectives",
        "",
    )
    print(f"| {' | '.join(names)} |\n" + "|---" * len(names) + "|")
    with tempfile.TemporaryDirectory(prefix="pantheraml-several-") as folder:
        single: dict[str, Path] = {}
        for adapter, mesh, level in QUICK_RUNS if quick else RUNS:
            if adapter not in single:
                single[adapter] = ran(Path(folder), adapter, {}, level)
            line = compared(single[adapter], ran(Path(folder), adapter, mesh, level)) | {"adapter": adapter, "mesh": mesh}
            lines.append(line)
            axes = " x ".join(f"{axis} {size}" for axis, size in mesh.items())
            times = ", ".join(f"{count} {kind}" for kind, count in sorted(line["times"].items()))
            cells = [adapter, axes, str(math.prod(mesh.values())), f"{line['loss']:.1e}", f"{line['weights']:.1e}", f"{line['bytes']:,}"]
            cells += [f"{line['formula_bytes']:,}", times, "ok" if line["ok"] else "WRONG"]
            print(f"| {' | '.join(cells)} |", flush=True)
    ok = all(line["ok"] for line in lines)
    print(json.dumps({"benchmark": "distributed", "paper": False, "ok": ok, "quick": quick, "steps": STEPS, "lines": lines}))
    return 0 if ok else 1


def ran(folder: Path, adapter: str, mesh: dict[str, int], level: str) -> Path:
    """A folder with what came of a run in as many processes as the mesh has places."""
    place = folder / f"{adapter}-{'-'.join(f'{axis}{size}' for axis, size in mesh.items()) or 'one'}"
    place.mkdir()
    base = folder / "base"
    if adapter == "nf4" and not base.exists():
        write_base(base)
    spec = {"family": "llama", "adapter": adapter, "mesh": mesh, "level": level, "steps": STEPS, "lr": RATES[adapter]}
    (place / "spec.json").write_text(json.dumps(spec | ({"base": str(base)} if adapter == "nf4" else {})))
    size = math.prod(mesh.values())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size)}
    command = [sys.executable, __file__, "--process", str(place / "spec.json")]
    logs = [place / f"{rank}.log" for rank in range(size)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as out:
                environment = {**os.environ, **meet, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
        codes = [process.wait(timeout=PATIENCE_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        raise SystemExit(
            f"{place.name}: process {codes.index(max(codes, key=abs))} ended with {max(codes, key=abs)}\n{logs[0].read_text()[-4000:]}"
        )
    return place


def write_base(base: Path) -> None:
    """The model of every run, as a folder, which can be read in four bits."""
    from transformers.utils import logging

    from one_process import Spec, small

    logging.disable_progress_bar()
    small(Spec(family="llama", adapter="lora", mesh={}, level="cheap", steps=0, lr=0.0)).save_pretrained(base)


def compared(one: Path, other: Path) -> dict[str, Any]:
    """How far a run is from the one in a single process."""
    from safetensors.torch import load_file

    results = [json.loads((place / "result.json").read_text()) for place in (one, other)]
    losses = max(abs(a - b) / abs(a) for a, b in zip(*(each["losses"] for each in results), strict=True))
    here, there = (load_file(place / "weights.safetensors") for place in (one, other))
    weights = max(float((here[name] - there[name]).abs().max()) for name in here) if here.keys() == there.keys() else math.inf
    sent, formula = sum(results[1]["bytes"].values()), results[1]["formula_bytes"]
    ok = losses <= LOSS_TOLERANCE and weights <= WEIGHTS_TOLERANCE and sent == formula > 0
    return {"loss": losses, "weights": weights, "bytes": sent, "formula_bytes": formula, "times": results[1]["times"], "ok": ok}


def paper(*, quick: bool) -> int:
    """The table of docs/distributed.md."""
    from pantheraml.hardware.catalog import lookup
    from pantheraml.planning.scaling import UTILISATION, scaling_table
    from pantheraml.planning.traffic import Links

    gpu, links = lookup("cuda", "NVIDIA H100 80GB HBM3"), Links()
    assert gpu is not None
    lines: list[dict[str, Any]] = []
    print(
        f"{gpu.name}, {links.devices_each} in a machine: {links.inside_bytes_per_s / 1e9:.0f} GB/s between them, "
        f"{links.between_bytes_per_s / 1e9:.0f} GB/s each to other machines, {links.reached:.0%} of both reached; "
        f"one device computes at {UTILISATION:.0%} of {gpu.flops['bfloat16'] / 1e12:.0f} TFLOP/s (assumed)"
    )
    print("\n".join(header()))
    for tokens_each in TOKENS_EACH:
        shapes = [shape_of(name) for name in MODELS]
        devices = QUICK_DEVICES if quick else DEVICES
        chosen = scaling_table(shapes, gpu, devices=devices, tokens_each=tokens_each)
        asked = scaling_table(shapes[1:], gpu, devices=devices, tokens_each=tokens_each, adapters=("full",), in_machine="fsdp")
        found = [*map(as_line, chosen), *(as_line(each) | {"asked": "a copy in each machine"} for each in asked)]
        if tokens_each * links.devices_each >= LONG_ROW:  # a machine has a whole row at least
            rows = scaling_table(
                shapes[1:2], gpu, devices=devices, tokens_each=tokens_each, adapters=("lora",), row_tokens=LONG_ROW, in_machine="cp"
            )
            found += [as_line(each) | {"asked": f"rows of {LONG_ROW:,}, cp in each machine"} for each in rows]
        for line in found:
            lines.append(line)
            print(row(line))
    print("\nStep time and share of the devices' speed that is left, by number of devices:\n")
    print("\n".join(summary(lines)))
    problems = contradictions(lines)
    for problem in problems:
        print(f"WRONG: {problem}")
    print(json.dumps({"benchmark": "distributed", "paper": True, "ok": not problems, "quick": quick, "figures": PREDICTED, "lines": lines}))
    return 1 if problems else 0


def shape_of(name: str) -> Any:
    """The shape of a published model."""
    from pantheraml.planning.shape import ModelShape

    sizes = MODELS[name]
    hidden, inner, layers = sizes["hidden"], sizes["intermediate"], sizes["layers"]
    width = hidden // sizes["heads"]
    q, k = hidden, sizes["kv_heads"] * width
    layer = ((hidden, q), (hidden, k), (hidden, k), (q, hidden), (hidden, inner), (hidden, inner), (inner, hidden))
    embedding = sizes["vocab"] * hidden * (1 if name in TIED else 2)
    biases = q + 2 * k if sizes["family"] == "qwen2" else 0
    return ModelShape(
        name=name,
        parameters=embedding + layers * (sum(a * b for a, b in layer) + 2 * hidden + biases) + hidden,
        embedding_parameters=embedding,
        linears=layer * layers,
        head_dim=width,
        packs=True,
        weight_bytes_each=2,
        fused=True,
        **sizes,
    )


def as_line(each: Any) -> dict[str, Any]:
    """A prediction as JSON holds it."""
    line = {"model": each.model, "adapter": each.adapter, "devices": each.devices, "tokens_each": each.tokens_each}
    if each.refused:
        return {**line, "refused": each.refused}
    return {
        **line,
        "mesh": dict(each.mesh),
        "micro_tokens": each.micro_tokens,
        "sent_bytes": round(each.traffic.wire_bytes),
        "step_s": each.time.step_s,
        "waiting_s": each.time.step_s - each.time.compute_s,
        "tokens_per_s": each.tokens_per_s,
        "efficiency": each.time.efficiency,
    }


def header() -> list[str]:
    """The two lines above the rows, as Markdown has them."""
    names = (
        "model",
        "trained",
        "tokens a device and step",
        "devices",
        "mesh",
        "sent by each",
        "step",
        "of it waiting",
        "tokens/s",
        "efficiency",
        "",
    )
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def row(line: dict[str, Any]) -> str:
    """One line of the table."""
    begun = [line["model"], line["adapter"], f"{line['tokens_each']:,}", str(line["devices"])]
    if "refused" in line:
        return f"| {' | '.join([*begun, 'does not fit', *[''] * 5, PREDICTED])} |"
    mesh = " x ".join(f"{axis} {size}" for axis, size in line["mesh"].items()) + (" (asked)" if "asked" in line else "") or "-"
    cells = [mesh, f"{line['sent_bytes'] / 1e9:.3g} GB", f"{line['step_s']:.3g} s", f"{line['waiting_s']:.2g} s"]
    speed = [f"{line['tokens_per_s']:,.0f}", f"{line['efficiency']:.0%}"]
    return f"| {' | '.join([*begun, *cells, *speed, PREDICTED])} |"


def summary(lines: list[dict[str, Any]]) -> list[str]:
    """The same with a column for each number of devices, as docs/distributed.md has it."""
    counts = sorted({line["devices"] for line in lines})
    series: dict[tuple[str, ...], dict[int, str]] = {}
    for line in lines:
        name = (line["model"], ", ".join((line["adapter"], *([line["asked"]] if "asked" in line else []))), f"{line['tokens_each']:,}")
        axes = " x ".join(line["mesh"]) if "mesh" in line and "asked" not in line else ""
        cell = f"{line['step_s']:.3g} s, {line['efficiency']:.0%}{' ' * bool(axes)}{axes}" if "mesh" in line else "does not fit"
        series.setdefault(name, {})[line["devices"]] = cell
    titles = ("model", "trained", "tokens a device and step", *map(str, counts), "")
    rows = [f"| {' | '.join((*name, *(cells.get(count, '') for count in counts), PREDICTED))} |" for name, cells in series.items()]
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *rows]


def contradictions(lines: list[dict[str, Any]]) -> list[str]:
    """What cannot be."""
    found = [f"{line} is faster than its devices" for line in lines if line.get("efficiency", 0) > 1 + 1e-9]
    series: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        if "refused" not in line:
            series.setdefault((line["model"], line["adapter"], line["tokens_each"], line.get("asked")), []).append(line)
    for each in series.values():
        for few, many in pairwise(each):
            if many["tokens_per_s"] <= few["tokens_per_s"]:
                found.append(f"{many['model']} is no faster on {many['devices']} devices than on {few['devices']}")
    return found


if __name__ == "__main__":
    sys.exit(main())

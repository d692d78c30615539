"""Several devices: what a step sends, and how fast many GPUs would be.

    python benchmarks/distributed.py --paper [--quick]

--paper: for Qwen2.5-0.5B, Llama-3.1-8B and Llama-3.1-70B on 1 to 1024 H100 (eight in a machine), with LoRA and with every
weight, what the planner would choose, how long a step would take, and which share of the devices' speed is left; with every
weight also where each machine has a copy of its own, which has to be asked for. Every figure of it is predicted, from formulas
(docs/distributed.md) and figures of vendors: no GPU takes part. --quick: fewer devices.

The last line is JSON. The exit status is 1 if a line contradicts itself: more devices that are slower in all than fewer, or a
share of speed over 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from typing import Any

DEVICES = (1, 2, 8, 16, 64, 256, 1024)
QUICK_DEVICES = (1, 8, 1024)
TOKENS_EACH = (16_384, 2048)
"""Tokens of a step for each device: as many as keep one busy, and as few as come of a step that does not grow with the devices."""
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {"family": "qwen2", "layers": 24, "hidden": 896, "intermediate": 4864, "heads": 14, "kv_heads": 2, "vocab": 151_936},
    "Llama-3.1-8B": {"family": "llama", "layers": 32, "hidden": 4096, "intermediate": 14_336, "heads": 32, "kv_heads": 8, "vocab": 128_256},
    "Llama-3.1-70B": {
        "family": "llama",
        "layers": 80,
        "hidden": 8192,
        "intermediate": 28_672,
        "heads": 64,
        "kv_heads": 8,
        "vocab": 128_256,
    },
}
"""As their config.json has them."""
TIED = ("Qwen2.5-0.5B",)
PREDICTED = "predicted, not measured"


def main() -> int:
    """Print what was asked for, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="predict, for up to 1024 GPUs; nothing is run")
    parser.add_argument("--quick", action="store_true", help="fewer numbers of devices")
    asked = parser.parse_args()
    if not asked.paper:
        parser.error("say --paper: nothing is measured by this script yet")
    return paper(quick=asked.quick)


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
        asked = scaling_table(shapes[1:], gpu, devices=devices, tokens_each=tokens_each, adapters=("full",), in_machine=True)
        for line in (*map(as_line, chosen), *(as_line(each) | {"asked": True} for each in asked)):
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
        max_tokens=32_768,
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
        name = (line["model"], line["adapter"] + (", a copy in each machine" if "asked" in line else ""), f"{line['tokens_each']:,}")
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
            series.setdefault((line["model"], line["adapter"], line["tokens_each"], "asked" in line), []).append(line)
    for each in series.values():
        for few, many in pairwise(each):
            if many["tokens_per_s"] <= few["tokens_per_s"]:
                found.append(f"{many['model']} is no faster on {many['devices']} devices than on {few['devices']}")
    return found


if __name__ == "__main__":
    sys.exit(main())

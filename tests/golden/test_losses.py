"""Loss curves that a change must not move, unless it says so.

Where one is meant to move: python -m pytest tests/golden --update-golden, and give the reason in the commit.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tiny import chats, losses, quiet, tiny_recipe

from pantheraml.trainer.run import train

KEPT = Path(__file__).with_name("losses.json")
# Other processors add in another order: 1e-7 relative in each sum, which AdamW's first steps, that depend on little but the
# signs of the gradients, may enlarge. With ATen's kernels for any processor and oneDNN's for SSE4.1 the curves moved by less
# than 1e-6. A learning rate that is 2% off moves them by 1e-2, ten times the tolerance (the last test).
TOLERANCE = 1e-3

CURVES = {
    "llama-lora": {"model": "tiny:llama", "adapter": {"kind": "lora", "rank": 8, "dropout": 0.1}, "optim": {"lr": 5e-3}},
    "mistral-lora": {"model": "tiny:mistral", "adapter": {"kind": "lora", "rank": 8}, "optim": {"lr": 5e-3}},
    "qwen3-full": {"model": "tiny:qwen3", "adapter": "full", "optim": {"lr": 1e-3, "weight_decay": 0.1}},
}


def curve(folder: Path, name: str, **optim: float) -> dict[str, list[float]]:
    sections = {**CURVES[name], "eval": {"every": 10, "generate_rows": 0}, "run": {"save_every": "end", "seed": 7}}
    sections["optim"] = {**sections["optim"], "steps": 20, "warmup": 0.2, **optim}
    run = train(tiny_recipe(folder, batch={"size": 6}, **sections), rows=chats(64), console=quiet()[0])
    return {"loss": losses(run.folder), "eval_loss": losses(run.folder, "eval_loss")}


@pytest.mark.parametrize("name", CURVES)
def test_the_losses_are_those_that_were_kept(name: str, tmp_path: Path, request: pytest.FixtureRequest):
    measured = curve(tmp_path, name)
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    if request.config.getoption("--update-golden", default=False):
        kept[name] = {key: [round(value, 6) for value in values] for key, values in measured.items()}
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    assert len(measured["loss"]) == 20 and len(measured["eval_loss"]) == 3
    for key, values in measured.items():
        assert values == pytest.approx(kept[name][key], rel=TOLERANCE), f"{name} {key} moved; if it should, see the top of this file"


def test_the_tolerance_would_see_a_learning_rate_that_is_two_percent_off(tmp_path: Path):
    kept = json.loads(KEPT.read_text())["llama-lora"]
    moved = curve(tmp_path, "llama-lora", lr=5e-3 * 1.02)
    assert moved["loss"] != pytest.approx(kept["loss"], rel=TOLERANCE)

"""Rows and recipes for runs that take a second or two."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from pantheraml.recipe.load import recipe_from
from pantheraml.recipe.types import Recipe


def chats(count: int) -> list[dict[str, Any]]:
    """Short questions with short answers of different lengths, no two alike."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"what is {i} times {i}?"},
                {"role": "assistant", "content": f"it is {i * i}" + "." * (i % 7)},
            ]
        }
        for i in range(count)
    ]


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows as a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def tiny_recipe(folder: Path, train: Any = "<memory>", *, model: str = "tiny:llama", **sections: Any) -> Recipe:
    """A small LoRA run in float32 with two evaluations. `sections` are put over the defaults, key by key."""
    said: dict[str, Any] = {
        "model": {"name": model, "dtype": "float32"},
        "data": {"train": train, "eval_fraction": 0.1},
        "adapter": {"kind": "lora", "rank": 4},
        "batch": {"size": 4},
        "optim": {"steps": 6, "lr": 2e-3},
        "eval": {"every": 3, "generate_rows": 2, "max_new_tokens": 4},
        "run": {"folder": str(folder), "name": "run", "log_every": 2, "save_every": 2},
        "hardware": {"kind": "cpu", "threads": 1},
    }
    for section, keys in sections.items():
        said[section] = {**said.get(section, {}), **keys} if section != "adapter" else keys
    return recipe_from(said)


def quiet() -> tuple[Console, Callable[[], str]]:
    """A console, and what was printed on it."""
    out = StringIO()
    return Console(file=out, width=240), out.getvalue


def losses(folder: Path, key: str = "loss") -> list[float]:
    """From metrics.jsonl, in the order in which they are written there."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]

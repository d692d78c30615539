"""The walls hold: what must not be built is planted into a copy of the house, and the linters refuse it.

Without this, a contract that checks nothing would look like one that is kept.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = Path(sys.executable).parent


@pytest.fixture
def copy(tmp_path) -> Path:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    # Without it, Python would merge the copy and an editable install into one namespace package.
    assert (tmp_path / "src" / "pantheraml" / "__init__.py").exists()
    return tmp_path


def tool(copy: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a linter in the copy; PYTHONPATH stands before an editable install, so the copy is what it reads."""
    environment = {**os.environ, "PYTHONPATH": str(copy / "src")}
    program, *words = command
    return subprocess.run([TOOLS / program, *words], cwd=copy, env=environment, capture_output=True, text=True, timeout=120, check=False)


def plant(copy: Path, name: str, text: str) -> None:
    path = copy / "src" / "pantheraml" / name
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(text)


def test_the_house_as_it_stands_is_accepted(copy):
    done = tool(copy, "lint-imports", "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr
    done = tool(copy, "ruff", "check", "--no-cache", "src")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        pytest.param("utils/__init__.py", '"""Planted."""\n', "pantheraml.utils", id="a room that is not on the plan"),
        pytest.param(
            "recipe/keys.py", "\nimport pantheraml.trainer\n", "pantheraml.recipe.keys -> pantheraml.trainer", id="recipe imports trainer"
        ),
        pytest.param(
            "planning/plan.py",
            "\n\ndef late():\n    from pantheraml.engines import anything\n",
            "pantheraml.planning.plan -> pantheraml.engines",
            id="planning imports engines inside a function",
        ),
        pytest.param(
            "planning/plan.py", "\n\ndef late():\n    import torch\n", "pantheraml.planning.plan -> torch", id="planning imports torch"
        ),
        pytest.param(
            "models/load.py", "\n\ndef late():\n    import jax\n", "pantheraml.models.load -> jax", id="a second file imports jax"
        ),
        pytest.param(
            "recipe/text.py",
            "\nimport pantheraml.recipe.load\n",
            "pantheraml.recipe",
            id="a cycle inside a room",
        ),
    ],
)
def test_import_linter_refuses(copy, name, text, said):
    plant(copy, name, text)
    done = tool(copy, "lint-imports", "--no-cache")
    assert done.returncode == 1, done.stdout + done.stderr
    assert said in done.stdout


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("import torch\n\ntorch.cuda.is_available()\n", "TID251"),
        ("import torch\n\ntorch.mps.synchronize()\n", "TID251"),
        ("from torch import xpu\n\nxpu.is_available()\n", "TID251"),
        ("import os\n\nos.environ['A'] = 'b'\n", "TID251"),
        ("import torch\n\ntorch.load('a.bin')\n", "TID251"),
        ("import pickle\n\npickle.loads(b'')\n", "TID251"),
        ("exec('1')\n", "S102"),
        ("try:\n    print()\nexcept Exception:\n    pass\n", "BLE001"),
    ],
)
def test_ruff_refuses(copy, line, rule):
    plant(copy, "planning/planted.py", f'"""Planted."""\n\n{line}')
    done = tool(copy, "ruff", "check", "--no-cache", "--output-format", "concise", "src/pantheraml/planning/planted.py")
    assert done.returncode == 1, done.stdout + done.stderr
    assert rule in done.stdout


def test_ruff_lets_a_device_spell_its_own_name(copy):
    for kind in ("cuda", "xpu", "mps"):
        path = copy / "src" / "pantheraml" / "hardware" / f"{kind}.py"
        path.write_text(f'"""Planted."""\n\nimport torch\n\nAVAILABLE = torch.{kind}.is_available()\n')
        done = tool(copy, "ruff", "check", "--no-cache", "--output-format", "concise", str(path))
        assert done.returncode == 0, done.stdout

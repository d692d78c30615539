"""A new device is one file and one row: made up here, in a copy of the package, and then asked to train."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pantheraml

FILE = '''"""The abacus: beads that compute on the CPU."""

from dataclasses import replace

from pantheraml.hardware.cpu import CpuBackend


class AbacusBackend(CpuBackend):
    """One abacus."""

    kind = "abacus"

    def probe(self):
        return tuple(replace(device, kind="abacus", name="Suanpan", simulated=True) for device in super().probe())
'''
ROW = '    "abacus": Row("pantheraml.hardware.abacus:AbacusBackend", "gpu"),\n'

SNIPPET = """
from pantheraml import get_device_manager
from pantheraml.hardware.device import DeviceType
manager = get_device_manager(prefer="abacus")
assert manager.get_device().device_type is DeviceType.ABACUS
assert str(get_device_manager().get_device()) == str(get_device_manager(prefer="gpu").get_device()) == "abacus:0"
print(manager.get_batch_config(2).batch_size)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with one more file and one more row."""
    root = tmp_path_factory.mktemp("grown")
    shutil.copytree(Path(pantheraml.__file__).parent, root / "pantheraml", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "pantheraml/hardware/abacus.py").write_text(FILE)
    table = root / "pantheraml/recipe/kinds.py"
    before = table.read_text()
    table.write_text(before.replace('    "cuda": Row', ROW + '    "cuda": Row'))
    assert len(table.read_text().splitlines()) == len(before.splitlines()) + 1
    return root


def run(package: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(package), "PANTHERAML_CACHE": str(cwd / "cache")}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_the_report_lists_it_and_auto_prefers_it_by_its_row(package: Path, tmp_path: Path) -> None:
    done = run(package, tmp_path, "-m", "pantheraml", "devices", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["device"] == "abacus:0"
    assert {"abacus:0", "cpu:0"} <= {each["id"] for each in report["devices"]}


def test_the_manager_and_the_recipe_know_it(package: Path, tmp_path: Path) -> None:
    done = run(package, tmp_path, "-c", SNIPPET)
    assert (done.stdout, done.returncode) == ("8\n", 0), done.stderr
    refused = run(package, tmp_path, "-m", "pantheraml", "plan", "tiny:llama", "x.jsonl", "hardware.kind=abaccus")
    assert refused.returncode == 2 and "did you mean abacus?" in refused.stderr


def test_a_run_trains_on_it_and_says_that_it_is_simulated(package: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("hardware.kind=abacus", "optim.steps=2", "eval.generate_rows=0", "run.name=one")
    done = run(package, tmp_path, "-m", "pantheraml", "train", "tiny:llama", "rows.jsonl", *words)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "runs/one/report.json").read_text())
    assert report["device"]["kind"] == "abacus" and report["device"]["simulated"]
    assert "on abacus:0 (Suanpan (simulated))" in (tmp_path / "runs/one/report.md").read_text()

"""`pantheraml memory search` shows what can be read, whatever became of the rest."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from pantheraml.cli_memory import memory_app
from pantheraml.memory import Memory
from pantheraml.memory.policy import Budgets


def test_a_damaged_record_costs_no_other_hit(tmp_path: Path):
    with Memory.open(tmp_path, budgets=Budgets(warm_bytes=0)) as memory:
        memory.put("cold", "the boat leaves oslo")
        memory.compact()
        memory.put("warm", "the boat stays in bergen")
    (segment,) = (tmp_path / "cold").iterdir()
    data = bytearray(segment.read_bytes())
    data[60] ^= 1
    segment.write_bytes(data)
    found = CliRunner().invoke(memory_app, ["search", str(tmp_path), "boat in oslo"], catch_exceptions=False)
    assert found.exit_code == 0 and "the boat stays in bergen" in found.output and "'cold'" in found.output

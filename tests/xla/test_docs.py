"""The page on TPUs, on simulated ones."""

from __future__ import annotations

from tests.docs.test_blocks import ROOT, check_page
from tests.docs.test_blocks import folder as folder


def test_every_block_of_the_page_works(folder, monkeypatch, capsys):
    check_page(ROOT / "docs" / "tpu.md", monkeypatch, capsys)

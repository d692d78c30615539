"""Compiled layers give the losses of those that are not, and there are few graphs however the lengths are mixed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fakes import FakeBackend

from pantheraml.data.chat import Example
from pantheraml.data.pack import StepBatch, pack_step
from pantheraml.engines.torch_engine import TorchEngine
from pantheraml.models.adapters import attach
from pantheraml.models.compiled import compiled_layers, keep_graphs
from pantheraml.models.decoder import Decoder
from pantheraml.recipe.types import LoRA, OptimSpec
from pantheraml.trainer.sft import sft_loss, stock_loss

TINY = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture
def graphs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Counts the graphs that are compiled from here on; what is compiled goes to the test's folder."""
    from torch._dynamo.utils import counters

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "graphs"))
    torch._dynamo.reset()
    counters.clear()
    if not request.node.get_closest_marker("slow"):  # graphs are traced all the same, and no C++ is built
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield lambda: counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    torch._dynamo.reset()


def steps(examples: list[Example]) -> list[StepBatch]:
    """Mixed lengths: rows of other widths, other numbers of examples and labels, one with two micro-batches."""
    chosen = [examples, examples[:3], examples[1:3], examples[4:], [*examples, *examples]]
    return [pack_step(each, row_tokens=(32, 64), micro_tokens=128, packing=True, pad_id=0, trim=True) for each in chosen]


def losses(model: Any, loss: Any, plan: Any, batches: list[StepBatch]) -> list[float]:
    engine = TorchEngine(FakeBackend("cpu"))
    engine.prepare(model, loss, OptimSpec(), plan, seed=1)
    return [value.loss for value in engine.read([engine.step(batch, k, 1e-2) for k, batch in enumerate(batches)])]


@pytest.mark.parametrize("level", [pytest.param("cheap", marks=pytest.mark.slow), "keep", "all"])
def test_by_the_kernels_there_are_three_graphs(level: Any, small: Any, examples: list[Example], plan_of: Any, graphs: Any) -> None:
    found: list[list[float]] = []
    for compile in (False, True):
        model: Any = attach(small("llama", num_hidden_layers=4, **TINY), LoRA(rank=4), seed=0)
        decoder = Decoder(model, (level,) * 4, compile=compile)
        found.append(losses(model, sft_loss(model, decoder), replace(plan_of(model), dtype="float32"), steps(examples)))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    # The first layer, whose input needs no gradient; all between; the last one, which goes on with labelled tokens.
    assert graphs() == 3


@pytest.mark.parametrize("level", ["keep", "all"])
def test_a_models_own_layers_are_few_graphs(level: Any, small: Any, examples: list[Example], plan_of: Any, graphs: Any) -> None:
    found: list[list[float]] = []
    for compile in (False, True):
        model: Any = attach(small("llama", num_hidden_layers=4, **TINY), LoRA(rank=4), seed=0)
        forward = type(model.get_base_model().model.layers[0]).forward
        with compiled_layers(model) if compile else nullcontext(0) as count:
            assert count == (4 if compile else 0)
            found.append(losses(model, stock_loss, replace(plan_of(model), dtype="float32", levels=(level,) * 4), steps(examples)))
        for layer in model.get_base_model().model.layers:
            assert "forward" not in vars(layer) and type(layer).forward is forward
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    # For several rows, for one, and for one without a mask; each for the first layer, whose input needs no gradient, and the
    # others. To be computed again, every input is made to need one.
    assert graphs() == 3 * (2 if level == "keep" else 1)


def test_graphs_are_kept_beside_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_graphs(tmp_path)
    assert cache_dir() == str(tmp_path / "graphs")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "asked"))
    keep_graphs(tmp_path)
    assert cache_dir() == str(tmp_path / "asked")

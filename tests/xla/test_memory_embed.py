"""A model embeds texts on XLA as it does on the CPU, in few shapes."""

from __future__ import annotations

import numpy as np
import pytest

from pantheraml.hardware.find import find
from pantheraml.memory.model_embed import ModelEmbedder
from pantheraml.recipe.types import HardwareAsk


@pytest.mark.slow
def test_vectors_are_those_of_the_cpu_and_shapes_are_few(devices):
    texts = [f"text number {i}" * (1 + i % 9) for i in range(60)] + ["", "a longer one " * 40]
    cpu = find(HardwareAsk(kind="cpu"), training=False).device
    tpu = find(HardwareAsk(kind="tpu", simulate_tpu=True), training=False).device
    expected = ModelEmbedder("tiny:llama", cpu, dtype="float32", max_tokens=128).embed(texts)
    embedder = ModelEmbedder("tiny:llama", tpu, dtype="float32", max_tokens=128)
    shapes = []
    run = embedder._run
    embedder._run = lambda ids, mask: shapes.append(tuple(ids.shape)) or run(ids, mask)
    # Both compute in float32, in another order.
    assert embedder.embed(texts) == pytest.approx(expected, abs=2e-5)
    assert len(set(shapes)) <= 4 and all(width in (64, 96, 128) for _, width in shapes)
    assert embedder.origin.kind == tpu.kind and "simulated" in embedder.origin.name
    assert np.linalg.norm(embedder.embed(["", "x"]), axis=1) == pytest.approx([0, 1], abs=1e-5)

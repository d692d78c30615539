"""Every family that is known against transformers itself: loss, gradients, training, merging, answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pantheraml.data.chat import Example
from pantheraml.data.pack import StepBatch, pack_step
from pantheraml.engines.torch_engine import TorchEngine, micro_tensors
from pantheraml.export.safetensors import merge_model, save_full
from pantheraml.hardware.cpu import CpuBackend
from pantheraml.models import head
from pantheraml.models.adapters import attach
from pantheraml.models.decoder import decodes
from pantheraml.models.generate import generate
from pantheraml.models.isolation import keeps_apart
from pantheraml.models.load import shape_of
from pantheraml.models.tiny import FAMILIES
from pantheraml.recipe.types import LoRA, OptimSpec
from pantheraml.trainer.sft import head_loss, hidden_states, sft_loss, stock_loss

# Not in head.FAMILIES: they keep their own forward. Names of transformers, and sizes in its words.
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "olmo2": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mixtral": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    },
}

Gradients = dict[str, torch.Tensor]


def other(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    ends = {"vocab_size": 263, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **ends, **OTHERS[family])).eval()


def layouts(examples: list[Example]) -> dict[str, StepBatch]:
    shape: dict[str, Any] = {"row_tokens": (16, 32), "micro_tokens": 64, "pad_id": 0}
    return {
        "packed": pack_step(examples, packing=True, trim=False, **shape),
        "padded": pack_step(examples, packing=False, trim=False, **shape),
        "trimmed": pack_step(examples, packing=False, trim=True, **shape),
    }


def gradients(model: Any) -> Gradients:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def by_definition(model: Any, examples: list[Example]) -> tuple[float, Gradients]:
    """transformers' logits of each example alone, without padding, and torch's cross entropy over what is learned."""
    total = 0.0
    for example in examples:
        tokens, learned = torch.tensor(example.tokens, dtype=torch.int64), torch.tensor(example.loss)
        logits = model(input_ids=tokens[None], attention_mask=torch.ones_like(tokens)[None], use_cache=False).logits[0]
        loss = F.cross_entropy(logits[:-1][learned[1:]], tokens[1:][learned[1:]], reduction="sum")
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def ours(model: Any, step: StepBatch, known: head.Head | None = None) -> tuple[float, Gradients]:
    loss_of = sft_loss(model)
    total = 0.0
    for micro in step.micro:
        part = micro_tensors(micro.input_ids, micro.position_ids, micro.labels, torch.device("cpu"))
        loss = loss_of(model, part) if known is None else head_loss(known, hidden_states(known, part), part)
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def worst(found: Gradients, wanted: Gradients) -> tuple[float, str]:
    """The largest relative error of a parameter's gradient, and whose it is.

    A gradient that is zero but for rounding (a bias of keys: softmax does not see it) counts against the others.
    """
    assert found.keys() == wanted.keys()
    assert all(gradient is not None for gradient in found.values())
    floor = 1e-4 * max(gradient.norm().item() for gradient in wanted.values())
    return max(((found[name] - wanted[name]).norm().item() / max(wanted[name].norm().item(), floor), name) for name in wanted)


def train(model: Any, step: StepBatch, plan: Any, *, steps: int, lr: float) -> list[float]:
    engine = TorchEngine(CpuBackend())
    engine.prepare(model, sft_loss(model), OptimSpec(), plan, seed=1)
    values = engine.read([engine.step(step, k, lr) for k in range(steps)])
    model.eval()
    assert all(value.ok for value in values)
    return [value.loss for value in values]


def test_the_tiny_families_are_those_whose_head_is_known() -> None:
    assert FAMILIES.keys() == head.FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_transformers_own(family: str, small: Any, examples: list[Example]) -> None:
    model = small(family)
    assert head.output_head(model) is not None
    wanted, exact = by_definition(model, examples)
    assert (decodes(model) is None) == (family != "falcon_h1")  # the kernels compute the layers of all others
    packs = shape_of(model, family).packs
    assert packs == (family != "falcon_h1")
    for layout, step in layouts(examples).items():
        if layout == "packed" and not packs:
            continue
        found, grads = ours(model, step)
        # float32 on both sides; sums in another order.
        assert found == pytest.approx(wanted, rel=1e-5), layout
        error, name = worst(grads, exact)
        assert error < 1e-4, (layout, name)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere", "falcon_h1"])
def test_what_a_family_does_to_its_logits_matters_here(family: str, small: Any, examples: list[Example]) -> None:
    """The test above would show nothing where scale and bound change nothing."""
    model = small(family)
    known = head.output_head(model)
    assert known is not None
    scaled, _ = ours(model, layouts(examples)["padded"])
    plain, _ = ours(model, layouts(examples)["padded"], replace(known, scale=1.0, softcap=None))
    assert abs(plain - scaled) > 1e-2 * scaled


@pytest.mark.parametrize("family", OTHERS)
def test_an_unknown_family_trains_through_its_own_forward(family: str, examples: list[Example], plan_of: Any) -> None:
    model = other(family)
    assert head.output_head(model) is None
    assert sft_loss(model) is stock_loss
    wanted, exact = by_definition(model, examples)
    steps = layouts(examples)
    for layout in ("padded", "packed") if keeps_apart(model) else ("padded",):
        found, grads = ours(model, steps[layout])
        assert found == pytest.approx(wanted, rel=1e-5), layout
        error, name = worst(grads, exact)
        assert error < 1e-4, (layout, name)
    losses = train(model, steps["padded"], plan_of(model, adapter="full"), steps=4, lr=3e-3)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("family", OTHERS)
def test_an_unknown_family_takes_an_adapter(family: str, examples: list[Example], plan_of: Any) -> None:
    model = attach(other(family), LoRA(rank=4), seed=0)
    losses = train(model, layouts(examples)["padded"], plan_of(model), steps=6, lr=1e-2)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_adapter_merged_is_the_trained_model(
    family: str, small: Any, examples: list[Example], plan_of: Any, tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.tensor(examples[4].tokens, dtype=torch.int64)[None]
    model = small(family)
    with torch.no_grad():
        before = model(ids).logits
    model = attach(model, LoRA(rank=4, alpha=8.0), seed=0)
    with torch.no_grad():
        assert model(ids).logits.equal(before)  # a new adapter changes nothing
    plan = plan_of(model)
    step = layouts(examples)["packed" if plan.packing else "padded"]
    losses = train(model, step, plan, steps=5, lr=1e-2)
    assert losses[-1] < 0.95 * losses[0]
    with torch.no_grad():
        trained = model(ids).logits
    assert (trained - before).norm() > 1e-2 * before.norm()

    merge_model(model, tokenizer, tmp_path / "merged")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        # W x + B A x against (W + B A) x in float32.
        assert (stock(ids).logits - trained).norm() < 1e-4 * trained.norm()


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon_h1"])
def test_a_fully_trained_model_reads_back_as_it_was(
    family: str, small: Any, examples: list[Example], plan_of: Any, tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = small(family)
    losses = train(model, layouts(examples)["padded"], plan_of(model, adapter="full"), steps=3, lr=3e-3)
    assert losses[-1] < losses[0]
    save_full(model, tokenizer, tmp_path / "full")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()
    ids = torch.tensor(examples[4].tokens, dtype=torch.int64)[None]
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_transformers_own_row_by_row(family: str, small: Any, examples: list[Example]) -> None:
    model = small(family)
    # Tokens as numbers: bytes that are no text would all look alike.
    spelled = SimpleNamespace(
        pad_token_id=0, eos_token_id=2, get_vocab=dict, decode=lambda tokens, skip_special_tokens: " ".join(map(str, tokens))
    )
    prompts = [example.tokens.tolist() for example in examples]
    answers = generate(model, spelled, prompts, max_new_tokens=12)
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            alone = model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=12,
                eos_token_id=2,
                pad_token_id=0,
            )
        wanted = alone[0, len(prompt) :].tolist()
        assert answer.split() == [str(token) for token in (wanted[: wanted.index(2)] if 2 in wanted else wanted)]
    assert len(set(answers)) > 1

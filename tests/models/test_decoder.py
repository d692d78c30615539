"""The layers by the kernels against transformers' and PEFT's own forward: every family, every level, every kind of adapter."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pantheraml.data.chat import Example
from pantheraml.data.pack import pack_step
from pantheraml.engines.engine import MicroTensors
from pantheraml.engines.torch_engine import micro_tensors
from pantheraml.hardware.host_memory import HostMemory
from pantheraml.models import decoder as module
from pantheraml.models.adapters import attach
from pantheraml.models.decoder import Decoder, decodes
from pantheraml.models.families import FAMILIES
from pantheraml.models.tiny import tiny_config
from pantheraml.planning.memory import Level
from pantheraml.recipe.types import LoRA
from pantheraml.trainer.sft import sft_loss, stock_loss

CPU = torch.device("cpu")
Gradients = dict[str, torch.Tensor]


def adapted(model: Any, **spec: Any) -> Any:
    """The model with an adapter that adds something: a new one is zero, and what it adds would go unseen."""
    model = attach(model, LoRA(**{"rank": 4, **spec}), seed=7)
    moved(model)
    return model.train()


def moved(model: Any) -> None:
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(i))


def layouts(examples: list[Example]) -> dict[str, MicroTensors]:
    """One micro-batch of each kind."""

    def laid(chosen: list[Example], *, packing: bool) -> MicroTensors:
        step = pack_step(chosen, row_tokens=(16, 32), micro_tokens=96, packing=packing, pad_id=0, trim=False)
        (micro,) = step.micro
        return micro_tensors(micro.input_ids, micro.position_ids, micro.labels, CPU)

    last = [replace(example, loss=np.arange(len(example.tokens)) == len(example.tokens) - 1) for example in examples]
    silent = [replace(example, loss=np.zeros_like(example.loss)) for example in examples]
    one = np.arange(7, 12, dtype=np.int64)[:, None]
    return {
        "packed": laid(examples, packing=True),
        "padded": laid(examples[1:4], packing=False),
        "few labels": laid([*silent[:4], last[4]], packing=True),
        "no label": laid(silent, packing=True),
        "rows of one token": micro_tensors(one, np.zeros_like(one), one + 1, CPU),
    }


def gradients(model: Any) -> Gradients:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad(set_to_none=True)
    return {name: torch.zeros(()) if gradient is None else gradient for name, gradient in found.items()}


def stock(model: Any, batch: MicroTensors) -> tuple[torch.Tensor, Gradients]:
    """By the model's own forward."""
    loss = stock_loss(model, batch)
    loss.backward()
    return loss.detach(), gradients(model)


def ours(
    model: Any, batch: MicroTensors, levels: tuple[Level, ...] | None = None, *, host: HostMemory | None = None
) -> tuple[torch.Tensor, Gradients]:
    loss = sft_loss(model, Decoder(model, levels, in_host_memory=host))(model, batch)
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), gradients(model)


def errors(found: Gradients, exact: Gradients) -> dict[str, float]:
    """The relative error of each gradient. One that is zero but for rounding (of q, where a token sees itself alone) counts against the others."""
    assert found.keys() == exact.keys()
    floor = max(1e-2 * max(gradient.norm().item() for gradient in exact.values()), 1e-30)
    return {name: (found[name].double() - exact[name].double()).norm().item() / max(exact[name].norm().item(), floor) for name in exact}


def check(model: Any, batch: MicroTensors, *, what: Any = None, tolerance: float = 1e-4) -> None:
    """float32 on both sides; sums in another order."""
    assert decodes(model) is None
    wanted, exact = stock(model, batch)
    loss, found = ours(model, batch)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5), what
    worst = max(errors(found, exact).items(), key=lambda each: each[1])
    assert worst[1] < tolerance, (what, worst)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_learns_what_it_learns_under_peft(family: str, small: Any, examples: list[Example]) -> None:
    model = adapted(small(family))
    for layout, batch in layouts(examples).items():
        check(model, batch, what=layout)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_learns_what_it_learns_in_transformers(family: str, small: Any, examples: list[Example]) -> None:
    for tied in (False, True):
        model = small(family, tie_word_embeddings=tied).train()
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
        with torch.no_grad():  # norms begin as ones or zeros, all alike
            for i, parameter in enumerate(model.parameters()):
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        for layout, batch in layouts(examples).items():
            check(model, batch, what=(tied, layout))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_rounds_no_more_than_under_peft(family: str, small: Any, examples: list[Example]) -> None:
    model = attach(small(family).to(torch.bfloat16), LoRA(rank=4), seed=7).train()
    moved(model)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    wide = copy.deepcopy(model).double()
    theirs, mine, losses, total = 0.0, 0.0, (0.0, 0.0), 0.0
    for seed in range(4):  # one batch alone is a matter of luck
        draw = np.random.default_rng(seed)
        drawn = [replace(example, tokens=draw.integers(7, 263, len(example.tokens)).astype(np.int32)) for example in examples]
        batch = layouts(drawn)["packed"]
        loss, exact = stock(wide, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            stock_found, found = stock(model, batch), ours(model, batch)
        theirs += sum(error**2 for error in errors(stock_found[1], exact).values())
        mine += sum(error**2 for error in errors(found[1], exact).values())
        total += loss.item()
        losses = (losses[0] + abs(stock_found[0] - loss).item(), losses[1] + abs(found[0] - loss).item())
    assert mine**0.5 <= 1.1 * theirs**0.5
    assert losses[1] <= 1.1 * losses[0] + 5e-4 * total  # of a number alone, rounding is luck


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_levels_give_the_same_bits(
    family: str, dtype: torch.dtype, small: Any, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TILE_TOKENS", 20)
    model = attach(small(family).to(dtype), LoRA(rank=4), seed=7).train()
    moved(model)
    batches = layouts(examples)
    same: list[tuple[Level, ...]] = [("keep", "keep"), ("all", "all"), ("all", "keep")]
    for layout in ("packed", "no label", "rows of one token"):
        batch = batches[layout]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, wanted = ours(model, batch)
            for levels in same:
                again, found = ours(model, batch, levels)
                assert torch.equal(again, loss) and all(torch.equal(found[name], wanted[name]) for name in wanted), (layout, levels)
            again, found = ours(model, batch, ("tiled",) * 2)
            away, brought = ours(model, batch, ("offload",) * 2, host=HostMemory(CPU, pinned=False))
            assert torch.equal(away, again) and all(torch.equal(brought[name], found[name]) for name in found), layout
        # A product of fewer rows may sum in another order; the gradient of an adapter is a sum over pieces.
        assert again.item() == pytest.approx(loss.item(), rel=1e-5 if dtype == torch.float32 else 1e-2)
        assert max(errors(found, wanted).values()) < (1e-4 if dtype == torch.float32 else 5e-2), layout


def test_tiles_are_taken_one_after_the_other(small: Any, examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_TOKENS", 20)
    model, batch = adapted(small("llama")), layouts(examples)["packed"]
    rows: list[int] = []
    down = Decoder._down

    def counted(self: Any, linear: Any, gate: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(gate))
        return down(self, linear, gate, *rest)

    monkeypatch.setattr(Decoder, "_down", counted)
    loss = sft_loss(model, Decoder(model, ("tiled", "tiled")))(model, batch)
    pieces = [len(piece) for n in (batch.input_ids.numel(), len(batch.labelled)) for piece in torch.arange(n).split(20)]
    assert rows == pieces and len(pieces) > 4
    loss.backward()
    # In backward each piece once more, the last one first.
    assert rows[len(pieces) :] == [*reversed(pieces)]


def test_offload_puts_away_the_input_of_each_layer_and_nothing_else(small: Any, examples: list[Example]) -> None:
    model, batch = adapted(small("llama", num_hidden_layers=3)), layouts(examples)["packed"]
    put: list[tuple[int, ...]] = []

    class Counting(HostMemory):
        def _put_away(self, tensor: torch.Tensor) -> Any:
            kept = super()._put_away(tensor)
            put.extend([tuple(tensor.shape)] if kept is not tensor else [])
            return kept

    host = Counting(CPU, pinned=False)
    loss = sft_loss(model, Decoder(model, ("offload",) * 3, in_host_memory=host))(model, batch)
    assert put == [(batch.input_ids.numel(), model.config.hidden_size)] * 3
    assert host.waiting() == 3
    loss.backward()
    assert len(put) == 3 and host.waiting() == 0


def test_without_gradients_nothing_is_kept_or_computed_again(small: Any, examples: list[Example]) -> None:
    model, batch = adapted(small("llama")), layouts(examples)["packed"]
    host = HostMemory(CPU, pinned=False)
    with torch.no_grad():
        losses = [
            sft_loss(model, Decoder(model, (level,) * 2, in_host_memory=host))(model, batch)
            for level in ("keep", "cheap", "all", "tiled", "offload")
        ]
    assert host.waiting() == 0 and all(torch.equal(loss, losses[0]) and not loss.requires_grad for loss in losses)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "phi3"])
@pytest.mark.parametrize(
    "spec",
    [
        {"dora": True},
        {"rslora": True},
        {"rank": 1},
        {"targets": ("o_proj",)},
        {"targets": ("down_proj",)},
        {"dropout": 1e-9},  # PEFT's own path, and no value is dropped
    ],
    ids=str,
)
def test_other_adapters_are_pefts_own(family: str, spec: dict[str, Any], small: Any, examples: list[Example]) -> None:
    model = adapted(small(family), **spec)
    for layout in ("packed", "no label", "rows of one token"):
        check(model, layouts(examples)[layout], what=layout)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("gate_proj",), ("k_proj", "up_proj", "down_proj")], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "cohere2"])
def test_an_adapter_may_be_on_some_layers_only(family: str, targets: tuple[str, ...], small: Any, examples: list[Example]) -> None:
    check(adapted(small(family), targets=targets), layouts(examples)["packed"])


def test_peft_may_adapt_what_the_kernels_do_not(small: Any, examples: list[Example]) -> None:
    from peft import IA3Config, LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "o_proj", "down_proj", "gate_proj"]
    for config in (
        LoraConfig(r=4, target_modules=targets, lora_bias=True),
        LoraConfig(r=4, target_modules=targets, bias="all"),
        LoraConfig(r=4, target_modules=targets, rank_pattern={"q_proj": 2}, alpha_pattern={"o_proj": 3}),
        LoraConfig(r=4, target_modules=targets, modules_to_save=["input_layernorm", "up_proj", "norm"]),
        LoraConfig(r=4, target_modules=[*targets, "embed_tokens"]),
        LoraConfig(r=4, target_modules=targets, layers_to_transform=[1]),
        IA3Config(target_modules=targets, feedforward_modules=["down_proj"]),
    ):
        model: Any = get_peft_model(small("llama", attention_bias=True, mlp_bias=True), config).train()
        with torch.no_grad():
            for i, parameter in enumerate(model.parameters()):
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        check(model, layouts(examples)["packed"], what=config)


def test_several_adapters_one_switched_off_and_one_merged(small: Any, examples: list[Example]) -> None:
    batch = layouts(examples)["packed"]
    model = adapted(small("llama"))
    with model.disable_adapter(), torch.no_grad():
        found = sft_loss(model, Decoder(model))(model, batch)
        assert found.item() == pytest.approx(stock_loss(model, batch).item(), rel=1e-5)
    model.add_adapter("second", model.peft_config["default"])
    moved(model)
    check(model, batch)
    model.base_model.set_adapter(["default", "second"])
    check(model, batch)
    model.merge_adapter()
    with torch.no_grad():
        assert sft_loss(model, Decoder(model))(model, batch).item() == pytest.approx(stock_loss(model, batch).item(), rel=1e-5)


def test_dropout_drops_as_often_as_it_says(small: Any, examples: list[Example]) -> None:
    """Other shapes take other masks than PEFT's, so only the mean can be compared."""
    model, batch = adapted(small("llama"), dropout=0.3), layouts(examples)["packed"]
    loss = sft_loss(model, Decoder(model))
    torch.manual_seed(0)
    with torch.no_grad():
        mine = torch.stack([loss(model, batch) for _ in range(60)])
        theirs = torch.stack([stock_loss(model, batch) for _ in range(60)])
    assert mine.std() > 0
    assert mine.std().item() == pytest.approx(theirs.std().item(), rel=0.5)
    assert abs(mine.mean() - theirs.mean()) < 4 * (mine.var() / 60 + theirs.var() / 60).sqrt()  # of two means of 60
    model.eval()
    with torch.no_grad():
        assert loss(model, batch).item() == pytest.approx(stock_loss(model, batch).item(), rel=1e-5)


def test_a_layer_that_is_computed_again_drops_the_same(small: Any, examples: list[Example]) -> None:
    model, batch = adapted(small("llama"), dropout=0.3), layouts(examples)["packed"]
    found: list[tuple[torch.Tensor, Gradients]] = []
    for level in ("keep", "all"):
        torch.manual_seed(0)
        found.append(ours(model, batch, (level, level)))
    assert torch.equal(found[0][0], found[1][0]) and all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


ORIGINAL = 8
"""Positions that a model of the test below was made for at first; its examples are longer."""
ROPES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"rope_type": "linear", "factor": 2.0}),
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 2.0}),
    "yarn": ("llama", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}),
    "yarn of qwen": ("qwen3", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}),
    "llama3": (
        "llama",
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": ORIGINAL,
        },
    ),
    "longrope": (
        "phi3",
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 16,
            "long_factor": [1.0 + 0.2 * i for i in range(16)],
            "original_max_position_embeddings": ORIGINAL,
        },
    ),
    "partial": ("phi3", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    "partial longrope": (
        "phi3",
        {
            "rope_type": "longrope",
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0] * 12,
            "long_factor": [1.0 + 0.2 * i for i in range(12)],
            "original_max_position_embeddings": ORIGINAL,
        },
    ),
    "interleaved": ("cohere", {"rope_type": "linear", "factor": 2.0}),
}


@pytest.mark.parametrize("name", ROPES)
def test_positions_are_turned_as_the_model_says(name: str, small: Any, examples: list[Example]) -> None:
    family, rope = ROPES[name]
    rope = {"rope_theta": 100.0, **rope}
    sizes: dict[str, Any] = {"max_position_embeddings": ORIGINAL if rope["rope_type"] == "dynamic" else 512}
    if rope["rope_type"] == "longrope":
        sizes["original_max_position_embeddings"] = ORIGINAL
    model, plain = adapted(small(family, rope_parameters=rope, **sizes)), adapted(small(family))
    longer = layouts(examples)["packed"]
    assert longer.position_ids.max() > 2 * ORIGINAL
    check(model, longer)
    check(model, layouts(examples)["rows of one token"])  # a type that looks at the positions looks again
    check(model, longer)
    with torch.no_grad():
        turned, usual = (sft_loss(each, Decoder(each))(each, longer) for each in (model, plain))
    assert abs(turned - usual) > 1e-3 * usual, "the type would not show"


def test_each_type_of_layers_may_turn_by_its_own_rule(small: Any, examples: list[Example]) -> None:
    rules = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
    }
    check(adapted(small("gemma3_text", rope_parameters=rules)), layouts(examples)["packed"])


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 16}),
        ("llama", {"sliding_window": 4, "layer_types": ["sliding_attention"] * 2}),  # not its own words: they mean nothing there
        ("llama", {"num_key_value_heads": 1}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "attention_bias": True}),
        ("gemma", {"attention_bias": True}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"], "attention_bias": True}),
        ("gemma3_text", {"attn_logit_softcapping": 1.0}),
        ("granite", {"attention_bias": True, "mlp_bias": True}),
        ("cohere", {"use_qk_norm": True}),
        ("cohere", {"attention_bias": True}),
        ("cohere2", {"attention_bias": True}),
        ("cohere2", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("phi3", {"sliding_window": 4}),
        *((family, {"hidden_act": act}) for family in ("llama", "phi3") for act in ("gelu", "gelu_pytorch_tanh", "silu")),
    ],
    ids=str,
)
def test_options_that_are_known(family: str, options: dict[str, Any], small: Any, examples: list[Example]) -> None:
    model = small(family, **options)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith("bias") or "norm" in name:  # zeros and ones would go unseen
                parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    check(adapted(model), layouts(examples)["packed"])


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("llama", {"hidden_act": "relu"}, "the gate of its MLP"),
        ("phi3", {"hidden_act": "tanh"}, "the gate of its MLP"),
        ("gemma", {"use_bidirectional_attention": True}, "looks ahead"),
        ("gemma2", {"use_bidirectional_attention": True}, "looks ahead"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "looks ahead"),
        ("llama", {"is_causal": False}, "looks ahead"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop"),
        ("falcon_h1", {}, "falcon_h1"),
    ],
    ids=str,
)
def test_options_that_are_not_known_are_refused(family: str, options: dict[str, Any], said: str, small: Any) -> None:
    assert said in str(decodes(small(family, **options)))


def test_a_layer_of_somebody_else_is_refused(small: Any) -> None:
    class Mine(nn.Module):
        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj, self.act_fn = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn

    model = small("llama")
    model.model.layers[1].mlp = Mine(model.model.layers[1].mlp)
    assert decodes(model) == "its Mine is not the one of transformers"
    model = small("llama")
    attention = model.model.layers[0].self_attn
    attention.forward = lambda *args, **options: type(attention).forward(attention, *args, **options)
    assert decodes(model) == "its LlamaAttention is not the one of transformers"


def test_an_adapter_on_the_head_is_refused(small: Any) -> None:
    from peft import LoraConfig, get_peft_model

    for config in (LoraConfig(target_modules=["q_proj", "lm_head"]), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])):
        assert decodes(get_peft_model(small("llama"), config)) == "its output head is more than a matrix"


def test_every_family_can_be_made_small() -> None:
    for family in FAMILIES:
        assert tiny_config(family).model_type == family

"""The XLA engine on XLA's CPU devices: real compilation, eight devices that share this machine. What a TPU takes is not said here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax.sharding import Mesh

from pantheraml.data.chat import Example
from pantheraml.data.pack import StepBatch, pack_step
from pantheraml.engines.engine import Engine
from pantheraml.engines.torch_engine import TorchEngine
from pantheraml.engines.xla_ahead import collectives
from pantheraml.engines.xla_engine import XlaEngine
from pantheraml.errors import DeviceError, PantheraError
from pantheraml.hardware.cpu import CpuBackend
from pantheraml.hardware.xla_mesh import open_mesh
from pantheraml.models.adapters import attach
from pantheraml.models.generate import generate
from pantheraml.models.tiny import tiny_tokenizer
from pantheraml.planning.plan import Plan
from pantheraml.recipe.types import LoRA, OptimSpec
from pantheraml.trainer.sft import sft_loss

# The eight that must be there, one with a sliding window in every layer and one in every second, and a mixture of experts.
FAMILIES = ("llama", "mistral", "gemma2", "qwen3", "granite", "cohere", "phi3", "falcon_h1", "mixtral")
OPTIM = OptimSpec(weight_decay=0.1, clip_norm=1.0)
RATE = 1e-3
Steps = list[StepBatch]


def mesh_of(**axes: int) -> Mesh:
    count = int(np.prod(list(axes.values())))
    return Mesh(np.array(jax.devices("cpu")[:count]).reshape(*axes.values()), tuple(axes))


def xla(**axes: int) -> XlaEngine:
    return XlaEngine(mesh_of(**axes or {"fsdp": 1}), allowed=("keep", "all"))


@pytest.fixture(scope="module")
def model_of(small: Callable[..., Any]) -> Callable[..., Any]:
    """A model of four layers with an adapter that is not zero; rank None: every weight trains."""

    def made(family: str, *, rank: int | None = 4, dropout: float = 0.0, **sizes: Any) -> Any:
        windowed = {"sliding_window": 8} if family in ("mistral", "gemma2") else {}
        model = OTHERS[family]() if family in OTHERS else small(family, num_hidden_layers=4, **windowed, **sizes)
        if rank is None:
            return model
        model = attach(model, LoRA(rank=rank, dropout=dropout), seed=1)
        drawn = torch.Generator().manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=drawn) * 0.05
        return model

    return made


def mixture() -> Any:
    """Four layers with four experts each, of which two compute a token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=263, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.1, pad_token_id=0, **sizes)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return MixtralForCausalLM(config).eval()


def nested() -> Any:
    """A model whose layers are not right below its backbone."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "word_embed_proj_dim": 64}
    config = OPTConfig(vocab_size=263, dropout=0.0, max_position_embeddings=64, init_std=0.1, pad_token_id=0, **sizes)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return OPTForCausalLM(config).eval()


OTHERS = {"mixtral": mixture, "opt": nested}


def steps(count: int, *, packing: bool = True, **shape: Any) -> Steps:
    """Eight examples a step, in rows of 32 tokens, one row at a time."""
    drawn = np.random.default_rng(0)
    laid: dict[str, Any] = {"row_tokens": (32,), "micro_tokens": 32, "packing": packing, "pad_id": 0, "trim": False, **shape}
    found = []
    for _ in range(count):
        lengths = drawn.integers(3, 31, 8)
        examples = [Example(drawn.integers(7, 263, n).astype(np.int32), np.arange(n) >= n // 3, "rows") for n in lengths]
        found.append(pack_step(examples, **laid))
    return found


def trained(engine: Engine, model: Any, batches: Sequence[StepBatch], plan: Plan, optim: OptimSpec = OPTIM) -> list[float]:
    engine.prepare(model, sft_loss(model), optim, plan, seed=1)
    return taken(engine, batches)


def taken(engine: Engine, batches: Sequence[StepBatch], first: int = 0) -> list[float]:
    return [value.loss for value in engine.read([engine.step(batch, k, RATE) for k, batch in enumerate(batches, first)])]


def furthest(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor], kind: str = "weight/") -> float:
    assert state.keys() == other.keys()
    return max(float((state[name] - other[name]).abs().max()) for name in state if name.startswith(kind))


# ---- The same numbers as torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "rank"), [*((family, 4) for family in FAMILIES), ("llama", None), ("gemma2", None)])
def test_ten_steps_are_those_of_the_torch_engine(
    model_of: Callable[..., Any], plan_of: Callable[..., Plan], family: str, rank: int | None
) -> None:
    # Layers in one loop and computed again, four and more micro-batches a step, packed but where a layer carries a state.
    batches = steps(10, packing=family != "falcon_h1")
    assert min(len(batch.micro) for batch in batches) >= 4
    torchs, ours = TorchEngine(CpuBackend()), xla()
    model = model_of(family, rank=rank)
    expected = trained(torchs, model, batches, plan_of(model))
    model = model_of(family, rank=rank)
    found = trained(ours, model, batches, replace(plan_of(model), levels=("all",) * 4))
    assert sum(slot.stacked for slot in ours.traced.slots) > len(ours.traced.slots) / 2
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) < 1e-5
    assert furthest(torchs.state_dict(), ours.state_dict()) < 1e-4
    assert abs(torchs.evaluate(batches[:2]) - ours.evaluate(batches[:2])) < 1e-5


def test_levels_give_the_same_steps(model_of: Callable[..., Any], plan_of: Callable[..., Plan]) -> None:
    batches = steps(3)
    found = []
    for levels in (("keep",) * 4, ("cheap",) * 4, ("all", "all", "keep", "keep")):
        model = model_of("llama")
        found.append(trained(xla(), model, batches, replace(plan_of(model), levels=levels)))
    for other in found[1:]:
        assert max(abs(a - b) for a, b in zip(found[0], other, strict=True)) < 1e-6


def test_bfloat16_is_near(model_of: Callable[..., Any], plan_of: Callable[..., Plan]) -> None:
    batches = steps(3)
    model = model_of("llama")
    expected = trained(xla(), model, batches, plan_of(model))
    model = model_of("llama")
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    found = trained(xla(), model, batches, replace(plan_of(model), dtype="bfloat16"))
    assert found != expected
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) < 0.03


def test_dropout_differs_from_step_to_step_and_comes_again(model_of: Callable[..., Any], plan_of: Callable[..., Plan]) -> None:
    (batch,) = steps(1)
    engine, model = xla(), model_of("llama", dropout=0.5)
    engine.prepare(model, sft_loss(model), OPTIM, plan_of(model), seed=1)

    def loss(k: int) -> float:
        return engine.read([engine.step(batch, k, 0.0)])[0].loss

    assert loss(0) != loss(1)
    assert loss(0) == loss(0)
    assert engine.evaluate([batch]) == engine.evaluate([batch])


# ---- Several devices -------------------------------------------------------------------------------------------------


def share(engine: XlaEngine) -> float:
    """Of all bytes of weights and moments, those that the first device holds."""
    first = jax.devices("cpu")[0]
    arrays = jax.tree.leaves(engine.arrays)
    held = sum(part.data.nbytes for array in arrays for part in array.addressable_shards if part.device == first)
    return held / sum(array.nbytes for array in arrays)


@pytest.mark.parametrize(
    ("axes", "most_held"),
    [
        ({"dp": 8}, 1.0),
        ({"fsdp": 8}, 0.13),
        ({"fsdp": 4, "tp": 2}, 0.2),
        ({"dp": 4, "tp": 2}, 0.65),
        ({"dcn": 2, "fsdp": 4}, 0.26),
    ],
    ids=str,
)
def test_a_mesh_of_eight_takes_the_steps_of_one(
    model_of: Callable[..., Any], plan_of: Callable[..., Plan], axes: dict[str, int], most_held: float
) -> None:
    batches = steps(3, micro_tokens=256)
    alone, several = xla(), xla(**axes)
    model = model_of("llama")
    expected = trained(alone, model, batches, plan_of(model))
    model = model_of("llama")
    found = trained(several, model, batches, plan_of(model))
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) < 1e-5
    assert furthest(alone.state_dict(), several.state_dict()) < 1e-4
    assert share(several) <= most_held
    counted = Counter(collectives(several.hlo("gradients")))
    assert counted["all-reduce"] > 0
    if "fsdp" not in axes:  # copies hold what they need
        assert counted["all-gather"] == 0
    else:
        assert counted["all-gather"] > 0


def test_a_mesh_needs_its_devices(tmp_path: Any) -> None:
    before = jax.config.jax_compilation_cache_dir
    with pytest.raises(DeviceError, match="99 devices were asked for"):
        open_mesh({"dp": 99}, simulate=True, cache=tmp_path)
    jax.config.update("jax_compilation_cache_dir", before)


# ---- Shapes and compilations -----------------------------------------------------------------------------------------


def test_mixed_lengths_compile_once_for_each_shape_and_phase(model_of: Callable[..., Any], plan_of: Callable[..., Plan]) -> None:
    compiled: list[str] = []

    def note(event: str, seconds: float, **about: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(note)
    batches = steps(6, packing=False, row_tokens=(16, 32), micro_tokens=64)
    model = model_of("llama")
    engine = xla()
    trained(engine, model, batches, replace(plan_of(model), row_tokens=(16, 32)))
    engine.evaluate(batches[:2])
    expected = {"zeros": 1, "gradients 4x16": 1, "gradients 2x32": 1, "update": 1, "losses 4x16": 1, "losses 2x32": 1}
    assert engine.compilations == expected
    ours = [name for name in compiled if any(phase in name for phase in ("zeros", "gradients", "update", "losses"))]
    assert len(ours) == len(expected)
    before = len(compiled)
    taken(engine, batches, first=6)
    engine.evaluate(batches[:2])
    assert compiled[before:] == []  # JAX compiled nothing at all


# ---- State -----------------------------------------------------------------------------------------------------------


def test_either_engine_goes_on_from_the_other(model_of: Callable[..., Any], plan_of: Callable[..., Plan]) -> None:
    batches = steps(6)

    def made(kind: str) -> Engine:
        engine: Engine = TorchEngine(CpuBackend()) if kind == "torch" else xla()
        model = model_of("gemma2")
        engine.prepare(model, sft_loss(model), OPTIM, plan_of(model), seed=1)
        return engine

    whole = {kind: taken(made(kind), batches) for kind in ("torch", "xla")}
    for begins, ends in (("torch", "xla"), ("xla", "torch"), ("xla", "xla")):
        first, second = made(begins), made(ends)
        taken(first, batches[:3])
        second.load_state_dict(first.state_dict())
        found = taken(second, batches[3:], first=3)
        assert max(abs(a - b) for a, b in zip(whole[ends][3:], found, strict=True)) < 1e-5
        if begins == ends:
            assert found == whole[ends][3:]


def test_a_state_that_does_not_fit_is_refused(model_of: Callable[..., Any], plan_of: Callable[..., Plan]) -> None:
    engine, model = xla(), model_of("llama")
    engine.prepare(model, sft_loss(model), OPTIM, plan_of(model), seed=1)
    with pytest.raises(ValueError, match="does not fit"):
        engine.load_weights({"weight/other": torch.zeros(1)})


def test_the_model_gets_its_weights_back(model_of: Callable[..., Any], plan_of: Callable[..., Plan]) -> None:
    batches = steps(2)
    engine, model = xla(), model_of("llama")
    trained(engine, model, batches, plan_of(model))
    engine.hand_back()
    state = engine.state_dict()
    assert all(torch.equal(parameter, state[f"weight/{name}"]) for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_what_is_not_finite_changes_nothing(model_of: Callable[..., Any], plan_of: Callable[..., Plan]) -> None:
    batches = steps(3)
    engine, model = xla(), model_of("llama")
    trained(engine, model, batches[:1], plan_of(model))
    before = engine.state_dict()
    ok = [value.ok for value in engine.read([engine.step(batches[1], 1, float("nan")), engine.step(batches[2], 2, RATE)])]
    assert ok == [True, False]  # the rate was no number, so the weights are none, and the loss behind them
    engine.load_state_dict(before)
    assert furthest(engine.state_dict(), before, kind="") == 0


# ---- What is refused -------------------------------------------------------------------------------------------------


def test_a_parameter_that_the_loss_does_not_reach_is_named(model_of: Callable[..., Any], plan_of: Callable[..., Plan]) -> None:
    engine, model = xla(), model_of("llama")
    model.register_parameter("idle", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(PantheraError, match=r"1 of .* got no gradient: idle"):
        trained(engine, model, steps(1), plan_of(model))


def test_states_in_eight_bits_are_refused(model_of: Callable[..., Any], plan_of: Callable[..., Plan]) -> None:
    model = model_of("llama")
    with pytest.raises(DeviceError, match=r"optim\.states=8bit"):
        xla().prepare(model, sft_loss(model), OptimSpec(states="8bit"), plan_of(model), seed=1)


def test_it_can_need_less_memory(model_of: Callable[..., Any], plan_of: Callable[..., Plan]) -> None:
    batches = steps(2)
    engine, model = xla(), model_of("llama")
    plan = plan_of(model)
    first = trained(engine, model, batches, plan)
    assert engine.lower() == "with layers at 4 all"
    assert engine.lower() is None
    again = xla()
    model = model_of("llama")
    again.prepare(model, sft_loss(model), OPTIM, plan, seed=1)
    again.lower()
    assert max(abs(a - b) for a, b in zip(first, taken(again, batches), strict=True)) < 1e-6


def test_attention_that_would_see_what_comes_after_is_refused(plan_of: Callable[..., Plan]) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=263, hidden_size=64, n_layer=2, n_head=4))
    with pytest.raises(DeviceError, match="BloomForCausalLM cannot be computed by XLA"):
        trained(xla(), model, steps(1), plan_of(model))


def test_a_base_in_eight_bits_is_near(model_of: Callable[..., Any], plan_of: Callable[..., Plan]) -> None:
    batches = steps(3)
    model = model_of("llama")
    expected = trained(xla(), model, batches, plan_of(model))
    model = model_of("llama")
    engine = xla(fsdp=4, tp=2)
    found = trained(engine, model, batches, replace(plan_of(model), quantizer="int8"))
    assert found != expected
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) < 0.02
    assert sum(isinstance(array, tuple) for array in engine.arrays[0].values()) == 7  # q, k, v, o, gate, up, down of all layers


# ---- Answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon_h1", "opt"])
def test_answers_are_those_of_transformers(model_of: Callable[..., Any], plan_of: Callable[..., Plan], family: str) -> None:
    tokenizer, drawn = tiny_tokenizer(), np.random.default_rng(1)
    prompts = [drawn.integers(7, 263, n).tolist() for n in (3, 14, 9)]
    model = model_of(family)
    expected = generate(model, tokenizer, prompts, max_new_tokens=12)
    engine = xla()
    engine.prepare(model, sft_loss(model), OPTIM, plan_of(model), seed=1)
    assert engine.generate(tokenizer, prompts, max_new_tokens=12) == expected
    assert any(expected)
    assert engine.generate(tokenizer, prompts, max_new_tokens=12) == expected
    assert [count for phase, count in engine.compilations.items() if phase.startswith("answers")] == [1]

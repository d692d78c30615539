"""The XLA engine on XLA's CPU devices: real compilation, eight devices that share this machine. What a TPU takes is not said here."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
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
from pantheraml.engines.xla_engine import XlaEngine
from pantheraml.engines.xla_layers import places_of
from pantheraml.errors import DeviceError, PantheraError
from pantheraml.hardware.cpu import CpuBackend
from pantheraml.hardware.detect import detect
from pantheraml.hardware.recovery import Recovery
from pantheraml.hardware.xla_mesh import open_mesh
from pantheraml.models.adapters import attach
from pantheraml.models.generate import generate
from pantheraml.models.load import load_model, shape_of
from pantheraml.models.tiny import tiny_tokenizer
from pantheraml.planning.plan import Plan, make_plan
from pantheraml.planning.sharding import spec_of
from pantheraml.recipe.types import LoRA, ModelSpec, OptimSpec, Recipe
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


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def exchanged(text: str, kind: str) -> set[tuple[int, ...]]:
    """Shapes of floats that come out of an exchange between devices, in XLA's text."""
    results = re.findall(rf"= (.{{1,4000}}?) {kind}(?:-start)?\(", text)
    shapes = [shape for result in results for shape in re.findall(r"\bf32\[([\d,]*)\]", result)]
    return {tuple(int(n) for n in shape.split(",") if n) for shape in shapes}


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
    gradients, update = (part.compile().as_text() for part, _ in several.lowered(8, 32).values())
    slots = several.traced.slots
    # One layer at a time is gathered, along fsdp alone: neither a whole stack, nor what tp divides, nor anything but weights.
    tp, of_rows = axes.get("tp", 1), {(8, 32, 64 // axes.get("fsdp", 1))}
    of_one_layer = {
        tuple(n // tp if axis == "tp" else n for n, axis in zip(slot.shape, spec_of(slot.name, slot.shape, axes), strict=True))
        for slot in slots
    }
    gathered = exchanged(gradients, "all-gather")
    assert gathered <= of_one_layer | of_rows
    assert bool(gathered) == ("fsdp" in axes)  # copies hold what they need
    matrices = {slot.shape for slot in slots if not slot.trains and len(slot.shape) == 2}
    assert not exchanged(gradients, "all-reduce") & (
        matrices | {(4, *shape) for shape in matrices}
    )  # frozen: no gradient of theirs travels
    assert exchanged(gradients, "all-reduce")
    # The update exchanges the norm, and nothing else.
    assert set().union(*(exchanged(update, kind) for kind in COLLECTIVES)) <= {()}


def test_a_mesh_needs_its_devices(tmp_path: Any) -> None:
    before = jax.config.jax_compilation_cache_dir
    with pytest.raises(DeviceError, match="99 devices were asked for"):
        open_mesh({"dp": 99}, simulate=True, cache=tmp_path)
    jax.config.update("jax_compilation_cache_dir", before)


def own_bytes() -> int:
    """What this process holds besides pages of files, which the system takes back when it needs them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_weights_come_from_their_file_part_by_part(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=8192, num_hidden_layers=12, **sizes)).bfloat16().save_pretrained(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size > 100 << 20
    asked = {"model": {"name": "here", "max_tokens": 32}, "data": "rows", "hardware": {"kind": "tpu", "devices": 4, "simulate_tpu": True}}

    def taken(folder: Path) -> tuple[XlaEngine, int, int]:
        """The engine with the model of a folder in it, and what the process had before and after that was loaded."""
        before = own_bytes()
        model = load_model(ModelSpec(name=str(folder)), dtype=torch.bfloat16, device=torch.device("cpu"))
        loaded = own_bytes()
        plan = make_plan(Recipe.model_validate(asked), detect(["tpu"], simulate_tpu=True), shape_of(model, "here"), longest_example=32)
        model, engine = attach(model, LoRA(rank=4), seed=1), xla(fsdp=4)
        engine.prepare(model, sft_loss(model), OPTIM, plan, seed=1)
        return engine, before, loaded

    small = tmp_path / "small"
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes)).bfloat16().save_pretrained(small)
    taken(small)  # what it imports, and what JAX starts, is no model's
    engine, before, loaded = taken(tmp_path)
    assert loaded - before < size / 5  # the host holds none of them
    arrays = sum(array.nbytes for array in jax.tree.leaves(engine.arrays))
    assert arrays > size
    assert own_bytes() - loaded < arrays + size / 4  # the devices do, which are this process here


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


def test_a_shape_that_was_not_planned_is_reported(model_of: Callable[..., Any], plan_of: Callable[..., Plan]) -> None:
    said: list[str] = []
    recovery = Recovery(announce=said.append)
    engine, model = XlaEngine(mesh_of(fsdp=1), recovery), model_of("llama")
    trained(engine, model, steps(2), replace(plan_of(model), micro_tokens=32))
    assert said == []
    taken(engine, steps(1, row_tokens=(40,), micro_tokens=80), first=2)
    assert said == ["gradients 2x40 is compiled, a shape that the plan does not have (1x32): that takes time, once"]
    assert recovery.said == said  # which is what the report shows
    batch = steps(1)[0]
    more = replace(batch, micro=batch.micro * 3)  # more micro-batches than a batch of the plan can have
    taken(engine, [more], first=3)
    assert said[1].startswith("gradients 1x32 is compiled again: argument [4][0] was int32[8, 1, 32] and is int32[12, ")


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


def test_it_takes_fewer_rows_at_once_where_nothing_else_is_left(
    model_of: Callable[..., Any], plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = steps(2, micro_tokens=256)
    alone, several = xla(), XlaEngine(mesh_of(fsdp=2), Recovery({"out of memory": 4}))
    model = model_of("llama")
    expected = trained(alone, model, batches, plan_of(model))
    run = several._run

    def full(phase: str, shape: tuple[int, ...], *args: Any) -> Any:
        if phase in ("gradients", "losses") and shape[0] > 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM")
        return run(phase, shape, *args)

    monkeypatch.setattr(several, "_run", full)
    model = model_of("llama")
    found = trained(several, model, batches, replace(plan_of(model), micro_tokens=256))
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) < 1e-5
    assert furthest(alone.state_dict(), several.state_dict()) < 1e-4
    assert [count for name, count in several.compilations.items() if name.startswith("gradients")] == [1]
    assert several._recovery.parts == 4
    assert len(several._recovery.said) == 2 and "in 4 parts" in several._recovery.said[1]
    assert several.evaluate(batches) == pytest.approx(alone.evaluate(batches), abs=1e-5)


def test_attention_that_would_see_what_comes_after_is_refused(plan_of: Callable[..., Plan]) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=263, hidden_size=64, n_layer=2, n_head=4))
    with pytest.raises(DeviceError, match="BloomForCausalLM cannot be computed by XLA"):
        trained(xla(), model, steps(1), plan_of(model))


def test_layers_that_are_called_with_something_of_their_own_are_not_one_loop(plan_of: Callable[..., Plan]) -> None:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    sizes = {"hidden_size": 64, "hidden_size_per_layer_input": 16, "intermediate_size": 96, "head_dim": 16, "laurel_rank": 8}
    kinds = {"layer_types": ["full_attention"] * 4, "activation_sparsity_pattern": [0.0] * 4, "num_kv_shared_layers": 0}
    heads = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma3nTextConfig(vocab_size=263, vocab_size_per_layer_input=263, pad_token_id=0, **sizes, **kinds, **heads)
    model = Gemma3nForCausalLM(config)
    assert places_of(model, model).looped == 0
    with pytest.raises(DeviceError, match="Gemma3nForCausalLM cannot be computed by XLA"):  # for another reason: a view of its own
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

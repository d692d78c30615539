"""What is loaded, what is counted before, and what is said when there is nothing to load."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pantheraml.errors import PantheraError, RecipeError
from pantheraml.models.load import load_model, load_tokenizer, read_config, read_shape, shape_of
from pantheraml.models.tiny import ALIASES, FAMILIES, PREFIX, tiny_config, tiny_tokenizer
from pantheraml.recipe.types import ModelSpec

CPU = torch.device("cpu")


def loaded(name: str | Path, **options: Any) -> Any:
    return load_model(ModelSpec(name=str(name)), **{"dtype": torch.float32, "device": CPU, **options})


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here may wait for a network, or reach one."""

    def nowhere(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    monkeypatch.setattr("urllib.request.getproxies", dict)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of one layer in bfloat16, as transformers saves it, with its tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=1)).bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_read_is_that_of_the_real_model(family: str) -> None:
    model = loaded(PREFIX + family)
    shape, config = read_shape(ModelSpec(name=PREFIX + family)), model.config
    assert shape == shape_of(model, PREFIX + family)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert shape.parameters == sum(parameter.numel() for parameter in {id(p): p for p in model.parameters()}.values())
    assert shape.embedding_parameters == embedding.numel() * (1 if config.tie_word_embeddings else 2)
    assert (embedding is head) == config.tie_word_embeddings
    linears = [(m.in_features, m.out_features) for name, m in model.named_modules() if type(m) is torch.nn.Linear and name != "lm_head"]
    assert list(shape.linears) == linears
    assert (shape.family, shape.layers, shape.hidden, shape.vocab) == (family, 4, 128, 263)
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.intermediate, shape.max_tokens) == (4, 2, 32, 352, 512)
    assert shape.packs == (family != "falcon_h1")
    assert shape.weight_bytes_each == 4
    # transformers refuses sdpa for Gemma 2, whose bound on attention it does not know.
    assert ("sdpa" in shape.attention) == (family != "gemma2") and shape.attention[-1] == "eager"


def test_a_saved_folder_is_read_as_it_is(saved: Path) -> None:
    model = loaded(saved, dtype=torch.bfloat16, attention="eager")
    assert model.dtype == torch.bfloat16 and not model.training and model.config._attn_implementation == "eager"
    shape = read_shape(ModelSpec(name=str(saved)))
    assert shape == shape_of(model, str(saved)) and shape.weight_bytes_each == 2
    assert read_config(ModelSpec(name=str(saved))).model_type == "llama"
    assert load_tokenizer(ModelSpec(name=str(saved)))("Hé")["input_ids"] == tiny_tokenizer()("Hé")["input_ids"]
    as_asked = loaded(saved)
    assert as_asked.dtype == torch.float32
    assert all(torch.equal(a.float(), b) for a, b in zip(model.parameters(), as_asked.parameters(), strict=True))


def test_a_tokenizer_without_padding_pads_with_its_end(saved: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    assert load_tokenizer(ModelSpec(name=str(tmp_path))).pad_token_id == 2


def test_tiny_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = loaded("tiny:qwen3", seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again, other = loaded("tiny:qwen3", seed=1).state_dict(), loaded("tiny:qwen3", seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    low = loaded("tiny:qwen3", seed=1, dtype=torch.bfloat16).state_dict()
    assert torch.equal(low["lm_head.weight"], first["lm_head.weight"].bfloat16())


def test_tiny_names() -> None:
    for alias, family in ALIASES.items():
        assert read_config(ModelSpec(name=PREFIX + alias)).model_type == family
    for load in LOADERS.values():
        with pytest.raises(RecipeError, match="no tiny model of the family 'lama'") as caught:
            load("tiny:lama")
        assert "tiny:llama" in caught.value.fix


LOADERS: dict[str, Callable[[Any], Any]] = {
    "shape": lambda name: read_shape(ModelSpec(name=str(name))),
    "tokenizer": lambda name: load_tokenizer(ModelSpec(name=str(name))),
    "model": loaded,
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("name", ["./models/mine", "../mine", "/models/mine", "a/b/c", "my model", "models/"])
def test_a_path_without_a_folder_is_said_to_be_one(name: str, load: Callable[[Any], Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        load(name)
    assert caught.value.what == f"there is no model folder {name}"
    assert "it is no folder here" in caught.value.why and "check the path" in caught.value.fix


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model"])
def test_an_unknown_name_without_a_network_is_said_at_once(name: str, load: Callable[[Any], Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        load(name)
    assert caught.value.what == f"the model {name} is not here, and the Hugging Face Hub cannot be reached"
    assert "does not resolve: Name or service not known" in caught.value.why
    assert "tiny:llama works without a network" in caught.value.fix


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    for load in LOADERS.values():
        with pytest.raises(RecipeError, match="does not hold a model that can be loaded") as caught:
            load(tmp_path)
        assert str(tmp_path) in caught.value.what and caught.value.why and "config.json" in caught.value.fix


@pytest.mark.parametrize("config", ["{not json", '{"model_type": "no such thing"}', '{"model_type": "t5"}', "{}"])
def test_a_folder_with_a_config_that_cannot_be_used(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(RecipeError, match="does not hold a model that can be loaded") as caught:
        read_shape(ModelSpec(name=str(tmp_path)))
    assert caught.value.why and "causal language model" in caught.value.fix


def test_pickled_weights_are_not_read(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    torch.save(loaded(saved).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(RecipeError, match="does not hold a model that can be loaded") as caught:
        loaded(tmp_path)
    assert "no file named model.safetensors" in caught.value.why and "safetensors" in caught.value.fix


def test_torn_weights_are_said_to_be(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(RecipeError, match="does not hold a model that can be loaded"):
        loaded(tmp_path)


def test_code_that_comes_with_a_model_does_not_run(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **own}))
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')")
    for load in (LOADERS["shape"], LOADERS["model"]):
        with pytest.raises(PantheraError) as caught:
            load(tmp_path)
        assert caught.value.what == f"{tmp_path} comes with its own Python code"
        assert "does not run unless you say so" in caught.value.why and "model.trust_remote_code=true" in caught.value.fix

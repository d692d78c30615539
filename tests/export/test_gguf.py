"""llama.cpp itself is the judge: it loads each file, and must cut and continue texts as transformers does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pantheraml.errors import MissingExtra, PantheraError, StorageError
from pantheraml.export import llamacpp
from pantheraml.export.gguf import export_gguf, verify_gguf
from pantheraml.models.tiny import FAMILIES, tiny_config, tiny_tokenizer

TEXT = ["the quick brown fox jumps over the lazy dog", "Zwölf große Boxkämpfer jagen Viktor", "12345 + 678 = 13023; don't I'LL"] * 20
HARD = ["Hello  world\n\n\tI'll don't 12345 x", "grüße 你好 🙂", " leading and trailing ", "<|user|>the quick<|end|>"]
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ROPE_LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def folder_of(path: Path, family: str, tokenizer: PreTrainedTokenizerFast | None = None, **sizes: object) -> Path:
    """A model whose choices are clear-cut.

    Fresh weights give logits so close that rounding decides; four times larger matrices and uneven norms and biases
    make the distances large, and every tensor matter.
    """
    tokenizer = tokenizer or tiny_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **{"vocab_size": len(tokenizer), **sizes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
            elif "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def facts(file: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def tensors(file: Path) -> dict[str, np.ndarray]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}


def with_ends(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|pad|>", "<|begin|>", "<|end|>", "<|user|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|begin|>", eos_token="<|end|>", clean_up_tokenization_spaces=False
    )


def byte_level(pattern: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    cut = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return with_ends(tokenizer)


def sentencepiece_like(prefix: bool) -> PreTrainedTokenizerFast:
    """As transformers converts a SentencePiece model: every pair whose sum is a token is a merge, by the score of the sum."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.train_from_iterator(["▁" + text for text in TEXT], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learnt = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *(piece for piece, _ in learnt)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [(p[:cut], p[cut:]) for p in pieces[257:] for cut in range(1, len(p)) if p[:cut] in vocab and p[cut:] in vocab]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = with_ends(tokenizer)
    fast.unk_token = "<unk>"
    return fast


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_continues_as_transformers(tmp_path: Path, family: str):
    folder = folder_of(tmp_path / "model", family)
    exact = export_gguf(folder, tmp_path / "model.gguf", "f32")
    assert exact.verified.engine == "xllamacpp"
    assert exact.verified.same_tokens == exact.verified.tokens >= 50, exact.verified
    assert exact.verified.same_tokenization == exact.verified.prompts == 4
    for kind in ("f16", "bf16", "q8_0"):
        rounded = export_gguf(folder, tmp_path / f"{kind}.gguf", kind)  # raises where a choice is no near tie
        assert rounded.verified.same_tokens >= 0.9 * rounded.verified.tokens, (kind, rounded.verified)
        assert rounded.fallbacks == 0 and rounded.bytes < exact.bytes


def test_bfloat16_folder_in_shards(tmp_path: Path):
    folder = folder_of(tmp_path / "one", "qwen3")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "many", max_shard_size="300KB")
    tiny_tokenizer().save_pretrained(tmp_path / "many")
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    report = export_gguf(tmp_path / "many", tmp_path / "m.gguf", "bf16")
    # bfloat16 to bfloat16 rounds nothing: the values are the stored ones.
    stored = tensors(tmp_path / "m.gguf")["blk.3.ffn_down.weight"]
    np.testing.assert_array_equal(stored, model.model.layers[3].mlp.down_proj.weight.detach().float().numpy())
    assert report.verified.worst_gap < 0.15


def test_tensors_are_the_weights(tmp_path: Path):
    weights = load_file(folder_of(tmp_path / "g", "gemma") / "model.safetensors")
    export_gguf(tmp_path / "g", tmp_path / "g.gguf", "f32", verify=False)
    written = tensors(tmp_path / "g.gguf")
    assert len(written) == len(weights) and "output.weight" not in written, "tied: stored once"
    np.testing.assert_array_equal(written["blk.0.attn_q.weight"], weights["model.layers.0.self_attn.q_proj.weight"])
    np.testing.assert_array_equal(written["output_norm.weight"], weights["model.norm.weight"] + 1)

    weights = load_file(folder_of(tmp_path / "l", "llama") / "model.safetensors")
    export_gguf(tmp_path / "l", tmp_path / "l.gguf", "q8_0", verify=False)
    query, there = weights["model.layers.0.self_attn.q_proj.weight"], tensors(tmp_path / "l.gguf")["blk.0.attn_q.weight"]
    # Rows 0 and 16 turn together in transformers (half a head of 32 apart), rows 0 and 1 in llama.cpp.
    step = query.abs().max() / 127
    np.testing.assert_allclose(there[1], query[16], atol=float(step))
    np.testing.assert_allclose(there[33], query[32 + 16], atol=float(step))


def test_facts(tmp_path: Path):
    export_gguf(folder_of(tmp_path / "model", "gemma2"), tmp_path / "m.gguf", "f16", verify=False)
    said = facts(tmp_path / "m.gguf")
    assert said["general.architecture"] == "gemma2" and said["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    assert said["gemma2.attention.sliding_window"] == 64 and said["gemma2.attention.key_length"] == 32
    assert said["gemma2.attn_logit_softcapping"] == 50.0 and said["gemma2.final_logit_softcapping"] == 30.0
    assert said["tokenizer.ggml.bos_token_id"] == 1 and said["tokenizer.ggml.add_bos_token"] is False
    assert said["tokenizer.ggml.token_type"][:8] == [gguf.TokenType.CONTROL] * 7 + [gguf.TokenType.NORMAL]


def test_llama_3_rope(tmp_path: Path):
    folder = folder_of(tmp_path / "model", "llama", rope_parameters=ROPE_LLAMA_3, max_position_embeddings=512)
    export_gguf(folder, tmp_path / "m.gguf", "f32")
    model = AutoModelForCausalLM.from_pretrained(folder)
    plain = 1 / 10000.0 ** (torch.arange(0, 32, 2) / 32)
    # transformers keeps the slowed frequencies; the file holds what divides the plain ones.
    torch.testing.assert_close(
        torch.from_numpy(plain.numpy() / tensors(tmp_path / "m.gguf")["rope_freqs.weight"]), model.model.rotary_emb.inv_freq
    )
    long = "the quick brown fox " * 10
    assert verify_gguf(tmp_path / "m.gguf", folder, [long]).worst_gap < 0.02


@pytest.mark.parametrize(("pattern", "name"), [(None, "gpt-2"), (LLAMA_3, "dbrx"), (LLAMA_3.replace("{1,3}", ""), "qwen2")])
def test_trained_byte_level_bpe(tmp_path: Path, pattern: str | None, name: str):
    folder = folder_of(tmp_path / "model", "llama", byte_level(pattern))
    report = export_gguf(folder, tmp_path / "m.gguf", "f32")
    checked = verify_gguf(tmp_path / "m.gguf", folder, [*TEXT[:3], *HARD])
    assert facts(tmp_path / "m.gguf")["tokenizer.ggml.pre"] == name and not report.warnings
    assert checked.same_tokenization == 7 and checked.same_tokens == checked.tokens, checked


@pytest.mark.parametrize("prefix", [True, False], ids=["space first, as Llama 2", "as Gemma"])
def test_sentencepiece_with_byte_fallback(tmp_path: Path, prefix: bool):
    folder = folder_of(tmp_path / "model", "gemma", sentencepiece_like(prefix))
    report = export_gguf(folder, tmp_path / "m.gguf", "f32")
    checked = verify_gguf(tmp_path / "m.gguf", folder, [*TEXT[:3], *HARD])
    said = facts(tmp_path / "m.gguf")
    assert checked.same_tokenization == 7 and checked.same_tokens == checked.tokens, checked
    assert said["tokenizer.ggml.model"] == "llama" and said["tokenizer.ggml.add_space_prefix"] is prefix and not report.warnings
    assert said["tokenizer.ggml.token_type"][:2] == [gguf.TokenType.UNKNOWN, gguf.TokenType.BYTE]


def test_unknown_cutting_rule_is_announced(tmp_path: Path):
    folder = folder_of(tmp_path / "model", "llama", byte_level(r"\p{L}{1,2}|."))
    report = export_gguf(folder, tmp_path / "m.gguf", "f32", verify=False)
    assert "no name for how this tokenizer cuts words" in report.warnings[0]
    with pytest.raises(PantheraError, match="tokenizations as in transformers; first difference"):
        export_gguf(folder, tmp_path / "checked.gguf", "f32")
    assert not (tmp_path / "checked.gguf").exists()


def test_embedding_with_more_rows_than_tokens(tmp_path: Path):
    folder = folder_of(tmp_path / "model", "qwen2", vocab_size=288)
    report = export_gguf(folder, tmp_path / "m.gguf", "f32")
    said = facts(tmp_path / "m.gguf")
    assert len(said["tokenizer.ggml.tokens"]) == 288 and said["tokenizer.ggml.token_type"][263:] == [gguf.TokenType.UNUSED] * 25
    assert report.verified.worst_gap < 0.02
    with pytest.raises(PantheraError, match="ids up to 262 and its embedding 200 rows"):
        export_gguf(folder_of(tmp_path / "short", "qwen2", vocab_size=200), tmp_path / "s.gguf", "f32")


def test_rows_that_do_not_fill_a_block_are_counted(tmp_path: Path):
    folder = folder_of(tmp_path / "model", "llama", intermediate_size=344)
    report = export_gguf(folder, tmp_path / "m.gguf", "q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert report.fallbacks == 4 and kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"


def test_generation_marks_are_taken_out_of_the_template(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{%- generation -%}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    export_gguf(folder_of(tmp_path / "model", "llama", tokenizer), tmp_path / "m.gguf", "f32", verify=False)
    assert facts(tmp_path / "m.gguf")["tokenizer.chat_template"] == "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def test_sliding_window_that_llama_cpp_ignores_is_announced(tmp_path: Path):
    report = export_gguf(folder_of(tmp_path / "model", "mistral"), tmp_path / "m.gguf", "f32")
    assert "the same model up to 64 tokens" in report.warnings[0] and report.verified.worst_gap == 0


def test_wrong_file_is_found_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = folder_of(tmp_path / "model", "llama")
    monkeypatch.setattr("pantheraml.export.gguf._encode", lambda name, tensor, kind: np.roll(tensor.numpy(), 1))
    with pytest.raises(PantheraError, match=r"llama\.cpp does not agree with transformers"):
        export_gguf(folder, tmp_path / "m.gguf", "f32")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_damaged_file_is_refused(tmp_path: Path):
    folder = folder_of(tmp_path / "model", "llama")
    export_gguf(folder, tmp_path / "m.gguf", "f32", verify=False)
    (tmp_path / "half.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:100_000])
    with pytest.raises(StorageError, match=r"cannot load half\.gguf"):
        verify_gguf(tmp_path / "half.gguf", folder)


def test_without_an_engine_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llamacpp, "_installed_engine", lambda: None)
    report = export_gguf(folder_of(tmp_path / "model", "llama"), tmp_path / "m.gguf", "f32")
    assert str(report.verified) == "not checked by another engine: pip install xllamacpp"


def test_k_quant_without_a_quantiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingExtra, match="llama-cpp-python is not installed"):
        export_gguf(folder_of(tmp_path / "model", "llama"), tmp_path / "m.gguf", "q4_k_m")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_quantiser_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'no room' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setenv("PATH", f"{program.parent}:/bin:/usr/bin")
    with pytest.raises(StorageError, match="quantising to Q6_K failed with code 3: no room"):
        export_gguf(folder_of(tmp_path / "model", "llama"), tmp_path / "m.gguf", "q6_k")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bin", "model"]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_k_quant(tmp_path: Path):
    pytest.importorskip("llama_cpp", reason="K-quants need llama-cpp-python")
    folder = folder_of(tmp_path / "model", "llama", hidden_size=256, intermediate_size=512)
    right = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].numpy()
    # A block keeps 4, 5 or 6 bits a weight: the error halves with each bit (measured on normal weights: 0.08, 0.04, 0.02).
    for kind, error in (("q4_k_m", 0.1), ("q5_k_m", 0.05), ("q6_k", 0.025)):
        report = export_gguf(folder, tmp_path / f"{kind}.gguf", kind)
        there = tensors(tmp_path / f"{kind}.gguf")["blk.0.ffn_up.weight"]
        assert np.linalg.norm(there - right) < error * np.linalg.norm(right)
        # Random weights have no margin for 4 bits, so how far the continuations agree is reported, not judged.
        assert report.fallbacks == 0 and report.verified.tokens > 50 and report.verified.same_tokenization == 4
    narrow = export_gguf(folder_of(tmp_path / "narrow", "llama"), tmp_path / "narrow.gguf", "q4_k_m")
    assert narrow.fallbacks > 0, "128 columns do not fill a block of 256"


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"model_type": "opt"}, "models of the type opt cannot be written"),
        ("qwen2", {"rope_parameters": {**ROPE_LLAMA_3}}, "rope of the kind llama3 cannot be written for qwen2"),
        ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar=100"),
        ("cohere2", {"layer_types": ["full_attention"] + ["sliding_attention"] * 3}, "on other layers than llama.cpp expects"),
    ],
)
def test_what_gguf_cannot_say_is_refused(tmp_path: Path, family: str, change: dict[str, object], message: str):
    folder = folder_of(tmp_path / "model", family)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(PantheraError, match=message):
        export_gguf(folder, tmp_path / "m.gguf", "f32")


def test_adapter_is_not_a_model(tmp_path: Path):
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(StorageError, match=r"holds no config\.json"):
        export_gguf(tmp_path, tmp_path / "m.gguf", "f32")
    tiny_config("llama").save_pretrained(tmp_path)
    with pytest.raises(StorageError, match="merge the adapter first"):
        export_gguf(tmp_path, tmp_path / "m.gguf", "f32")

"""llama.cpp as judge and as quantiser: what it reads in a GGUF file, compared with what transformers says."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import secrets
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pantheraml.errors import MissingExtra, PantheraError, StorageError
from pantheraml.export.safetensors import PROBES

CONTEXT = 1024  # tokens; enough for the prompts of a check, and little memory even for a model with a long context
# How far below transformers' best token the token that llama.cpp chose may lie, in standard deviations of the logits:
# a near tie may fall either way where the arithmetic rounds otherwise. For K-quants the distance is only reported.
TIE = {"F32": 0.02, "F16": 0.05, "BF16": 0.15, "Q8_0": 0.3}


@dataclass(frozen=True)
class Verified:
    """What another engine made of a file. `engine` is None where none is installed: then nothing was checked."""

    engine: str | None
    prompts: int = 0
    same_tokenization: int = 0  # prompts cut into the same tokens
    tokens: int = 0  # chosen greedily by the engine
    same_tokens: int = 0  # of these, transformers would choose the same after the same text
    worst_gap: float = 0.0  # standard deviations below transformers' best, over the tokens that differ
    first_difference: str | None = None

    def __str__(self) -> str:
        if self.engine is None:
            return "not checked by another engine: pip install xllamacpp"
        said = (
            f"{self.engine}: {self.same_tokens} of {self.tokens} greedy tokens and "
            f"{self.same_tokenization} of {self.prompts} tokenizations as in transformers"
        )
        return f"{said}; {self.first_difference}" if self.first_difference else said


class _Engine(Protocol):
    name: str

    def tokenize(self, text: str) -> list[int]: ...

    def complete(self, ids: list[int], tokens: int) -> list[int]: ...

    def close(self) -> None: ...


def verify_gguf(
    file: Path, folder: Path, prompts: Sequence[str] | None = None, tokens: int = 24, *, longest: int | None = None
) -> Verified:
    """Let llama.cpp read `file`, and compare its tokens and its greedy continuation with transformers on `folder`.

    transformers (float32, CPU) is asked at each token what it would have chosen after the engine's own text, so one
    near tie does not make the rest of a continuation count as different. Nothing is compared beyond `longest` tokens,
    where the engine is known to read the family otherwise.

    Raises: StorageError if the engine cannot load the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    room = CONTEXT if longest is None else min(CONTEXT, longest)
    open_engine = _installed_engine()
    if open_engine is None:
        return Verified(None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    texts = list(prompts) if prompts is not None else _prompts(tokenizer)
    same_cut, chosen, same, worst, first = 0, 0, 0, 0.0, None
    engine = open_engine(file)
    try:
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            theirs = engine.tokenize(text)
            same_cut += theirs == ids
            if theirs != ids:
                first = first or f"first difference: {text[:40]!r} is {ids[:12]} here and {theirs[:12]} there"
            ids = ids[: max(1, room - tokens)]
            answer = engine.complete(ids, min(tokens, room - len(ids)))
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].float()
            for row, token in zip(logits, answer, strict=True):
                gap = float((row.max() - row[token]) / row.std())
                same += gap == 0
                worst = max(worst, gap)
                if gap:
                    first = first or f"first difference: token {token} after {text[:40]!r}, {gap:.2g} deviations below the best"
            chosen += len(answer)
    finally:
        engine.close()
    return Verified(engine.name, len(texts), same_cut, chosen, same, worst, first)


def require_agreement(verified: Verified, type_name: str) -> None:
    """Raises: PantheraError if the engine reads another model or another text than transformers."""
    tolerance = TIE.get(type_name)
    cut_alike = verified.same_tokenization == verified.prompts
    if cut_alike and (tolerance is None or verified.worst_gap <= tolerance):
        return
    raise PantheraError(
        f"llama.cpp does not agree with transformers on this file: {verified}",
        why="whoever runs it would get another model than the one that was trained; the file was removed",
        fix="serve the merged folder with transformers, or pass verify=False to keep the file as it is",
    )


def quantize(source: Path, out: Path, type_name: str) -> None:
    """Rewrite a 16-bit GGUF as a K-quant, with llama-cpp-python or else the `llama-quantize` program.

    Raises: MissingExtra where neither is there, StorageError where it fails.
    """
    import gguf

    file_type = int(gguf.LlamaFileType[f"MOSTLY_{type_name}"])
    try:
        import llama_cpp  # pyright: ignore[reportMissingImports] - optional
    except ImportError:
        program = shutil.which("llama-quantize")
        if program is None:
            raise MissingExtra("llama-cpp-python", needed_for=f"quantising to {type_name}", install="'pantheraml[gguf]'") from None
        done = subprocess.run([program, str(source), str(out), type_name], capture_output=True, text=True, check=False)
        failed, said = done.returncode, done.stderr[-300:]
    else:
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # otherwise two lines a tensor
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = file_type
        failed, said = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params), ""
    if failed:
        raise StorageError(
            f"quantising to {type_name} failed with code {failed}: {said}",
            why="llama.cpp stopped while it wrote the file; nothing was left",
            fix="free space, or export as q8_0, which needs no other program",
        )


def _prompts(tokenizer: Any) -> list[str]:
    chat = [{"role": "user", "content": "What is 7 times 8?"}]
    has_template = isinstance(tokenizer.chat_template, str)
    return [*PROBES, *([tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)] if has_template else [])]


def _installed_engine() -> Callable[[Path], _Engine] | None:
    engines: dict[str, Callable[[Path], _Engine]] = {"xllamacpp": _XLlamaCpp, "llama_cpp": _LlamaCppPython}
    return next((engine for module, engine in engines.items() if importlib.util.find_spec(module)), None)


def _cannot_load(file: Path, engine: str) -> StorageError:
    return StorageError(
        f"{engine} cannot load {file.name}",
        why="the file is damaged, or this llama.cpp is older than the model's family",
        fix=f"pip install --upgrade {engine}, and export again",
    )


class _XLlamaCpp:
    """llama.cpp in this process; its server answers on a port of this machine only, and asks for a key."""

    name = "xllamacpp"

    def __init__(self, file: Path) -> None:
        xllamacpp: Any = importlib.import_module("xllamacpp")  # a compiled module without types
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.offline = True
        params.verbosity = -1
        params.n_ctx = CONTEXT
        params.n_gpu_layers = 0
        params.warmup = params.fit_params = params.ui = False
        # The cache is float16 by default, and flash attention rounds again: here the file is judged, not the cache.
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._key = secrets.token_hex(16)
        params.api_keys = [self._key]
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise _cannot_load(file, self.name) from error
        # No proxy of the environment for a port of this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        # xllamacpp 2026.10 waits for ever when it is closed before its loop has begun; an answer shows that it has.
        self.tokenize("a")

    def _ask(self, path: str, question: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        address = f"{self._server.listening_address}{path}"
        try:
            with self._opener.open(urllib.request.Request(address, json.dumps(question).encode(), headers), timeout=600) as answer:
                return json.loads(answer.read())
        except OSError as error:
            raise PantheraError(
                f"{self.name} did not answer {path}: {error}",
                why="the file was loaded, but not compared with transformers",
                fix="try again, or pass verify=False to keep the file unchecked",
            ) from error

    def tokenize(self, text: str) -> list[int]:
        return self._ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def complete(self, ids: list[int], tokens: int) -> list[int]:
        question = {"prompt": ids, "n_predict": tokens, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        return self._ask("/completion", question)["tokens"]

    def close(self) -> None:
        del self._server


class _LlamaCppPython:
    name = "llama-cpp-python"

    def __init__(self, file: Path) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports] - optional

        try:
            self._model = llama_cpp.Llama(
                str(file), n_ctx=CONTEXT, n_gpu_layers=0, verbose=False, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32
            )
        except ValueError as error:
            raise _cannot_load(file, self.name) from error
        self._adds_bos = self._model.metadata.get("tokenizer.ggml.add_bos_token") == "true"

    def tokenize(self, text: str) -> list[int]:
        return self._model.tokenize(text.encode(), add_bos=self._adds_bos, special=True)

    def complete(self, ids: list[int], tokens: int) -> list[int]:
        answer: list[int] = []
        for token in self._model.generate(ids, top_k=1, temp=0.0):
            answer.append(token)
            if len(answer) == tokens or token == self._model.token_eos():
                return answer
        return answer

    def close(self) -> None:
        self._model.close()

"""A run that is there: talk to what it trained, take it away, look at what it left."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pantheraml.data.chat import Encoder
from pantheraml.engines.open import loading_device
from pantheraml.errors import PantheraError, RecipeError, StorageError
from pantheraml.export.gguf import export_gguf
from pantheraml.export.ollama import write_modelfile
from pantheraml.export.safetensors import atomic_folder, merge
from pantheraml.hardware.backend import backend_of
from pantheraml.hardware.find import find
from pantheraml.models.generate import generate
from pantheraml.models.load import load_model, load_tokenizer
from pantheraml.recipe.load import load_recipe
from pantheraml.recipe.types import Format, GgufType, HardwareAsk, ModelSpec, Recipe
from pantheraml.trainer.folder import ADAPTER, BASE, GGUF, MERGED, MODEL, RECIPE, is_run, read_json
from pantheraml.trainer.report import REPORT

Target = Literal["adapter", "merged", "gguf", "ollama"]


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and what was found when it was checked."""

    path: Path
    said: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model on its device, ready to answer. `can_compare`: its adapter can be switched off."""

    model: Any
    tokenizer: Any
    encoder: Encoder
    can_compare: bool

    def untuned(self) -> AbstractContextManager[Any]:
        """Within the block the model answers as it did before training. Raises: RecipeError if it has no adapter."""
        if not self.can_compare:
            raise RecipeError(
                "there is no base to compare with",
                why="only an adapter can be switched off; here every weight was trained, or none",
                fix="leave --compare out, or name a run that trained an adapter",
            )
        return self.model.disable_adapter()

    def answer(
        self, messages: Sequence[Any], *, max_new_tokens: int = 256, temperature: float = 0.0, on_text: Any = None, tuned: bool = True
    ) -> str:
        """The next turn of a conversation, as text."""
        with nullcontext() if tuned else self.untuned():
            tokens = self.encoder.ask(list(messages))
            return generate(self.model, self.tokenizer, [tokens], max_new_tokens=max_new_tokens, temperature=temperature, on_text=on_text)[
                0
            ]


class Run:
    """What a run folder holds. Making one reads nothing; each part is read when it is asked for."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @cached_property
    def recipe(self) -> Recipe:
        """As it was asked. Raises: StorageError if the folder holds no run."""
        if not is_run(self.folder):
            raise StorageError(
                f"{self.folder} holds no run",
                why=f"a run folder has a {RECIPE} in it",
                fix="list the runs that are there: pantheraml runs",
            )
        return load_recipe(self.folder / RECIPE)

    @property
    def report(self) -> dict[str, Any] | None:
        """report.json; None until the run has ended."""
        return read_json(self.folder / REPORT)

    @property
    def base(self) -> str:
        """Where the untuned model is: a folder, or a name on the Hub."""
        base = self.folder / BASE
        return str(base) if base.is_dir() else self.recipe.model.name

    @cached_property
    def loaded(self) -> Loaded:
        """The tuned model. Raises: StorageError if the run has not ended."""
        self._need_result()
        report = self.report or {}
        format: Format = report.get("data", {}).get("format", "messages")
        adapter = self.folder / ADAPTER
        spec = self.recipe.model.model_copy(update={"name": self.base if adapter.is_dir() else str(self.folder / MODEL)})
        return load_target(spec, adapter=adapter if adapter.is_dir() else None, format=format, ask=self.recipe.hardware)

    def chat(self, message: str, *, max_new_tokens: int = 256, temperature: float = 0.0) -> str:
        """The tuned model's answer to one message."""
        return self.loaded.answer([{"role": "user", "content": message}], max_new_tokens=max_new_tokens, temperature=temperature)

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int = 256, temperature: float = 0.0) -> list[str]:
        """The answer to each message, all at once."""
        loaded = self.loaded
        tokens = [loaded.encoder.ask([{"role": "user", "content": prompt}]) for prompt in prompts]
        return generate(loaded.model, loaded.tokenizer, tokens, max_new_tokens=max_new_tokens, temperature=temperature)

    def export(
        self, to: Target, *, type: GgufType = "q8_0", out: Path | str | None = None, verify: bool = True, overwrite: bool = False
    ) -> Exported:
        """Write what was trained in a form that other programs read.

        Args:
            to: adapter (for PEFT), merged (for transformers), gguf (for llama.cpp), or ollama (gguf and a Modelfile).
            type: of the GGUF file.
            out: a folder for adapter and merged, a file for gguf and ollama. Default: inside the run folder.
            verify: read it back and compare, gguf by llama.cpp where it is installed.
        Raises: StorageError, PantheraError: see the export room.
        """
        self._need_result()
        adapter, model = self.folder / ADAPTER, self.folder / MODEL
        match to:
            case "adapter":
                if not adapter.is_dir():
                    raise PantheraError(
                        f"{self.folder} has no adapter", why="it trained every weight", fix="export merged, gguf or ollama instead"
                    )
                if out is None:
                    return Exported(adapter, "it is there already; it loads with peft.PeftModel.from_pretrained")
                with atomic_folder(Path(out), overwrite=overwrite) as folder:
                    shutil.copytree(adapter, folder, dirs_exist_ok=True)
                return Exported(Path(out), "copied")
            case "merged":
                if model.is_dir() and out is None:
                    return Exported(model, "every weight was trained, so there is nothing to merge")
                place = Path(out) if out else self.folder / MERGED
                if model.is_dir():
                    with atomic_folder(place, overwrite=overwrite) as folder:
                        shutil.copytree(model, folder, dirs_exist_ok=True)
                    return Exported(place, "copied")
                return self._merge(place, verify=verify, overwrite=overwrite or out is None)
            case "gguf" | "ollama":
                file = Path(out) if out else self.folder / GGUF / f"{self.folder.name}.{type}.gguf"
                if out and not overwrite:
                    _refuse_files(file, *([file.with_name("Modelfile")] if to == "ollama" else []))
                return self._gguf(file, type, verify=verify, modelfile=to == "ollama")

    def _merge(self, place: Path, *, verify: bool, overwrite: bool) -> Exported:
        spec = self.recipe.model
        report = merge(
            self.base,
            self.folder / ADAPTER,
            place,
            revision=spec.revision if self.base == spec.name else None,
            trust_remote_code=spec.trust_remote_code,
            verify=verify,
            overwrite=overwrite,
        )
        checked = (
            "not compared" if report.merge_error is None else f"logits differ by {report.merge_error:.1e} (relative) from base + adapter"
        )
        return Exported(place, f"{report.dtype}, {checked}")

    def _gguf(self, file: Path, type: GgufType, *, verify: bool, modelfile: bool) -> Exported:
        whole = next((place for place in (self.folder / MODEL, self.folder / MERGED) if place.is_dir()), None)
        passing = self.folder / ".merged"  # an intermediate: the user did not ask to keep it
        try:
            if whole is None:
                self._merge(passing, verify=verify, overwrite=True)
            report = export_gguf(whole or passing, file, type, verify=verify)
            if modelfile:
                write_modelfile(file, file.with_name("Modelfile"), load_tokenizer(ModelSpec(name=str(whole or passing))))
        finally:
            shutil.rmtree(passing, ignore_errors=True)
        said = f"{report.type}, {report.bytes / 2**20:.1f} MiB" + (f"; {report.verified}" if report.verified else "")
        said += "".join(f"; {warning}" for warning in report.warnings)
        return Exported(file, said + (f"; next: ollama create {self.folder.name} -f {file.with_name('Modelfile')}" if modelfile else ""))

    def _need_result(self) -> None:
        _ = self.recipe
        if not any((self.folder / place).is_dir() for place in (ADAPTER, MODEL)):
            raise StorageError(
                f"the run {self.folder} has not ended: there is no adapter and no model in it",
                why="they are written at the end of training",
                fix=f"go on with it: pantheraml resume {self.folder}",
            )


def _refuse_files(*files: Path) -> None:
    for file in files:
        if file.exists():
            raise StorageError(
                f"{file} is there already",
                why="it may be something else, and would be replaced",
                fix="name another file, or pass --overwrite",
            )


def load_target(spec: ModelSpec, *, adapter: Path | None = None, format: Format = "messages", ask: HardwareAsk | None = None) -> Loaded:
    """A model for answering: on the device that a run would use, in the dtype that is fastest there."""
    import torch

    ask = ask or HardwareAsk()
    device = find(ask).device
    backend = backend_of(device)
    backend.set_threads(ask.threads)
    dtype = getattr(torch, spec.dtype if spec.dtype != "auto" else device.dtypes[0])
    model: Any = load_model(spec, dtype=dtype, device=loading_device(backend, device.index))
    tokenizer = load_tokenizer(ModelSpec(name=str(adapter)) if adapter else spec)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    if format not in ("prompt-completion", "text") and not tokenizer.chat_template:
        format = "text"  # a base model without a template goes on with the text
    return Loaded(model, tokenizer, Encoder(tokenizer, "assistant", format), can_compare=adapter is not None)


def list_runs(root: Path) -> list[Run]:
    """The runs in a folder, the newest last."""
    if not root.is_dir():
        return []
    places = [place for place in root.iterdir() if is_run(place)]
    return [Run(place) for place in sorted(places, key=lambda place: (place / RECIPE).stat().st_mtime)]

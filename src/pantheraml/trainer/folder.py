"""Run folders: their names, what lies in them, and that one process at a time writes into one."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import blake3

from pantheraml.errors import RecipeError, StorageError
from pantheraml.export.safetensors import atomic_file
from pantheraml.recipe.load import dump_recipe, load_recipe
from pantheraml.recipe.types import Recipe

RECIPE, PLAN, BEFORE, BAD_ROWS = "recipe.yaml", "plan.json", "before.json", "bad_rows.jsonl"
BASE, ADAPTER, MODEL, MERGED, GGUF, CHECKPOINTS = "base", "adapter", "model", "merged", "gguf", "checkpoints"
LOGS = "logs"
"""Of the processes of a run, where there are several. They are started before it is decided whether it begins, so this is no sign of one."""
_LOCK = ".lock"
# What a kill leaves of a file or folder that was being written beside its place.
_LEFTOVER = re.compile(r"\.(.+\.)?[0-9a-f]{8}(\.old)?|\.merged")


def usual_name(recipe: Recipe) -> str:
    """`qwen3-0.6b-faq` for model Qwen/Qwen3-0.6B and data faq.jsonl."""
    model = Path(recipe.model.name.removeprefix("tiny:").rstrip("/"))
    parts = model.parts[-2:] if model.name in (MODEL, MERGED, BASE) else model.parts[-1:]
    data = recipe.data.train[0].removeprefix("hub:").rstrip("/")
    return _slug("-".join((*parts[:1], Path(data).stem)))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "run"


def is_run(folder: Path) -> bool:
    """Whether a run was started here."""
    return (folder / RECIPE).is_file()


def adapter_folder(place: Path) -> Path:
    """The folder of a LoRA adapter: the place itself, or what a run has trained there. Raises: RecipeError if it has none."""
    for folder in (place, place / ADAPTER):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise RecipeError(
        f"{place} holds no adapter",
        why="a LoRA adapter is a folder with adapter_config.json and adapter_model.safetensors",
        fix="name such a folder, or the folder of a run that trained one",
    )


@contextmanager
def open_folder(recipe: Recipe, *, resume: bool) -> Iterator[tuple[Path, Recipe]]:
    """The run's folder, locked, and the recipe with the run's name in it.

    Raises:
        StorageError: the folder cannot be written, is in use, or holds another run.
        RecipeError: to be resumed, but the recipe is not the one it was started with.
    """
    from filelock import FileLock, Timeout

    folder = choose_folder(recipe, resume)
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"name": folder.name})})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _try_to_write(folder)
        lock = FileLock(folder / _LOCK, blocking=False)
        lock.acquire()
    except Timeout as error:
        raise StorageError(
            f"the run {folder} is in use by another process",
            why="two processes in one run folder would overwrite each other's checkpoints",
            fix="wait for it, end it, or choose another run.name",
        ) from error
    except OSError as error:
        raise StorageError(
            f"the run folder {folder} cannot be written: {error.strerror or error}",
            why="checkpoints, metrics and results are kept in it",
            fix="set run.folder to a folder that you may write to, or correct its permissions",
        ) from error
    try:
        if is_run(folder):
            for place in (*folder.iterdir(), *(folder / GGUF).glob("*")):
                if _LEFTOVER.fullmatch(place.name):
                    _delete(place)
            _check_same(folder, recipe)
            yield folder, recipe
        else:
            with _begun(folder):
                with atomic_file(folder / RECIPE) as unfinished:
                    unfinished.write_text(dump_recipe(recipe), "utf-8")
                yield folder, recipe
    finally:
        lock.release()


@contextmanager
def _begun(folder: Path) -> Iterator[None]:
    """A run that fails before its first checkpoint leaves its name free, for the same command with the mistake corrected."""
    before = set(folder.iterdir())
    try:
        yield
    except BaseException:  # also an interrupt; it is raised again
        if not (folder / CHECKPOINTS).exists():
            for place in set(folder.iterdir()) - before - {folder / _LOCK, folder / BAD_ROWS, folder / LOGS}:
                _delete(place)
        raise


def _delete(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)


def choose_folder(recipe: Recipe, resume: bool) -> Path:
    """Where a run goes: into the folder that it names, or one that is free, or the newest of that name to be resumed. Makes nothing.

    Raises: RecipeError for a name that is a path; StorageError for a folder that is in use for something else.
    """
    root = Path(recipe.run.folder)
    if recipe.run.name is not None:
        folder = root / recipe.run.name
        if folder.parent != root or recipe.run.name == "..":
            raise RecipeError(
                f"run.name={recipe.run.name} is a path",
                why="run folders lie side by side in run.folder, so that they can be listed",
                fix="write the path as run.folder, and its last part as run.name",
            )
        if not is_run(folder) and _holds_something(folder):
            raise StorageError(
                f"the folder {folder} is there already, and is no run",
                why="a run writes and replaces what it needs, and what is in there may not be its own",
                fix="set run.name or run.folder to a place that is empty or new",
            )
        if is_run(folder) and not resume:
            raise StorageError(
                f"the run {folder} is there already",
                why="a new run would mix its checkpoints with the old ones",
                fix=f"go on with it: pantheraml resume {folder}; or set run.name to another name, or remove the folder",
            )
        return folder
    name = usual_name(recipe)
    folder, number, newest = root / name, 1, None
    while is_run(folder) or _holds_something(folder):
        newest = folder if is_run(folder) else newest
        number += 1
        folder = root / f"{name}-{number}"
    return newest if resume and newest else folder


def _holds_something(folder: Path) -> bool:
    """Whether there is more than a run that failed before it began leaves."""
    return folder.is_dir() and any(place.name not in (_LOCK, BAD_ROWS, LOGS) for place in folder.iterdir())


def _try_to_write(folder: Path) -> None:
    probe = folder / f".{secrets.token_hex(4)}"
    try:
        probe.write_bytes(b"")
    finally:
        probe.unlink(missing_ok=True)


def _check_same(folder: Path, recipe: Recipe) -> None:
    """What decides the weights must be as it was; the rest may change."""
    before = learned(load_recipe(folder / RECIPE))
    now = learned(recipe)
    changed = [f"{section}.{key}" for section in now for key in now[section] if before[section].get(key) != now[section][key]]
    if changed:
        raise RecipeError(
            f"the run {folder} was started with another recipe: {', '.join(changed)} differ",
            why="going on with other settings gives weights that neither recipe would give",
            fix=f"go on as it was started: pantheraml resume {folder}; or start a new run with another run.name",
        )


def learned(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The part of a recipe that decides which weights come out. micro_tokens only changes how sums are rounded."""
    parts = {name: getattr(recipe, name).model_dump(mode="json") for name in ("model", "data", "method", "adapter", "batch", "optim")}
    del parts["batch"]["micro_tokens"]
    parts["eval"] = {"early_stop": recipe.eval.early_stop, "every": recipe.eval.every}
    parts["run"] = {"seed": recipe.run.seed, "best": recipe.run.best}
    return parts


def fingerprint(recipe: Recipe, data: str) -> str:
    """What decides the weights, in one word. data: that of the rows."""
    parts = learned(recipe)
    for place in ("train", "eval"):  # a moved file is the same data; what is in it is in `data`
        del parts["data"][place]
    del parts["model"]["name"]
    if parts["optim"]["states"] == "float32":  # older runs have no such key, and go on
        del parts["optim"]["states"]
    return blake3.blake3(repr((parts, data)).encode()).hexdigest()


def write_json(path: Path, values: Any) -> None:
    """Whole or not at all."""
    with atomic_file(path) as unfinished:
        unfinished.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", "utf-8")


def read_json(path: Path) -> Any:
    """What `write_json` wrote; None if it is not there. Raises: StorageError if it is not JSON."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise StorageError(
            f"{path} cannot be read: {error}",
            why="the run needs it to go on as it began",
            fix="remove the file: it is made again, for this machine",
        ) from error

"""`pantheraml serve`: an HTTP service from the command line."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pantheraml.errors import DataError, MissingExtra, RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from pantheraml.council.persona import Persona
    from pantheraml.memory.store import Memory

MEMORY_KEY = "PANTHERAML_MEMORY_KEY"
SHORTEST_KEY = 16
"""Characters of an API key."""

serve_app = typer.Typer(rich_markup_mode=None)


@serve_app.command()
def serve(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, a model folder, a Hub id, or tiny:llama.")],
    host: Annotated[str, typer.Option(help="Where it listens. Elsewhere than on this machine it needs an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model id. Default: the folder's name, or the model as it is named.")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of the weights; auto: the fastest of the device's.")
    ] = "auto",
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="NAME=PATH", help="A LoRA adapter, or a run; NAME is its model id.")
    ] = None,
    api_key_env: Annotated[str | None, typer.Option(metavar="NAME", help="The variable that holds the API key.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file that holds the API key.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Answers at once. Default: as many as fit into memory.")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Of a prompt and its answer together.")] = None,
    memory: Annotated[Path | None, typer.Option(help=f"A store where councils look and keep transcripts; key: {MEMORY_KEY}.")] = None,
    personas: Annotated[Path | None, typer.Option(help="YAML with the advisors of councils.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Of a prompt.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer.")] = None,
    max_body: Annotated[int, typer.Option(min=1024, metavar="BYTES", help="Of a request.")] = 4 * 2**20,
    queue: Annotated[int, typer.Option(min=0, help="Answers that may wait for a row.")] = 256,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of a request; its answer then ends as it is.")] = 600.0,
    grace: Annotated[float, typer.Option(min=0.0, help="Seconds for answers in work when it is told to end.")] = 10.0,
) -> None:
    """Serve a model over HTTP, after OpenAI's API: chat, completions, embeddings, and councils. See docs/serve.md."""
    try:
        from pantheraml.serve.server import bind, check_reach
        from pantheraml.serve.server import serve as serve_on
    except ImportError as error:
        absent = (error.name or "").partition(".")[0]
        if absent not in ("fastapi", "h11", "starlette", "uvicorn"):
            raise
        raise MissingExtra(absent, needed_for="an HTTP service", install="pantheraml[serve]") from error
    from pantheraml.serve.limits import Limits
    from pantheraml.serve.opening import open_service

    key = read_key(os.environ, api_key_env, api_key_file)
    hosts = check_reach(host, key)  # before anything is loaded
    limits = Limits(
        body_bytes=max_body,
        prompt_tokens=max_prompt_tokens,
        new_tokens=max_new_tokens,
        queue=queue,
        seconds=seconds,
        grace_seconds=grace,
    )
    adapters, advisors = named_adapters(adapter or ()), _personas(personas)
    with ExitStack() as closing:
        listening = closing.enter_context(bind(host, port))
        service = open_service(
            target,
            name=name,
            dtype=dtype,
            adapters=adapters,
            rows=rows,
            tokens=tokens,
            limits=limits,
            personas=advisors,
            keys={name: os.environ[name] for each in advisors or () if (name := _key_name(each)) and name in os.environ},
            memory=None if memory is None else closing.enter_context(_memory(memory)),
            key=key,
            hosts=hosts,
        )
        _log_to_stderr()
        batcher, (at, bound) = service.engine.batcher, listening.getsockname()[:2]
        _say(f"models: {', '.join(service.models)}")
        _say(f"device: {service.device.label}, {service.dtype}, {batcher.rows} rows of {batcher.tokens} tokens")
        if batcher.fallback:
            _say(f"answers are computed one by one: {batcher.fallback}")
        _say(f"listening on http://{f'[{at}]' if ':' in at else at}:{bound}/v1" + ("" if key is None else ", with an API key"))
        serve_on(service, listening, announce=_say)
    _say("ended")


def read_key(environment: Mapping[str, str], name: str | None, file: Path | None) -> str | None:
    """The API key; None: none was asked for. Raises: RecipeError, which does not say the key, if it is not there or too short."""
    if name is not None and file is not None:
        raise RecipeError("both --api-key-env and --api-key-file are given", why="there is one key", fix="leave one of them out")
    if name is not None:
        where, key = f"the variable {name}", environment.get(name, "").strip()
    elif file is not None:
        try:
            where, key = str(file), file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read", why=f"it holds the API key: {error}", fix="check the path") from error
    else:
        return None
    if len(key) < SHORTEST_KEY or not re.fullmatch(r"[!-~]+", key):
        raise RecipeError(
            f"{where} holds no API key that can be used",
            why=f"a key has at least {SHORTEST_KEY} characters of ASCII without spaces, so that nobody guesses it",
            fix="make one: openssl rand -hex 32",
        )
    return key


def named_adapters(words: Sequence[str]) -> dict[str, Path]:
    """`NAME=PATH` of each word. Raises: RecipeError."""
    found: dict[str, Path] = {}
    for word in words:
        name, sign, path = word.partition("=")
        if not sign or not name or not path or name in found:
            raise RecipeError(
                f"--adapter {word} is not NAME=PATH, or NAME is there twice",
                why="it says under which model id the adapter in that folder answers",
                fix="write --adapter lawyer=runs/lawyer",
            )
        found[name] = Path(path)
    return found


def _personas(file: Path | None) -> tuple[Persona, ...] | None:
    if file is None:
        return None
    from pantheraml.council import load_personas

    return load_personas(file)


def _key_name(persona: Persona) -> str | None:
    """Of the variable with the key of the service that answers for an advisor."""
    return None if persona.endpoint is None else persona.endpoint.key_env


def _memory(path: Path) -> Memory:
    from pantheraml.memory.seal import Keys
    from pantheraml.memory.store import Memory

    return Memory.open(path, keys=Keys.from_mapping(os.environ, MEMORY_KEY), announce=_say)


def _log_to_stderr() -> None:
    """What is computed how fast, while it is."""
    log = logging.getLogger("pantheraml.serve")
    log.setLevel(logging.INFO)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.propagate = False


def _say(said: str) -> None:
    _err().print(said, markup=False, highlight=False)


def _err() -> Console:
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True)

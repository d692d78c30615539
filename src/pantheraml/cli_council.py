"""`pantheraml council`: advisors that debate, from the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pantheraml.errors import DataError, StorageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from pantheraml.council.local import Local
    from pantheraml.council.persona import Persona
    from pantheraml.memory.store import Memory

MEMORY_KEY = "PANTHERAML_MEMORY_KEY"

council_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="A question goes to several advisors, who answer, read each other, and revise; what it comes to is measured. See docs/council.md.",
)

Personas = Annotated[Path | None, typer.Option(metavar="FILE", help="A YAML file that says who debates. Default: five of ours.")]
Store = Annotated[Path, typer.Option("--memory", metavar="STORE", help="The folder of a memory.")]
KeyFile = Annotated[
    Path | None, typer.Option(help=f"A file with the key of an encrypted memory. Default: {MEMORY_KEY} in the environment.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@council_app.command()
def ask(
    question: Annotated[str, typer.Argument(metavar="QUESTION")],
    model: Annotated[str | None, typer.Option(metavar="RUN|MODEL", help="Answers for advisors without an endpoint.")] = None,
    personas: Personas = None,
    rounds: Annotated[int, typer.Option(min=1, help="At most, the first answers included.")] = 2,
    samples: Annotated[int, typer.Option(min=0, help="Ask each advisor so often again, to measure its confidence.")] = 0,
    quorum: Annotated[
        Literal["majority", "weighted", "supermajority", "unanimous"], typer.Option(help="When the council has decided.")
    ] = "majority",
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer in tokens. Default: 256, or a quarter of the model's context if that is less.")
    ] = None,
    extract: Annotated[bool, typer.Option("--extract", help="Put the synthesis together from what was said; no model words it.")] = False,
    calibration: Annotated[Path | None, typer.Option(metavar="FILE", help="What calibrate has written, for the confidence.")] = None,
    memory: Annotated[
        Path | None, typer.Option(metavar="STORE", help="Recall earlier debates from this memory, and keep this one in it.")
    ] = None,
    key_file: KeyFile = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the transcript as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Let advisors debate a question."""
    from pantheraml.council import Calibration, Settings, View, debate

    who = _personas(personas)
    learned = Calibration.load(calibration) if calibration else None
    if out is not None and not out.parent.is_dir():
        raise StorageError(f"there is no folder {out.parent}", why="the transcript goes there", fix="make it, or name another file")
    with _memory(memory, key_file) as opened, _interruptible():
        local = _local(model, who, samples)
        settings = Settings(
            rounds=rounds,
            max_new_tokens=max_new_tokens or (256 if local is None else min(256, local.batcher.tokens // 4)),
            seed=seed,
            quorum=quorum,
            samples=samples,
            synthesis="extract" if extract else "auto",
            calibration=learned,
        )
        with View(_err()) as view:
            found = debate(question, who, settings, local=local, memory=opened, keys=_keys(who), on_event=view.hear)
    if out is not None:
        _write(out, json.dumps(found.to_dict(), ensure_ascii=False, indent=2) + "\n")
    if as_json:
        return _print_json(found.to_dict())
    print(found.summary() + (f"\nKept: {found.key}" if memory else ""))


@council_app.command(name="personas")
def list_personas(
    personas: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Default: ours.")] = None, as_json: AsJson = False
) -> None:
    """List who debates."""
    found = _personas(personas)
    if as_json:
        return _print_json([asdict(each) for each in found])
    for each in found:
        voice = f" at {each.endpoint.url}, {each.endpoint.model}" if each.endpoint else f" with {each.adapter}" if each.adapter else ""
        print(f"{each.name}  (temperature {each.temperature:g}, weight {each.weight:g}){voice}\n  {each.system}")


@council_app.command()
def search(
    text: Annotated[str, typer.Argument(metavar="TEXT")],
    memory: Store,
    k: Annotated[int, typer.Option("-k", min=1, help="So many at most.")] = 5,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Find debates in a memory by likeness to a text, the likest first."""
    from pantheraml.council import archive
    from pantheraml.council.transcript import shown

    with _memory(memory, key_file, readonly=True) as opened:
        assert opened is not None
        hits = archive.search(opened, text, k)
    if as_json:
        return _print_json([asdict(hit) for hit in hits])
    for hit in hits:
        print(f"{hit.likeness:5.2f}  {hit.key}\n       " + shown(f"{hit.question}\n       -> {hit.verdict}"))


@council_app.command()
def show(
    key: Annotated[str, typer.Argument(metavar="KEY", help="As search prints it.")],
    memory: Store,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Print a debate that was kept."""
    from pantheraml.council import archive

    with _memory(memory, key_file, readonly=True) as opened:
        assert opened is not None
        found = archive.load(opened, key)
    if as_json:
        return _print_json(found.to_dict())
    print(found.text())


@council_app.command()
def calibrate(
    pairs: Annotated[Path, typer.Argument(metavar="FILE", help='JSONL: {"confidence": 0.7, "right": true}, one verdict a line.')],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the calibration goes; ask takes it.")] = Path("calibration.json"),
    method: Annotated[Literal["auto", "isotonic", "platt"], typer.Option(help="auto: platt below 500 pairs.")] = "auto",
    seed: int = 0,
    as_json: AsJson = False,
) -> None:
    """Learn from verdicts that are known to be right or wrong how much a confidence is worth."""
    from pantheraml.council import Calibration

    raw, right = _pairs(pairs)
    found = Calibration.fit(raw, right, method=None if method == "auto" else method, seed=seed)
    found.save(out)
    if as_json:
        return _print_json(asdict(found))
    print(f"{out}: {found.method}, from {found.after.count} verdicts, {sum(right)} of them right")
    for name, quality in (("before", found.before), ("after", found.after)):
        print(f"  {name:7}expected calibration error {quality.ece:.3f}, Brier score {quality.brier:.3f}")
    print("  (after: each fifth of the verdicts by a fit on the others)")


# ---- What the verbs share --------------------------------------------------------------------------------------------


def _personas(file: Path | None) -> tuple[Persona, ...]:
    from pantheraml.council import DEFAULT_PERSONAS, load_personas

    return DEFAULT_PERSONAS if file is None else load_personas(file)


def _local(model: str | None, personas: Sequence[Persona], samples: int) -> Local | None:
    """The model, with the adapters that personas name: folders of adapters, or of runs."""
    from pantheraml.council import Local

    speaking = [each for each in personas if each.endpoint is None]
    if model is None:
        return None
    from pantheraml.models.load import quiet_library

    quiet_library()
    adapters = {each.adapter: each.adapter for each in speaking if each.adapter is not None}
    return Local.open(model, adapters, wanted=max(1, len(speaking) * max(1, samples)))


def _keys(personas: Sequence[Persona]) -> dict[str, str]:
    """Values of the variables that endpoints name, of those that are set."""
    names = [each.endpoint.key_env for each in personas if each.endpoint is not None]
    return {name: os.environ[name] for name in names if name is not None and name in os.environ}


@contextmanager
def _memory(store: Path | None, key_file: Path | None, *, readonly: bool = False) -> Iterator[Memory | None]:
    if store is None:
        yield None
        return
    from pantheraml.memory.seal import Keys
    from pantheraml.memory.store import Memory

    keys = Keys.from_file(key_file) if key_file else Keys.from_mapping(os.environ, MEMORY_KEY)
    say = _err()
    with Memory.open(
        store, readonly=readonly, create=not readonly, keys=keys, announce=lambda said: say.print(said, markup=False, highlight=False)
    ) as memory:
        yield memory


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _err().print("interrupted; nothing was kept")
        raise typer.Exit(130) from None


def _pairs(file: Path) -> tuple[list[float], list[bool]]:
    raw: list[float] = []
    right: list[bool] = []
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}", why="its rows are learned from", fix="check the path") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
            if not isinstance(row["right"], bool):
                raise ValueError("right is true or false")
            raw.append(float(row["confidence"]))
            right.append(row["right"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{file}, line {number}: {type(error).__name__} {error}",
                why='a row is {"confidence": 0.7, "right": true}',
                fix="correct the line, or take it out",
            ) from None
    return raw, right


def _write(out: Path, text: str) -> None:
    try:
        out.write_text(text, "utf-8")
    except OSError as error:
        raise StorageError(
            f"{out} cannot be written: {error.strerror}", why="the transcript goes there", fix="name another file"
        ) from error


def _print_json(values: Any) -> None:
    print(json.dumps(values, ensure_ascii=False, indent=2, default=str))


def _err() -> Console:
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True)

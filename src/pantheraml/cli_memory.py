"""`pantheraml memory`: a store of records from the command line."""

from __future__ import annotations

import base64
import codecs
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pantheraml.errors import DataError, RecipeError, StorageError

if TYPE_CHECKING:
    from rich.console import Console

    from pantheraml.memory.record import Content, Decoded, Record
    from pantheraml.memory.seal import Keys
    from pantheraml.memory.store import Memory
    from pantheraml.memory.upkeep import Progress

KEY = "PANTHERAML_MEMORY_KEY"
AT_ONCE = 1000

memory_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="NBMF: records kept small, searchable and trustworthy. "
    f"A store is encrypted where {KEY} or --key-file holds a key; see docs/nbmf.md.",
)

Store = Annotated[Path, typer.Argument(metavar="STORE", help="A folder; it is made where there is none.")]
Key = Annotated[str, typer.Argument(metavar="KEY", help="The name of a record.")]
Tenant = Annotated[str, typer.Option(help="Whose records.")]
Kind = Annotated[str | None, typer.Option(help="Records of one kind look alike.")]
KeyFile = Annotated[Path | None, typer.Option(help=f"A file with the key of an encrypted store. Default: {KEY} in the environment.")]
Meta = Annotated[list[str] | None, typer.Option("--meta", metavar="NAME=VALUE", help="May be given several times.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@memory_app.command()
def put(
    store: Store,
    key: Key,
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="Default: what comes in from standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help="Its bytes; text where they are UTF-8.")] = None,
    kind: Kind = None,
    tenant: Tenant = "default",
    meta: Meta = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Keep a record; another one of that key is replaced."""
    if text is not None and file is not None:
        raise RecipeError("both TEXT and --file are given", why="a record has one content", fix="leave one of them out")
    content = text if text is not None else _text_or_bytes(_read(file) if file else sys.stdin.buffer.read())
    with _open(store, tenant, key_file) as memory:
        done = memory.put(key, content, kind=kind or "note", metadata=_metadata(meta))
    _show(asdict(done), done.said, as_json)


@memory_app.command(name="import")
def import_(
    store: Store,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="JSONL with key and content, or any file: one record each.")],
    kind: Kind = None,
    tenant: Tenant = "default",
    key_file: KeyFile = None,
) -> None:
    """Keep many records: rows of JSONL files (key, content, kind, metadata, created), and other files whole."""
    rows = list(_records(files, kind))
    with _open(store, tenant, key_file) as memory, _progress() as progress:
        for at in range(0, len(rows), AT_ONCE):
            memory.put_many(rows[at : at + AT_ONCE])
            progress("records", min(at + AT_ONCE, len(rows)), len(rows))
    print(f"{len(rows):,} records are in {store}")


@memory_app.command()
def get(
    store: Store,
    key: Key,
    tenant: Tenant = "default",
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Print a record; with --json also what is known of it."""
    with _open(store, tenant, key_file, readonly=True) as memory:
        found = memory.get(key)
    if as_json:
        return _print_json({**_content(found.content), "exact": found.exact, "score": found.score, "info": asdict(found.info)})
    if isinstance(found.content, bytes):
        sys.stdout.buffer.write(found.content)
    else:
        _print(found.content if isinstance(found.content, str) else json.dumps(found.content, ensure_ascii=False, indent=2))


@memory_app.command()
def search(
    store: Store,
    text: Annotated[str, typer.Argument(metavar="TEXT")],
    k: Annotated[int, typer.Option("-k", min=1, help="So many at most.")] = 5,
    kind: Kind = None,
    tenant: Tenant = "default",
    meta: Meta = None,
    since: Annotated[datetime | None, typer.Option(help="Created then or later (UTC).")] = None,
    until: Annotated[datetime | None, typer.Option(help="Created before then (UTC).")] = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Find records by likeness to a text, the likest first."""
    with _open(store, tenant, key_file, readonly=True) as memory:
        hits = memory.search(text, k, kind=kind, metadata=_metadata(meta) or None, since=_utc(since), until=_utc(until))
        shown = [(hit, each.content) for hit in hits if (each := _got(memory, hit.key))]
    if as_json:
        return _print_json([{**asdict(hit), **_content(content)} for hit, content in shown])
    for hit, content in shown:
        line = " ".join(str(content).split())
        _print(f"{hit.score:5.2f}  {hit.key}  {line[:100]}{'...' if len(line) > 100 else ''}")


@memory_app.command()
def delete(store: Store, key: Key, tenant: Tenant = "default", key_file: KeyFile = None) -> None:
    """Forget a record. Its bytes leave the files at the next compact."""
    with _open(store, tenant, key_file) as memory:
        if not memory.delete(key):
            raise DataError(
                f"there is no record {key!r} of {tenant}", why="nothing was deleted", fix=f"see pantheraml memory stats {store}"
            )
    _print(f"{key} is deleted")


@memory_app.command()
def stats(store: Store, tenant: Tenant = "default", key_file: KeyFile = None, as_json: AsJson = False) -> None:
    """Records and bytes: by tier, by codec, and in all."""
    with _open(store, tenant, key_file, readonly=True) as memory:
        found = memory.stats()
    _show(asdict(found), "\n".join(f"{what:28}{how_much}" for what, how_much in found.lines), as_json)


@memory_app.command()
def train(
    store: Store,
    minutes: Annotated[float, typer.Option(min=0.1, help="For the model, at most.")] = 5.0,
    model: Annotated[bool, typer.Option("--model/--no-model", help="Also the language model of the neural codec.")] = True,
    tenant: Tenant = "default",
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Learn from the records that are here: dictionaries, vectors for search, and the model of the neural codec."""
    if model:
        from pantheraml.models.load import quiet_library

        quiet_library()
    with _open(store, tenant, key_file) as memory, _progress() as progress:
        found = memory.train(minutes=minutes, model=model, progress=progress)
    _show(found.to_dict(), found.said, as_json)


@memory_app.command()
def compact(store: Store, tenant: Tenant = "default", key_file: KeyFile = None, as_json: AsJson = False) -> None:
    """Move records between tiers, encode them anew where that is smaller, and give space back."""
    with _open(store, tenant, key_file) as memory, _progress() as progress:
        found = memory.compact(progress=progress)
    _show(found.to_dict(), found.said, as_json)


@memory_app.command()
def verify(store: Store, key_file: KeyFile = None, as_json: AsJson = False) -> None:
    """Read every byte, and name what is damaged; exit code 6 if anything is."""
    with _open(store, "default", key_file, readonly=True) as memory, _progress() as progress:
        found = memory.verify(progress=progress)
    _show(found.to_dict(), found.said, as_json)
    if found.problems:
        raise typer.Exit(6)


@memory_app.command()
def repair(store: Store, key_file: KeyFile = None, as_json: AsJson = False) -> None:
    """Make a damaged store sound again, with all records that can still be read; the damaged file is kept beside it."""
    from pantheraml.memory.store import Memory

    found = Memory.repair(store, keys=_keys(key_file), announce=_say)
    said = [f"{found.kept:,} records are kept"]
    said += [f"lost: {lost.key or f'number {lost.id}'}: {lost.why}" for lost in found.lost]
    said += [f"the damaged files are in {found.quarantine}"] if found.quarantine else ["nothing was damaged"]
    _show(asdict(found), "\n".join(said), as_json)


@memory_app.command()
def export(
    store: Store,
    out: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL; bytes are base64.")],
    tenant: Tenant = "default",
    key_file: KeyFile = None,
) -> None:
    """Write all records of a tenant as JSONL, which import reads."""
    with _open(store, tenant, key_file, readonly=True) as memory:
        print(f"{out}: {memory.export(out)} records")


@memory_app.command()
def rotate(
    store: Store,
    new_key_file: Annotated[Path, typer.Argument(metavar="NEW_KEY_FILE", help="It holds the new key.")],
    key_file: KeyFile = None,
) -> None:
    """Exchange the key of an encrypted store. What was written before is encrypted anew at the next compact."""
    from pantheraml.memory.seal import Keys

    with _open(store, "default", key_file) as memory:
        memory.rotate(Keys.from_file(new_key_file))
    print(f"{store} takes the key in {new_key_file} from now on")


# ---- What the verbs share --------------------------------------------------------------------------------------------


@contextmanager
def _open(store: Path, tenant: str, key_file: Path | None, *, readonly: bool = False) -> Iterator[Memory]:
    from pantheraml.memory.store import Memory

    with Memory.open(store, tenant=tenant, readonly=readonly, create=not readonly, keys=_keys(key_file), announce=_say) as memory:
        yield memory


def _keys(key_file: Path | None) -> Keys | None:
    from pantheraml.memory.seal import Keys

    return Keys.from_file(key_file) if key_file else Keys.from_mapping(os.environ, KEY)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal, and nothing elsewhere."""
    from rich.progress import Progress as Bars

    with Bars(console=_err(), transient=True, disable=not sys.stderr.isatty()) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
            bars.update(tasks[what], completed=done, total=of)

        yield show


def _records(files: Sequence[Path], kind: str | None) -> Iterator[Record]:
    from pantheraml.memory.record import Record

    for file in files:
        if file.suffix != ".jsonl":
            yield Record(key=str(file), content=_text_or_bytes(_read(file)), kind=kind or file.suffix.removeprefix(".") or "file")
            continue
        # A line ends at a line feed alone: U+2028 and its like may stand within JSON text.
        for number, line in enumerate(_read(file).removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
            if line.strip():
                yield _record(line, f"{file}, line {number}", kind)


def _record(line: bytes, where: str, kind: str | None) -> Record:
    from pantheraml.memory.intake import microseconds
    from pantheraml.memory.record import Record

    try:
        row = json.loads(line.decode("utf-8", "surrogatepass"))
        content = base64.b64decode(row["base64"], validate=True) if "base64" in row else row["content"]
        created = datetime.fromisoformat(row["created"]) if row.get("created") else None
        key, kind, metadata = row["key"], kind or row.get("kind") or "note", row.get("metadata") or {}
        if created is not None:
            microseconds(created)  # it has a time zone
        if not (isinstance(key, str | int) and isinstance(kind, str) and isinstance(metadata, dict)):
            raise TypeError("key and kind are text, and metadata is an object")
        return Record(key=str(key), content=content, kind=kind, created=created, metadata=metadata, fidelity=row.get("fidelity", "exact"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{where} is no record: {type(error).__name__} {error}",
            why="a row is a JSON object with key and content (or base64), and maybe kind, created, metadata and fidelity",
            fix="correct the line, or take it out; nothing of this file was kept",
        ) from error


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}", why="its content was to be kept", fix="check the path") from error


def _text_or_bytes(data: bytes) -> Content:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def _got(memory: Memory, key: str) -> Decoded | None:
    """A record that a search has found; one that cannot be read is announced and costs no other one."""
    try:
        return memory.get_many([key]).get(key)  # it may be deleted meanwhile
    except StorageError as error:
        return _say(f"{error.what}; {error.fix}")


def _content(content: Content) -> dict[str, Any]:
    return {"base64": base64.b64encode(content).decode()} if isinstance(content, bytes) else {"content": content}


def _metadata(words: list[str] | None) -> dict[str, Any]:
    """`NAME=VALUE`, where a value that is JSON is read as such."""
    found: dict[str, Any] = {}
    for word in words or ():
        name, sign, value = word.partition("=")
        if not sign or not name:
            raise RecipeError(f"--meta {word} is not NAME=VALUE", why="it says what a record is about", fix="write --meta project=boats")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


def _utc(at: datetime | None) -> datetime | None:
    return at.replace(tzinfo=UTC) if at is not None and at.tzinfo is None else at


def _show(values: dict[str, Any], said: str, as_json: bool) -> None:
    if as_json:
        return _print_json(values)
    _print(said)


def _print_json(values: Any) -> None:
    _print(json.dumps(values, ensure_ascii=False, indent=2, default=str))


def _print(text: str) -> None:
    """Lone surrogates, which records may hold and UTF-8 may not, as escapes."""
    print(text.encode("utf-8", "backslashreplace").decode())


def _say(said: str) -> None:
    _err().print(said, markup=False, highlight=False)


def _err() -> Console:
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True)

"""The hot tier on disk. It is derived from the records, so anything that does not fit is an error, and whoever meets it builds it anew.

    index/MANIFEST      JSON: where the store stood, names of tenants and kinds, and size and blake3 of each of the others and of itself
    index/TOKEN.rows    safetensors: the columns of a block
    index/TOKEN.graph   a graph, as usearch saves it

A file never changes. What is new is written first, then the manifest is exchanged by renaming, then what it no longer names is removed;
so a kill leaves the index of before or the new one.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import blake3
import numpy as np

from pantheraml.errors import StorageError
from pantheraml.memory.columns import SAVED, Block
from pantheraml.memory.graph import Graph
from pantheraml.memory.hot import Hot

MANIFEST = "MANIFEST"
FORMAT = 1
Cover = Callable[[bytes, str], bytes]
"""Seals the bytes of a file, or opens them; gets its name as well."""


def save_index(hot: Hot, folder: Path, *, stamp: str, seal: Cover | None = None) -> None:
    """Write what has changed since the index was loaded or saved.

    Args:
        stamp: says which state of the store this is the index of. seal: encrypts each file.
    Raises: StorageError if the folder cannot be written; the index that was there stays.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with hot.quiet():
            blocks = [_save_block(folder, block, seal) for block in hot.blocks if block.count]
            graphs = [(tenant, graph.upto, *_save_graph(folder, graph, seal)) for tenant, graph in hot.graphs.items()]
            said: dict[str, Any] = {
                "format": FORMAT,
                "stamp": stamp,
                "dimensions": hot.dimensions,
                "next_serial": hot.next_serial,
                "tenants": list(hot.tenants),
                "kinds": list(hot.kinds),
                "blocks": blocks,
                "graphs": graphs,
            }
        text = json.dumps(said).encode()
        _write(folder / MANIFEST, _covered(blake3.blake3(text).hexdigest().encode() + b"\n" + text, MANIFEST, seal))
    except OSError as error:
        raise StorageError(
            f"the index cannot be written to {folder}",
            why=f"{error.strerror or error}; searches work, but the next start has to read all records",
            fix="make room, or see who may write there",
        ) from error
    named = {MANIFEST, *(row[0] for row in blocks), *(row[2] for row in graphs)}
    for path in folder.iterdir():
        if path.name not in named and path.suffix in (".rows", ".graph", ".part"):
            with suppress(OSError):  # a reader may hold it open, where that matters; it goes the next time
                path.unlink()


def load_index(hot: Hot, folder: Path, *, unseal: Cover | None = None) -> str:
    """Fill an index with what was saved. Returns the stamp: it is for the caller to see whether that is the store's state.

    Raises: StorageError naming the file that is missing, damaged or of another version; the index then stays as it is.
    """
    said = _manifest(folder, unseal)
    if said["dimensions"] != hot.dimensions:
        raise _unusable(folder / MANIFEST, f"its vectors have {said['dimensions']} numbers, and here they have {hot.dimensions}")
    blocks = [_load_block(folder, row, hot.dimensions, unseal) for row in said["blocks"]]
    graphs: dict[int, Graph] = {}
    for tenant, upto, *row in said["graphs"]:
        graphs[tenant] = _load_graph(folder, row, hot.dimensions, upto, unseal)
    hot.restore(blocks, graphs, said["tenants"], said["kinds"], said["next_serial"])
    return said["stamp"]


def _save_block(folder: Path, block: Block, seal: Cover | None) -> tuple[str, int, str]:
    from safetensors.numpy import save

    state = f"{block.count} {block.dead}"
    if (known := _still(folder, block.file, state)) is None:
        columns = {name: np.ascontiguousarray(getattr(block, name)[: block.count]) for name in SAVED}
        columns |= {"tag": block.tag[: block.tags], "tag_row": block.tag_row[: block.tags]}
        known = _save(folder, "rows", save(columns), seal)
        block.file = (str(folder), state, known[0], str(known[1]), known[2])
    return known


def _save_graph(folder: Path, graph: Graph, seal: Cover | None) -> tuple[str, int, str]:
    state = f"{len(graph)} {graph.upto}"
    if (known := _still(folder, graph.file, state)) is None:
        known = _save(folder, "graph", graph.to_bytes(), seal)
        graph.file = (str(folder), state, known[0], str(known[1]), known[2])
    return known


def _still(folder: Path, file: tuple[str, ...] | None, state: str) -> tuple[str, int, str] | None:
    """The file that something was saved in, if it has not changed since."""
    if file is None or file[:2] != (str(folder), state) or not (folder / file[2]).exists():
        return None
    return file[2], int(file[3]), file[4]


def _save(folder: Path, suffix: str, data: bytes, seal: Cover | None) -> tuple[str, int, str]:
    name = f"{secrets.token_hex(8)}.{suffix}"
    data = _covered(data, name, seal)
    _write(folder / name, data)
    return name, len(data), _hash(data)


def _load_block(folder: Path, row: list[Any], dimensions: int, unseal: Cover | None) -> Block:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path, data = folder / row[0], _read(folder, row, unseal)
    try:
        columns = load(data)
        count = len(columns["serial"])
        if columns["code"].shape != (count, dimensions):
            raise ValueError(f"its codes are {list(columns['code'].shape)}")
        block = Block(dimensions, max(count, 1))
        block.append({name: columns[name] for name in SAVED}, columns["tag"], columns["tag_row"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise _unusable(path, str(error)) from error
    block.file = (str(folder), f"{block.count} {block.dead}", row[0], str(row[1]), row[2])
    return block


def _load_graph(folder: Path, row: list[Any], dimensions: int, upto: int, unseal: Cover | None) -> Graph:
    path, data = folder / row[0], _read(folder, row, unseal)
    graph = Graph(dimensions)
    try:
        graph.load(path if unseal is None else data, upto)
    except (RuntimeError, ValueError) as error:
        raise _unusable(path, f"usearch says: {error}") from error
    graph.file = (str(folder), f"{len(graph)} {upto}", row[0], str(row[1]), row[2])
    return graph


def _manifest(folder: Path, unseal: Cover | None) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from error
    told, _, text = _covered(data, MANIFEST, unseal).partition(b"\n")
    if told != blake3.blake3(text).hexdigest().encode():
        raise _unusable(path, "it does not fit its checksum")
    said = json.loads(text)
    if said["format"] != FORMAT:
        raise _unusable(path, f"it has format {said['format']}, and this program reads {FORMAT}")
    return said


def _read(folder: Path, row: list[Any], unseal: Cover | None) -> bytes:
    name, size, told = row
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise _unusable(folder / name, error.strerror or str(error)) from error
    if len(data) != size or _hash(data) != told:
        raise _unusable(folder / name, f"it has {len(data):,} bytes of {size:,}, or other ones than were written")
    return _covered(data, name, unseal)


def _write(path: Path, data: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(data)
    os.replace(part, path)


def _hash(data: bytes) -> str:
    return blake3.blake3(data, max_threads=blake3.blake3.AUTO).hexdigest()


def _covered(data: bytes, name: str, cover: Cover | None) -> bytes:
    return data if cover is None else cover(data, name)


def _unusable(path: Path, why: str) -> StorageError:
    return StorageError(
        f"the index {path} cannot be used",
        why=why,
        fix="nothing is lost: it is made anew from the records; delete the folder if this comes back",
    )

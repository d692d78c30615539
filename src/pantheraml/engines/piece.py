"""Tensors that are divided over processes: the piece that one of them has, and what is stored, read back in any other division."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from pantheraml.errors import StorageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """The rectangular part of a tensor that this process has.

    Args:
        tensor: the part, of as many dimensions as the whole. One without elements says that this process has nothing of it,
            wherever it begins.
        shape: of the whole. offsets: where the part begins in it. Both have one number for each dimension.
    Raises: ValueError if the part does not lie in the whole.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.tensor.numel():
            _check_inside("the piece", self.shape, self.offsets, self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of this part."""
        return self.tensor.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A tensor that lies in files as the pieces of some processes. Nothing is read before it is asked for.

    Attributes:
        shape: of the whole.
        parts: its pieces, which make it up exactly.
        open: a file of them by its name, as safetensors opens it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]
    open: Callable[[str], Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return math.prod(self.shape) * self.dtype.itemsize

    def whole(self) -> Tensor:
        """All of it, on the host."""
        return self.read((0,) * len(self.shape), self.shape)

    def read(self, offsets: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The part of this shape that begins at these offsets, on the host; from the files that hold some of it, and no others.

        Raises: ValueError if it does not lie in the whole; StorageError if a file cannot be read any longer.
        """
        import torch
        from safetensors import SafetensorError

        _check_inside(self.name, self.shape, offsets, shape)
        found = torch.empty(tuple(shape), dtype=self.dtype)
        for part in self.parts:
            common = _common(offsets, shape, part["offsets"], part["shape"])
            if common is None:
                continue
            here = tuple(slice(start - offset, stop - offset) for (start, stop), offset in zip(common, offsets, strict=True))
            there = tuple(slice(start - offset, stop - offset) for (start, stop), offset in zip(common, part["offsets"], strict=True))
            try:
                file = self.open(part["file"])
                # A number has no dimension to slice.
                found[here] = file.get_slice(self.name)[there] if there else file.get_tensor(self.name)
            except (OSError, SafetensorError) as error:
                raise StorageError(
                    f"{self.name} cannot be read from {part['file']}: {error}",
                    why="the checkpoint was sound when it was opened, and has been changed or removed since",
                    fix="start again with --resume, which looks for the newest sound checkpoint",
                ) from error
        return found


def read_part(value: Tensor | Stored, offsets: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The part of this shape that begins at these offsets, of what a checkpoint holds; of a tensor it is a view."""
    if isinstance(value, Stored):
        return value.read(offsets, shape)
    _check_inside("the part", value.shape, offsets, shape)
    return value[tuple(slice(offset, offset + size) for offset, size in zip(offsets, shape, strict=True))]


def read_whole(value: Tensor | Stored) -> Tensor:
    """All of what a checkpoint holds under a name."""
    return value.whole() if isinstance(value, Stored) else value


# ---- How the pieces of all processes make up whole tensors ---------------------------------------------------------


class Part(TypedDict):
    """One piece, in the file of the process that writes it, under the name of the tensor."""

    file: str
    offsets: list[int]
    shape: list[int]


class Entry(TypedDict):
    """A tensor that is divided: its dtype ("bfloat16") and shape, and its pieces that have elements."""

    dtype: str
    shape: list[int]
    pieces: list[Part]


Index = dict[str, Entry]
"""Name -> where its pieces are; as JSON holds it."""


def file_of(rank: int) -> str:
    """The name of the file with the pieces that this process writes."""
    return f"pieces-{rank:05d}.safetensors"


def index_of(state: Mapping[str, Tensor | Piece], rank: int) -> Index:
    """The pieces that this process has."""
    index: Index = {}
    for name, value in state.items():
        if isinstance(value, Piece):
            part = Part(file=file_of(rank), offsets=list(value.offsets), shape=list(value.tensor.shape))
            dtype = str(value.tensor.dtype).removeprefix("torch.")
            index[name] = Entry(dtype=dtype, shape=list(value.shape), pieces=[part] if value.tensor.numel() else [])
    return index


def merged(indexes: Sequence[Index]) -> Index:
    """The pieces of all processes, by rank. What several have is in the file of the first of them.

    Raises: ValueError if the processes speak of different tensors under a name, or if pieces overlap or leave a hole.
    """
    index: Index = {}
    for rank, each in enumerate(indexes):
        for name, entry in each.items():
            known = index.setdefault(name, Entry(dtype=entry["dtype"], shape=entry["shape"], pieces=[]))
            if (known["dtype"], known["shape"]) != (entry["dtype"], entry["shape"]):
                raise ValueError(
                    f"{name} is {entry['dtype']} {entry['shape']} in process {rank}, and {known['dtype']} {known['shape']} in one before it"
                )
            known["pieces"] += entry["pieces"]
    for name, entry in index.items():
        distinct: dict[tuple[tuple[int, ...], tuple[int, ...]], Part] = {}
        for part in entry["pieces"]:
            distinct.setdefault((tuple(part["offsets"]), tuple(part["shape"])), part)
        entry["pieces"] = [distinct[box] for box in sorted(distinct)]
        _check_exact(name, entry)
    return index


def stored_in(folder: Path, index: Index) -> dict[str, Stored]:
    """The tensors whose pieces are in the files of a folder. Files are opened once, when something is read from them."""
    import torch
    from safetensors import safe_open

    opened = functools.cache(lambda file: safe_open(folder / file, framework="pt"))
    return {
        name: Stored(name, tuple(entry["shape"]), getattr(torch, entry["dtype"]), tuple(entry["pieces"]), opened)
        for name, entry in index.items()
    }


def _check_exact(name: str, entry: Entry) -> None:
    """Raises: ValueError unless the pieces, rising by offsets, make up the whole and no two of them share an element."""
    pieces, elements = entry["pieces"], 0
    for at, one in enumerate(pieces):
        _check_inside(name, entry["shape"], one["offsets"], one["shape"])
        elements += math.prod(one["shape"])
        for later in range(at + 1, len(pieces)):
            other = pieces[later]
            if other["offsets"][0] >= one["offsets"][0] + one["shape"][0]:
                break  # and so does every piece after it
            if _common(one["offsets"], one["shape"], other["offsets"], other["shape"]) is not None:
                raise ValueError(f"{name} {entry['shape']}: {_said(one)} and {_said(other)} overlap")
    if elements != (wanted := math.prod(entry["shape"])):
        raise ValueError(f"{name} {entry['shape']}: its {len(pieces)} pieces hold {elements} of {wanted} elements")


def _check_inside(name: str, whole: Sequence[int], offsets: Sequence[int], shape: Sequence[int]) -> None:
    inside = len(whole) == len(offsets) == len(shape) and all(
        0 <= offset <= offset + size <= end for end, offset, size in zip(whole, offsets, shape, strict=True)
    )
    if not inside:
        raise ValueError(f"{name}: {list(shape)} from {list(offsets)} does not lie in a tensor of shape {list(whole)}")


def _common(offsets: Sequence[int], shape: Sequence[int], others: Sequence[int], other: Sequence[int]) -> list[tuple[int, int]] | None:
    """Start and end in each dimension of what two parts share; None: nothing."""
    common = [(max(a, b), min(a + n, b + m)) for a, n, b, m in zip(offsets, shape, others, other, strict=True)]
    return common if all(start < stop for start, stop in common) else None


def _said(part: Part) -> str:
    return f"{part['shape']} from {part['offsets']} ({part['file']})"

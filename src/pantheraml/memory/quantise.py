"""Vectors in few bytes: float16, int8, one bit a number, or product quantisation. What is lost is measured.

A code stands for a vector c of small numbers, and a scale s; it decodes to s * c. The scale is that which comes nearest to what was
encoded, s = (x . c) / (c . c), so for an x of length 1 the length of what is decoded is its cosine with x; see `fidelity`.

A row in a database is one code (numbers little-endian):

    kind    1 byte   1 float16, 2 int8, 3 binary, 4 pq
    scale   4 bytes  float32
    data             float16: 2 bytes a number. int8: 1. binary: 1 bit, the first number in the highest bit of the first byte; set: +1,
                     not set: -1. pq: 1 byte a part, the number of its centroid; the book is known from elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pantheraml.errors import StorageError
from pantheraml.memory.features import F32, unit

if TYPE_CHECKING:
    from pantheraml.hardware.device import Device

Kind = Literal["float16", "int8", "binary", "pq"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Their numbers in a row are their places here, from 1."""
HEAD_BYTES = 5
CENTROIDS = 256
ROUNDS = 12
"""Of k-means; the error hardly moves after ten."""
_TRAIN_MOST = 65_536
_BLOCK = 16_384
_DTYPES: dict[Kind, Any] = {"float16": np.dtype("<f2"), "int8": np.dtype(np.int8), "binary": np.dtype(np.uint8), "pq": np.dtype(np.uint8)}


@dataclass(frozen=True, slots=True)
class Book:
    """What the parts of vectors look like: centroids float32 [parts, CENTROIDS, dimensions / parts]."""

    centroids: F32

    @property
    def dimensions(self) -> int:
        """Of the vectors that it encodes."""
        return self.centroids.shape[0] * self.centroids.shape[2]

    def to_bytes(self) -> bytes:
        """As safetensors."""
        from safetensors.numpy import save

        return save({"centroids": self.centroids})

    @classmethod
    def from_bytes(cls, data: bytes) -> Book:
        """What `to_bytes` gave. Raises: StorageError for anything else."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            centroids = load(data)["centroids"]
        except (SafetensorError, KeyError) as error:
            raise _no_book(str(error)) from error
        if centroids.ndim != 3 or centroids.shape[1] != CENTROIDS or centroids.dtype != np.float32:
            raise _no_book(f"its centroids are {centroids.dtype} {list(centroids.shape)}")
        return cls(centroids)


@dataclass(frozen=True, slots=True)
class Codes:
    """Vectors, encoded. scale: [N] float32. data: [N, W] in the dtype of the kind; see the top of this file."""

    kind: Kind
    scale: F32
    data: NDArray[Any]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, at: Any) -> Codes:
        """Some of them: a slice, places, or a mask."""
        return Codes(self.kind, self.scale[at], self.data[at])

    @property
    def row_bytes(self) -> int:
        """Of each, as a row."""
        return HEAD_BYTES + self.data.shape[1] * self.data.dtype.itemsize


def encode(vectors: F32, kind: Kind, book: Book | None = None) -> Codes:
    """Codes of vectors [N, D]. Raises: ValueError for another shape, numbers that are not finite, D that has no such code, pq without a book."""
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ValueError(f"vectors are finite and [N, D], not {list(vectors.shape)}")
    largest = np.abs(vectors).max(axis=1, initial=0, keepdims=True)
    within = vectors / np.where(largest == 0, 1, largest)
    if kind == "float16":
        data = within.astype(_DTYPES[kind])
    elif kind == "int8":
        data = np.rint(within * 127).astype(np.int8)
    elif kind == "binary":
        if vectors.shape[1] % 8:
            raise ValueError(f"binary codes take a multiple of 8 dimensions, not {vectors.shape[1]}")
        data = np.packbits(vectors > 0, axis=1)
    else:
        data = _nearest(vectors, _needed(book, vectors.shape[1]))
    return Codes(kind, _scale(vectors, _small(kind, data, book)), data)


def decode(codes: Codes, book: Book | None = None) -> F32:
    """The vectors [N, D] that the codes stand for."""
    return _small(codes.kind, codes.data, book) * codes.scale[:, None]


def fidelity(codes: Codes, book: Book | None = None) -> F32:
    """[N] cosines between unit vectors and what their codes decode to; 0 for a vector of zeros."""
    return np.sqrt(np.square(decode(codes, book)).sum(axis=1, dtype=np.float32))


def to_rows(codes: Codes) -> list[bytes]:
    """One row for each."""
    head = np.empty((len(codes), HEAD_BYTES), np.uint8)
    head[:, 0] = KINDS.index(codes.kind) + 1
    head[:, 1:] = codes.scale.astype("<f4").view(np.uint8).reshape(-1, 4)
    data = np.ascontiguousarray(codes.data).view(np.uint8).reshape(len(codes), -1)
    rows = np.concatenate([head, data], axis=1)
    whole, width = rows.tobytes(), rows.shape[1]
    return [whole[begin : begin + width] for begin in range(0, len(whole), width)]


def from_rows(rows: Sequence[bytes]) -> Codes:
    """The codes of rows, all of one kind and size. Raises: StorageError for other ones; ValueError for none."""
    if not rows:
        raise ValueError("there are no rows, so nobody knows of which kind they are")
    width, number = len(rows[0]), rows[0][0] if rows[0] else 0
    different = next((i for i, row in enumerate(rows) if len(row) != width or row[0] != number), None) if width else 0
    if different is not None:
        raise _no_code(rows[different], f"the first one has {width} bytes and kind {number}")
    if not 1 <= number <= len(KINDS) or width <= HEAD_BYTES:
        raise _no_code(rows[0], f"kinds are 1 to {len(KINDS)}, and data follows {HEAD_BYTES} bytes")
    kind = KINDS[number - 1]
    table = np.frombuffer(b"".join(rows), np.uint8).reshape(-1, width)
    if (width - HEAD_BYTES) % _DTYPES[kind].itemsize:
        raise _no_code(rows[0], f"numbers of {kind} have {_DTYPES[kind].itemsize} bytes each")
    scale = np.ascontiguousarray(table[:, 1:HEAD_BYTES]).view("<f4").ravel().astype(np.float32)
    if not np.isfinite(scale).all():
        raise _no_code(rows[int(np.flatnonzero(~np.isfinite(scale))[0])], "its scale is not finite")
    return Codes(kind, scale, np.ascontiguousarray(table[:, HEAD_BYTES:]).view(_DTYPES[kind]))


def scores(queries: F32, codes: Codes, book: Book | None = None) -> F32:
    """[Q, N] dot products of queries [Q, D] in full precision with what the codes stand for."""
    blocks = [queries @ decode(codes[begin : begin + _BLOCK], book).T for begin in range(0, len(codes), _BLOCK)]
    return np.concatenate(blocks, axis=1) if blocks else np.zeros((len(queries), 0), np.float32)


def recall(queries: F32, vectors: F32, kind: Kind, k: int, book: Book | None = None) -> float:
    """Of the k nearest vectors by exact cosines, the share that is among the k nearest by codes; the mean over the queries.

    Raises: ValueError without queries, or for a k that is not from 1 to the number of vectors.
    """
    if not 1 <= k <= len(vectors) or not len(queries):
        raise ValueError(f"k is from 1 to {len(vectors)}, not {k}, and there is a query at least")
    exact = _top(unit(queries) @ unit(vectors).T, k)
    found = _top(scores(unit(queries), encode(unit(vectors), kind, book), book), k)
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(exact, found, strict=True)]))


def train_book(vectors: F32, parts: int, *, device: Device | None = None, seed: int = 0) -> Book:
    """A book for vectors like these [N, D], by k-means in each of `parts` equal parts (Jegou et al. 2011), computed on the device.

    At most 65,536 of the vectors are looked at. An empty cluster begins anew at one of the vectors that are represented
    worst.

    Args:
        device: None: where torch puts tensors by itself. A device without torch tensors (a TPU): the same.
    Raises: ValueError if there are no vectors, or the parts do not divide D.
    """
    import torch

    from pantheraml.memory.where import torch_device

    count, dimensions = vectors.shape
    if not count or not 1 <= parts <= dimensions or dimensions % parts:
        raise ValueError(f"{parts} parts do not divide {dimensions} dimensions, or there are no vectors ({count})")
    drawn = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=drawn)[:_TRAIN_MOST]
    points_PND = torch.from_numpy(np.ascontiguousarray(vectors))[order].to(torch_device(device))
    points_PND = points_PND.reshape(len(order), parts, -1).transpose(0, 1).contiguous()
    first = torch.arange(CENTROIDS) % len(order)
    centroids_PKD = points_PND[:, first].clone()
    for _ in range(ROUNDS):
        sums, counts = torch.zeros_like(centroids_PKD), points_PND.new_zeros(parts, CENTROIDS)
        worst = []
        for block in points_PND.split(_BLOCK, dim=1):
            distance, nearest = torch.cdist(block, centroids_PKD).min(dim=2)
            sums.scatter_add_(1, nearest[..., None].expand_as(block), block)
            counts.scatter_add_(1, nearest, torch.ones_like(distance))
            worst.append(distance)
        centroids_PKD = torch.where(counts[..., None] > 0, sums / counts.clamp(min=1)[..., None], centroids_PKD)
        far = torch.cat(worst, dim=1).argsort(dim=1, descending=True)
        for part, empty in enumerate((counts == 0).cpu()):
            clusters = empty.nonzero().flatten()
            # Spread over the worst quarter: the very worst are often alike.
            places = torch.arange(len(clusters)) * max(1, len(order) // (4 * max(1, len(clusters)))) % len(order)
            centroids_PKD[part, clusters] = points_PND[part, far[part, places]]
    return Book(centroids_PKD.cpu().numpy())


def _nearest(vectors: F32, book: Book) -> NDArray[np.uint8]:
    """[N, parts] the nearest centroid of each part."""
    parts, _, width = book.centroids.shape
    length = np.square(book.centroids).sum(axis=2)
    out = np.empty((len(vectors), parts), np.uint8)
    for begin in range(0, len(vectors), _BLOCK):
        block = vectors[begin : begin + _BLOCK].reshape(-1, parts, width)
        for part in range(parts):
            out[begin : begin + _BLOCK, part] = (length[part] - 2 * block[:, part] @ book.centroids[part].T).argmin(axis=1)
    return out


def _small(kind: Kind, data: NDArray[Any], book: Book | None) -> F32:
    """What the data says without the scale."""
    if kind == "binary":
        return np.unpackbits(data, axis=1).astype(np.float32) * 2 - 1
    if kind == "pq":
        known = _needed(book, None)
        if data.shape[1] != known.centroids.shape[0]:
            raise ValueError(f"the book has {known.centroids.shape[0]} parts, and the codes have {data.shape[1]}")
        return known.centroids[np.arange(data.shape[1]), data].reshape(len(data), -1)
    return data.astype(np.float32)


def _scale(vectors: F32, small: F32) -> F32:
    over = np.einsum("nd,nd->n", vectors, small, dtype=np.float64)
    under = np.einsum("nd,nd->n", small, small, dtype=np.float64)
    return (over / np.where(under == 0, 1, under)).astype(np.float32)


def _top(scores: F32, k: int) -> NDArray[np.intp]:
    return np.argpartition(-scores, k - 1, axis=1)[:, :k]


def _needed(book: Book | None, dimensions: int | None) -> Book:
    if book is None:
        raise ValueError("pq needs the book that its codes were made with")
    if dimensions not in (None, book.dimensions):
        raise ValueError(f"the book is for {book.dimensions} dimensions, not {dimensions}")
    return book


def _no_code(row: bytes, why: str) -> StorageError:
    return StorageError(
        f"a vector of {len(row)} bytes that begins with {row[:5].hex() or 'nothing'} cannot be read",
        why=why,
        fix="see `pantheraml memory verify`; vectors are made anew from the content by `pantheraml memory compact`",
    )


def _no_book(why: str) -> StorageError:
    return StorageError("this is no book of product quantisation", why=why, fix="train it again: `pantheraml memory train`")

"""Latent semantic analysis (Deerwester et al. 1990): vectors for the words of a corpus, such that words of like texts lie near each other.

The singular vectors of the weighted counts are found by random projection and a few products with the matrix (Halko et al. 2011,
arXiv 0909.4061, algorithm 4.4), on the device. The matrix is never made: a product with it is a sum of weighted rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pantheraml.memory.features import F32, I64

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROUNDS = 3
SPARE = 32
"""Directions more than are asked for: the last of them are found less exactly."""


@dataclass(frozen=True, slots=True)
class Counts:
    """A sparse matrix [texts, words]: value[i] stands at (text[i], word[i]). Each place at most once."""

    text: I64
    word: I64
    value: F32
    texts: int
    words: int


def singular_vectors(counts: Counts, rank: int, *, device: torch.device, seed: int = 0) -> tuple[F32, F32]:
    """The largest singular values [R], falling, and the right singular vectors [words, R] that belong to them; R <= rank.

    Memory is about 4 * (texts + 2 * words) * rank bytes, and 40 bytes for each number that is not zero, on the device.
    R is smaller than asked where the matrix has no more; then what is left out is nothing but rounding.
    """
    import torch

    by_text, by_word = _bags(counts, False, device), _bags(counts, True, device)
    width = min(rank + SPARE, counts.texts, counts.words)
    basis = torch.randn(counts.words, width, generator=torch.Generator().manual_seed(seed)).to(device)
    seen = _orthogonal(_product(by_text, basis))
    for _ in range(ROUNDS):
        seen = _orthogonal(_product(by_text, _orthogonal(_product(by_word, seen))))
    within = _product(by_word, seen)  # [words, width]: A = seen @ within.T, nearly
    values, turned = _spectrum(within)
    kept = min(rank, int((values > values.max().clamp(min=1e-30) * 1e-4).sum()))
    values, turned = values[:kept], turned[:, :kept]
    vectors = within @ (turned / values).to(device=within.device, dtype=within.dtype)
    return values.float().numpy(), vectors.cpu().numpy()


def _bags(counts: Counts, transposed: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(columns, where each row begins, values), by rows: those of the matrix, or of its transpose."""
    import torch

    row, column, rows = (counts.word, counts.text, counts.words) if transposed else (counts.text, counts.word, counts.texts)
    order = np.argsort(row, kind="stable")
    begin = np.searchsorted(row[order], np.arange(rows))
    found: tuple[Any, ...] = (column[order], begin, counts.value[order])
    columns, begins, values = (torch.from_numpy(each).to(device) for each in found)
    return columns, begins, values


def _product(bags: tuple[Tensor, Tensor, Tensor], matrix: Tensor) -> Tensor:
    """Of the sparse matrix with a dense one."""
    import torch

    columns, begins, values = bags
    return torch.nn.functional.embedding_bag(columns, matrix, begins, mode="sum", per_sample_weights=values)


def _orthogonal(matrix: Tensor) -> Tensor:
    """An orthonormal basis of what the columns [N, R] span, twice by the eigenvectors of their products: needs no QR on the device."""
    for _ in range(2):
        values, vectors = _spectrum(matrix)
        scale = values.clamp(min=float(values.max()) * 1e-6 + 1e-30)
        matrix = matrix @ (vectors / scale).to(device=matrix.device, dtype=matrix.dtype)
    return matrix


def _spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values [R] of a matrix [N, R], falling, and its right singular vectors [R, R], in float64 on the host."""
    import torch

    values, vectors = torch.linalg.eigh((matrix.T @ matrix).cpu().double())
    return values.flip(0).clamp(min=0).sqrt(), vectors.flip(1)

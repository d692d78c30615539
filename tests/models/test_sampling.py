"""Draws against softmax, by chi-square; and that nothing of a row depends on its neighbours."""

from __future__ import annotations

import math

import pytest
import torch

from pantheraml.models.sampling import Draw, choose, log_probabilities, uniform

VOCAB = 12
# Beyond this lies one in ten thousand of chi-square with so many degrees of freedom (11, 4, 3).
LIMITS = {11: 37.4, 4: 23.5, 3: 21.1}


def logits(*, seed: int = 0, size: int = VOCAB) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2


def chi_square(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of counts against probabilities; what has none must not occur."""
    assert not found[wanted == 0].any()
    expected = wanted[wanted > 0] * found.sum()
    return float(((found[wanted > 0] - expected) ** 2 / expected).sum())


def counts(row: torch.Tensor, *, draws: int = 20_000, place: int = 3, **how: float) -> torch.Tensor:
    every = [Draw(number=uniform(seed, place), **how) for seed in range(draws)]
    return torch.bincount(choose(row.expand(draws, -1), every), minlength=len(row)).double()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_come_as_often_as_softmax_says(temperature: float) -> None:
    row = logits()
    wanted = (row.double() / temperature).softmax(-1)
    assert chi_square(counts(row, temperature=temperature), wanted) < LIMITS[VOCAB - 1]


def test_top_k_and_top_p_leave_the_likeliest_and_their_proportions() -> None:
    row = logits()
    shares, order = row.double().softmax(-1).sort(descending=True)
    five = torch.zeros(VOCAB).double().scatter(0, order[:5], shares[:5] / shares[:5].sum())
    assert chi_square(counts(row, temperature=1.0, top_k=5), five) < LIMITS[4]
    # The smallest set that has the share: the one that crosses it belongs to it.
    assert shares[:3].sum() < 0.88 < shares[:4].sum()
    four = torch.zeros(VOCAB).double().scatter(0, order[:4], shares[:4] / shares[:4].sum())
    assert chi_square(counts(row, temperature=1.0, top_p=0.88), four) < LIMITS[3]


def test_top_p_is_taken_of_what_top_k_left_as_in_transformers() -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    for seed in range(20):
        row = logits(seed=seed, size=40)
        ids, kept = torch.zeros(1, 1, dtype=torch.int64), row[None]
        for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(9), TopPLogitsWarper(0.6)):
            kept = warper(ids, kept)
        found = counts(row, draws=2000, temperature=0.7, top_k=9, top_p=0.6) > 0
        assert found.equal(kept[0].isfinite())  # none of them is rarer than one in a hundred


def test_a_draw_does_not_depend_on_what_is_drawn_beside_it() -> None:
    rows = torch.stack([logits(seed=seed, size=300) for seed in range(24)])
    how = [
        {},
        {"temperature": 0.8},
        {"temperature": 1.3, "top_p": 0.7},
        {"temperature": 1.0, "top_k": 20},
        {"temperature": 2.0, "top_k": 5, "top_p": 0.9},
    ]
    draws = [Draw(number=uniform(i, i), **how[i % len(how)]) for i in range(24)]
    together = choose(rows, draws)
    assert together.tolist() == [int(choose(rows[i : i + 1], draws[i : i + 1])[0]) for i in range(24)]
    backwards = choose(rows.flip(0), draws[::-1]).flip(0)
    assert backwards.equal(together)


def test_forbidden_tokens_and_extreme_numbers() -> None:
    row = torch.tensor([1.0, -math.inf, 3.0, -math.inf])
    for number in (0.0, 0.5, 1 - 2**-53):
        for cut in ({}, {"top_p": 0.9}, {"top_k": 3}):
            assert choose(row[None], [Draw(temperature=1.0, number=number, **cut)])[0] in (0, 2)
    assert choose(row[None], [Draw()])[0] == 2
    # A temperature near 0 is the likeliest token, and top_p near 0 as well, however hot.
    assert choose(row[None], [Draw(temperature=1e-30, number=0.99)])[0] == 2
    assert choose(row[None], [Draw(temperature=1e6, top_p=1e-9, number=0.99)])[0] == 2


def test_numbers_of_seeds_and_places_are_uniform_and_unlike() -> None:
    numbers = [uniform(seed, place) for seed in range(200) for place in range(100)]
    assert len(set(numbers)) == len(numbers) and min(numbers) >= 0 and max(numbers) < 1
    found = torch.histc(torch.tensor(numbers), bins=12, min=0, max=1).double()
    assert chi_square(found, torch.full((12,), 1 / 12).double()) < LIMITS[11]
    # Neighbours in both directions: of independent ones the correlation is about 1 / sqrt(20000) = 0.007.
    grid = torch.tensor(numbers, dtype=torch.float64).view(200, 100)
    for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.03
    assert uniform(-1, 0) != uniform(1, 0)
    # Seed 0 mixed is 0: the published first numbers of SplitMix64 from there.
    assert [uniform(0, place) for place in range(3)] == [
        (number >> 11) * 2.0**-53 for number in (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    ]


def test_log_probabilities_are_those_of_log_softmax() -> None:
    rows = torch.stack([logits(seed=seed) for seed in range(5)])
    tokens = torch.tensor([3, 0, 11, 7, 7])
    wanted = rows.double().log_softmax(-1)[torch.arange(5), tokens]
    torch.testing.assert_close(log_probabilities(rows, tokens).double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-30, 1e-44, 1e-46, 5e-324])
def test_a_temperature_that_float32_takes_for_0_draws_the_likeliest(temperature: float) -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    logits[0, 0] = -50.0
    for top_k in (0, 3):
        draw = Draw(temperature=temperature, top_k=top_k, number=0.999)
        assert choose(logits, [draw]).tolist() == logits.argmax(-1).tolist()

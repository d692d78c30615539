"""Confidence is measured, and calibration brings it nearer to how often it is right."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantheraml.council.calibration import Calibration, quality
from pantheraml.council.confidence import of_advisor, of_verdict, raw_confidence
from pantheraml.council.position import Agreement
from pantheraml.council.quorum import Quorum, Vote, decide
from pantheraml.errors import DataError

METHODS = ("isotonic", "platt")


def overconfident(count: int, seed: int = 0) -> tuple[list[float], list[bool]]:
    """Answers that are right with the square of what they are said to be."""
    drawn = np.random.default_rng(seed)
    raw = drawn.uniform(0.05, 0.99, count)
    return raw.tolist(), (drawn.uniform(size=count) < raw**2).tolist()


def test_both_parts_of_an_advisors_confidence_count() -> None:
    agreement = Agreement()
    sure = of_advisor("a", math.log(0.9), "42", ["42", "42.0", "7"], agreement)
    assert (sure.agreeing, sure.samples) == (2, 3) and sure.probability == pytest.approx(0.9)
    assert sure.raw == pytest.approx(math.sqrt(0.9 * 3 / 5))
    assert of_advisor("a", math.log(0.9), "42", [], agreement).raw == pytest.approx(0.9)
    assert of_advisor("a", None, "42", ["42"], agreement).raw == pytest.approx(2 / 3)
    assert of_advisor("a", None, "42", [], agreement).raw is None


@given(st.floats(0, 1), st.integers(0, 8), st.integers(1, 8))
def test_more_agreement_and_more_probability_are_more_confidence(probability: float, agreeing: int, samples: int) -> None:
    agreeing = min(agreeing, samples)
    raw = raw_confidence(probability, agreeing, samples)
    assert raw is not None and 0 <= raw <= 1
    assert agreeing == samples or (raw_confidence(probability, agreeing + 1, samples) or 0) >= raw
    assert (raw_confidence(min(1.0, probability + 0.1), agreeing, samples) or 0) >= raw


@pytest.mark.parametrize(("rule", "wanted"), [("majority", (0.9 + 0.6) / 3), ("weighted", (0.9 + 0.6 * 2) / 6)])
def test_dissent_takes_from_the_verdicts_confidence(rule: Quorum, wanted: float) -> None:
    agreement = Agreement()
    weights = {"a": 1.0, "b": 2.0, "c": 3.0}
    found = [
        of_advisor(name, math.log(share), held, [], agreement) for name, share, held in (("a", 0.9, "x"), ("b", 0.6, "x"), ("c", 0.8, "y"))
    ]
    held = {"a": "x", "b": "x", "c": "y"}
    votes = [Vote(advisor=name, position=held[name]) for name in weights]
    verdict = of_verdict(found, decide(votes, rule), weights, None)
    assert verdict.raw == pytest.approx(wanted) and verdict.calibrated is None and "not calibrated" in verdict.said


def test_dissent_counts_whether_it_was_measured_or_not() -> None:
    agreement, weights = Agreement(), dict.fromkeys("abcde", 1.0)

    def verdict(measured: str, held: dict[str, str]) -> float | None:
        found = [of_advisor(name, math.log(0.9) if name in measured else None, each, [], agreement) for name, each in held.items()]
        return of_verdict(found, decide([Vote(advisor=name, position=held.get(name)) for name in weights], "majority"), weights, None).raw

    split = {"a": "x", "b": "x", "c": "x", "d": "y", "e": "y"}
    assert verdict("abcde", split) == verdict("abc", split) == pytest.approx(3 * 0.9 / 5)
    assert verdict("abc", {"a": "x", "b": "x", "c": "x"}) == pytest.approx(3 * 0.9 / 5)  # two have failed
    assert verdict("ab", split) == pytest.approx(2 * 0.9 / 4)
    assert verdict("de", split) is None  # and not 0: how sure those are that hold it, nobody knows


def test_what_was_not_measured_is_not_a_number() -> None:
    found = [of_advisor("a", None, "x", [], Agreement())]
    verdict = of_verdict(found, decide([Vote(advisor="a", position="x")], "majority"), {"a": 1.0}, None)
    assert verdict.raw is None and verdict.said.startswith("not measured")


@pytest.mark.parametrize("method", METHODS)
def test_calibration_brings_confidence_nearer_to_the_truth(method, tmp_path: Path) -> None:
    raw, right = overconfident(1000)
    found = Calibration.fit(raw, right, method=method)
    assert found.after.ece < found.before.ece / 2 and found.after.brier < found.before.brier
    # On answers that it has never seen, and against what is true of them.
    other, outcome = overconfident(4000, seed=1)
    calibrated = np.array([found(each) for each in other])
    assert np.abs(calibrated - np.square(other)).mean() < 0.06
    assert quality(calibrated, np.array(outcome, float)).ece < 0.05
    assert all(a <= b + 1e-12 for a, b in zip(calibrated[np.argsort(other)], calibrated[np.argsort(other)][1:], strict=False))
    found.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == found


def test_isotonic_is_least_squares_among_all_that_never_fall() -> None:
    from scipy.optimize import isotonic_regression

    raw, right = overconfident(300)
    found = Calibration.fit(raw, right, method="isotonic")
    order = np.argsort(raw)
    wanted = isotonic_regression(np.array(right, float)[order]).x
    sums = np.square(wanted - np.array(right, float)[order]).sum()
    blocks = np.unique(wanted)
    assert found.y == pytest.approx(blocks)
    at_pools = np.square(np.repeat(found.y, [int((wanted == each).sum()) for each in blocks]) - np.array(right, float)[order]).sum()
    assert at_pools == pytest.approx(sums)


def test_the_measures_by_hand() -> None:
    # Two bins: 0.2 said where half is right, 0.9 where all is.
    found = quality(np.array([0.2, 0.2, 0.9, 0.9]), np.array([0.0, 1.0, 1.0, 1.0]))
    assert found.ece == pytest.approx((2 * 0.3 + 2 * 0.1) / 4)
    assert found.brier == pytest.approx((0.04 + 0.64 + 0.01 + 0.01) / 4)


def test_confidence_that_says_the_opposite_is_not_turned_around() -> None:
    raw = [0.1, 0.9] * 50
    found = Calibration.fit(raw, [each < 0.5 for each in raw], method="platt")
    assert found(0.1) == pytest.approx(found(0.9)) and found(0.5) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("raw", "right", "said"),
    [
        ([0.5] * 5, [True, False] * 2 + [True], "too few"),
        ([0.5] * 30, [True] * 30, "30 of them right"),
        ([1.5] * 30, [True, False] * 15, "from 0 to 1"),
    ],
)
def test_what_cannot_be_learned_from(raw: list[float], right: list[bool], said: str) -> None:
    with pytest.raises(DataError, match=said):
        Calibration.fit(raw, right)


@pytest.mark.parametrize("change", [{"x": []}, {"y": [1.0, 0.0], "x": [0.0, 1.0]}, {"version": 9}, {"method": "other"}, {"before": {}}])
def test_a_file_that_is_no_calibration(change: dict[str, object], tmp_path: Path) -> None:
    place = tmp_path / "c.json"
    Calibration.fit(*overconfident(600), method="isotonic").save(place)
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    with pytest.raises(DataError, match="no calibration"):
        Calibration.load(place)

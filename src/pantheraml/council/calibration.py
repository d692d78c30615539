"""From a confidence that was measured to how often such an answer is right, learned from questions whose answers are known.

Letters: N pairs of a raw confidence and whether the answer was right.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pantheraml.errors import DataError, StorageError

Method = Literal["isotonic", "platt"]
F64 = NDArray[np.float64]

BINS = 10
FOLDS = 5
FEWEST = 20
"""Pairs: with fewer of them a fold holds hardly any that is wrong."""
ISOTONIC_FROM = 500
"""Pairs from which on steps of any shape are learned better than two numbers (Niculescu-Mizil and Caruana 2005 found about 1,000)."""
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How far confidences are from being right.

    Attributes:
        ece: expected calibration error, the mean distance over ten bins of equal width between confidence and share of right answers,
            weighted by how many answers are in them. brier: mean squared distance from 1 if right, 0 if not. count: answers.
    """

    ece: float
    brier: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A function that never falls, from a raw confidence to the share of right answers.

    Attributes:
        method: isotonic: linear between points (x, y); platt: 1 / (1 + exp(-(a * logit(raw) + b))), with points ((a,), (b,)).
        before, after: on pairs that were not fitted on: each fifth of them by a fit on the others. The function itself is fitted on all.
    """

    method: Method
    x: tuple[float, ...]
    y: tuple[float, ...]
    before: Quality
    after: Quality

    @classmethod
    def fit(cls, raw: Sequence[float], right: Sequence[bool], *, method: Method | None = None, seed: int = 0) -> Calibration:
        """Learn from answers.

        Args:
            raw: confidences, 0 to 1. right: whether each answer was. method: None: by how many there are. seed: of the division in five.
        Raises: DataError if they are too few, out of range, or all right or all wrong.
        """
        x, y = np.asarray(raw, np.float64), np.asarray(right, np.float64)
        if x.shape != y.shape or x.ndim != 1 or not np.all((x >= 0) & (x <= 1)):
            raise DataError(
                "confidences are numbers from 0 to 1, each with right or wrong", why="others mean nothing", fix="correct the rows"
            )
        if len(x) < FEWEST or y.min() == y.max():
            raise DataError(
                f"{len(x)} answers, {int(y.sum())} of them right, are too few to calibrate with",
                why=f"it takes {FEWEST}, some right and some wrong",
                fix="ask more questions whose answers are known",
            )
        chosen: Method = method or ("isotonic" if len(x) >= ISOTONIC_FROM else "platt")
        learn = _isotonic if chosen == "isotonic" else _platt
        fold = np.random.default_rng(seed).permutation(len(x)) % FOLDS
        held = np.empty_like(x)
        for each in range(FOLDS):
            points = learn(x[fold != each], y[fold != each])
            held[fold == each] = _applied(chosen, *points, x[fold == each])
        points = learn(x, y)
        return cls(method=chosen, x=tuple(points[0].tolist()), y=tuple(points[1].tolist()), before=quality(x, y), after=quality(held, y))

    def __call__(self, raw: float) -> float:
        """The calibrated confidence, 0 to 1."""
        return float(_applied(self.method, np.asarray(self.x), np.asarray(self.y), np.asarray([raw], np.float64))[0])

    def save(self, path: Path) -> None:
        """Write it as JSON. Raises: StorageError."""
        try:
            path.write_text(json.dumps({"version": _VERSION, **asdict(self)}, indent=2) + "\n", "utf-8")
        except OSError as error:
            raise StorageError(
                f"{path} cannot be written: {error.strerror or error}", why="the calibration goes there", fix="name another file"
            ) from error

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """What `save` wrote. Raises: DataError for anything else."""
        try:
            said = json.loads(path.read_text("utf-8"))
            x, y = (tuple(float(each) for each in said[name]) for name in ("x", "y"))
            qualities = [Quality(**said[name]) for name in ("before", "after")]
            method: Method = said["method"]
            single = method == "platt" and len(x) == len(y) == 1
            points = method == "isotonic" and len(x) == len(y) > 0 and list(x) == sorted(x) and list(y) == sorted(y)
            if said["version"] != _VERSION or not (single or points) or not all(map(math.isfinite, (*x, *y))):
                raise ValueError("its points do not fit each other")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is no calibration: {error}",
                why="confidences would be turned into nonsense",
                fix="make it: pantheraml council calibrate",
            ) from error
        return cls(method=method, x=x, y=y, before=qualities[0], after=qualities[1])


def quality(confidence: F64, right: F64) -> Quality:
    """How far confidences [N] are from being right [N], 0 or 1."""
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(place, minlength=BINS)
    gaps = np.abs(np.bincount(place, confidence, BINS) - np.bincount(place, right, BINS))
    return Quality(ece=float(gaps.sum() / count.sum()), brier=float(np.square(confidence - right).mean()), count=len(confidence))


def _applied(method: Method, x: F64, y: F64, raw: F64) -> F64:
    if method == "isotonic":
        return np.interp(raw, x, y)
    return 1 / (1 + np.exp(-(x[0] * _logit(raw) + y[0])))


def _logit(share: F64) -> F64:
    bounded = np.clip(share, 1e-6, 1 - 1e-6)
    return np.log(bounded) - np.log1p(-bounded)


def _isotonic(x: F64, y: F64) -> tuple[F64, F64]:
    """Least squares among functions that never fall, by pooling neighbours that do (Ayer et al. 1955): the mean x and y of each pool."""
    values, place = np.unique(x, return_inverse=True)
    weight, total = np.bincount(place).astype(np.float64), np.bincount(place, y)
    pools: list[tuple[float, float, float]] = []  # weight, sum of y, sum of x
    for pool in zip(weight.tolist(), total.tolist(), (values * weight).tolist(), strict=True):
        pools.append(pool)
        while len(pools) > 1 and pools[-2][1] * pools[-1][0] >= pools[-1][1] * pools[-2][0]:
            (w, t, v), (w_before, t_before, v_before) = pools.pop(), pools.pop()
            pools.append((w_before + w, t_before + t, v_before + v))
    return np.array([v / w for w, _, v in pools]), np.array([t / w for w, t, _ in pools])


def _platt(x: F64, y: F64) -> tuple[F64, F64]:
    """Slope and place of a logistic curve over logits, by Newton's method, with targets drawn in a little (Platt 1999).

    A slope below 0 would call the sure ones wrong; it is then 0, and every confidence the same.
    """
    ups = float(y.sum())
    target = np.where(y > 0, (ups + 1) / (ups + 2), 1 / (len(y) - ups + 2))
    inputs = np.stack([_logit(x), np.ones_like(x)], 1)
    found = np.zeros(2)
    for _ in range(100):
        share = 1 / (1 + np.exp(-np.clip(inputs @ found, -30, 30)))
        slope = inputs.T @ (share - target) + 1e-6 * found
        curve = (inputs * (share * (1 - share))[:, None]).T @ inputs + 1e-6 * np.eye(2)
        step = np.linalg.solve(curve, slope)
        found -= np.clip(step, -5, 5)
        if np.abs(step).max() < 1e-10:
            break
    if found[0] < 0:
        mean = float(target.mean())
        found = np.array([0.0, math.log(mean / (1 - mean))])
    return found[:1], found[1:]

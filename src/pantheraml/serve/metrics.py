"""What the service counts, as text that Prometheus reads."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator

FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Bounds of the histogram of times to the first token."""
TOTAL_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
RATE_S = 10.0
"""Tokens per second are of so many seconds."""


class Histogram:
    """Counts of values up to each of some bounds."""

    def __init__(self, name: str, said: str, bounds: tuple[float, ...]) -> None:
        self._name, self._said, self._bounds = name, said, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """One more."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    @property
    def mean(self) -> float | None:
        """Of all values; None: there are none."""
        return self._sum / sum(self._counts) if any(self._counts) else None

    def lines(self) -> Iterator[str]:
        """In Prometheus' text format."""
        yield from _head(self._name, self._said, "histogram")
        seen = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            seen += count
            yield f'{self._name}_bucket{{le="{bound}"}} {seen}'
        yield f"{self._name}_sum {self._sum:.6f}"
        yield f"{self._name}_count {seen}"


class Metrics:
    """Requests by route and status, times, and the rate of tokens. What the rows do is read off the batcher, see `Engine`."""

    def __init__(self) -> None:
        self.first_s = Histogram("pantheraml_first_token_seconds", "From when a row was asked for to the first token.", FIRST_S)
        self.total_s = Histogram("pantheraml_answer_seconds", "From when a row was free to the last token.", TOTAL_S)
        self.ended: Counter[str] = Counter()
        """Answers by how they ended."""
        self._requests: Counter[tuple[str, int]] = Counter()
        self._drawn: deque[tuple[float, int]] = deque()

    def request(self, route: str, status: int) -> None:
        """One that has its answer, or was refused."""
        self._requests[route, status] += 1

    def drawn(self, now_s: float, tokens: int) -> None:
        """So many tokens were drawn since the start. Called about once a second."""
        self._drawn.append((now_s, tokens))
        while len(self._drawn) > 2 and now_s - self._drawn[1][0] >= RATE_S:
            self._drawn.popleft()

    @property
    def tokens_per_s(self) -> float:
        """Of the last seconds."""
        if len(self._drawn) < 2 or self._drawn[-1][0] == self._drawn[0][0]:
            return 0.0
        (begun, before), (now, after) = self._drawn[0], self._drawn[-1]
        return (after - before) / (now - begun)

    def text(self, gauges: dict[str, tuple[str, float]], counters: dict[str, tuple[str, float]]) -> str:
        """Everything. gauges and counters: what others know: name -> (what it is, value)."""
        lines = list(_head("pantheraml_requests_total", "Requests by route and status.", "counter"))
        lines += [f'pantheraml_requests_total{{route="{route}",status="{n}"}} {count}' for (route, n), count in self._requests.items()]
        lines += _head("pantheraml_answers_total", "Answers by how they ended.", "counter")
        lines += [f'pantheraml_answers_total{{finished="{how}"}} {count}' for how, count in self.ended.items()]
        for kind, values in (("counter", counters), ("gauge", gauges)):
            for name, (said, value) in values.items():
                lines += [*_head(name, said, kind), f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"]
        return "\n".join([*lines, *self.first_s.lines(), *self.total_s.lines()]) + "\n"


def _head(name: str, said: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {said}"
    yield f"# TYPE {name} {kind}"

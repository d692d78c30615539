"""An OpenAI-compatible service as the voice of an advisor: /chat/completions over HTTP."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from pantheraml.council.persona import Endpoint
from pantheraml.council.reply import Ask, CancelledError, Reply, means
from pantheraml.errors import MissingExtra, PantheraError

ATTEMPTS = 4
BACKOFF_S = 0.5
"""Before the second attempt; twice as long before each further one, or as long as the service asks for."""
LONGEST_WAIT_S = 30.0
MAX_BYTES = 1 << 24
"""Of a response."""
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
# What a service may refuse to know, and what is done then. The temperature is not among them: another one is another advisor.
_OPTIONAL = {
    "max_tokens": "max_completion_tokens",
    "logprobs": None,
    "seed": None,
    "response_format": None,
}


class Client:
    """One service.

    Args:
        key: None: it takes none. wait: sleeps so many seconds.
    Raises: MissingExtra without the HTTP library.
    """

    def __init__(self, endpoint: Endpoint, key: str | None = None, *, wait: Callable[[float], None] = time.sleep) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise MissingExtra("httpx2", needed_for="an advisor that answers from a service", install="pantheraml[serve]") from error
        self._endpoint, self._key, self._wait = endpoint, key, wait
        headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._http = httpx2.Client(headers=headers, timeout=endpoint.timeout_s)
        self._url = endpoint.url.rstrip("/") + "/chat/completions"

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back its connections."""
        self._http.close()

    def ask(self, ask: Ask, cancelled: Callable[[], bool] = lambda: False) -> Reply:
        """The answer of the service; what it is busy with is asked for again.

        Raises: PantheraError if there is none, in words without the key; CancelledError.
        """
        begun, notes = time.monotonic(), []
        body: dict[str, Any] = {
            "model": self._endpoint.model,
            "messages": list(ask.messages),
            "max_tokens": ask.max_new_tokens,
            "temperature": ask.temperature,
            "seed": ask.seed,
            "logprobs": True,
        }
        if ask.schema is not None:
            schema = {"name": "answer", "strict": True, "schema": dict(ask.schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        attempt = 1
        while True:
            if cancelled():
                raise CancelledError
            status, said, after = self._post(body)
            if status == 200:
                return self._reply(said, time.monotonic() - begun, tuple(notes))
            refused = next((name for name in _OPTIONAL if status in (400, 422) and name in body and name in said), None)
            if refused is not None:
                value, other = body.pop(refused), _OPTIONAL[refused]
                if other is not None:
                    body[other] = value
                else:
                    notes.append(f"{self._endpoint.model} takes no {refused}")
            elif (status is None or status in _AGAIN) and attempt < ATTEMPTS and time.monotonic() - begun < self._endpoint.timeout_s:
                self._wait(min(LONGEST_WAIT_S, after if after is not None else BACKOFF_S * 2 ** (attempt - 1)))
                attempt += 1
            else:
                raise self._trouble(status, said, attempt)

    def _post(self, body: Mapping[str, Any]) -> tuple[int | None, str, float | None]:
        """(status, text, seconds to wait); no status: the service was not reached, and the text says why."""
        import httpx2

        until = time.monotonic() + self._endpoint.timeout_s
        found = bytearray()
        try:
            with self._http.stream("POST", self._url, json=body) as response:
                for piece in response.iter_bytes():
                    found += piece
                    if len(found) > MAX_BYTES:
                        return response.status_code if response.status_code != 200 else 413, "the response has no end", None
                    if time.monotonic() > until:
                        return None, f"no answer in {self._endpoint.timeout_s:g} s", None
                return (
                    response.status_code,
                    self._without_key(found.decode("utf-8", "replace")),
                    _seconds(response.headers.get("retry-after")),
                )
        except httpx2.TimeoutException:
            return None, f"no answer in {self._endpoint.timeout_s:g} s", None
        except httpx2.HTTPError as error:
            return None, self._without_key(f"{type(error).__name__}: {error}"), None

    def _without_key(self, said: str) -> str:
        """What came, before anything is cut off or read of it: some services repeat the key, and an answer goes into a transcript."""
        return said.replace(self._key, "***") if self._key else said

    def _reply(self, said: str, seconds: float, notes: tuple[str, ...]) -> Reply:
        try:
            whole = json.loads(said)
            choice = whole["choices"][0]
            text = choice["message"]["content"]
            if not isinstance(text, str):
                raise ValueError("it has no text")
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise PantheraError(
                f"{self._endpoint.url} answered something else than a chat completion",
                why=f"{type(error).__name__}: {error}",
                fix="check the url: it ends before /chat/completions, often with /v1",
            ) from None
        mean, of_answer = _logprobs(text, choice.get("logprobs"))
        usage = whole.get("usage")
        counts: Mapping[str, Any] = usage if isinstance(usage, dict) else {}
        finished = choice.get("finish_reason")
        return Reply(
            text=text,
            tokens=_whole(counts.get("completion_tokens")),
            mean_logprob=mean,
            answer_logprob=of_answer,
            finished=finished if isinstance(finished, str) else None,
            seconds=seconds,
            prompt_tokens=_whole(counts.get("prompt_tokens")),
            notes=notes,
        )

    def _trouble(self, status: int | None, said: str, attempts: int) -> PantheraError:
        shown = _message(said)
        named = f"variable {self._endpoint.key_env}" if self._endpoint.key_env else "key_env of the endpoint, which names no variable"
        match status:
            case None:
                fix = "check that the service runs and the url is right, or give it a longer timeout_s"
            case 401 | 403:
                fix = f"check the key in the {named}"
            case 404:
                fix = "check the url, which ends before /chat/completions, and the name of the model"
            case 429:
                fix = "ask less at once, or later"
            case _:
                fix = "see what the service says, or choose another one"
        times = f" after {attempts} attempts" if attempts > 1 else ""
        what = f"{self._endpoint.url} cannot be reached" if status is None else f"{self._endpoint.url} answered {status}"
        return PantheraError(f"{what}{times}: {shown}", why="an advisor's answer was to come from there", fix=fix)


def _message(said: str) -> str:
    """What a service says of an error, in one short line."""
    try:
        whole = json.loads(said)
        error = whole.get("error", whole.get("detail", whole)) if isinstance(whole, dict) else whole
        said = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except ValueError:
        pass
    line = " ".join(said.split())
    return (line if len(line) <= 200 else line[:197] + "...") or "nothing"


def _logprobs(text: str, said: Any) -> tuple[float | None, float | None]:
    try:
        content = said["content"]
        values = [float(each["logprob"]) for each in content]
        ends: list[int] = []
        for each in content:
            ends.append((ends[-1] if ends else 0) + len(str(each["token"])))
    except (KeyError, TypeError, ValueError):
        return None, None
    return means(text, values, lambda place: next((i for i, end in enumerate(ends) if end > place), len(ends) - 1))


def _seconds(said: str | None) -> float | None:
    """Of a Retry-After; a date is not read."""
    try:
        found = float(said or "")
    except ValueError:
        return None
    return found if 0 <= found < math.inf else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None

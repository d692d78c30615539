"""What is answered to a request that gets no answer, in the words and the shape that clients of OpenAI's API know."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from pantheraml.errors import PantheraError

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """A request that is not served.

    Args:
        status: of HTTP. message: for a person: what, why, and what to do.
        param: the field that is to blame. code: for a program. retry_after_s: when it may be worth asking again.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after_s = status, message, param, code, retry_after_s

    @classmethod
    def of(cls, error: PantheraError, status: int = 400, *, param: str | None = None, code: str | None = None) -> Refusal:
        """The same as a refusal."""
        return cls(status, f"{error.what}: {error.why}; {error.fix}", param=param, code=code)

    def to_dict(self) -> dict[str, Any]:
        """`{"error": ...}`."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """To be sent."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        return Json(self.to_dict(), status_code=self.status, headers=headers)


class Json(Response):
    """JSON in ASCII: a client may have sent half a character, which no other encoding can say back."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """See starlette."""
        return as_json(content)


def as_json(content: Any) -> bytes:
    """Raises: ValueError for numbers that JSON does not have."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")

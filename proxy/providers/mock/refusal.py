"""How the mock says no: an HTTP status and the error envelope that OpenAI-compatible servers send."""

from __future__ import annotations

import orjson

from proxy.types import Headers


class Refusal(Exception):
    """A request that the mock answers with an error of its own."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Headers | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers or []

    def envelope(self) -> bytes:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})


def invalid(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """A 400."""
    return Refusal(400, message, param=param, code=code)

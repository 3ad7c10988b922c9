"""How a stream ends that its budget cut: with finish reason `length`, as if it had met its own maximum. Pure.

The last events of each API are rebuilt from the head of the stream, so that ids and model stay the same.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from proxy.types import Dialect

_decode = msgspec.json.decode
_encode = msgspec.json.Encoder().encode
_NOT_JSON: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_KEPT: Final = ("id", "object", "created", "model", "system_fingerprint", "service_tier")
MAX_CHOICES: Final = 128


class Head:
    """What a stream's first events say of themselves. Fed with what is forwarded; decodes only the first chunk."""

    __slots__ = ("_data", "_done")

    def __init__(self) -> None:
        self._data = b""
        self._done = False

    def see(self, data: bytes) -> None:
        if not self._done:
            self._data = data
            self._done = b"data:" in data

    def first(self) -> dict[str, Any]:
        for line in self._data.splitlines():
            if line.startswith(b"data:"):
                try:
                    found = _decode(line[5:].strip())
                except _NOT_JSON:
                    continue
                if isinstance(found, dict):
                    return found
        return {}


def ending(dialect: Dialect, head: Head, choices: int = 1) -> bytes:
    """The events that end the stream: complete, in the API's own grammar."""
    first = head.first()
    if dialect == "responses":
        response = first.get("response")
        body = {**(response if isinstance(response, dict) else {"object": "response"})}
        body |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        kind = "response.incomplete"
        return b"event: response.incomplete\ndata: " + _encode({"type": kind, "response": body}) + b"\n\n"
    empty: dict[str, Any] = {"text": ""} if dialect == "completions" else {"delta": {}}
    chunk: dict[str, Any] = {name: first[name] for name in _KEPT if name in first}
    chunk["choices"] = [
        {"index": index, **empty, "logprobs": None, "finish_reason": "length"}
        for index in range(min(max(choices, 1), MAX_CHOICES))
    ]
    return b"data: " + _encode(chunk) + b"\n\ndata: [DONE]\n\n"

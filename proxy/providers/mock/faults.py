"""Faults by model name. The rest of the request is read and answered as usual, then the answer is bent.

| model           | a plain request                            | a stream                                           |
|-----------------|--------------------------------------------|----------------------------------------------------|
| `400` … `599`   | that status, with an error envelope (429 and 503 with Retry-After) | the same                   |
| `slow`          | answers after `slow_ms`                    | head at once, first piece after `slow_ms`          |
| `cut`           | half the body, then a reset                | half the events, then a reset                      |
| `early-close`   | half the body, then a close                | half the events, then a close without last chunk   |
| `stall`         | never answers                              | head and first event, then nothing, line open      |
| `no-done`       | as usual                                   | no terminator, but a clean end of the body         |
| `garbage`       | 200 with an HTML page                      | two events, one that is not JSON, `[DONE]`         |
| `error-event`   | 200 with an error envelope                 | 200, then an error as the only event               |
| `error-late`    | as `error-event`                           | half the events, then an error as the last         |
| `plain`         | as usual                                   | the plain JSON answer instead of a stream          |
| `no-usage`      | no `usage` member                          | no usage chunk, whether asked for or not           |
| `refuses-usage` | as usual                                   | 400 if `stream_options` is there                   |
| `window-N`      | 400 `context_length_exceeded` if the prompt is longer than N tokens (`admission`) | the same    |

Names may carry the prefix `mock/`. `echo`, `digest`, `bench-N` and `bench-N-RATE` are described in `compose`.
"""

from __future__ import annotations

import re
from typing import Final

import orjson

from proxy.providers.mock.ask import Prompt
from proxy.providers.mock.chat import DONE
from proxy.providers.mock.draft import Draft, sse
from proxy.providers.mock.refusal import Refusal, invalid
from proxy.transport.answer import NEVER, End

NAMES: Final = (
    "echo", "digest", "slow", "400", "401", "403", "404", "429", "500", "503", "529", "cut", "early-close", "stall",
    "no-done", "garbage", "error-event", "error-late", "plain", "no-usage", "refuses-usage",
)  # fmt: skip
"""What `/v1/models` lists of them."""

_STATUS: Final = re.compile(r"[45]\d\d")
_RETRY_AFTER: Final = [(b"retry-after", b"1")]
_ERROR: Final = {"message": "The mock was asked to fail.", "type": "server_error", "param": None, "code": "mock_error"}
_HTML: Final = b"<!doctype html><html><head><title>502</title></head><body><h1>Bad gateway</h1></body></html>\n"

_KINDS: Final = {
    400: ("invalid_request_error", "invalid_value", "The mock was asked to refuse this request."),
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    402: ("insufficient_quota", "credit_balance_exhausted", "There is no credit left."),
    403: ("invalid_request_error", "request_forbidden", "This key may not do that."),
    404: ("invalid_request_error", "model_not_found", "The model does not exist."),
    429: ("requests", "rate_limit_exceeded", "Rate limit reached for requests. Try again in 1s."),
    503: ("service_unavailable_error", "server_is_overloaded", "The server is overloaded."),
}


def before(prompt: Prompt) -> None:
    """Raises the Refusal that the model's name asks for."""
    if _STATUS.fullmatch(prompt.name):
        status = int(prompt.name)
        kind, code, message = _KINDS.get(status, ("server_error", None, "The mock was asked to fail."))
        waits = status in (429, 503)
        raise Refusal(status, message, kind=kind, code=code, headers=list(_RETRY_AFTER) if waits else None)
    if prompt.name == "refuses-usage" and "stream_options" in prompt.body:
        raise invalid("Unsupported parameter: 'stream_options'.", "stream_options", "unsupported_parameter")
    if prompt.name == "plain":
        prompt.stream = False


def after(prompt: Prompt, draft: Draft, path: str) -> None:
    """Bends the answer as the model's name asks for."""
    bend = _BENDS.get(prompt.name)
    if bend is not None:
        bend(draft, path)


def _cut(draft: Draft, path: str) -> None:
    _halve(draft)
    draft.end = End.RESET


def _early_close(draft: Draft, path: str) -> None:
    _halve(draft)
    draft.end = End.CLOSE


def _halve(draft: Draft) -> None:
    if draft.stream:
        draft.keep(len(draft.pieces) // 2)
    else:
        draft.cut(len(draft.pieces[0]) // 2)


def _stall(draft: Draft, path: str) -> None:
    draft.keep(1 if draft.stream else 0)
    draft.end = End.STALL
    if not draft.stream:
        draft.delay = NEVER


def _no_done(draft: Draft, path: str) -> None:
    if draft.stream:
        draft.keep(len(draft.pieces) - 1)


def _garbage(draft: Draft, path: str) -> None:
    if not draft.stream:
        draft.content_type, draft.pieces, draft.billed = b"text/html; charset=utf-8", [_HTML], draft.billed[-1:]
        return
    draft.keep(2)
    _append(draft, b'data: {"id": "broken", "choices": [{"delta": {"content": oops}}]\n\n')
    _append(draft, DONE)


def _error_event(draft: Draft, path: str) -> None:
    draft.keep(0)
    _append(draft, _error(draft, path))


def _error_late(draft: Draft, path: str) -> None:
    draft.keep(len(draft.pieces) // 2 if draft.stream else 0)
    _append(draft, _error(draft, path))


def _error(draft: Draft, path: str) -> bytes:
    if not draft.stream:
        return orjson.dumps({"error": _ERROR})
    if path == "/v1/responses":  # the only stream whose errors are flat
        flat = {"type": "error", "sequence_number": len(draft.pieces), **{k: _ERROR[k] for k in ("message", "param")}}
        return sse("error", orjson.dumps({**flat, "code": _ERROR["code"]}))
    return sse("", orjson.dumps({"error": _ERROR}))


def _append(draft: Draft, piece: bytes) -> None:
    draft.billed.append(draft.billed[-1] if draft.billed else 0)
    draft.pieces.append(piece)


_BENDS: Final = {
    "cut": _cut,
    "early-close": _early_close,
    "stall": _stall,
    "no-done": _no_done,
    "garbage": _garbage,
    "error-event": _error_event,
    "error-late": _error_late,
}

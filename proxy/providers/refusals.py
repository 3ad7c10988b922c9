"""What a provider's error object means. Pure.

A status says little: 429 is a rate limit or an account without money, 400 a wrong parameter or a prompt that is too
long. The error's code says more, and where there is none its text. Vendors share most of OpenAI's words; the words that
some have of their own stand here too.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import orjson

from proxy.errors import StreamInterrupted, UpstreamError, UpstreamRateLimited, UpstreamUnavailable
from proxy.providers.too_long import figures_in, says_too_long
from proxy.types import TooLong

Meaning = Literal["quota", "rate", "context_length", "content_policy", "request", "fault"]
"""What is wrong: the account is spent, it asks too often, the prompt is too long, it may not be answered, the request
itself, or the provider."""

_QUOTA: Final = frozenset(
    {
        "insufficient_quota",
        "quota_exceeded",
        "billing_hard_limit_reached",
        "billing_not_active",
        "credit_balance_exhausted",
        "insufficient_balance",
        "insufficient_credits",
        "exceeded_current_quota_error",
    }
)
_CONTEXT: Final = frozenset(
    {
        "context_length_exceeded",
        "context_window_exceeded",
        "exceed_context_size_error",
        "model_max_prompt_tokens_exceeded",
    }
)
_CONTENT: Final = frozenset(
    {
        "content_filter",
        "content_policy_violation",
        "responsibleaipolicyviolation",
        "moderation_blocked",
        "invalid_prompt",
    }
)
_REQUEST: Final = frozenset({"invalid_request_error", "badrequesterror", "invalid_argument", "validationexception"})
_LARGEST: Final = 10**15


def meaning_of(error: object) -> Meaning:
    """Of an error object `{message, type, code, …}`; of anything else it is a `fault`."""
    if not isinstance(error, dict):
        return "fault"
    inner = error.get("innererror")  # the one vendor that says why in an object of its own
    code, kind = _word(error.get("code")), _word(error.get("type"))
    words = {code, kind, _word(error.get("status")), _word(inner.get("code")) if isinstance(inner, dict) else ""}
    if words & _QUOTA:
        return "quota"
    if words & _CONTEXT:
        return "context_length"
    if words & _CONTENT:
        return "content_policy"
    if "rate_limit" in code or "rate_limit" in kind or kind == "too_many_requests":
        return "rate"
    text = error.get("message")
    asked = bool(words & _REQUEST)
    # Some name no kind at all, or say in a number what others say in a word.
    if (asked or not kind) and isinstance(text, str) and says_too_long(text, error.get("param")):
        return "context_length"
    return "request" if asked else "fault"


def too_long_in(body: bytes) -> TooLong | None:
    """The figures in the body of an error answer whose meaning is `context_length`; None if it means anything else."""
    error = error_in(body)
    if not isinstance(error, dict) or meaning_of(error) != "context_length":
        return None
    text = error.get("message")
    found = figures_in(text) if isinstance(text, str) else TooLong()
    window, asked = _count(error.get("n_ctx")), _count(error.get("n_prompt_tokens"))  # one server has fields for them
    return TooLong(window or found.window, asked or found.asked, None if asked else found.output)


def meaning_in(body: bytes) -> Meaning:
    """Of the body of an error answer."""
    return meaning_of(error_in(body))


def error_in(body: bytes) -> object:
    """The error object in a body; None where there is none.

    Usually it is the member `error`. A text in its place is its message; some servers make the body itself the error,
    one wraps it in a list.
    """
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if not isinstance(found, dict):
        return None
    error = found.get("error")
    if isinstance(error, str):
        return {"message": error}
    if error is None and isinstance(found.get("message"), str):
        return found
    return error


def error_object(event: bytes | None) -> dict[str, object] | None:
    """The error object of an error event, if it has one. The flat event of a response is one itself."""
    if event is None:
        return None
    try:
        found = orjson.loads(event.partition(b"data:")[2])
    except orjson.JSONDecodeError:
        return None
    if not isinstance(found, dict):
        return None
    failed = found.get("response")
    error = failed.get("error") if isinstance(failed, dict) else found.get("error")
    if isinstance(error, dict):
        return error
    if found.get("type") != "error":
        return None
    return {"message": found.get("message"), "type": "", "param": found.get("param"), "code": found.get("code")}


def is_fault(event: bytes) -> bool:
    """Of an error event: it tells of a fault of the provider's, and not of the request, a limit or the account."""
    return meaning_of(error_object(event)) == "fault"


def fault_in(message: str, error: object) -> UpstreamError:
    """Of an error that came in place of a reply, with a status that says nothing of it."""
    meaning = meaning_of(error)
    if meaning == "rate":
        return UpstreamRateLimited("The provider's rate limit is reached.")
    if meaning == "quota":
        return quota_spent()
    fault = UpstreamUnavailable(message).but(reason="error_event")
    if meaning != "fault":  # the request's own fault, told in a way that leaves nothing to pass on
        fault.but(reason="refused", retryable=False, trips_breaker=False)
    return fault


def interrupted(message: str, event: bytes | None) -> StreamInterrupted:
    """Of a stream that ends with an error; `event` as in StreamInterrupted. Only a fault of the provider's counts
    against it: what a client writes, or an account lacks, must shut it for nobody."""
    error = StreamInterrupted(message, event=event)
    if event is not None and not is_fault(event):
        error.but(reason="refused", trips_breaker=False)
    return error


def quota_spent(**details: Any) -> UpstreamUnavailable:
    """The account has no money or no quota left: the same again, and another key of it, would bring the same."""
    error = UpstreamUnavailable("The provider's account has no quota left.", **details)
    error.but(reason="quota", retryable=False, trips_breaker=False, cools="credential")
    return error


def _word(value: object) -> str:
    return value.lower() if isinstance(value, str) else ""


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _LARGEST else None

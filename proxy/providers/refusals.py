"""What a provider's error object means. Pure.

A status says little: 429 is a rate limit or an account without money, 400 a wrong parameter or a prompt that is too
long. The error's code says more, and where there is none its text. Vendors share most of OpenAI's words; the words that
some have of their own stand here too.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import orjson

from proxy.errors import StreamInterrupted, UpstreamError, UpstreamRateLimited, UpstreamUnavailable

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
_CONTEXT: Final = frozenset({"context_length_exceeded", "context_window_exceeded", "model_max_prompt_tokens_exceeded"})
_CONTENT: Final = frozenset(
    {
        "content_filter",
        "content_policy_violation",
        "responsibleaipolicyviolation",
        "moderation_blocked",
        "invalid_prompt",
    }
)
_CONTEXT_TEXTS: Final = ("maximum context length", "context window", "prompt is too long", "input is too long")
_REQUEST: Final = frozenset({"invalid_request_error", "badrequesterror"})
_LONGEST_TEXT: Final = 4096


def meaning_of(error: object) -> Meaning:
    """Of an error object `{message, type, code, …}`; of anything else it is a `fault`."""
    if not isinstance(error, dict):
        return "fault"
    inner = error.get("innererror")  # the one vendor that says why in an object of its own
    code, kind = _word(error.get("code")), _word(error.get("type"))
    words = {code, kind, _word(inner.get("code")) if isinstance(inner, dict) else ""}
    if words & _QUOTA:
        return "quota"
    if words & _CONTEXT:
        return "context_length"
    if words & _CONTENT:
        return "content_policy"
    if "rate_limit" in code or "rate_limit" in kind or kind == "too_many_requests":
        return "rate"
    if words & _REQUEST:
        text = error.get("message")
        if isinstance(text, str) and any(phrase in text[:_LONGEST_TEXT].lower() for phrase in _CONTEXT_TEXTS):
            return "context_length"
        return "request"
    return "fault"


def meaning_in(body: bytes) -> Meaning:
    """Of the body of an error answer."""
    return meaning_of(error_in(body))


def error_in(body: bytes) -> object:
    """The error object in a body; None where there is none."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return found.get("error") if isinstance(found, dict) else None


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

"""Every error that a client can see, and the one place that writes it down.

The tree::

    ProxyError                      status, type, code, param, retryable, details
    ├── InvalidRequest              400  invalid_request (or invalid_json, …): can never be served
    ├── InvalidKey                  401  invalid_api_key: one identical answer for no key and a wrong one
    ├── OriginNotAllowed            403  origin_not_allowed: keyless mode, a foreign page
    ├── NotFound                    404  model_not_found, unknown_url, unsupported_route
    ├── MethodNotAllowed            405  method_not_allowed
    ├── RequestTimeout              408  request_timeout: the client did not finish its request in time
    ├── RequestTooLarge             413  request_too_large
    ├── Overloaded                  503  overloaded: too many in flight
    ├── RequestExceedsBudget        400  request_exceeds_budget: larger than a whole window, so waiting cannot help
    ├── ContextExceeded             400  context_length_exceeded: what of the conversation must stay does not fit
    ├── ModelPriceUnknown           400  model_price_unknown: a limit in USD applies, and nobody knows the price
    ├── BudgetExceeded              429  budget_exceeded: a window is full
    │   └── ProviderFull                 that of a provider's account: the target is refused, not the request
    ├── StoreUnavailable            503  store_unavailable: the store is away, and the policy is to refuse
    ├── InternalError               500  internal_error: a fault of ours
    └── UpstreamError                    something between us and a good answer; what policy reads stands there
        ├── UpstreamUnavailable     503  upstream_unavailable: refused, broken, or our credential was not accepted
        │   ├── ConnectFailed            no connection: dns, refused, tls, timeout. Nothing was sent.
        │   └── UpstreamBroken           the connection or its framing broke after bytes were sent
        ├── UpstreamTimeout         504  upstream_timeout
        ├── UpstreamRateLimited     429  upstream_rate_limited
        └── StreamInterrupted       (event)  stream_interrupted: died after the first forwarded event

Policy reads the attributes; nobody compares status codes or strings. A foreign exception is translated once, at the
seam where it is caught, `from` its cause; its text never becomes part of ours, for it can hold a key.
"""

from __future__ import annotations

from typing import Any, Final, Literal, Self

import msgspec

_encode = msgspec.json.Encoder().encode

Cooling = Literal["rate", "credential", "forbidden"]
"""`rate`: it asked too often. `credential`: it is not accepted, or what it may spend is spent. `forbidden`: it may not
do this; or the text of this one request was not to be answered, for which some vendors have no other status."""


class ProxyError(Exception):
    """The root. `message` is for a person and never quotes a foreign exception; `details` is for a program."""

    status: int = 500
    type: str = "server_error"
    code: str = "internal_error"
    retryable: bool = False
    """Sending the same request to the same place again, later, can help."""

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: list[tuple[bytes, bytes]] | None = None,
        **details: Any,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code
        self.headers = headers or []
        """Extra response headers, such as `retry-after`."""
        self.details = details


class InvalidRequest(ProxyError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class InvalidKey(ProxyError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    def __init__(self) -> None:
        super().__init__("No or unknown API key. Send a key of this gateway as 'Authorization: Bearer KEY'.")


class OriginNotAllowed(ProxyError):
    status = 403
    type = "invalid_request_error"
    code = "origin_not_allowed"


class NotFound(ProxyError):
    status = 404
    type = "invalid_request_error"
    code = "unknown_url"


class MethodNotAllowed(ProxyError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class RequestTimeout(ProxyError):
    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class RequestTooLarge(ProxyError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class Overloaded(ProxyError):
    status = 503
    code = "overloaded"
    retryable = True


class RequestExceedsBudget(ProxyError):
    status = 400
    type = "invalid_request_error"
    code = "request_exceeds_budget"


class ContextExceeded(ProxyError):
    """Of one target: another may have a larger window. The details hold the figures: limit, pinned, newest."""

    status = 400
    type = "invalid_request_error"
    code = "context_length_exceeded"


class ModelPriceUnknown(ProxyError):
    status = 400
    type = "invalid_request_error"
    code = "model_price_unknown"


class BudgetExceeded(ProxyError):
    """`retry_after_ms` is an upper bound. Of the scopes `provider` and `global`, the details hold the reset alone."""

    status = 429
    type = "budget_error"
    code = "budget_exceeded"
    retryable = True

    def __init__(
        self, message: str, *, retry_after_ms: int, headers: list[tuple[bytes, bytes]], **details: Any
    ) -> None:
        super().__init__(message, headers=headers, **details)
        self.retry_after_ms = retry_after_ms


class ProviderFull(BudgetExceeded):
    """Another target may still serve the request; the client sees this only when all of them are full."""


class StoreUnavailable(ProxyError):
    status = 503
    code = "store_unavailable"
    retryable = True


class InternalError(ProxyError):
    """A fault of ours. The message is always the same: what went wrong stands in the log, under the request id."""

    def __init__(self) -> None:
        super().__init__("Breakwater met an internal error. Its log has the details under this request id.")


class UpstreamError(ProxyError):
    """What went wrong at a provider, in the terms that retries, failover and the breaker decide by.

    The classes say what is usual; whoever translates a provider's answer says what is different this time, with
    `but`. `headers` are what the provider told the client of its limits and of when to come back.
    """

    type = "upstream_error"
    code = "upstream_unavailable"
    status = 503
    reason: str = "failed"
    """One word of a closed set: the label of metrics, and what the list of attempts says."""
    failover: bool = False
    """Another target may well serve the same request."""
    trips_breaker: bool = False
    """Counts as evidence against the provider's health."""
    local_origin: bool = False
    """May just as well be this machine's own trouble: no evidence for the other processes."""
    sent: bool = True
    """Request bytes may have been written: what must not be served twice is not sent again."""
    timed_out: bool = False
    """It may still be at work on the request, and bill it: sent again to the same place only where that is wanted."""
    cools: Cooling | None = None
    """Why the credential that was used should rest."""
    other_key: bool = False
    """The provider has another credential that may be used at once."""
    asked: float | None = None
    """Seconds that the provider asked to be left alone for."""

    def but(self, *, reason: str, **differences: Any) -> Self:
        """The same error, for another reason than usual, with other attributes than those of its class."""
        self.reason = reason
        for name, value in differences.items():
            if name not in POLICY:
                raise TypeError(f"policy knows no '{name}'")
            setattr(self, name, value)
        return self


POLICY: Final = ("retryable", "failover", "trips_breaker", "local_origin", "sent", "timed_out", "cools", "asked")
"""The attributes that may differ from one error of a class to the next."""


class UpstreamUnavailable(UpstreamError):
    retryable = True
    failover = True
    trips_breaker = True


class ConnectFailed(UpstreamUnavailable):
    """`reason`: dns, refused, tls, timeout, pool (no slot came free in time), network. No request byte was written."""

    local_origin = True
    sent = False

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
        if reason == "pool":
            self.trips_breaker = False  # our own limit: it says nothing of the provider


class UpstreamBroken(UpstreamUnavailable):
    """`reason`: closed, reset, protocol, encoding, too_large. Request bytes may have been acted on."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
        if reason in ("encoding", "too_large"):  # the same again would bring the same
            self.retryable = False
            self.failover = self.trips_breaker = reason == "encoding"  # how much it is, the client has asked for


class UpstreamTimeout(UpstreamError):
    """Nothing came in time after the request was sent. (A connection that did not come up is a ConnectFailed.)"""

    status = 504
    code = "upstream_timeout"
    reason = "upstream_timeout"
    failover = True
    trips_breaker = True
    timed_out = True


class UpstreamRateLimited(UpstreamError):
    status = 429
    code = "upstream_rate_limited"
    reason = "rate_limited"
    retryable = True
    failover = True
    cools = "rate"


class StreamInterrupted(UpstreamError):
    """Only ever an SSE event, the last one of its stream.

    `event` is the provider's own error event, complete, where it sent one that clients of its API know: an error
    object, on which every SDK raises, or the flat `error` event of a response, which SDKs hand to the application. Else
    ours is written.
    """

    code = "stream_interrupted"
    reason = "interrupted"
    trips_breaker = True

    def __init__(self, message: str, *, event: bytes | None = None) -> None:
        super().__init__(message)
        self.event = event


def envelope(error: ProxyError) -> bytes:
    """The OpenAI envelope: `{"error": {message, type, param, code, "breakwater": {…}?}}`.

    The details stand inside, because SDKs give their users the inner object only.
    """
    body: dict[str, Any] = {
        "error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    }
    if error.details:
        body["error"]["breakwater"] = error.details
    return _encode(body)


def sse_event(error: ProxyError) -> bytes:
    """The same as the last event of a stream: the official SDKs raise on it, whichever API they stream."""
    if isinstance(error, StreamInterrupted) and error.event is not None:
        return error.event
    return b"data: " + envelope(error) + b"\n\n"

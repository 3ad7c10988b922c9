"""What a client is told when every attempt has failed. Pure.

    the deadline has passed                        504 upstream_timeout
    every target is full (its account's budget)    429 budget_exceeded
    every target says 429, or rests after one      429 upstream_rate_limited, with the shortest Retry-After
    every target timed out                         504 upstream_timeout
    else                                           503 upstream_unavailable

It lists every attempt, and says that to repeat the request is of no use: that was done here. Only a 429 that was not
waited for, because nothing is repeated here, is the client's to repeat.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from proxy.errors import (
    ContextExceeded,
    ModelPriceUnknown,
    ProviderFull,
    ProxyError,
    RequestExceedsBudget,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from proxy.fault_tolerance.retry import Standing
from proxy.types import Headers, Target

TargetRefused = ProviderFull | ModelPriceUnknown | RequestExceedsBudget | ContextExceeded
"""One target is refused, not the request: by a budget, or because the conversation does not fit there."""
REFUSALS: Final = (ProviderFull, ModelPriceUnknown, RequestExceedsBudget, ContextExceeded)

RATE: Final = "rate_limited"
CREDENTIAL: Final = "credential"
"""Why a target rests: what its last answers said."""
_REFUSED: Final = {
    ProviderFull: "account_full",
    ModelPriceUnknown: "price_unknown",
    ContextExceeded: "context_length",
}
_NO_REPEAT: Final = (b"x-should-retry", b"false")


def reason_of(refused: TargetRefused) -> str:
    """The word for a target that was refused."""
    return _REFUSED.get(type(refused), "exceeds_budget")


def entry(target: Target, reason: str, status: int | None = None, seconds: float = 0.0) -> dict[str, Any]:
    """One line of the list of attempts."""
    place = f"{target.provider}/{target.model}".rstrip("/")
    return {"target": place, "status": status, "reason": reason, "ms": round(seconds * 1000)}


def listed(error: UpstreamError, attempts: Sequence[Mapping[str, Any]], *, repeats: bool) -> UpstreamError:
    """`error` as it goes to the client. `repeats`: failed attempts are repeated here."""
    error.details["attempts"] = list(attempts)
    if repeats or not isinstance(error, UpstreamRateLimited):
        error.headers = [*(header for header in error.headers if header[0] != _NO_REPEAT[0]), _NO_REPEAT]
    return error


def verdict(
    standings: Sequence[Standing],
    refused: Sequence[TargetRefused],
    attempts: Sequence[Mapping[str, Any]],
    *,
    now: float,
    late: bool,
    repeats: bool,
) -> ProxyError:
    """The final error. `refused`: what budgets said of targets. `late`: the deadline of the request has passed."""
    last = [one for one in standings if one.error is not None or one.skipped]
    if refused and len(refused) == len(last):
        return _refusal(refused)
    return listed(_summary(last, now=now, late=late), attempts, repeats=repeats)


def _summary(last: Sequence[Standing], *, now: float, late: bool) -> UpstreamError:
    if late:
        return UpstreamTimeout("The deadline of this request passed before a provider had answered.")
    if len(last) == 1 and last[0].error is not None and not last[0].skipped:
        return last[0].error
    if last and all(_is_rate_limited(one) for one in last):
        message = "Every provider of this model has its rate limit reached."
        return UpstreamRateLimited(message, headers=_come_back(last, now))
    if last and all(isinstance(one.error, UpstreamTimeout) and not one.skipped for one in last):
        return UpstreamTimeout("No provider of this model answered in time.")
    headers = _come_back(last, now) if all(one.asked is not None for one in last) else []
    return UpstreamUnavailable("No provider of this model can answer now.", headers=headers)


def _refusal(refused: Sequence[TargetRefused]) -> TargetRefused:
    full = [one for one in refused if isinstance(one, ProviderFull)]
    return min(full, key=lambda one: one.retry_after_ms) if full else refused[0]


def _is_rate_limited(one: Standing) -> bool:
    return one.skipped == RATE if one.skipped else isinstance(one.error, UpstreamRateLimited)


def _come_back(last: Sequence[Standing], now: float) -> Headers:
    """When the first of them may be asked again; nothing where none has said it."""
    waits = [max(one.at + one.asked - now, 0.0) for one in last if one.asked is not None]
    return [(b"retry-after", b"%d" % max(math.ceil(min(waits)), 1))] if waits else []

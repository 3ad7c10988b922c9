"""What a client is told about its budget: errors and headers, out of a store's verdict. Pure.

No tenant sees another's load: of the scopes `provider` and `global` an answer holds the reset alone, and the
`x-ratelimit-*` headers speak of the tenant and its key only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, TypeVar

from proxy.budget.amounts import Row
from proxy.budget.plan import Plan
from proxy.budget.policy import Reach
from proxy.budget.pricing import line_to_paste, place_to_paste
from proxy.errors import BudgetExceeded, ModelPriceUnknown, ProviderFull, RequestExceedsBudget, StoreUnavailable
from proxy.money import usd_text
from proxy.store.base import Refused, Scope
from proxy.types import Headers, Target

LONG_WAIT_MS: Final = 60_000
"""Beyond this, SDKs are told not to repeat by themselves."""

_SHOWN: Final = ("tenant", "key")
_WHOSE: Final = {
    "tenant": "This tenant",
    "key": "This key",
    "global": "This gateway",
    "provider": "The provider's account",
}
_Exceeded = TypeVar("_Exceeded", bound=BudgetExceeded)


def budget_exceeded(refused: Refused, headers: Headers) -> BudgetExceeded:
    """`headers` are the caller's rate limit headers, as far as they are known."""
    return _exceeded(BudgetExceeded, refused, headers)


def provider_full(refused: Refused, headers: Headers) -> ProviderFull:
    return _exceeded(ProviderFull, refused, headers)


def _exceeded(kind: type[_Exceeded], refused: Refused, headers: Headers) -> _Exceeded:
    wait_ms = refused.reset_ms if refused.retry_after_ms is None else refused.retry_after_ms
    seconds = -(-wait_ms // 1000)
    scope = refused.scope.kind
    details: dict[str, Any] = {"scope": scope}
    message = f"{_WHOSE[scope]} has no room left in its budget"
    if scope in _SHOWN:
        details |= {"window": refused.window} | {
            name: _figure(refused.window, getattr(refused, name)) for name in ("limit", "used", "reserved")
        }
        used, reserved, limit = details["used"], details["reserved"], details["limit"]
        message = f"{_WHOSE[scope]} has used {used} and reserved {reserved} of {limit} {refused.window}"
    details["reset"] = -(-refused.reset_ms // 1000)
    extra: Headers = [(b"retry-after", b"%d" % max(seconds, 1))]
    if wait_ms > LONG_WAIT_MS:
        extra.append((b"x-should-retry", b"false"))
    if refused.window == "max_concurrent":
        message = f"{message}. There is room again when one of them ends."  # nobody knows when that is
    else:
        message = f"{message}. There is room again in {max(seconds, 1)} s at the latest."
    return kind(message, retry_after_ms=wait_ms, headers=[*headers, *extra], **details)


def _figure(window: str, amount: int) -> int | str:
    """In the unit of the configuration key: dollars as an exact decimal text."""
    return usd_text(amount) if window.startswith("usd_") else amount


def request_exceeds(plan: Plan, scopes: Iterable[tuple[Scope, Reach]]) -> RequestExceedsBudget:
    """`scopes`: those that hold the request; the first that is too small for it is named."""
    ask = plan.judged
    for scope, reach in scopes:
        if reach.tokens is not None and ask.tokens > reach.tokens:
            size, window = f"{ask.tokens} tokens", f"{reach.tokens}"
        elif reach.nano_usd is not None and ask.nano_usd > reach.nano_usd:
            size, window = f"{usd_text(ask.nano_usd)} USD", usd_text(reach.nano_usd)
        else:
            continue
        beside = f", and a whole window holds {window}" if scope.kind in _SHOWN else ""
        return RequestExceedsBudget(
            f"The request needs about {size}{beside}: it is larger than the budget of the {scope.kind}, and can never"
            " be served.",
            scope=scope.kind,
        )
    return RequestExceedsBudget("The request is larger than a whole budget window, and can never be served.")


def price_unknown(target: Target) -> ModelPriceUnknown:
    return ModelPriceUnknown(
        f"No price is known for '{target.model}' at '{target.provider}', so it cannot be held to a budget in USD. Add"
        f" this line under {place_to_paste(target)}, with USD per million tokens, or 'price: none' for a model that"
        f" costs nothing: {line_to_paste(target)}",
        param="model",
    )


def store_unavailable() -> StoreUnavailable:
    return StoreUnavailable(
        "The budget cannot be checked at the moment, and requests are refused until it can.",
        headers=[(b"retry-after", b"1")],
    )


def rate_limit_headers(rows: Iterable[tuple[Scope, Row]], refused: Refused | None = None) -> Headers:
    """`x-ratelimit-{limit,remaining,reset}-{requests,tokens}`: of several scopes the one that leaves the least.

    `refused` is newer than the rows: what other processes took meanwhile stands in it alone.
    """
    requests: tuple[int, int, int] | None = None
    tokens: tuple[int, int, int] | None = None
    for scope, row in rows:
        if scope.kind not in _SHOWN or not scope.enforced:
            continue
        limits = scope.limits
        limit = limits.requests_per_minute
        if limit is not None:
            left = max(limit - row.minute_requests - row.minute_held_requests, 0)
            if requests is None or left < requests[0]:
                requests = (left, limit, row.minute_reset_ms)
        limit = limits.tokens_per_minute
        if limit is not None:
            left = max(limit - row.minute_tokens - row.minute_held_tokens, 0)
            if tokens is None or left < tokens[0]:
                tokens = (left, limit, row.minute_reset_ms)
    if refused is not None and refused.scope.kind in _SHOWN:
        found = (max(refused.limit - refused.used - refused.reserved, 0), refused.limit, refused.reset_ms)
        if refused.window == "requests_per_minute":
            requests = found if requests is None or found[0] < requests[0] else requests
        elif refused.window == "tokens_per_minute":
            tokens = found if tokens is None or found[0] < tokens[0] else tokens
    headers: Headers = []
    reset = b""
    if requests is not None:
        left, limit, reset_ms = requests
        reset = go_duration(reset_ms).encode()
        headers += (
            (b"x-ratelimit-limit-requests", b"%d" % limit),
            (b"x-ratelimit-remaining-requests", b"%d" % left),
            (b"x-ratelimit-reset-requests", reset),
        )
    if tokens is not None:
        left, limit, reset_ms = tokens
        if requests is None or reset_ms != requests[2]:
            reset = go_duration(reset_ms).encode()
        headers += (
            (b"x-ratelimit-limit-tokens", b"%d" % limit),
            (b"x-ratelimit-remaining-tokens", b"%d" % left),
            (b"x-ratelimit-reset-tokens", reset),
        )
    return headers


def go_duration(milliseconds: int) -> str:
    """As Go writes a duration: `6m0s`, `1.5s`, `250ms`, `0s`."""
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds > 0 else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    whole, thousandths = divmod(rest, 1000)
    seconds = f"{whole}.{thousandths:03d}".rstrip("0") + "s" if thousandths else f"{whole}s"
    if hours:
        return f"{hours}h{minutes}m{seconds}"
    return f"{minutes}m{seconds}" if minutes else seconds

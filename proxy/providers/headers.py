"""Which headers cross the proxy, by allow-list in both directions. Pure.

What is not named here stays on its side: credentials, cookies, hop-by-hop and framing headers, the client's address,
a provider's organisation. A new header of a vendor is added here on purpose or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from proxy.types import Headers

_TO_PROVIDER: Final = frozenset({b"openai-beta", b"x-client-request-id"})
_TO_PROVIDER_PASSTHROUGH: Final = _TO_PROVIDER | {
    b"content-type",
    b"content-encoding",
    b"accept",
    b"range",
    b"if-none-match",
}
_TO_PROVIDER_OWN_KEY: Final = frozenset({b"openai-organization", b"openai-project", b"idempotency-key"})
"""They name something within an account, so they travel only with the caller's own key: in an account that many share,
two tenants with one idempotency key would get each other's replies."""

_TO_CLIENT: Final = frozenset(
    {
        b"content-type",
        b"openai-processing-ms",
        b"openai-version",
        b"openai-model",
        b"retry-after",
        b"retry-after-ms",
        b"x-should-retry",
    }
)
_TO_CLIENT_PASSTHROUGH: Final = _TO_CLIENT | {
    b"content-disposition",
    b"content-encoding",
    b"content-range",
    b"accept-ranges",
    b"etag",
    b"last-modified",
}
_REQUEST_IDS: Final = (b"x-request-id", b"request-id", b"apim-request-id")
_RATE_LIMIT: Final = b"x-ratelimit-"
_UPSTREAM_RATE_LIMIT: Final = b"x-breakwater-upstream-ratelimit-"
_WAIT: Final = (b"retry-after", b"retry-after-ms", b"x-should-retry")


def to_provider(headers: Headers, *, passthrough: bool, own_key: bool) -> Headers:
    """The client's headers that the provider gets."""
    allowed = _TO_PROVIDER_PASSTHROUGH if passthrough else _TO_PROVIDER
    if own_key:
        allowed = allowed | _TO_PROVIDER_OWN_KEY
    return [header for header in headers if header[0] in allowed]


def to_client(headers: Headers, *, passthrough: bool) -> Headers:
    """The provider's headers that the client gets. Its rate limits are renamed: `x-ratelimit-*` are ours alone."""
    allowed = _TO_CLIENT_PASSTHROUGH if passthrough else _TO_CLIENT
    kept: Headers = []
    for name, value in headers:
        if name in allowed:
            kept.append((name, value))
        elif name.startswith(_RATE_LIMIT):
            kept.append((_UPSTREAM_RATE_LIMIT + name[len(_RATE_LIMIT) :], value))
    return kept


def when_to_come_back(headers: Headers) -> Headers:
    """What a provider's 429 says about its limits and about trying again, for the client."""
    kept = to_client(headers, passthrough=False)
    return [header for header in kept if header[0] in _WAIT or header[0].startswith(_UPSTREAM_RATE_LIMIT)]


def by_name(headers: Headers) -> dict[bytes, bytes]:
    """Of several headers with one name, the first."""
    return dict(reversed(headers))


def request_id(named: Mapping[bytes, bytes]) -> str:
    """The provider's own id of the request, or an empty string."""
    for name in _REQUEST_IDS:
        if name in named:
            return named[name].decode("latin-1")[:128]
    return ""


def caller_key(headers: Headers) -> bytes:
    """The key that the caller presented, in whichever of the three headers; b"" when there is none."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            return key if scheme.lower() == b"bearer" else b""
        if name in (b"api-key", b"x-api-key"):
            return value
    return b""

"""Whose request it is. One identical answer for every wrong, missing or doubled key.

Keys are compared by SHA-256 digest: the table holds no key, and looking one up takes the same time however much of it
is right. Without tenants there is no key to check, so another question is asked: does the request come from a program
on this machine, or from a page that a browser on this machine happens to show? A page cannot help sending `Origin` or
`Sec-Fetch-Site`, and a rebound name betrays itself in `Host`.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache

from proxy.errors import InvalidKey, OriginNotAllowed, StoreUnavailable
from proxy.types import Call, Headers, Tenant

_KEY_HEADERS = (b"authorization", b"api-key", b"x-api-key")
KEY_DIGITS = 16
"""Of a key's digest, as its name in the ledger."""
DEFAULT = Tenant(name="default", passthrough=None)


def presented_key(headers: Headers) -> bytes | None:
    """The one key that a request presents, or None when there is none, or more than one, or a malformed one."""
    key: bytes | None = None
    for name, value in headers:
        if name not in _KEY_HEADERS:
            continue
        if name == b"authorization":
            scheme, _, value = value.partition(b" ")
            if scheme.lower() != b"bearer":
                return None
        if not value or value != value.strip() or (key is not None and (name == b"authorization" or key != value)):
            return None
        key = value
    return key


class KeyedTenants:
    """Tenants with keys of their own: `by_key` maps a configured key's text to its tenant.

    Keys that are made at run time come and go by their digests, in the same table. `complete`: none of them can be
    unknown here, except those that are not valid.
    """

    def __init__(self, by_key: Mapping[str, Tenant], *, complete: bool = True) -> None:
        digests = ((hashlib.sha256(key.encode()), tenant) for key, tenant in by_key.items())
        self._by_digest = {one.digest(): replace(tenant, key=one.hexdigest()[:KEY_DIGITS]) for one, tenant in digests}
        self._configured = frozenset(self._by_digest)
        self.complete = complete

    def identify(self, call: Call) -> Tenant:
        """The tenant whose key the call presents. Raises InvalidKey, and StoreUnavailable while nobody can tell."""
        key = presented_key(call.headers)
        tenant = self._by_digest.get(hashlib.sha256(key).digest()) if key is not None else None
        if tenant is None:
            if key is not None and not self.complete:
                # 401 would tell whoever holds a good key to stop trying.
                raise StoreUnavailable("Keys cannot be checked yet: try again.", headers=[(b"retry-after", b"1")])
            raise InvalidKey
        return tenant

    def admit(self, digest: bytes, tenant: Tenant) -> None:
        """Lets a key made at run time in. One that stands in the configuration too is what that says."""
        if digest not in self._configured:
            self._by_digest[digest] = tenant

    def dismiss(self, digest: bytes) -> None:
        if digest not in self._configured:
            self._by_digest.pop(digest, None)


class Keyless:
    """No tenants: any key will do, but only for programs. `any_host` lifts the check of Host (`--insecure`)."""

    def __init__(self, *, any_host: bool = False) -> None:
        self._any_host = any_host

    def identify(self, call: Call) -> Tenant:
        """The one tenant there is. Raises OriginNotAllowed for a page's request."""
        refuse_pages(call.headers, any_host=self._any_host)
        return DEFAULT


def refuse_pages(headers: Headers, *, any_host: bool) -> None:
    """Raises OriginNotAllowed for what only a browser sends, and for a Host that is not this machine's loopback."""
    for name, value in headers:
        if name == b"origin":
            raise OriginNotAllowed("Without tenants, requests from web pages (with an Origin header) are refused.")
        if name == b"sec-fetch-site" and value.strip().lower() not in (b"none", b"same-origin"):
            raise OriginNotAllowed("Without tenants, cross-site requests of a browser are refused.")
        if name == b"host" and not any_host and not is_loopback_host(value):
            raise OriginNotAllowed(
                "Without tenants, the Host header must be a loopback address or localhost. "
                "Configure tenants to serve other names."
            )


@lru_cache(maxsize=256)
def is_loopback_host(value: bytes) -> bool:
    """Whether a Host header names this machine's loopback: `localhost`, `127.x.y.z`, `[::1]`, with or without port."""
    host = value.decode("latin-1").strip().lower()
    if host.startswith("["):
        host, _, port = host[1:].partition("]")
        port = port.removeprefix(":")
    else:
        host, _, port = host.partition(":")
    if port and not port.isdigit():
        return False
    return is_loopback(host)


def is_loopback(host: str) -> bool:
    """Whether a listening address or host name is loopback and nothing else."""
    if host in ("localhost", "localhost."):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class AdminKeys:
    """The keys of `admin.keys`. Without any, nothing is an administrator."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = frozenset(hashlib.sha256(key.encode()).digest() for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, headers: Headers) -> bool:
        """Whether the request presents one of them."""
        key = presented_key(headers)
        return key is not None and hashlib.sha256(key).digest() in self._digests

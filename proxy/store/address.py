"""Where the store lives: the URL of the configuration, taken apart.

    redis://[[user]:password@]host[:6379][/db]                    one server; rediss:// for TLS
    redis+sentinel://[[user]:password@]host[:26379],…/service[/db]    whoever the sentinels call the master
    redis+cluster://[[user]:password@]host[:6379],…               whoever owns our slot; any members as a start

`rediss+sentinel` and `rediss+cluster` speak TLS. Options of TLS, after `?`: `ssl_ca_certs`, `ssl_certfile`,
`ssl_keyfile`, `ssl_cert_reqs=required|none`, `ssl_check_hostname=true|false`; of sentinels: `sentinel_username`,
`sentinel_password`. Valkey speaks the same and takes the same URLs, `valkey://` included.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from typing import Final, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

Topology = Literal["standalone", "sentinel", "cluster"]
Host = tuple[str, int]

MEMORY: Final = "memory://"
"""No server at all: the store of one process."""

NAMESPACE: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""Goes between the braces of every key, so it can hold neither."""
_SCHEME: Final = re.compile(r"(?:redis|valkey)(s?)(?:\+(sentinel|cluster))?")
_TLS_OPTIONS: Final = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"}
_SENTINEL_OPTIONS: Final = {"sentinel_username", "sentinel_password"}


@dataclass(frozen=True, slots=True)
class Credentials:
    """What AUTH sends; nothing for a server without a password."""

    username: str = ""
    password: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Address:
    """A store's place. Holds a password, which its `repr` leaves out."""

    topology: Topology
    hosts: tuple[Host, ...]
    credentials: Credentials = Credentials()
    db: int = 0
    service: str = ""
    """The master's name, as the sentinels know it."""
    sentinel_credentials: Credentials = Credentials()
    tls: ssl.SSLContext | None = field(default=None, repr=False)


def parse_address(url: str) -> Address:
    """Raises ValueError, which never quotes the URL (it can hold a password), and OSError for an unreadable file."""
    try:
        parts = urlsplit(url)
        scheme = _SCHEME.fullmatch(parts.scheme)
        options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    except ValueError:
        raise ValueError("expected a URL such as redis://localhost:6379/0") from None
    if scheme is None or not parts.netloc or parts.fragment:
        raise ValueError("expected a URL such as redis://localhost:6379/0, rediss://…, redis+sentinel://…")
    topology: Topology = scheme[2] or "standalone"  # type: ignore[assignment]  # the pattern allows no other
    user, _, hosts = parts.netloc.rpartition("@")
    username, _, password = user.partition(":")
    service, db = _path(topology, parts.path)
    known = (_TLS_OPTIONS if scheme[1] else set()) | (_SENTINEL_OPTIONS if topology == "sentinel" else set())
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"the URL has an option that does not apply: {unknown[0][:40]}")
    return Address(
        topology,
        _hosts(hosts, topology),
        Credentials(unquote(username), unquote(password)),
        db,
        service,
        Credentials(options.get("sentinel_username", ""), options.get("sentinel_password", "")),
        _tls(options) if scheme[1] else None,
    )


def passwords_in(url: str) -> frozenset[str]:
    """What of a URL must never be shown, of any scheme: passwords, as they are written and as they are sent."""
    try:
        parts = urlsplit(url)
        options = parse_qsl(parts.query)
    except ValueError:
        return frozenset((url,))  # Nobody can say where in it the password stands.
    _, _, written = parts.netloc.rpartition("@")[0].partition(":")
    found = {written, unquote(written), *(value for name, value in options if name.endswith("password"))}
    return frozenset(found - {""})


def _path(topology: Topology, path: str) -> tuple[str, int]:
    """The service of sentinels, and the number of the database."""
    words = [unquote(word) for word in path.strip("/").split("/") if word]
    service = ""
    if topology == "sentinel":
        if not words:
            raise ValueError("after the sentinels, the URL names the master, such as /mymaster")
        service = words.pop(0)
    db = words.pop(0) if words else "0"
    if words or not db.isascii() or not db.isdigit() or len(db) > 5:
        raise ValueError("the path of the URL is the number of a database, such as /0")
    if topology == "cluster" and int(db):
        raise ValueError("a cluster has only database 0")
    return service, int(db)


def _hosts(text: str, topology: Topology) -> tuple[Host, ...]:
    port = 26_379 if topology == "sentinel" else 6379
    hosts = tuple(_host(one, port) for one in text.split(","))
    if topology == "standalone" and len(hosts) > 1:
        raise ValueError("one host, or the scheme redis+sentinel or redis+cluster")
    return hosts


def _host(text: str, default: int) -> Host:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port == 0 or parts.path:
        raise ValueError("expected host or host:port, several of them separated by commas")
    return host, port or default


def _tls(options: dict[str, str]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
    context.check_hostname = _choice(options, "ssl_check_hostname", "true", "false") == "true"
    if _choice(options, "ssl_cert_reqs", "required", "none") == "none":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if certificate := options.get("ssl_certfile"):
        # An encrypted key is an error: with no password given, the library would ask whoever sits at the terminal.
        context.load_cert_chain(certificate, options.get("ssl_keyfile"), password="")
    return context


def _choice(options: dict[str, str], name: str, *values: str) -> str:
    value = options.get(name, values[0])
    if value not in values:
        raise ValueError(f"{name} is one of: {', '.join(values)}")
    return value

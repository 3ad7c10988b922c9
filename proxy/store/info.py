"""What INFO says of a server, and whether it will do. Pure."""

from __future__ import annotations

import re
from typing import Final

from proxy.store.base import Server, Shortcoming

OLDEST: Final = (6, 2)
KEEPS: Final = "noeviction"

_VERSION: Final = re.compile(rb"^redis_version:([0-9]{1,9}(?:\.[0-9]{1,9}){1,3})\r?$", re.MULTILINE)
_EVICTION: Final = re.compile(rb"^maxmemory_policy:([a-z-]{1,32})\r?$", re.MULTILINE)


def server_of(info: bytes) -> Server:
    """The parts that matter here. What has another form than expected is as good as not said."""
    version, eviction = _VERSION.search(info), _EVICTION.search(info)
    found: list[Shortcoming] = []
    if version is not None and tuple(map(int, version[1].split(b".")[:2])) < OLDEST:
        found.append("version")
    if eviction is not None and eviction[1].decode() != KEEPS:
        found.append("eviction")
    return Server(
        version[1].decode() if version is not None else "",
        eviction[1].decode() if eviction is not None else "",
        tuple(found),
    )

"""The Lua scripts, one for each verb, as they are sent: each behind the parts that it shares with others."""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import Final

_SHARED: Final = {
    "reserve": ("windows", "reservations", "admission"),
    "top_up": ("windows", "reservations", "admission"),
    "settle": ("windows", "reservations"),
    "extend": ("windows", "reservations"),
    "balance": ("windows", "reservations"),
    "seed": ("windows",),
    "key_create": ("registry",),
    "key_revoke": ("registry",),
    "key_rotate": ("registry",),
    "claim": (),
    "beat": ("windows",),
    "circuit_report": ("circuits",),
    "circuit_lease": ("circuits",),
    "circuit_conclude": ("circuits",),
    "circuit_command": ("circuits",),
}


class Scripts:
    """Read once, when a store is made. Attributes are digests; `texts` has what they stand for."""

    def __init__(self) -> None:
        self.texts: dict[bytes, bytes] = {}
        self.reserve = self._add("reserve")
        self.top_up = self._add("top_up")
        self.settle = self._add("settle")
        self.extend = self._add("extend")
        self.balance = self._add("balance")
        self.seed = self._add("seed")
        self.key_create = self._add("key_create")
        self.key_revoke = self._add("key_revoke")
        self.key_rotate = self._add("key_rotate")
        self.claim = self._add("claim")
        self.beat = self._add("beat")
        self.report = self._add("circuit_report")
        self.lease = self._add("circuit_lease")
        self.conclude = self._add("circuit_conclude")
        self.command = self._add("circuit_command")

    def _add(self, verb: str) -> bytes:
        folder = resources.files("proxy.store") / "lua"
        text = b"\n".join((folder / f"{name}.lua").read_bytes() for name in (*_SHARED[verb], verb))
        digest = hashlib.sha1(text, usedforsecurity=False).hexdigest().encode()
        self.texts[digest] = text
        return digest

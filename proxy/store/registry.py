"""The port of the registry: keys that are made at run time, and the values it speaks in.

A key has an id, which is public and stays the same for its life, and one or more secrets, of which only SHA-256 digests
are kept. A rotation gives it a new secret; the ones before stay valid until they end. What a key has spent is counted
under its id, so a rotation does not begin its budget anew.

    created ──rotate──▶ (a new secret) ──expires──▶ over
       └──────────────── revoke ──────────────────▶ over, for good

Times are milliseconds since 1970 on the registry's own clock.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Literal, Protocol

import msgspec

MAX_KEYS: Final = 10_000
"""Keys of one namespace, those that are over included as long as they are kept."""
KEPT_MS: Final = 30 * 86_400_000
"""How long a key that is over is still listed at least."""
MAX_SECRETS: Final = 8
"""Of one key, valid at the same time."""
MAX_SPAN_MS: Final = 3650 * 86_400_000
"""The longest life or overlap that can be asked for."""

State = Literal["live", "expired", "revoked"]
_ID: Final = re.compile(r"key_[0-9a-f]{16}")


class Secret(msgspec.Struct, frozen=True, gc=False):
    digest: bytes
    """SHA-256 of the secret: 32 bytes."""
    until_ms: int | None = None
    """Not valid from then on; None: as long as its key."""


class KeyRecord(msgspec.Struct, frozen=True):
    id: str
    tenant: str
    name: str
    """For people; may be empty, and need not be unique."""
    models: tuple[str, ...] | None
    """Globs of model names, beside those of the tenant: a model must match both. None: no further restriction."""
    budget: str
    """What was written of its own budget, as JSON; empty for none."""
    created_ms: int
    expires_ms: int | None
    revoked_ms: int | None
    secrets: tuple[Secret, ...]
    """The newest first."""

    def state(self, now_ms: int) -> State:
        if self.revoked_ms is not None:
            return "revoked"
        return "expired" if self.expires_ms is not None and self.expires_ms <= now_ms else "live"


class NewKey(msgspec.Struct, frozen=True):
    """`digest` as in `Secret`; `lives_ms`: None for ever; the rest as in `KeyRecord`."""

    id: str
    digest: bytes
    tenant: str
    name: str = ""
    models: tuple[str, ...] | None = None
    budget: str = ""
    lives_ms: int | None = None


class Stamp(msgspec.Struct, frozen=True):
    """Names the state of the whole registry: it is another one after every change."""

    text: str
    """Empty for a registry in which nothing was ever made, or which lost everything."""
    now_ms: int

    @property
    def life(self) -> str:
        """The same from the first key on until the registry loses everything."""
        return self.text.partition(" ")[0]


class Snapshot(msgspec.Struct, frozen=True):
    stamp: Stamp
    records: Mapping[str, KeyRecord]
    """By id. A record that did not change since the last snapshot is the same object."""


Refusal = Literal["unknown", "revoked", "expired", "full"]


class KeyRefused(Exception):
    """A verb that the state of the registry does not allow; nothing was changed.

    `full`: of `create`, that there are MAX_KEYS; of `rotate`, that there are MAX_SECRETS.
    """

    def __init__(self, reason: Refusal) -> None:
        super().__init__(reason)
        self.reason = reason


class KeyRegistry(Protocol):
    """Every verb raises StoreUnavailable of `base`. Repeated with the same arguments, it changes nothing more."""

    async def create(self, new: NewKey) -> KeyRecord:
        """Raises KeyRefused(full)."""

    async def revoke(self, key_id: str) -> tuple[KeyRecord, bool]:
        """The key, and whether it was this call that revoked it. Raises KeyRefused(unknown)."""

    async def rotate(self, key_id: str, digest: bytes, overlap_ms: int) -> KeyRecord:
        """A new secret; those before end after `overlap_ms` at the latest. Raises KeyRefused, for any reason."""

    async def stamp(self) -> Stamp:
        """Cheap enough to be asked each second."""

    async def snapshot(self) -> Snapshot:
        """All keys, as of one moment."""


def is_key_id(text: str) -> bool:
    """Whether it could be one; whatever could not, is none, and reaches no store."""
    return _ID.fullmatch(text) is not None

"""Keys that are made at run time, as the commands and the admin API know them, and as this process follows them.

A secret is `bw_` and 256 random bits. It leaves this module once, in the answer to whoever asked for it; what is kept
is its SHA-256 digest. (256 bits cannot be guessed, so neither salt nor a slow hash has anything to add.)
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import msgspec

from proxy.budget.policy import Policies
from proxy.config.problems import ConfigErrors, did_you_mean
from proxy.config.request import checked
from proxy.config.settings import Settings
from proxy.edge.auth import KeyedTenants
from proxy.edge.follow import KeyFollower
from proxy.edge.keyring import Keyring
from proxy.edge.settings import KeySettings, RotationSettings, TenantSettings, span_ms
from proxy.errors import InvalidRequest, NotFound, StoreUnavailable
from proxy.observability.events import Bus
from proxy.settings import Section
from proxy.store.base import BudgetStore
from proxy.store.base import StoreUnavailable as StoreAway
from proxy.store.memory import MemoryStore
from proxy.store.registry import KeyRecord, KeyRefused, KeyRegistry, NewKey
from proxy.types import Tenant

PREFIX: Final = "bw_"
SECRET_BYTES: Final = 32

_IN_MEMORY: Final = (
    "Keys cannot be made with memory:// as state: they would end with this process, and no other would know them. Set"
    " `state` to a Redis, or write keys under `tenants[].keys`."
)
_REFUSED: Final[dict[str, str]] = {
    "revoked": "The key was revoked; a revoked key stays so. Make a new one.",
    "expired": "The key has expired. Make a new one.",
}
_T = TypeVar("_T")
_S = TypeVar("_S", bound=Section)


@dataclass(frozen=True, slots=True)
class Made:
    """A key and its secret, which nobody can see again."""

    record: KeyRecord
    secret: str


class Keys:
    """What can be done with keys. `tenants`: the names of those that are configured; `random(n)` gives n random bytes.

    Every verb raises InvalidRequest, NotFound and StoreUnavailable, all of `errors`. `registry`: None where the
    configuration has no store that could keep keys.
    """

    def __init__(
        self,
        registry: KeyRegistry | None,
        tenants: Collection[str],
        *,
        random: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._registry = registry
        self._tenants = tenants
        self._random = random

    async def create(self, wanted: Mapping[str, Any]) -> Made:
        """`wanted` is as `KeySettings` says."""
        registry = self._there()
        asked = _checked(KeySettings, wanted)
        if asked.tenant not in self._tenants:
            hint = did_you_mean(asked.tenant, self._tenants) or "the configuration has no tenants"
            raise InvalidRequest(f"No tenant is named {asked.tenant!r} in the configuration: {hint}", param="tenant")
        secret, digest = self._secret()
        new = NewKey(
            f"key_{self._random(8).hex()}",
            digest,
            asked.tenant,
            asked.name,
            asked.models,
            "" if asked.budget is None else asked.budget.model_dump_json(exclude_unset=True),
            None if asked.expires is None else span_ms(asked.expires),
        )
        return Made(await _asked(registry.create(new)), secret)

    async def list(self) -> tuple[list[KeyRecord], int]:
        """All of them, those that are over included, by tenant and then the oldest first; and what time it is there."""
        snapshot = await _asked(self._there().snapshot())
        records = sorted(snapshot.records.values(), key=lambda one: (one.tenant, one.created_ms, one.id))
        return records, snapshot.stamp.now_ms

    async def revoke(self, key_id: str) -> tuple[KeyRecord, bool]:
        """The key, and whether it was not revoked before."""
        return await _asked(self._there().revoke(key_id))

    async def rotate(self, key_id: str, wanted: Mapping[str, Any]) -> Made:
        """`wanted` is as `RotationSettings` says."""
        registry = self._there()
        asked = _checked(RotationSettings, wanted)
        secret, digest = self._secret()
        return Made(await _asked(registry.rotate(key_id, digest, span_ms(asked.overlap))), secret)

    def _there(self) -> KeyRegistry:
        if self._registry is None:
            raise InvalidRequest(_IN_MEMORY)
        return self._registry

    def _secret(self) -> tuple[str, bytes]:
        secret = PREFIX + base64.urlsafe_b64encode(self._random(SECRET_BYTES)).rstrip(b"=").decode()
        return secret, hashlib.sha256(secret.encode()).digest()


class AdministeredKeys:
    """The same as JSON, for the admin API. A secret stands under `key`, once."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    async def create(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        return made_shown(await self._keys.create(wanted))

    async def list(self, tenant: str | None) -> dict[str, Any]:
        records, now_ms = await self._keys.list()
        return {"keys": [shown(one, now_ms) for one in records if tenant in (None, one.tenant)]}

    async def revoke(self, key_id: str) -> dict[str, Any]:
        record, _ = await self._keys.revoke(key_id)
        return shown(record, record.revoked_ms or 0)

    async def rotate(self, key_id: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
        return made_shown(await self._keys.rotate(key_id, wanted))


async def _asked(answer: Awaitable[_T]) -> _T:
    try:
        return await answer
    except KeyRefused as refused:
        if refused.reason == "unknown":
            raise NotFound("There is no key with this id.") from refused
        full = (
            "There is no room for more: revoke what is not needed; what is over leaves after 30 days at the earliest."
        )
        raise InvalidRequest(_REFUSED.get(refused.reason, full)) from refused
    except StoreAway as away:
        doubt = ""
        if away.uncertain:
            doubt = " It may have been done all the same: list the keys, and revoke one whose secret nobody has."
        raise StoreUnavailable(f"The store of keys does not answer ({away.reason}).{doubt}") from away


def _checked(model: type[_S], wanted: Mapping[str, Any]) -> _S:
    try:
        return checked(model, wanted)
    except ConfigErrors as errors:
        texts = [": ".join(part for part in (one.path, one.message) if part) for one in errors.problems]
        raise InvalidRequest("; ".join(texts), param=errors.problems[0].path or None) from errors


def shown(one: KeyRecord, now_ms: int) -> dict[str, Any]:
    """A key as JSON: nothing of its secrets, and nothing that they could be found by."""
    overlaps = [secret.until_ms for secret in one.secrets if secret.until_ms is not None and secret.until_ms > now_ms]
    return {
        "id": one.id,
        "tenant": one.tenant,
        "name": one.name,
        "state": one.state(now_ms),
        "models": None if one.models is None else list(one.models),
        "budget": msgspec.json.decode(one.budget) if one.budget else None,
        "created": moment(one.created_ms),
        "expires": moment(one.expires_ms),
        "revoked": moment(one.revoked_ms),
        "overlap_until": moment(max(overlaps, default=None)),
    }


def made_shown(made: Made) -> dict[str, Any]:
    """The same, with the secret under `key`."""
    return {"key": made.secret, **shown(made.record, made.record.created_ms)}


def moment(milliseconds: int | None) -> str | None:
    """In UTC, to the second: `2026-01-31T23:59:59Z`."""
    if milliseconds is None:
        return None
    return datetime.fromtimestamp(milliseconds // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def registry_of(store: BudgetStore) -> KeyRegistry | None:
    """None for a store that ends with its process."""
    if isinstance(store, MemoryStore):
        return None
    from proxy.store.redis import RedisStore

    return store.registry() if isinstance(store, RedisStore) else None


def door_of(settings: Settings, *, complete: bool) -> KeyedTenants:
    """Where keys are looked up: with those of the configuration. `complete` as in KeyedTenants."""
    configured = ((key.get_secret_value(), tenant_of(one)) for one in settings.tenants for key in one.keys)
    return KeyedTenants(dict(configured), complete=complete)


def tenant_of(one: TenantSettings) -> Tenant:
    return Tenant(one.name, one.models, one.providers, one.passthrough)


def follower_of(
    registry: KeyRegistry, settings: Settings, door: KeyedTenants, policies: Policies, bus: Bus
) -> KeyFollower:
    """Within the event loop that runs it."""
    ring = Keyring({one.name: tenant_of(one) for one in settings.tenants}, door, policies)
    return KeyFollower(registry, ring, door, clock=asyncio.get_running_loop().time, emit=bus.emit)

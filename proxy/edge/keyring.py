"""Which keys made at run time open the door, out of what the registry says. Pure: it decides, and never waits.

The registry is the truth, with two exceptions, for a store can lose what it has confirmed (a failover to a copy that
lags behind, a restart without its data):

- *What has ended stays ended.* A secret that was revoked, rotated out or expired opens nothing again in this process,
  whatever the registry says later. A key that the registry shows as live although it was revoked is named, so that the
  registry can be told once more.
- *A registry that lost everything ends no key.* Its stamp then names another life, or none. That nothing is written
  about a key is no reason to lock out everybody who holds one, so the keys known until then stay valid for as long as
  this process lives or until they expire. They are not written back either: somebody may have revoked one of them
  where this process could not hear of it, and a revoked key must never come back.

Within one life, a key that is missing has ended: only what is over is ever removed.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from proxy.budget.settings import BudgetSettings
from proxy.store.registry import KeyRecord, Snapshot
from proxy.types import Tenant


class Door(Protocol):
    """Where a key's digest is looked up."""

    def admit(self, digest: bytes, tenant: Tenant) -> None: ...

    def dismiss(self, digest: bytes) -> None: ...


class KeyBudgets(Protocol):
    """Where the budgets of keys are looked up."""

    def put_key(self, tenant: str, key: str, section: BudgetSettings) -> None: ...

    def drop_key(self, tenant: str, key: str) -> None: ...


class Taken:
    """What a snapshot came to. `lost`: how many keys are still valid although the registry forgot everything; None if
    it did not. `again`: keys that were revoked, and are shown as live."""

    __slots__ = ("again", "lost")

    def __init__(self, lost: int | None, again: tuple[str, ...]) -> None:
        self.lost = lost
        self.again = again


class Keyring:
    """`tenants` by name, as configured: the keys of others open nothing here."""

    def __init__(self, tenants: Mapping[str, Tenant], door: Door, budgets: KeyBudgets) -> None:
        self._tenants = tenants
        self._door = door
        self._budgets = budgets
        self._life = ""
        self._records: Mapping[str, KeyRecord] = {}
        """As of the last snapshot."""
        self._open: dict[bytes, tuple[str, float]] = {}
        """Digests that are let in: of which key, and until when (milliseconds; infinite)."""
        self._of_key: dict[str, set[bytes]] = {}
        self._ends: list[tuple[float, bytes]] = []
        """A heap of the finite ends; one that was put off stands there twice."""
        self._ended: set[bytes] = set()
        self._revoked: set[str] = set()
        self._budgeted: set[str] = set()
        """Keys whose own budgets hold."""

    @property
    def next_end_ms(self) -> float | None:
        return self._ends[0][0] if self._ends else None

    def take(self, snapshot: Snapshot) -> Taken:
        """Follows a snapshot."""
        lost: int | None = None
        if snapshot.stamp.life != self._life:
            if self._life:
                lost = len(self._of_key)
            self._life = snapshot.stamp.life
            self._records = {}
        before, now_ms = self._records, snapshot.stamp.now_ms
        self._records = snapshot.records
        again = []
        for key_id, record in snapshot.records.items():
            if before.get(key_id) is record:
                continue
            if record.revoked_ms is not None:
                self._revoked.add(key_id)
            elif key_id in self._revoked:
                again.append(key_id)
            self._follow(record, now_ms)
        for key_id in before.keys() - snapshot.records.keys():
            for digest in tuple(self._of_key.get(key_id, ())):
                self._end(digest)
            if key_id in self._budgeted:
                self._budgeted.discard(key_id)
                self._budgets.drop_key(before[key_id].tenant, key_id)
        self.sweep(now_ms)
        return Taken(lost, tuple(again))

    def sweep(self, now_ms: float) -> None:
        """Ends what is over by now."""
        while self._ends and self._ends[0][0] <= now_ms:
            _, digest = heapq.heappop(self._ends)
            known = self._open.get(digest)
            if known is not None and known[1] <= now_ms:
                self._end(digest)

    def _follow(self, record: KeyRecord, now_ms: int) -> None:
        valid = self._valid(record, now_ms)
        for digest in self._of_key.get(record.id, set()) - valid.keys():
            self._end(digest)
        tenant = self._tenants.get(record.tenant) if valid else None
        if tenant is None or not self._holds_budget(record):
            return
        # Where nobody looks at the model, a key that is for some models only has no business.
        narrowed = tenant if record.models is None else replace(tenant, key_models=record.models, passthrough=())
        holder = replace(narrowed, key=record.id)
        for digest, end in valid.items():
            if end != float("inf") and self._open.get(digest) != (record.id, end):
                heapq.heappush(self._ends, (end, digest))
            self._open[digest] = record.id, end
            self._of_key.setdefault(record.id, set()).add(digest)
            self._door.admit(digest, holder)

    def _valid(self, record: KeyRecord, now_ms: int) -> dict[bytes, float]:
        """The digests that open something, each with its end."""
        if record.id in self._revoked:
            return {}
        never = float("inf")
        expires = never if record.expires_ms is None else record.expires_ms
        ends = {one.digest: min(expires, never if one.until_ms is None else one.until_ms) for one in record.secrets}
        return {digest: end for digest, end in ends.items() if end > now_ms and digest not in self._ended}

    def _holds_budget(self, record: KeyRecord) -> bool:
        """Its own budget holds from now on. False if it has one that cannot be read: then it may spend nothing."""
        if record.budget and record.id not in self._budgeted:
            try:
                section = BudgetSettings.model_validate_json(record.budget)
            except ValueError:
                return False
            self._budgets.put_key(record.tenant, record.id, section)
            self._budgeted.add(record.id)
        return True

    def _end(self, digest: bytes) -> None:
        key_id, _ = self._open.pop(digest)
        self._door.dismiss(digest)
        self._ended.add(digest)
        left = self._of_key[key_id]
        left.discard(digest)
        if not left:
            del self._of_key[key_id]

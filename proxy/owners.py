"""Whose a stored object is, and where it lives: asked before a request that names one, booked when a reply makes one.

With tenants, what is not known to be the caller's own does not exist for it: another's object, one that never was, and
one that was made behind this gateway's back get one answer. Without tenants there is nobody to protect it from: an
unknown one passes, and what is known says only which provider it lives at.

A claim is sent when a reply first names the object, and nothing waits for it but the reply's last event: whoever has
that may use the object at once, by way of another replica. If the store does not take it in its own time, the reply
goes on, and the claim is kept and repeated until the store is back; meanwhile this process knows the owner itself, and
others answer 503. Claims that find no room to wait in, or that still wait when the process ends, are lost: that is
logged, and with tenants the object is then nobody's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container
from contextlib import suppress
from typing import Any, Final

import msgspec

from proxy.errors import InvalidRequest
from proxy.errors import StoreUnavailable as AnswerUnavailable
from proxy.observability.events import Notice, OwnershipLost
from proxy.store.base import StoreUnavailable
from proxy.store.ownership import MOST_ID_CHARS, Owner, Ownership
from proxy.transport.sse import events
from proxy.types import Ask, Event, Groups, Reply, Target, Tenant
from proxy.validation.stored import unknown

KNOWN: Final = 10_000
WAITING: Final = 10_000
PAUSES: Final = (0.25, 8.0)
"""Seconds: the first and the longest between two attempts to book what waits."""


class Owners:
    """`strict`: there are tenants. `providers`: names of those that are configured."""

    def __init__(
        self,
        ownership: Ownership,
        *,
        strict: bool,
        providers: Container[str],
        emit: Callable[[Notice], None],
        waiting: int = WAITING,
        pauses: tuple[float, float] = PAUSES,
    ) -> None:
        self._ownership = ownership
        self._strict = strict
        self._providers = providers
        self._emit = emit
        self._most_waiting = waiting
        self._pauses = pauses
        self._known: dict[str, Owner] = {}
        """What the store said, the oldest first. An owner never changes."""
        self._waiting: dict[str, Owner] = {}
        """Claims that the store has not taken yet."""
        self._lost = 0
        self._booking: set[asyncio.Task[None]] = set()
        self._repeating: asyncio.Task[None] | None = None

    async def aclose(self) -> None:
        """One last attempt for what waits. Before the store is closed."""
        if self._booking:
            await asyncio.wait(self._booking)  # each has the store's own time limit
        if self._repeating is not None:
            self._repeating.cancel()
            with suppress(asyncio.CancelledError):
                await self._repeating
        with suppress(StoreUnavailable):
            await self._repeat()
        self._lost += len(self._waiting)
        self._tell_lost()

    # -- before a request --------------------------------------------------------------------------------------------

    async def home(self, ask: Ask, tenant: Tenant) -> Owner | None:
        """Where the objects live that `ask` names; None if it names none, or none that is known.

        Raises NotFound, StoreUnavailable of `errors`, and InvalidRequest for objects of two providers.
        """
        home: Owner | None = None
        for param, object_id in ask.objects.refers if ask.objects is not None else ():
            owner = await self._owner(object_id, param, tenant.name)
            if owner is None:
                if self._strict:
                    raise unknown(param)
                continue
            if owner.tenant != tenant.name or not self._reaches(tenant, owner.provider):
                raise unknown(param)
            if home is not None and home.provider != owner.provider:
                raise InvalidRequest("The request names objects that live at different providers.", param=param)
            home = owner
        return home

    def lead(self, ask: Ask, groups: Groups, home: Owner) -> Groups:
        """Those of the targets where the object lives that `ask` names, or the same model there: no other provider
        knows it. Raises InvalidRequest."""
        there = (tuple(target for target in group if target.provider == home.provider) for group in groups)
        if kept := tuple(group for group in there if group):
            return kept
        if ask.model != home.asked:
            raise InvalidRequest(
                f"The model '{ask.model}' is not served by the provider that keeps the object that is named.",
                param="model",
            )
        return ((Target(home.provider, home.model, groups[0][0].label),),)

    def _reaches(self, tenant: Tenant, provider: str) -> bool:
        """What a change of the configuration took away is not there any more."""
        return provider in self._providers and (tenant.providers is None or provider in tenant.providers)

    async def _owner(self, object_id: str, param: str, tenant: str) -> Owner | None:
        if len(object_id) > MOST_ID_CHARS:
            return None
        known = self._waiting.get(object_id) or self._known.get(object_id)
        if known is not None and known.tenant == tenant:
            return known
        # Of another's object the store is asked as of an unknown one, so that neither answer comes sooner.
        try:
            owner = await self._ownership.owner(object_id)
        except StoreUnavailable as error:
            if not self._strict:
                return None
            raise AnswerUnavailable(
                "Whose the stored object is cannot be checked at the moment.",
                headers=[(b"retry-after", b"1")],
                param=param or None,
            ) from error
        if owner is not None and owner.tenant == tenant:
            self._remember(object_id, owner)
        return owner

    # -- with a reply ------------------------------------------------------------------------------------------------

    def claims(self, ask: Ask, tenant: Tenant, target: Target, reply: Reply) -> Claims | None:
        """What takes note of the objects that `reply` makes; None if it makes none."""
        if ask.objects is None or not ask.objects.makes or reply.status >= 300:
            return None
        return Claims(self, Owner(tenant.name, target.provider, target.model, ask.model), stream=reply.stream)

    def book(self, ids: tuple[str, ...], owner: Owner) -> asyncio.Task[None]:
        """Claims objects, whatever becomes of the request that made them. The task raises nothing."""
        task = asyncio.get_running_loop().create_task(self._book(ids, owner))
        self._booking.add(task)
        task.add_done_callback(self._booking.discard)
        return task

    async def _book(self, ids: tuple[str, ...], owner: Owner) -> None:
        for object_id in ids:
            try:
                self._remember(object_id, await self._ownership.claim(object_id, owner))
            except StoreUnavailable:
                self._wait(object_id, owner)

    def _remember(self, object_id: str, owner: Owner) -> None:
        self._known[object_id] = owner
        if len(self._known) > KNOWN:
            del self._known[next(iter(self._known))]

    # -- a store that is away ----------------------------------------------------------------------------------------

    def _wait(self, object_id: str, owner: Owner) -> None:
        self._waiting[object_id] = owner
        if len(self._waiting) > self._most_waiting:
            del self._waiting[next(iter(self._waiting))]
            self._lost += 1
        if self._repeating is None or self._repeating.done():
            self._repeating = asyncio.get_running_loop().create_task(self._until_taken())

    async def _until_taken(self) -> None:
        pause, longest = self._pauses
        while self._waiting:
            await asyncio.sleep(pause)
            try:
                await self._repeat()
            except StoreUnavailable:
                pause = min(2 * pause, longest)
        self._tell_lost()

    async def _repeat(self) -> None:
        """Books what waits, the oldest first. Raises StoreUnavailable at the first that must wait on."""
        while self._waiting:
            object_id, owner = next(iter(self._waiting.items()))
            try:
                holds = await self._ownership.claim(object_id, owner)
            except StoreUnavailable as error:
                if error.reason != "corrupt":
                    raise
                self._lost += 1  # That key alone is spoilt: the others are not to wait behind it for ever.
            else:
                self._remember(object_id, holds)
            if self._waiting.get(object_id) is owner:
                del self._waiting[object_id]

    def _tell_lost(self) -> None:
        lost, self._lost = self._lost, 0
        if lost:
            self._emit(OwnershipLost(objects=lost))


class Claims:
    """Of one reply. One task uses it."""

    __slots__ = ("_booking", "_owner", "_owners", "_stream")

    def __init__(self, owners: Owners, owner: Owner, *, stream: bool) -> None:
        self._owners = owners
        self._owner = owner
        self._stream = stream
        self._booking: asyncio.Task[None] | None = None

    async def see(self, event: Event) -> None:
        """Before `event` is forwarded. Waits for the store only if it is the last one. Raises nothing."""
        if self._booking is None and (ids := made_in(event.data)):
            self._booking = self._owners.book(ids, self._owner)
        if self._booking is not None and (event.terminator or not self._stream):
            await asyncio.wait([self._booking])


class _Made(msgspec.Struct):
    """A response or a conversation. Members of any type, so that an odd one spoils nothing."""

    id: Any = None
    conversation: Any = None


class _Told(msgspec.Struct):
    response: _Made | None = None


_made: Final = msgspec.json.Decoder(_Made).decode
_told: Final = msgspec.json.Decoder(_Told).decode
_NOT_JSON: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def made_in(data: bytes) -> tuple[str, ...]:
    """The ids of the objects that a plain body, or the first event that tells of one, says were made. Pure."""
    if data.lstrip()[:1] == b"{":
        return _ids(_decoded(_made, data))
    for _, _, text in events(data):
        if text is not None and b'"response"' in text:
            told = _decoded(_told, text)
            if told is not None and (ids := _ids(told.response)):
                return ids
    return ()


def _decoded(decode: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return decode(data)
    except _NOT_JSON:
        return None


def _ids(made: _Made | None) -> tuple[str, ...]:
    if made is None:
        return ()
    conversation = made.conversation
    found = (made.id, conversation.get("id") if isinstance(conversation, dict) else conversation)
    return tuple(one for one in found if isinstance(one, str) and 0 < len(one) <= MOST_ID_CHARS)

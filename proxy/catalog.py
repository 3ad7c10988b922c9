"""Which models there are: exact names from the configuration, and for globs what the provider lists.

A provider's list is cached for five minutes, one question at a time; with the caller's own key it is asked each time,
for another key may see other models. A provider that cannot be asked keeps the list it had; without one it costs its
own models only, and a warning, and is left alone for ten seconds.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import orjson
from msgspec.structs import replace

from proxy.errors import NotFound, UpstreamError, UpstreamUnavailable
from proxy.providers.base import Provider
from proxy.routing import Route, Routing
from proxy.types import Ask, Call, Event, Out, Reply, Tenant

TTL_SECONDS = 300.0
RETRY_SECONDS = 10.0
"""A provider that could not be asked is not asked again for so long."""
PATIENCE_SECONDS = 15.0
"""For one list. Its caller waits, and with it whoever asks meanwhile."""
_Model = dict[str, Any]


class Catalog:
    """Answers `/v1/models` and `/v1/models/{id}`. `uncached` names the providers asked with the caller's own key."""

    def __init__(
        self,
        routing: Routing,
        providers: Mapping[str, Provider],
        *,
        uncached: Iterable[str],
        clock: Callable[[], float],
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._routing = routing
        self._providers = providers
        self._uncached = frozenset(uncached)
        self._clock = clock
        self._patience = patience
        self._lists: dict[str, tuple[float, list[_Model] | None]] = {}
        """Good until, and the list; None where there never was one."""
        self._locks = {name: asyncio.Lock() for name in providers}

    async def answer(self, ask: Ask, tenant: Tenant, out: Out) -> None:
        """Writes the list, or the one model asked for; or the provider's refusal of the caller's own key.

        Raises NotFound (`model_not_found`) and UpstreamUnavailable.
        """
        started = self._clock()
        try:
            if ask.model:
                body = orjson.dumps(await self._one(ask, tenant))
            else:
                body = orjson.dumps({"object": "list", "data": await self._all(ask, tenant, out)})
        except _Refused as refused:
            reply = refused.reply
            await out.start(reply.status, reply.headers, length=len(refused.body))
            await out.write(Event(refused.body))
            return
        except UpstreamUnavailable as error:
            # It was tried, now or a moment ago: the provider's failure, not a refusal of ours.
            record = out.record
            record.provider, record.attempts = error.details["attempts"][0]["target"], 1
            record.upstream_started, record.upstream_ended = started, self._clock()
            raise
        await out.start(200, [(b"content-type", b"application/json")], length=len(body))
        await out.write(Event(body))

    async def _all(self, ask: Ask, tenant: Tenant, out: Out) -> list[_Model]:
        found: dict[str, _Model] = {}
        failed: dict[str, UpstreamError] = {}
        for route in self._routing.routes:
            provider, wanted = route.first(tenant)
            if not provider:
                continue
            if "*" not in route.name:
                listed = [_entry(route.name, provider)]
            else:
                try:
                    listed = await self._behind(route, provider, wanted, ask)
                except UpstreamError as error:
                    failed[provider] = error
                    continue
            for model in listed:
                if self._leads(model["id"], route, tenant):
                    found[model["id"]] = model
        if failed and not found:
            raise next(iter(failed.values()))
        out.record.warnings += [f"models of {provider} not listed" for provider in failed]
        return list(found.values())

    def _leads(self, name: str, route: Route, tenant: Tenant) -> bool:
        """Whether a request of `tenant` for `name` would go by `route`, and not by a more exact one or by none."""
        try:
            return self._routing.targets(name, tenant)[0][0].label == route.name
        except NotFound:
            return False

    async def _one(self, ask: Ask, tenant: Tenant) -> _Model:
        try:
            target = self._routing.targets(ask.model, tenant)[0][0]
        except NotFound:
            raise _unknown() from None
        if target.label == ask.model:
            return _entry(ask.model, target.provider)
        for model in await self._list(target.provider, ask):
            if model["id"] == target.model:
                return {**model, "id": ask.model}
        raise _unknown()

    async def _behind(self, route: Route, provider: str, wanted: str, ask: Ask) -> list[_Model]:
        """The provider's models as this glob's names: what `*` matches there is put where `*` stands here.

        Of several targets the first one tells: the others are there to serve the same models when it cannot."""
        if "*" not in wanted:
            return []
        pattern = re.compile(re.escape(wanted).replace(r"\*", "(.*)", 1), re.DOTALL)
        return [
            {**model, "id": route.name.replace("*", match[1], 1)}
            for model in await self._list(provider, ask)
            if (match := pattern.fullmatch(model["id"]))
        ]

    async def _list(self, provider: str, ask: Ask) -> list[_Model]:
        if provider in self._uncached:
            return await self._fetch(provider, ask.call)
        async with self._locks[provider]:
            until, models = self._lists.get(provider, (0.0, None))
            if self._clock() >= until:
                models = await self._refreshed(provider, ask.call, models)
        if models is None:
            raise _unlisted(provider)
        return models

    async def _refreshed(self, provider: str, call: Call, known: list[_Model] | None) -> list[_Model] | None:
        """A new list; the one that is known, if any, where there is none to be had."""
        try:
            # What is kept for all must not depend on who asked first: none of the client's headers travel.
            models = await self._fetch(provider, replace(call, headers=[]))
            self._lists[provider] = (self._clock() + TTL_SECONDS, models)
            return models
        except UpstreamError:
            self._lists[provider] = (self._clock() + RETRY_SECONDS, known)
            return known

    async def _fetch(self, provider: str, call: Call) -> list[_Model]:
        """Raises UpstreamUnavailable, and _Refused for what the provider answers to a caller's own key."""
        try:
            async with asyncio.timeout(self._patience):
                reply = await self._providers[provider].open(Ask("models", "/v1/models", call, replayable=True), "")
                try:
                    body = b"".join([event.data async for event in reply.events])
                finally:
                    await reply.aclose()
        except (UpstreamError, TimeoutError) as error:
            raise _unlisted(provider) from error
        if reply.status in (401, 402, 403):
            raise _Refused(reply, body)
        if reply.status != 200:
            raise _unlisted(provider)
        try:
            listed = orjson.loads(body).get("data")
        except (orjson.JSONDecodeError, AttributeError) as error:
            raise _unlisted(provider) from error
        if not isinstance(listed, list):
            return []
        return [model for model in listed if isinstance(model, dict) and isinstance(model.get("id"), str)]


class _Refused(UpstreamError):
    """The caller's own key is not accepted: the caller's affair, so the provider's answer passes."""

    def __init__(self, reply: Reply, body: bytes) -> None:
        super().__init__("The provider did not accept the key.")
        self.reply = reply
        self.body = body


def _unlisted(provider: str) -> UpstreamUnavailable:
    return UpstreamUnavailable(
        "The models of a provider cannot be listed now.",
        headers=[(b"x-should-retry", b"false")],
        attempts=[{"target": provider, "reason": "upstream_unavailable"}],
    )


def _unknown() -> NotFound:
    """Does not quote the path: keys end up in paths, and errors in logs."""
    return NotFound(
        "That model does not exist here, or this key may not use it.", code="model_not_found", param="model"
    )


def _entry(name: str, provider: str) -> _Model:
    return {"id": name, "object": "model", "created": 0, "owned_by": provider}

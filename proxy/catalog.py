"""Which models there are: exact names from the configuration, and for globs what the provider lists.

A provider's list is cached for five minutes, one question at a time; with the caller's own key it is asked each time,
for another key may see other models. A provider that cannot be asked costs its own models only, and a warning.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import orjson

from proxy.errors import NotFound, UpstreamBroken, UpstreamError
from proxy.providers.base import Provider
from proxy.routing import Route, Routing, allows
from proxy.types import Ask, Event, Out, Tenant

TTL_SECONDS = 300.0
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
    ) -> None:
        self._routing = routing
        self._providers = providers
        self._uncached = frozenset(uncached)
        self._clock = clock
        self._lists: dict[str, tuple[float, list[_Model]]] = {}
        self._locks = {name: asyncio.Lock() for name in providers}

    async def answer(self, ask: Ask, tenant: Tenant, out: Out) -> None:
        """Writes the list, or the one model asked for. Raises NotFound (`model_not_found`) and UpstreamError."""
        if ask.model:
            body = orjson.dumps(await self._one(ask, tenant))
        else:
            body = orjson.dumps({"object": "list", "data": await self._all(ask, tenant, out)})
        await out.start(200, [(b"content-type", b"application/json")], length=len(body))
        await out.write(Event(body))

    async def _all(self, ask: Ask, tenant: Tenant, out: Out) -> list[_Model]:
        found: dict[str, _Model] = {}
        failed: UpstreamError | None = None
        for route in self._routing.routes:
            if "*" not in route.name:
                found.setdefault(route.name, _entry(route.name, route.target.partition("/")[0]))
                continue
            try:
                for model in await self._behind(route, ask):
                    found.setdefault(model["id"], model)
            except UpstreamError as error:
                failed = error
                out.record.warnings.append(f"models of {route.target.partition('/')[0]} not listed")
        if failed is not None and not found:
            raise failed
        return [model for name, model in found.items() if self._may(name, tenant)]

    def _may(self, name: str, tenant: Tenant) -> bool:
        try:
            return allows(tenant, name, self._routing.target(name, tenant))
        except NotFound:
            return False

    async def _one(self, ask: Ask, tenant: Tenant) -> _Model:
        try:
            target = self._routing.target(ask.model, tenant)
        except NotFound:
            raise _unknown() from None
        if target.label == ask.model:
            return _entry(ask.model, target.provider)
        for model in await self._list(target.provider, ask):
            if model["id"] == target.model:
                return {**model, "id": ask.model}
        raise _unknown()

    async def _behind(self, route: Route, ask: Ask) -> list[_Model]:
        """The provider's models as this glob's names: what `*` matches there is put where `*` stands here."""
        provider, _, wanted = route.target.partition("/")
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
            return await self._fetch(provider, ask)
        async with self._locks[provider]:
            until, models = self._lists.get(provider, (0.0, []))
            if self._clock() >= until:
                models = await self._fetch(provider, ask)
                self._lists[provider] = (self._clock() + TTL_SECONDS, models)
            return models

    async def _fetch(self, provider: str, ask: Ask) -> list[_Model]:
        reply = await self._providers[provider].open(Ask("models", ask.route, ask.call), "")
        try:
            body = b"".join([event.data async for event in reply.events])
        finally:
            await reply.aclose()
        if reply.status != 200:
            raise UpstreamBroken("The provider does not list its models.", reason="protocol")
        try:
            listed = orjson.loads(body).get("data")
        except orjson.JSONDecodeError as error:
            raise UpstreamBroken("The provider's list of models is not valid JSON.", reason="protocol") from error
        if not isinstance(listed, list):
            return []
        return [model for model in listed if isinstance(model, dict) and isinstance(model.get("id"), str)]


def _unknown() -> NotFound:
    """Does not quote the path: keys end up in paths, and errors in logs."""
    return NotFound(
        "That model does not exist here, or this key may not use it.", code="model_not_found", param="model"
    )


def _entry(name: str, provider: str) -> _Model:
    return {"id": name, "object": "model", "created": 0, "owned_by": provider}

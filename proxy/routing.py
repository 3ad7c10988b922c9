"""From a model name to the places that answer for it. Pure, and computed once per configuration.

An exact name wins, then the longest glob, then file order; `*` in a target is what the glob matched. A target splits at
its first `/`: what follows is the provider's own name for the model and may hold further slashes. Clients never address
a provider directly. What a tenant may not use is not there for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from proxy.errors import NotFound
from proxy.globs import compiled, matches
from proxy.types import OTHER, Groups, Target, Tenant

MATCHED: Final = 4096
"""Names that are remembered; clients choose them."""


@dataclass(frozen=True, slots=True)
class Route:
    """One entry of `models`: a name or glob, and where it leads: groups of `PROVIDER/MODEL`."""

    name: str
    targets: Sequence[Sequence[str]]

    def first(self, tenant: Tenant) -> tuple[str, str]:
        """Provider and model of the first target that `tenant` may use; empty texts where there is none."""
        for group in self.targets:
            for target in group:
                provider, _, model = target.partition("/")
                if tenant.providers is None or provider in tenant.providers:
                    return provider, model
        return "", ""


class Routing:
    """The table of all routes. `providers` is the file's order: the first one serves pass-through.

    `fallback`: PROVIDER or PROVIDER/MODEL, the last target of every route that does not lead to that provider; without
    a model it is asked for the name that the client asked for.
    """

    def __init__(self, routes: Iterable[Route], providers: Iterable[str], *, fallback: str | None = None) -> None:
        self.routes = tuple(route if fallback is None else _with_fallback(route, fallback) for route in routes)
        self.providers = tuple(providers)
        self._exact: Mapping[str, Route] = {route.name: route for route in self.routes if "*" not in route.name}
        globs = [route for route in self.routes if "*" in route.name]
        self._globs = [(compiled(route.name), route) for route in sorted(globs, key=lambda r: -len(r.name))]
        self._groups = {name: _groups(route, "", name) for name, route in self._exact.items()}
        self._matched: dict[str, Groups] = {}
        """Names that a glob has matched lately."""

    def targets(self, model: str, tenant: Tenant) -> Groups:
        """Where `model` is answered for `tenant`: at least one target. Raises NotFound (`model_not_found`), the same
        for every reason."""
        groups = self._groups.get(model)
        if groups is None:
            groups = self._by_glob(model)
        if groups is not None and tenant.providers is not None:
            groups = _allowed(groups, tenant.providers)
        if not groups or not allows(tenant, model):
            raise NotFound(
                f"The model '{model}' does not exist here, or this key may not use it.",
                code="model_not_found",
                param="model",
            )
        return groups

    def _by_glob(self, model: str) -> Groups | None:
        known = self._matched.get(model)
        if known is not None:
            return known
        for pattern, route in self._globs:
            if match := pattern.fullmatch(model):
                if len(self._matched) >= MATCHED:
                    self._matched.clear()
                found = self._matched[model] = _groups(route, match[1], model)
                return found
        return None

    def passthrough(self, tenant: Tenant, model: str = "") -> Groups:
        """The first provider of the file, which serves what is not routed by its model. Raises NotFound."""
        provider = self.providers[0]
        if tenant.providers is not None and provider not in tenant.providers:
            raise NotFound("This key may not use the provider that serves this path.", code="unsupported_route")
        return ((Target(provider, model, OTHER),),)


def allows(tenant: Tenant, model: str) -> bool:
    """Whether `tenant`, and the key that it came with, may ask for `model`."""
    return (tenant.models is None or any(matches(glob, model) for glob in tenant.models)) and (
        tenant.key_models is None or any(matches(glob, model) for glob in tenant.key_models)
    )


def _allowed(groups: Groups, providers: Sequence[str]) -> Groups:
    kept = (tuple(target for target in group if target.provider in providers) for group in groups)
    return tuple(group for group in kept if group)


def _groups(route: Route, matched: str, asked: str) -> Groups:
    return tuple(tuple(_target(target, route.name, matched, asked) for target in group) for group in route.targets)


def _target(target: str, label: str, matched: str, asked: str) -> Target:
    provider, _, model = target.partition("/")
    return Target(provider, model.replace("*", matched) if model else asked, label)


def _with_fallback(route: Route, fallback: str) -> Route:
    provider, _, model = fallback.partition("/")
    if any(target.partition("/")[0] == provider for group in route.targets for target in group):
        return route
    if not model and route.name.count("*") < 2:
        model = route.name  # its `*` is what the glob matched: together the name that was asked for
    return Route(route.name, (*route.targets, (f"{provider}/{model}",)))

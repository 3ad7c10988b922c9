"""From a model name to the place that answers for it. Pure, and computed once per configuration.

An exact name wins, then the longest glob, then file order; `*` in a target is what the glob matched. A target splits at
its first `/`: what follows is the provider's own name for the model and may hold further slashes. Clients never address
a provider directly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from proxy.errors import NotFound
from proxy.globs import compiled, matches
from proxy.types import OTHER, Target, Tenant


@dataclass(frozen=True, slots=True)
class Route:
    """One entry of `models`: a name or glob, and where it leads (`PROVIDER/MODEL`)."""

    name: str
    target: str


class Routing:
    """The table of all routes. `providers` is the file's order: the first one serves pass-through."""

    def __init__(self, routes: Iterable[Route], providers: Iterable[str]) -> None:
        self.routes = tuple(routes)
        self.providers = tuple(providers)
        self._exact: Mapping[str, Route] = {route.name: route for route in self.routes if "*" not in route.name}
        globs = [route for route in self.routes if "*" in route.name]
        self._globs = [(compiled(route.name), route) for route in sorted(globs, key=lambda r: -len(r.name))]
        self._targets = {name: _target(route, "") for name, route in self._exact.items()}

    def target(self, model: str, tenant: Tenant) -> Target:
        """Where `model` is answered for `tenant`. Raises NotFound (`model_not_found`), the same for both reasons."""
        target = self._targets.get(model)
        if target is None:
            target = self._by_glob(model)
        if target is None or not allows(tenant, model, target):
            raise NotFound(
                f"The model '{model}' does not exist here, or this key may not use it.",
                code="model_not_found",
                param="model",
            )
        return target

    def _by_glob(self, model: str) -> Target | None:
        for pattern, route in self._globs:
            if match := pattern.fullmatch(model):
                return _target(route, match[1])
        return None

    def passthrough(self, tenant: Tenant, model: str = "") -> Target:
        """The first provider of the file, which serves what is not routed by its model. Raises NotFound."""
        provider = self.providers[0]
        if tenant.providers is not None and provider not in tenant.providers:
            raise NotFound("This key may not use the provider that serves this path.", code="unsupported_route")
        return Target(provider, model, OTHER)


def allows(tenant: Tenant, model: str, target: Target) -> bool:
    """Whether `tenant` may ask for `model` and be answered by `target`."""
    if tenant.providers is not None and target.provider not in tenant.providers:
        return False
    return (tenant.models is None or any(matches(glob, model) for glob in tenant.models)) and (
        tenant.key_models is None or any(matches(glob, model) for glob in tenant.key_models)
    )


def _target(route: Route, matched: str) -> Target:
    provider, _, model = route.target.partition("/")
    return Target(provider, model.replace("*", matched), route.name)

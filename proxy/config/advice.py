"""What a valid configuration probably does not mean. Pure; each finding is a warning, never an error."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Final
from urllib.parse import urlsplit

from proxy.budget.settings import BudgetSettings, LimitSettings, merged
from proxy.config.problems import Path
from proxy.config.references import Finding
from proxy.config.settings import Settings
from proxy.context.settings import ContextSettings
from proxy.context.settings import merged as trimmed
from proxy.globs import matches
from proxy.providers.settings import OpenAISettings

_LONG: Final = ("usd_per_hour", "usd_per_day", "usd_per_month")
FORGETS: Final = (
    "is counted in memory alone, from zero after each restart: set state to a Redis, or let a ledger remember it, "
    "such as: ledger: {sinks: [{file: ledger.jsonl}]}"
)


def warnings(settings: Settings) -> Iterator[Finding]:
    """The path of each doubtful value, and why."""
    if not settings.tenants and not is_loopback(settings.listen.host):
        message = "reachable from other machines, without tenants: serve refuses this unless --insecure is given"
        yield ("listen", "host"), message
    for name, provider in settings.providers.items():
        if isinstance(provider, OpenAISettings):
            for key, message in _provider(provider):
                yield ("providers", name, key), message
    yield from _forgotten(settings)
    yield from _small_minutes(settings)
    names = [model.name for model in settings.models]
    if any("*" in name for name in names):
        return
    for index, tenant in enumerate(settings.tenants):
        for position, glob in enumerate(tenant.models or ()):
            if not any(matches(glob, name) for name in names):
                yield ("tenants", index, "models", position), "matches none of the configured models"


def _forgotten(settings: Settings) -> Iterator[Finding]:
    """Windows that outlive a process, in a store that does not."""
    if settings.state.get_secret_value() != "memory://" or settings.ledger.sinks:
        return
    sections: list[tuple[Path, LimitSettings]] = [
        (("providers", name, "limits"), provider.limits) for name, provider in settings.providers.items()
    ]
    sections += [(("tenants", index, "budget"), one.budget) for index, one in enumerate(settings.tenants) if one.budget]
    sections += [(("global_budget",), settings.global_budget), (("budget",), settings.budget)]
    for path, section in sections:
        if isinstance(section, BudgetSettings) and section.mode == "off":
            continue
        for name in _LONG:
            if getattr(section, name) is not None:
                yield (*path, name), FORGETS
                break


def _small_minutes(settings: Settings) -> Iterator[Finding]:
    """A conversation may grow to a size that no minute of the budget has room for."""
    sections: list[tuple[Path, BudgetSettings, ContextSettings]] = [(("context",), settings.budget, settings.context)]
    for index, tenant in enumerate(settings.tenants):
        own = merged(settings.budget, tenant.budget), trimmed(settings.context, tenant.context)
        if tenant.budget or tenant.context:
            sections.append((("tenants", index, "context" if tenant.context else "budget"), *own))
    for path, budget, context in sections:
        minute, most = budget.tokens_per_minute, context.max_tokens
        if minute is None or most is None or budget.mode != "enforce" or context.mode == "off" or minute >= most:
            continue
        key = "tokens_per_minute" if path[-1] == "budget" else "max_tokens"
        message = (
            f"no prompt has more than {minute} tokens: budget.tokens_per_minute is smaller than context.max_tokens"
        )
        yield (*path, key), message


def _provider(provider: OpenAISettings) -> Iterator[tuple[str, str]]:
    url = urlsplit(provider.base_url)
    with_key = provider.passes_client_key or bool(provider.credentials)
    if url.scheme == "http" and with_key and not is_loopback(url.hostname or ""):
        yield "base_url", "the key travels unencrypted: use https, unless the network between is trusted"
    if url.scheme == "https" and not with_key:
        yield "base_url", 'no api_key is set, so requests go without one; add: api_key: "${API_KEY}"'
    if url.path == "":
        yield "base_url", f"has no path; most compatible servers expect {provider.base_url}/v1"


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""What a valid configuration probably does not mean. Pure; each finding is a warning, never an error."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from urllib.parse import urlsplit

from proxy.config.references import Finding
from proxy.config.settings import Settings
from proxy.globs import matches
from proxy.providers.settings import OpenAISettings


def warnings(settings: Settings) -> Iterator[Finding]:
    """The path of each doubtful value, and why."""
    if not settings.tenants and not is_loopback(settings.listen.host):
        message = "reachable from other machines, without tenants: serve refuses this unless --insecure is given"
        yield ("listen", "host"), message
    for name, provider in settings.providers.items():
        if isinstance(provider, OpenAISettings):
            for key, message in _provider(provider):
                yield ("providers", name, key), message
    names = [model.name for model in settings.models]
    if any("*" in name for name in names):
        return
    for index, tenant in enumerate(settings.tenants):
        for position, glob in enumerate(tenant.models or ()):
            if not any(matches(glob, name) for name in names):
                yield ("tenants", index, "models", position), "matches none of the configured models"


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

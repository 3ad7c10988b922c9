"""Settings of the providers, told apart by `kind`."""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, SecretStr, ValidationInfo, field_validator

from proxy.budget.settings import LimitSettings, ModelFactsSettings
from proxy.settings import HeaderSecret, HeaderText, Milliseconds, Section

CLIENT: Final = "client"
"""The word that stands for the caller's own key where a key is expected."""

_Setting = TypeVar("_Setting")

Vendor = Literal[
    "none", "anthropic", "arcee", "avian", "aws", "azure", "baseten", "cerebras", "cloudflare", "cohere", "cursor",
    "databricks", "deepseek", "doubleword", "elevenlabs", "fireworks", "github-copilot", "google", "groq",
    "huggingface_cerebras", "huggingface_fireworks-ai", "huggingface_groq", "huggingface_hyperbolic",
    "huggingface_nebius", "huggingface_novita", "huggingface_nscale", "huggingface_ovhcloud", "huggingface_publicai",
    "huggingface_sambanova", "huggingface_together", "meta", "minimax", "mistral", "modal", "moonshotai", "novita",
    "openai", "openai-decisions", "openrouter", "ovhcloud", "perplexity", "quicksilverpro", "together", "typesafe",
    "voyageai", "x-ai", "zai", "zhipuai",
]  # fmt: skip
"""Whose list prices are known. The library of prices is not loaded to read a configuration."""

_VISIBLE = re.compile(r"[^\s\x00-\x1f\x7f]+")


class Timeouts(Section):
    """Time limits of one attempt, in milliseconds."""

    connect_ms: Milliseconds = 5000
    """Milliseconds to connect, TLS included."""
    first_event_ms: Milliseconds = 300_000
    """Streams: milliseconds from the request until the first event that brings something of the reply."""
    idle_ms: Milliseconds = 300_000
    """Streams: milliseconds of silence between two events."""
    total_ms: Milliseconds = 600_000
    """Plain replies: milliseconds for the whole reply."""


class OpenAISettings(Section):
    """Any server that speaks OpenAI's API."""

    kind: Literal["openai"]
    """Which API the provider speaks."""
    base_url: str = "https://api.openai.com/v1"
    """Address of the API, http or https, usually ending in /v1."""
    api_key: HeaderSecret | None = None
    """The provider's key, or the word client: pass the caller's own key on. Leave it out for a server without keys."""
    api_keys: tuple[HeaderSecret, ...] | None = None
    """Several keys of the same account or of several: requests go round, and one that is refused rests."""
    organization: HeaderText | None = None
    """Sent as OpenAI-Organization."""
    project: HeaderText | None = None
    """Sent as OpenAI-Project."""
    timeouts: Timeouts = Timeouts()
    """Time limits of one attempt."""
    transport: Literal["http1", "httpx"] = "http1"
    """http1: the built-in HTTP/1.1 client, the fastest; httpx: for HTTP/2 and egress proxies."""
    max_connections: int = Field(default=1000, ge=1, le=100_000)
    """Connections to this provider at once; further requests wait for one."""
    http2: bool = False
    """Speak HTTP/2 where the server offers it; needs transport: httpx."""
    egress_proxy: SecretStr | None = None
    """URL of an HTTP proxy on the way out; a secret, for it may hold a password; needs transport: httpx."""
    ca_file: Path | None = None
    """PEM file of certificate authorities to trust instead of the system's."""
    vendor: Vendor | None = None
    """Whose list prices it charges; null: as base_url says; none: nobody's."""
    limits: LimitSettings = LimitSettings()
    """What the provider's account may serve, for all tenants together."""
    models: dict[str, ModelFactsSettings] = Field(default_factory=dict)
    """Prices and sizes of its models, by name or glob; each goes over the price list."""

    @property
    def passes_client_key(self) -> bool:
        """The caller's own key is passed on, and the proxy holds none."""
        return any(key.get_secret_value() == CLIENT for key in self._configured)

    @property
    def credentials(self) -> tuple[SecretStr, ...]:
        """The keys that the proxy holds for this provider; none if it needs none or passes the caller's on."""
        return () if self.passes_client_key else self._configured

    @property
    def _configured(self) -> tuple[SecretStr, ...]:
        if self.api_keys:
            return self.api_keys
        return () if self.api_key is None else (self.api_key,)

    @field_validator("base_url")
    @classmethod
    def _is_base_url(cls, value: str) -> str:
        parts = _http_url(value, "https://api.openai.com/v1")
        if "@" in parts.netloc:
            raise ValueError("must not hold a user name or a password; a key belongs into api_key")
        if "?" in value or "#" in value:
            raise ValueError("must not hold a query or a fragment")
        if not parts.path.isascii():
            raise ValueError("the path must be ASCII, with other characters percent-encoded")
        return value.rstrip("/")

    @field_validator("api_keys")
    @classmethod
    def _are_keys(cls, value: tuple[SecretStr, ...] | None, info: ValidationInfo) -> tuple[SecretStr, ...] | None:
        if value is None:
            return None
        if info.data.get("api_key") is not None:
            raise ValueError("api_key is given too: keep one of the two")
        keys = [key.get_secret_value() for key in value]
        if not keys:
            raise ValueError("needs at least one key; leave the line out for none")
        if CLIENT in keys and len(keys) > 1:
            raise ValueError("'client' passes the caller's own key on and stands alone")
        if len(set(keys)) < len(keys):
            raise ValueError("holds the same key twice")
        return value

    @field_validator("http2", "egress_proxy")
    @classmethod
    def _has_httpx(cls, value: _Setting, info: ValidationInfo) -> _Setting:
        if value and info.data.get("transport") == "http1":
            raise ValueError("needs another transport: add the line 'transport: httpx'")
        return value

    @field_validator("egress_proxy")
    @classmethod
    def _is_proxy_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            parts = _http_url(value.get_secret_value(), "http://proxy.example.com:3128")
            if parts.path not in ("", "/") or parts.query or parts.fragment:
                raise ValueError("expected scheme, host and port only, such as http://proxy.example.com:3128")
        return value

    @field_validator("ca_file")
    @classmethod
    def _holds_certificates(cls, value: Path | None) -> Path | None:
        if value is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=value)
            except OSError:  # unreadable, or (as its subclass SSLError) without any certificate
                raise ValueError("expected a PEM file of certificates") from None
        return value


class MockSettings(Section):
    """The built-in provider that answers without any network: for a trial, for tests, for rehearsing faults."""

    kind: Literal["mock"]
    """Which API the provider speaks."""
    seed: int = Field(default=0, ge=0, le=2**53)
    """The same seed and request give the same reply."""
    tokens_per_second: float = Field(default=0.0, ge=0, le=1_000_000, allow_inf_nan=False)
    """Pace of a stream in tokens a second; 0 is as fast as possible."""
    first_token_ms: int = Field(default=0, ge=0, le=600_000)
    """Milliseconds before the first token."""
    script: Path | None = None
    """YAML file of scripted replies, faults included."""
    prompt_cache: bool = False
    """Tell in the usage how much of a prompt was sent before, as a provider with a prompt cache does."""
    timeouts: Timeouts = Timeouts()
    """Time limits of one attempt."""
    limits: LimitSettings = LimitSettings()
    """What the mock may serve, for all tenants together."""
    models: dict[str, ModelFactsSettings] = Field(default_factory=dict)
    """Prices and sizes of its models, by name or glob; without a price they cost nothing."""


ProviderSettings = Annotated[OpenAISettings | MockSettings, Field(discriminator="kind")]


def _http_url(value: str, example: str) -> SplitResult:
    """`value` split. Raises ValueError, without quoting the value, if it is no usable http or https URL."""
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not _VISIBLE.fullmatch(value):
        raise ValueError(f"expected an http or https URL, such as {example}")
    return parts

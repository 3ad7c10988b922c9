"""Settings of the edge: where it listens, who may administer it, and who its tenants are."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr, ValidationInfo, field_validator

from proxy.budget.settings import BudgetSettings
from proxy.context.settings import ContextSettings
from proxy.settings import DAY_MS, HeaderSecret, Milliseconds, Section

MIN_KEY_CHARS = 16
RESERVED_TENANTS = ("default", "other")
"""`default` is the tenant of keyless mode, `other` the metric label of whoever is not configured."""

_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SPAN = re.compile(r"([0-9]{1,6})([smhd])")
_UNIT_MS = {"s": 1000, "m": 60_000, "h": 3_600_000, "d": DAY_MS}
MAX_SPAN_DAYS = 3650
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")


def _long_enough(value: SecretStr) -> SecretStr:
    if len(value.get_secret_value()) < MIN_KEY_CHARS:
        raise ValueError(
            f"a key needs at least {MIN_KEY_CHARS} characters; make one with:"
            " python3 -c 'import secrets; print(\"bw-\" + secrets.token_urlsafe(32))'"
        )
    return value


def _passthrough_path(value: str) -> str:
    if not value.startswith("/v1/"):
        raise ValueError('expected a path or glob that begins with /v1/, such as "/v1/audio/*"')
    return value


def span_ms(text: str) -> int:
    """Milliseconds of 30s, 30m, 24h or 90d. Raises ValueError."""
    found = _SPAN.fullmatch(text)
    if found is None:
        raise ValueError("expected a span of time, such as 30m, 24h or 90d")
    span = int(found[1]) * _UNIT_MS[found[2]]
    if span > MAX_SPAN_DAYS * DAY_MS:
        raise ValueError(f"must be at most {MAX_SPAN_DAYS}d")
    return span


def _span(value: str) -> str:
    span_ms(value)
    return value


def _some_span(value: str) -> str:
    if span_ms(value) == 0:
        raise ValueError("must be more than 0")
    return value


def _label(value: str) -> str:
    if not value.isprintable() or value != value.strip():
        raise ValueError("must be printable, on one line, without blanks around it")
    return value


Span = Annotated[str, AfterValidator(_span)]
Label = Annotated[str, Field(max_length=64), AfterValidator(_label)]
Glob = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_label)]
Key = Annotated[HeaderSecret, AfterValidator(_long_enough)]
PathGlob = Annotated[str, AfterValidator(_passthrough_path)]


class ListenSettings(Section):
    """Where the proxy listens, and what it accepts from a client."""

    host: str = "127.0.0.1"
    """Address or host name to bind. Beyond loopback it needs tenants, or the flag --insecure."""
    port: int = Field(default=8080, ge=0, le=65535)
    """TCP port; 0 takes any free one."""
    admin_port: int | None = Field(default=None, ge=0, le=65535)
    """TCP port of its own for /metrics and /admin; null leaves them on `port`."""
    max_body_bytes: int = Field(default=20_971_520, ge=1, le=1_073_741_824)
    """Largest request body, in bytes; above it the answer is 413."""
    max_in_flight: int = Field(default=2000, ge=1, le=1_000_000)
    """Requests in progress at once; above it the answer is 503 `overloaded`."""
    drain_ms: int = Field(default=5000, ge=0, le=DAY_MS)
    """On SIGTERM: milliseconds in which /readyz already says 503 while the listener stays open."""
    grace_ms: int = Field(default=30_000, ge=0, le=DAY_MS)
    """After draining: milliseconds that running requests have to finish."""
    header_timeout_ms: Milliseconds = 10_000
    """Milliseconds for a client to complete the head of its request."""
    body_timeout_ms: Milliseconds = 30_000
    """Milliseconds for a client to complete the body of its request."""
    write_timeout_ms: Milliseconds = 60_000
    """Milliseconds in which a client must take something of an answer that waits for it."""
    keep_alive_ms: Milliseconds = 75_000
    """Milliseconds an idle client connection stays open; keep it above the idle timeout of a load balancer in front."""

    @field_validator("host")
    @classmethod
    def _is_host(cls, value: str) -> str:
        try:
            ipaddress.ip_address(value)
        except ValueError:
            if not _HOST_NAME.fullmatch(value):
                raise ValueError(
                    "expected an address or a host name alone, such as 127.0.0.1; the port has its own key"
                ) from None
        return value

    @field_validator("admin_port")
    @classmethod
    def _has_its_own_port(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and value == info.data.get("port"):
            raise ValueError("must differ from listen.port; null serves both on one port")
        return value


class AdminSettings(Section):
    """Who may use /admin."""

    keys: tuple[Key, ...] = ()
    """Admin keys of at least 16 characters; with none, /admin answers 404."""


class TenantSettings(Section):
    """One tenant: its keys and what they may reach."""

    name: str
    """Name in metrics and logs: 1 to 64 letters, digits, '.', '_' or '-'."""
    keys: tuple[Key, ...] = ()
    """Keys of at least 16 characters that identify this tenant; at least one, unless `state` is a Redis, where keys are
    made with `breakwater keys create` too."""
    models: tuple[str, ...] | None = None
    """Globs of the model names it may ask for; null allows all."""
    providers: tuple[str, ...] | None = None
    """Names of the providers that may answer it; null allows all."""
    passthrough: tuple[PathGlob, ...] = ()
    """Globs of further paths, with /v1, that it may use; none by default."""
    budget: BudgetSettings | None = None
    """What it may spend: goes over the section `budget`, key by key; a null lifts a limit."""
    context: ContextSettings | None = None
    """How its conversations are kept within a window: goes over the section `context`, key by key."""

    @field_validator("name")
    @classmethod
    def _is_name(cls, value: str) -> str:
        if not _TENANT.fullmatch(value):
            raise ValueError("expected 1 to 64 letters, digits, '.', '_' or '-'")
        if value in RESERVED_TENANTS:
            raise ValueError(f"the name '{value}' is reserved: choose another")
        return value


class KeySettings(Section):
    """What is said of a key when it is made at run time. No part of the file: a request of administration."""

    tenant: str
    """The tenant whose key it is, one of the configuration."""
    name: Label = ""
    """A name for people, at most 64 characters."""
    expires: Annotated[str, AfterValidator(_some_span)] | None = None
    """How long it is valid: 30m, 24h, 90d; null: until it is revoked."""
    models: tuple[Glob, ...] | None = Field(default=None, min_length=1, max_length=100)
    """Globs of the model names that it may ask for, beside those of its tenant; null: no further restriction."""
    budget: BudgetSettings | None = None
    """What it may spend, beside what its tenant may."""


class RotationSettings(Section):
    """How a key made at run time gets a new secret."""

    overlap: Span = "24h"
    """How long the secrets of before stay valid; 0s ends them at once."""

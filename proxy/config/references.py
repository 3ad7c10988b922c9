"""Rules that hold between sections: names that must exist, keys and names that must be unique. Pure.

They work on a configuration of which parts are invalid, so that their findings stand beside those on the parts: a part
that could not be read at all is None, a single value an empty text. No message quotes a key.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

from proxy.budget.settings import LedgerSettings, SinkSettings
from proxy.config.problems import Path, did_you_mean, render
from proxy.context.settings import ContextSettings, merged
from proxy.edge.settings import AdminSettings, TenantSettings
from proxy.fault_tolerance.settings import FaultToleranceSettings
from proxy.globs import matches
from proxy.providers.settings import OpenAISettings, ProviderSettings

if TYPE_CHECKING:
    from proxy.config.settings import ModelSettings

_PROVIDER = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_CLIENT_WITH_TENANTS = (
    "'client' passes the caller's own key on, but with tenants that is a key of this proxy: set the provider's own key"
)

_WITHOUT_KEYS = (
    "needs at least 1 key: only with a Redis as state can a tenant do with keys from `breakwater keys create` alone"
)
_BESIDE = re.compile(r"\.([0-9]+|lock)$")
"""What a sink appends to its file's name."""

Finding = tuple[Path, str]


def findings(
    providers: Mapping[str, ProviderSettings | None],
    models: Sequence[ModelSettings | None],
    tenants: Sequence[TenantSettings | None],
    admin: AdminSettings | None,
    ledger: LedgerSettings | None,
    fault_tolerance: FaultToleranceSettings | None = None,
    context: ContextSettings | None = None,
    *,
    makes_keys: bool,
) -> Iterator[Finding]:
    """Every broken rule, as the path of the value at fault and a message.

    `makes_keys`: the store keeps keys that are made at run time."""
    yield from _providers(providers, bool(tenants))
    yield from _unique_names("models", models)
    for index, model in enumerate(models):
        for place, targets in enumerate(model.targets if model else ()):
            at: Path = ("models", index, "targets", place)
            if isinstance(targets, tuple):
                names = [target.partition("/")[0] for target in targets]
                yield from _dangling(at, names, providers)
            else:
                yield from _unknown(at, targets.partition("/")[0], providers)
    yield from _unique_names("tenants", tenants)
    for index, tenant in enumerate(tenants):
        yield from _dangling(("tenants", index, "providers"), (tenant and tenant.providers) or (), providers)
        if tenant is not None and not tenant.keys and not makes_keys:
            yield ("tenants", index, "keys"), _WITHOUT_KEYS
    yield from _unique_keys(tenants, admin)
    yield from _unique_files((ledger and ledger.sinks) or ())
    fallback = fault_tolerance and fault_tolerance.fallback_provider
    yield from _unknown(("fault_tolerance", "fallback_provider"), (fallback or "").partition("/")[0], providers)
    names = [model.name for model in models if model] or ["*"]  # unwritten, every name is answered
    yield from _summarised(("context",), context, names)
    for index, tenant in enumerate(tenants):
        if tenant is not None and tenant.context is not None:
            section = merged(context or ContextSettings(), tenant.context)
            yield from _summarised(("tenants", index, "context"), section, names)


def _summarised(at: Path, section: ContextSettings | None, names: Sequence[str]) -> Iterator[Finding]:
    """Whoever wants summaries names the model that makes them."""
    if section is None or section.trim_strategy != "summary":
        return
    model = section.summary_model
    if model is None:
        yield (*at, "trim_strategy"), "needs a model that makes the summaries: add the line 'summary_model: NAME'"
    elif model and not any(matches(name, model) for name in names):
        message = f"no entry of models answers for '{model}': {did_you_mean(model, dict.fromkeys(names))}"
        yield (*at, "summary_model"), message


def _providers(providers: Mapping[str, ProviderSettings | None], with_tenants: bool) -> Iterator[Finding]:
    if not providers:
        yield ("providers",), "at least one is needed, such as: providers: {openai: {kind: openai}}"
    for name, provider in providers.items():
        if not _PROVIDER.fullmatch(name):
            rule = "expected a name of 1 to 64 lower-case letters, digits, '.', '_' or '-', not beginning with a sign"
            yield ("providers", name), rule
        if with_tenants and isinstance(provider, OpenAISettings) and provider.passes_client_key:
            where: Path = ("api_keys", 0) if provider.api_keys else ("api_key",)
            yield ("providers", name, *where), _CLIENT_WITH_TENANTS


def _unique_names(section: str, entries: Sequence[ModelSettings | TenantSettings | None]) -> Iterator[Finding]:
    first: dict[str, int] = {}
    for index, entry in enumerate(entries):
        if entry and entry.name and (earlier := first.setdefault(entry.name, index)) != index:
            yield (section, index, "name"), f"'{entry.name}' is the name of {render((section, earlier))} already"


def _dangling(path: Path, names: Sequence[str], providers: Mapping[str, object]) -> Iterator[Finding]:
    for position, name in enumerate(names):
        yield from _unknown((*path, position), name, providers)


def _unknown(path: Path, name: str, providers: Mapping[str, object]) -> Iterator[Finding]:
    if name and name not in providers:
        yield path, f"no provider is named '{name}': {did_you_mean(name, providers)}"


def _unique_keys(tenants: Sequence[TenantSettings | None], admin: AdminSettings | None) -> Iterator[Finding]:
    """A key names one holder: whoever presents it is that tenant, or the administrator."""
    first: dict[str, Path] = {}
    holders: list[tuple[Path, AdminSettings | TenantSettings | None]] = [(("admin",), admin)]
    holders += [(("tenants", index), tenant) for index, tenant in enumerate(tenants)]
    for holder, section in holders:
        for position, key in enumerate(section.keys if section else ()):
            path: Path = (*holder, "keys", position)
            value = key.get_secret_value()
            if value and (earlier := first.setdefault(value, path)) != path:
                yield path, f"the same key stands in {render(earlier)}: each holder needs keys of its own"


def _unique_files(sinks: Sequence[SinkSettings | None]) -> Iterator[Finding]:
    """A file has one writer, and so have those that it is renamed to."""
    first: dict[str, int] = {}
    for index, sink in enumerate(sinks):
        if sink is None or not isinstance(sink.file, FilePath):
            continue
        file = os.path.normpath(sink.file.absolute())
        for other, earlier in first.items():
            if file == other or _BESIDE.sub("", file) == other or _BESIDE.sub("", other) == file:
                where = render(("ledger", "sinks", earlier, "file"))
                yield ("ledger", "sinks", index, "file"), f"{where} writes this file, or renames its own to it"
                break
        first.setdefault(file, index)

"""The whole configuration: the layers' sections put together, in the order of the pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    Discriminator,
    Field,
    SecretStr,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from proxy.budget.settings import UNWRITTEN, BudgetSettings, Count, LedgerSettings, LimitSettings, PriceSettings
from proxy.config.problems import render
from proxy.config.references import findings
from proxy.config.shape import TAGS, one_or_list
from proxy.context.settings import ContextSettings
from proxy.edge.settings import AdminSettings, ListenSettings, TenantSettings
from proxy.fault_tolerance.settings import FaultToleranceSettings
from proxy.observability.settings import ObservabilitySettings
from proxy.providers.settings import CLIENT, ProviderSettings
from proxy.settings import Section
from proxy.store.address import MEMORY, NAMESPACE, parse_address, passwords_in


def _target(value: str) -> str:
    provider, slash, model = value.partition("/")
    if not (provider and slash and model):
        raise ValueError("expected PROVIDER/MODEL, such as openai/gpt-4o-mini")
    return value


TargetText = Annotated[str, AfterValidator(_target)]
_Shared = Annotated[tuple[TargetText, ...], Field(min_length=1)]
OneTarget = Annotated[
    Annotated[TargetText, Tag(TAGS[0])] | Annotated[_Shared, Tag(TAGS[1])], Discriminator(one_or_list)
]


class ModelSettings(Section):
    """One model name that clients may ask for, and where it leads."""

    name: str = Field(min_length=1, max_length=256)
    """Name or glob: an exact name wins, then the longest glob, then the order of the file."""
    targets: tuple[OneTarget, ...] = Field(min_length=1)
    """PROVIDER/MODEL in the order in which they are tried; those of an inner list share the load; a * in one stands for
    what the glob matched."""
    price: PriceSettings | Literal["none"] | None = None
    """USD per million tokens, where the provider's own entry has none; none: it costs nothing; null: the price list."""
    context_window: Count | None = None
    """Tokens of input and output together, where the provider's own entry has none."""
    max_output_tokens: Count | None = None
    """The most that one reply can have, where the provider's own entry has none."""

    @field_validator("targets")
    @classmethod
    def _are_targets(cls, value: tuple[str | tuple[str, ...], ...], info: ValidationInfo) -> Any:
        name = info.data.get("name")
        flat = [target for group in _groups(value) for target in group]
        for target in flat:
            provider, _, model = target.partition("/")
            if "*" in provider:
                raise ValueError("a * may stand in the model's part only: PROVIDER/*")
            if "*" in model and name is not None and name.count("*") != 1:
                raise ValueError("a * in a target needs a name with exactly one *, for it is what that matched")
        if len(set(flat)) < len(flat):
            raise ValueError("the same target stands there twice")
        return value

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The targets in order; those of one group share."""
        return _groups(self.targets)


def _groups(targets: tuple[str | tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    return tuple((one,) if isinstance(one, str) else one for one in targets)


class Settings(Section):
    """The configuration of one process."""

    listen: ListenSettings = ListenSettings()
    """Where the proxy listens, and what it accepts from a client."""
    state: SecretStr = SecretStr(MEMORY)
    """Where budgets are kept: memory:// (this process alone), or redis://HOST:PORT/DB, shared by all that name it;
    also rediss://, redis+sentinel://HOST,HOST/SERVICE, redis+cluster://HOST,HOST."""
    state_namespace: str = "0"
    """Deployments of different namespaces share a Redis and nothing in it."""
    state_timeout_ms: int = Field(default=50, ge=1, le=10_000)
    """Milliseconds that a call to Redis may take."""
    admin: AdminSettings = AdminSettings()
    """Who may use /admin."""
    providers: dict[str, ProviderSettings] = Field(min_length=1)
    """Providers by name (1 to 64 of a-z, 0-9, '.', '_', '-'); the first one serves pass-through."""
    models: tuple[ModelSettings, ...] = Field(
        default_factory=lambda given: (ModelSettings(name="*", targets=(f"{next(iter(given['providers']))}/*",)),),
        min_length=1,
    )
    """Model names that clients may ask for; by default every name goes to the first provider."""
    tenants: tuple[TenantSettings, ...] = ()
    """Who may use the proxy; with none, anyone on loopback may (keyless mode)."""
    global_budget: LimitSettings = LimitSettings()
    """What all tenants may spend together."""
    budget: BudgetSettings = Field(default_factory=lambda: UNWRITTEN)
    """What each tenant may spend. Written, it enforces; unwritten, it observes 40,000 tokens and 2 USD a minute."""
    ledger: LedgerSettings = LedgerSettings()
    """The record of what was spent."""
    context: ContextSettings = ContextSettings()
    """How conversations are kept within the window of the model that answers."""
    fault_tolerance: FaultToleranceSettings = FaultToleranceSettings()
    """What happens when a provider fails: retries, the circuit breaker, the fallback."""
    observability: ObservabilitySettings = ObservabilitySettings()
    """Logs and metrics."""

    @field_validator("state")
    @classmethod
    def _is_a_place(cls, value: SecretStr) -> SecretStr:
        if value.get_secret_value() != MEMORY:
            try:
                parse_address(value.get_secret_value())
            except OSError:  # unreadable, or (as its subclass SSLError) not what it should be
                raise ValueError("a file that the URL names cannot be read, or holds no certificate or key") from None
        return value

    @field_validator("state_namespace")
    @classmethod
    def _is_a_namespace(cls, value: str) -> str:
        if not NAMESPACE.fullmatch(value):
            raise ValueError("expected 1 to 64 letters, digits, '.', '_' or '-'")
        return value

    @model_validator(mode="after")
    def _holds_together(self) -> Settings:
        broken = [
            f"{render(path)}: {message}"
            for path, message in findings(
                self.providers,
                self.models,
                self.tenants,
                self.admin,
                self.ledger,
                self.fault_tolerance,
                self.context,
                makes_keys=self.state.get_secret_value() != MEMORY,
            )
        ]
        if broken:
            raise ValueError("; ".join(broken))
        return self

    def secrets(self) -> frozenset[str]:
        """The value of every secret: what must not appear in a log. Of a URL it is the password, and all around it."""
        values = {secret.get_secret_value() for secret in _secrets(self)} - {CLIENT}
        passwords = {value: passwords_in(value) for value in values if "://" in value}
        open_urls = {value for value, found in passwords.items() if not found}
        return frozenset((values - open_urls).union(*passwords.values()))


def _secrets(value: object) -> Iterator[SecretStr]:
    if isinstance(value, SecretStr):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _secrets(getattr(value, name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _secrets(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _secrets(item)

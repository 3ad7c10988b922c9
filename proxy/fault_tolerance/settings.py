"""Settings of fault tolerance: retries, the circuit breaker, the fallback, and what bounds all attempts together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from proxy.settings import Milliseconds, Section

Mode = Literal["off", "observe", "enforce"]


def _fallback(value: str) -> str:
    provider, slash, model = value.partition("/")
    if not provider or (slash and not model) or "*" in value:
        raise ValueError("expected PROVIDER or PROVIDER/MODEL, such as backup/claude-haiku-4-5")
    return value


class RetrySettings(Section):
    """How often, and after which delay, a failed attempt is repeated."""

    max_attempts: int = Field(default=4, ge=1, le=20)
    """Attempts of one request, over all its targets; 1 never repeats anything."""
    base_delay_ms: Milliseconds = 1000
    """Milliseconds of the first delay, at most; it doubles with each repetition."""
    max_delay_ms: Milliseconds = 30_000
    """Milliseconds of the longest delay, what a provider asks for included."""
    jitter: bool = True
    """Draw each delay between 0 and its most, so that clients do not come back together."""
    on_timeout: bool = False
    """Repeat at the same target what timed out after it was sent: it may then be billed twice."""

    @model_validator(mode="after")
    def _delays_ascend(self) -> RetrySettings:
        if self.base_delay_ms > self.max_delay_ms:
            raise ValueError("base_delay_ms must not be larger than max_delay_ms")
        return self


class BreakerSettings(Section):
    """When a provider's model is left alone, and for how long."""

    mode: Mode = "enforce"
    """off: no circuits; observe: they open and are told of, and refuse nothing; enforce: an open circuit is skipped."""
    failure_threshold: int = Field(default=5, ge=1, le=1000)
    """Failures in a row that open a circuit; half of at least 20 attempts within 10 seconds open it too."""
    recovery_timeout_ms: Milliseconds = 60_000
    """Milliseconds until an open circuit is probed by one request."""

    @model_validator(mode="before")
    @classmethod
    def _may_be_switched_off(cls, value: Any) -> Any:
        return {"mode": "off"} if value is False else value


class FaultToleranceSettings(Section):
    """What happens when a provider fails. Unwritten, it is on with these defaults: it changes no answer."""

    mode: Mode = "enforce"
    """off: one attempt at the first target, whatever happens; observe: the same, but circuits are told of; enforce."""
    retry: RetrySettings = RetrySettings()
    """How often, and after which delay, a failed attempt is repeated."""
    circuit_breaker: BreakerSettings = BreakerSettings()
    """When a provider's model is left alone, and for how long."""
    fallback_provider: Annotated[str, AfterValidator(_fallback)] | None = None
    """PROVIDER or PROVIDER/MODEL that comes after the targets of every model that does not list the provider."""
    deadline_ms: Milliseconds = 900_000
    """Milliseconds of a request with all its attempts; of a stream, until its first event."""
    max_upstream_calls: int = Field(default=6, ge=1, le=100)
    """Calls to providers that one request may cause, over retries, failovers and repairs."""

    @model_validator(mode="before")
    @classmethod
    def _may_be_switched_off(cls, value: Any) -> Any:
        return {"mode": "off"} if value is False else value

    @property
    def acts(self) -> bool:
        """Attempts are repeated and moved to other targets."""
        return self.mode == "enforce"

    @property
    def breaker(self) -> Mode:
        """The mode in which circuits work: the stricter word of the two is the weaker one."""
        order: tuple[Mode, ...] = ("off", "observe", "enforce")
        return min(self.mode, self.circuit_breaker.mode, key=order.index)

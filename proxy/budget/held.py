"""What one client request holds and has cost so far: values that a charge changes, and the settlement of them. Pure."""

from __future__ import annotations

from secrets import token_hex
from typing import Final, Literal

from proxy.budget.amounts import MAX_AMOUNT, Amounts
from proxy.budget.plan import Plan
from proxy.budget.policy import Policy
from proxy.errors import ProxyError
from proxy.store.base import NOTHING, BudgetStore, Entry, Scope, Settlement
from proxy.tokens.meter import Meter
from proxy.types import Usage

State = Literal["asked", "open"]
Risks = tuple[tuple[str, ...], int, int]
"""Places, tokens and nano-dollars that were entered into the exposures."""
NO_RISK: Final[Risks] = ((), 0, 0)


class Attempt:
    """One try at one target."""

    __slots__ = ("failed", "measured", "meter", "nano_usd", "next_check", "number", "plan", "seen_bytes", "status",
                 "usage")  # fmt: skip

    def __init__(self, plan: Plan, number: int) -> None:
        self.plan = plan
        self.number = number
        """From 1, under one reservation."""
        self.meter: Meter | None = None
        """Of a reply whose usage was not told yet."""
        self.status = 0
        self.usage: Usage | None = None
        self.nano_usd: int | None = None
        """Of that usage, or of its estimate; None: nobody knows a price."""
        self.failed: ProxyError | None = None
        self.seen_bytes = 0
        self.next_check = 0
        """Bytes of the reply at which its output is measured next."""
        self.measured = 0


class Spent:
    """What one client request has cost so far, over all its attempts and children."""

    __slots__ = ("attempts", "before_nano_usd", "id", "nano_usd", "tokens", "unpriced", "usage")

    def __init__(self, known: str = "") -> None:
        self.id = known
        """Of its reservation; empty where there is none."""
        self.tokens = 0
        self.nano_usd = 0
        """Of attempts that are over."""
        self.before_nano_usd = 0
        """Of an earlier reservation of the same request, whose lease was lost."""
        self.unpriced = False
        self.usage: Usage | None = None
        """Of attempts that are over; None: nobody knows of any."""
        self.attempts = 0


class Held(Spent):
    """And what the store holds for it."""

    __slots__ = ("apart", "ask", "entries", "local", "provider", "risks", "state")

    def __init__(self) -> None:
        super().__init__(token_hex(16))
        self.state: State | None = None
        """None: nothing is held anywhere. `asked`: the store was asked, and may hold it. `open`: nobody has to."""
        self.local: BudgetStore | None = None
        """The slice of this process that holds it as well, while the store is away."""
        self.ask = NOTHING
        self.provider: Scope | None = None
        """The account that is covered."""
        self.entries: list[Entry] = []
        self.apart: dict[str, list[int]] = {}
        """By provider: requests, tokens and nano-dollars since its account joined the reservation."""
        self.risks: Risks = NO_RISK
        """Places, tokens and nano-dollars that were entered into the exposures."""

    def account(self) -> Amounts:
        """What the covered account has served."""
        requests, tokens, nano = (0, 0, 0) if self.provider is None else self.apart.get(self.provider.name, (0, 0, 0))
        return Amounts(requests, min(tokens, MAX_AMOUNT), min(nano, MAX_AMOUNT))

    def settlement(self, policy: Policy) -> Settlement:
        scopes = policy.at("" if self.provider is None else self.provider.name).scopes
        actual = Amounts(1 if self.attempts else 0, min(self.tokens, MAX_AMOUNT), min(self.nano_usd, MAX_AMOUNT))
        apart = () if self.provider is None else ((self.provider, self.account()),)
        return Settlement(self.id, scopes, actual, apart, tuple(self.entries))

    def renew(self) -> None:
        """A new life under a new id, after the old one was settled with all that it had cost."""
        self.id = token_hex(16)
        self.state, self.local, self.provider, self.ask = None, None, None, NOTHING
        self.before_nano_usd += self.nano_usd
        self.tokens = self.nano_usd = self.attempts = 0
        self.entries = []
        self.apart = {}


def added(one: Usage, other: Usage) -> Usage:
    """Of two attempts together."""
    return Usage(
        one.input + other.input,
        one.output + other.output,
        one.cache_read + other.cache_read,
        one.cache_write + other.cache_write,
        one.reasoning + other.reasoning,
        one.estimated or other.estimated,
        one.input_audio + other.input_audio,
        one.output_audio + other.output_audio,
    )

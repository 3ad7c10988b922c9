"""The port of the budget store: the verbs of a reservation's life, and the values they speak in.

A reservation's life, by its id::

    reserve ──▶ live ──settle──▶ settled           every further settle is `already`
                 │ ▲
         top_up ─┘ │ extend
                 │
                 └──lease over──▶ expired ──settle──▶ settled    (`late`: the difference is booked, once)

Every verb may be repeated with the same arguments: a repetition changes nothing and gives the answer of the first.
That is what makes a lost reply harmless. A verb takes effect in every scope and window, or in none.

A store begins *cold*: it knows nothing, which is not the same as nothing spent. While it is cold, and for a scope that
it has never seen, the verbs answer `Cold` until `seed` has told it what is remembered.

Amounts are integers: requests, tokens, nano-dollars, each at most `MAX_AMOUNT`. Times are milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, Protocol

import msgspec

from proxy.budget.amounts import MAX_AMOUNT, Amounts, Limits, Row, Window

ScopeKind = Literal["provider", "global", "tenant", "key"]
OnLost = Literal["charge", "refund"]
Outcome = Literal["settled", "already", "late", "unknown"]

ID_CHARS: Final = 32
ROLLUP_MS: Final = 3_600_000
ROLLUP_KEPT_MS: Final = 62 * 24 * 3_600_000
OUTBOX_RECORDS: Final = 100_000
"""Records that the outbox keeps, roughly; older ones leave."""
ROLLUP_FIELDS: Final = 10_000
"""Combinations of dimensions that one tenant may have in one hour; further ones count under `OTHER`."""
MAX_RECORD: Final = 200
SEED_MS: Final = 2000
"""How long a cold store collects what processes remember before it opens."""

Dimension = Literal["tenant", "key", "model", "provider", "tags", "quality"]
DIMENSIONS: Final[tuple[Dimension, ...]] = ("tenant", "key", "model", "provider", "tags", "quality")
"""What usage is told apart by. `quality` is `true` for a provider's own figures and `estimated` for ours."""

NOTHING: Final = Amounts()


class Scope(msgspec.Struct, frozen=True, eq=False):
    """Whose windows. Made once for each configuration: stores keep what they prepared for it under its identity."""

    kind: ScopeKind
    name: str
    limits: Limits = Limits()
    enforced: bool = True
    """False: what does not fit is granted all the same, and said."""
    place: str = ""
    """Names the scope's windows: two scopes of one kind and name share them, and no others do. Follows from them."""

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "place", f"{self.kind}:{len(self.name)}:{self.name}")


class Reservation(msgspec.Struct, frozen=True, gc=False):
    """An ask, before anything is sent. All scopes take it, or none."""

    id: str
    """32 lower-case hexadecimal digits of our own making, never anything that a client wrote."""
    scopes: tuple[Scope, ...]
    ask: Amounts
    lease_ms: int = 30_000
    """Without `extend` or `settle` in this time, the reservation is lost."""
    on_lost: OnLost = "charge"
    """What a lost reservation costs: what it asked for, or nothing."""


class Tally(msgspec.Struct, frozen=True, gc=False):
    """Counts of the ledger; nano-dollars are an integer too. They are added up, member by member."""

    requests: int = 0
    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0
    reasoning: int = 0
    nano_usd: int = 0
    cost_unknown: int = 0
    """Requests whose cost nobody knows."""


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One line of the ledger: an attempt that was, or may have been, billed."""

    dimensions: tuple[str, ...]
    """As `DIMENSIONS`; an empty string where there is none."""
    usage: Tally
    record: tuple[str, ...] = ()
    """Names and values in turn, kept as they are for whoever reads the outbox; empty for no record."""


class Settlement(msgspec.Struct, frozen=True, gc=False):
    """What a reservation came to."""

    id: str
    scopes: tuple[Scope, ...]
    """Those of the reservation. A store that has lost the reservation charges these."""
    actual: Amounts
    apart: tuple[tuple[Scope, Amounts], ...] = ()
    """Scopes with an amount of their own: a provider account that served only one of several attempts."""
    entries: tuple[Entry, ...] = ()


class Balance(msgspec.Struct, frozen=True, gc=False):
    """The figures of one scope, as of one answer."""

    scope: Scope
    row: Row


class Granted(msgspec.Struct, frozen=True, gc=False):
    """The ask is held. `balances` include it, one for each scope and in their order."""

    balances: tuple[Balance, ...]
    epoch: int
    """Names the life of the store: another number means that it began again with what processes remembered."""
    over: Refused | None = None
    """What a scope that is not enforced would have said."""


class Refused(msgspec.Struct, frozen=True, gc=False):
    """A window is full, and nothing is held. Of several full windows: the one that takes longest."""

    scope: Scope
    window: Window
    limit: int
    used: int
    reserved: int
    retry_after_ms: int | None
    """An upper bound, provided nothing else is admitted or settled above its ask meanwhile; None: never, since the ask
    alone is larger than the limit. Of `max_concurrent`: a hint."""
    reset_ms: int
    """Until the window is empty, or the next calendar window begins."""


class Ended(msgspec.Struct, frozen=True, gc=False):
    """The reservation is settled, lost or unknown: nothing is held under its id, and nothing will be."""


class Cold(msgspec.Struct, frozen=True, gc=False):
    """Nothing was done: the store must be told what is remembered of these scopes; of all of them when it is empty."""

    scopes: tuple[Scope, ...] = ()


class Settled(msgspec.Struct, frozen=True, gc=False):
    """`late`: it had expired, and its charge was corrected. `unknown`: no such reservation, charged all."""

    outcome: Outcome
    balances: tuple[Balance, ...]
    epoch: int


class Remembered(msgspec.Struct, frozen=True, gc=False):
    """The most that some process has seen spent in a scope: hours, days and months as in `Row`."""

    scope: Scope
    windows: tuple[int, int, int] = (0, 0, 0)
    spent: tuple[int, int, int] = (0, 0, 0)
    minute: tuple[int, int, int] = (0, 0, 0)
    """Requests, tokens and nano-dollars in the last minute, as last seen. Windows that begin anew count them as spent
    now, which is never too little; windows that are there know better."""


class Seeded(msgspec.Struct, frozen=True, gc=False):
    wait_ms: int
    """0: the store is open. Else it still collects, and `seed` is to be called again after this time."""
    first: bool
    """This call was the first to reach an empty store: of all processes, this one reports it."""


class Beat(msgspec.Struct, frozen=True, gc=False):
    """Who shares the store."""

    processes: int
    """Those that live, the one that asked among them unless it left."""
    epoch: int
    """As in `Granted`; 0 while the store is cold."""


Shortcoming = Literal["version", "eviction"]
"""version: older than 6.2, so that some scripts fail. eviction: when its memory is full, the server throws keys away,
and with them what was spent; it is to refuse writes instead."""


class Server(msgspec.Struct, frozen=True):
    """What a shared store runs on, as far as it says so."""

    version: str
    """Of Redis, or the one that a server compatible with it claims; empty: it does not say."""
    eviction: str
    """Its `maxmemory-policy`; empty: it does not say."""
    shortcomings: tuple[Shortcoming, ...] = ()


class UsageRow(msgspec.Struct, frozen=True, gc=False):
    dimensions: tuple[str, ...]
    """The dimensions that were asked for, in that order."""
    usage: Tally


class Record(msgspec.Struct, frozen=True, gc=False):
    """One record of the outbox. A lost reservation has one too: `lost` (its id), requests, tokens, nano_usd."""

    id: str
    """Orders the records, and is where the next read goes on."""
    fields: tuple[str, ...]


class StoreUnavailable(Exception):
    """The store did not answer, or not as it should. `reason` is one of a closed set, fit for a log and a label.

    `uncertain`: the verb may have taken effect all the same. Repeating it under the same id is safe.
    """

    def __init__(self, reason: Reason, *, uncertain: bool = False) -> None:
        super().__init__(f"the budget store is unavailable: {reason}")
        self.reason = reason
        self.uncertain = uncertain


Reason = Literal[
    "open", "connect", "timeout", "closed", "refused", "moving", "full", "corrupt", "overloaded", "stopped"
]
"""open: its circuit is open. connect: no connection. timeout: no reply in time. closed: the connection broke. refused:
the server would not (loading, read-only, no permission). moving: our slot is changing places. full: out of memory.
corrupt: a key of ours holds something else. overloaded: too much is waiting already. stopped: the store was closed."""


class BudgetStore(Protocol):
    """Windows, reservations and roll-ups. Every verb but `aclose` raises StoreUnavailable."""

    async def reserve(self, reservation: Reservation) -> Granted | Refused | Ended | Cold:
        """Holds the ask in all scopes, or says why not."""

    async def top_up(
        self,
        reservation_id: str,
        ask: Amounts,
        scopes: tuple[Scope, ...],
        leave: tuple[tuple[Scope, Amounts], ...] = (),
    ) -> Granted | Refused | Ended | Cold:
        """Raises a live reservation to `ask` in all: a stream that outgrew it, or a failover to a dearer target.

        A scope that the reservation does not cover yet joins it with the whole ask. Those in `leave` are settled with
        the amount beside them, and covered no more: the account of a provider that failed. Refused, nothing changes.
        """

    async def settle(self, settlement: Settlement) -> Settled | Cold:
        """Ends a reservation, and books its entries. Exactly once for each id."""

    async def extend(self, reservation_ids: Sequence[str], lease_ms: int) -> tuple[str, ...] | Cold:
        """Gives live reservations a new lease from now on. Returns the ids that are live no more."""

    async def balance(self, scopes: Sequence[Scope]) -> tuple[Balance, ...] | Cold:
        """The figures of scopes."""

    async def seed(
        self, remembered: Sequence[Remembered], collect_ms: int = SEED_MS, held: Sequence[Reservation] = ()
    ) -> Seeded:
        """Tells the store what is remembered: each calendar window becomes the larger of both.

        `held` is what the caller was granted, here or elsewhere, and has not settled. It is taken whether or not it
        fits, for it will be spent: what the store does not know, or holds less of, is held from now on; what ended
        here stays ended. A scope that is not known counts as remembered with nothing spent.

        An empty store collects from all processes for `collect_ms` from the first call on, then opens at the next.
        """

    async def usage(self, since_ms: int, until_ms: int, by: Sequence[Dimension]) -> list[UsageRow]:
        """What the roll-ups of all hours that begin from `since_ms` to before `until_ms` add up to, sorted."""

    async def outbox(self, after: str, count: int) -> list[Record]:
        """At most `count` records after the one with that id (empty: from the oldest that is kept)."""

    async def beat(self, process_id: str, life_ms: int) -> Beat:
        """Says that a process lives, and is to be counted for `life_ms` from now on; 0: it leaves. Works cold, too.

        `process_id` is made as the id of a reservation is.
        """

    async def server(self) -> Server | None:
        """What the store runs on; None: on no server, or on one that tells nobody."""

    async def aclose(self) -> None:
        """Frees everything. What still waits for an answer gets StoreUnavailable."""


def checked_id(value: str) -> str:
    """The id itself. Raises ValueError for anything but 32 lower-case hexadecimal digits."""
    if len(value) != ID_CHARS or value.strip("0123456789abcdef"):
        raise ValueError("a reservation id is 32 lower-case hexadecimal digits")
    return value


def checked_amounts(amounts: Amounts) -> tuple[int, int, int]:
    """Requests, tokens, nano-dollars. Raises ValueError for what is negative or larger than MAX_AMOUNT."""
    requests, tokens, usd = amounts.requests, amounts.tokens, amounts.nano_usd
    if not (0 <= requests <= MAX_AMOUNT and 0 <= tokens <= MAX_AMOUNT and 0 <= usd <= MAX_AMOUNT):
        raise ValueError("an amount is between 0 and 2**43")
    return requests, tokens, usd


def checked_scopes(scopes: Sequence[Scope]) -> tuple[str, ...]:
    """Their places. Raises ValueError if there is none, or one twice: a reservation takes each once."""
    places = tuple(scope.place for scope in scopes)
    if not places or len(set(places)) != len(places):
        raise ValueError("a reservation has one or more scopes, each once")
    return places


def checked_entries(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """The entries. Raises ValueError for one whose dimensions, counts or record cannot be kept."""
    for entry in entries:
        if len(entry.dimensions) != len(DIMENSIONS):
            raise ValueError("an entry has a value for each of the dimensions, if only an empty one")
        if len(entry.record) % 2 or len(entry.record) > MAX_RECORD:
            raise ValueError("a record is names and values in turn, at most 100 of each")
        counts = msgspec.structs.astuple(entry.usage)
        if min(counts) < 0 or max(counts) > MAX_AMOUNT:
            raise ValueError("a count is between 0 and 2**43")
    return entries

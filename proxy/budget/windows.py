"""What one scope has spent and holds, window by window. Pure integers: the caller says what time it is.

Theory. A *scope* (a provider account, the deployment, a tenant, a key) has up to seven windows, all tested at once:

    requests, tokens, USD per minute   a ring of 61 buckets of one second. Any 60 s touch at most 61 of them, so a sum
                                       that never passes the limit is strict in every span of 60 s, not on average
    USD per hour, day, month           calendar windows in UTC, rolled when they are next touched
    max_concurrent                     reservations that live

A *reservation* counts in the bucket of the second it was made in, as held. Settling turns held into spent in that same
bucket while it is in the ring, so what was not used is free again at once; what was used above the ask enters the
current bucket. What a calendar window holds belongs to no window: it counts against whichever is current, and becomes
spent in the one in which it settles. So a roll during a long stream loses nothing.

    ring of one scope          bucket b = second % 61        each bucket: spent and held, of requests, tokens, nano-USD
    +---+---+---+---+---+
    |   | h |s h|   | s |      take: held += ask      release: held -= ask, spent += used      roll: the oldest leaves
    +---+---+---+---+---+

The ring and the leases run on steady time, the calendar on wall time (`clocks.py`); neither ever runs backwards. The
scripts of the store in Redis compute the same in Lua, and one test holds the two to the same answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from proxy.budget.amounts import MAX_SUM, WINDOWS, Bounds, Part, Row, Shortfall
from proxy.budget.clocks import DAY_MS, HOUR_MS, Moment, month_start

RING_SECONDS: Final = 61
CONCURRENCY_HINT_MS: Final = 1000
"""Nobody knows when a running request ends: a hint, not a bound."""


class ScopeWindows:
    """The state of one scope. `roll` comes before every other method; amounts are requests, tokens, nano-USD."""

    __slots__ = (
        "day", "day_spent", "held_requests", "held_tokens", "held_usd", "hour", "hour_spent", "last", "live", "month",
        "month_spent", "ring", "ring_held_requests", "ring_held_tokens", "ring_held_usd", "ring_requests",
        "ring_tokens", "ring_usd", "second",
    )  # fmt: skip

    def __init__(self, now: Moment) -> None:
        self.second = now.second
        self.last = now.second - RING_SECONDS
        """The newest second that something was counted in."""
        self.ring = [[0, 0, 0, 0, 0, 0] for _ in range(RING_SECONDS)]
        """Each bucket: spent requests, tokens, nano-USD, then held ones."""
        self.ring_requests = self.ring_tokens = self.ring_usd = 0
        self.ring_held_requests = self.ring_held_tokens = self.ring_held_usd = 0
        self.held_requests = self.held_tokens = self.held_usd = self.live = 0
        self.hour, self.day, self.month = now.hour, now.day, now.month
        self.hour_spent = self.day_spent = self.month_spent = 0

    # -- time --------------------------------------------------------------------------------------------------------

    def roll(self, now: Moment) -> None:
        """Lets go of what left the ring, and begins new calendar windows."""
        if now.second > self.second:
            self._advance(now.second)
        if now.hour > self.hour:
            self.hour, self.hour_spent = now.hour, 0
        if now.day > self.day:
            self.day, self.day_spent = now.day, 0
        if now.month > self.month:
            self.month, self.month_spent = now.month, 0

    def _advance(self, second: int) -> None:
        old, self.second = self.second, second
        for leaving in range(max(old, second - RING_SECONDS) + 1, second + 1):
            index = leaving % RING_SECONDS
            spent, tokens, usd, held, held_tokens, held_usd = self.ring[index]
            self.ring_requests -= spent
            self.ring_tokens -= tokens
            self.ring_usd -= usd
            self.ring_held_requests -= held
            self.ring_held_tokens -= held_tokens
            self.ring_held_usd -= held_usd
            self.ring[index] = [0, 0, 0, 0, 0, 0]

    # -- admission ---------------------------------------------------------------------------------------------------

    def fits(self, bounds: Bounds, requests: int, tokens: int, usd: int, starts: int) -> bool:
        """Whether all windows have room. `starts`: 1 for a reservation that is new to this scope, else 0."""
        rpm, tpm, upm, uph, upd, upmo, concurrent = bounds
        open_usd = self.held_usd + usd
        return (
            self.ring_requests + self.ring_held_requests + requests <= rpm
            and self.ring_tokens + self.ring_held_tokens + tokens <= tpm
            and self.ring_usd + self.ring_held_usd + usd <= upm
            and self.hour_spent + open_usd <= uph
            and self.day_spent + open_usd <= upd
            and self.month_spent + open_usd <= upmo
            and self.live + starts <= concurrent
        )

    def shortfall(self, bounds: Bounds, ask: tuple[int, int, int], starts: int, now: Moment) -> Shortfall | None:
        """The full window that takes longest to have room, or None if all have room. The slow path of `fits`."""
        worst: Shortfall | None = None
        for found in self._shortfalls(bounds, ask, starts, now):
            if worst is None or found.outlasts(worst):
                worst = found
        return worst

    def _shortfalls(self, bounds: Bounds, ask: tuple[int, int, int], starts: int, now: Moment) -> Iterable[Shortfall]:
        ring = (
            (self.ring_requests, self.ring_held_requests),
            (self.ring_tokens, self.ring_held_tokens),
            (self.ring_usd, self.ring_held_usd),
        )
        for index, (spent, held) in enumerate(ring):
            limit = bounds[index]
            if spent + held + ask[index] > limit:
                wait = (
                    self._leaves(index, spent + held + ask[index] - limit, now.steady_ms)
                    if ask[index] <= limit
                    else None
                )
                yield Shortfall(WINDOWS[index], limit, spent, held, wait, self.minute_reset(now.steady_ms))
        usd, held = ask[2], self.held_usd
        for index, spent, end, next_end in (
            (3, self.hour_spent, (self.hour + 1) * HOUR_MS, (self.hour + 2) * HOUR_MS),
            (4, self.day_spent, (self.day + 1) * DAY_MS, (self.day + 2) * DAY_MS),
            (5, self.month_spent, month_start(self.month + 1), month_start(self.month + 2)),
        ):
            limit = bounds[index]
            if spent + held + usd > limit:
                # What is held may yet settle in the next window, and fill that one too.
                until = end if held + usd <= limit else next_end
                yield Shortfall(
                    WINDOWS[index], limit, spent, held, until - now.wall_ms if usd <= limit else None, end - now.wall_ms
                )
        if self.live + starts > bounds[6]:
            yield Shortfall(WINDOWS[6], bounds[6], self.live, 0, CONCURRENCY_HINT_MS, CONCURRENCY_HINT_MS)

    def _leaves(self, index: int, need: int, steady_ms: int) -> int:
        """Milliseconds until buckets with at least `need` have left the ring; what is held counts as asked."""
        second = self.second - RING_SECONDS
        while need > 0:
            second += 1
            bucket = self.ring[second % RING_SECONDS]
            need -= bucket[index] + bucket[index + 3]
        return (second + RING_SECONDS) * 1000 - steady_ms

    # -- a reservation's life ----------------------------------------------------------------------------------------

    def take(self, requests: int, tokens: int, usd: int, starts: int) -> Part:
        """Holds an ask in the current bucket. The part is what `release` and `correct` need."""
        second = self.last = self.second
        bucket = self.ring[second % RING_SECONDS]
        bucket[3] += requests
        bucket[4] += tokens
        bucket[5] += usd
        self.ring_held_requests += requests
        self.ring_held_tokens += tokens
        self.ring_held_usd += usd
        self.held_requests += requests
        self.held_tokens += tokens
        self.held_usd += usd
        self.live += starts
        return (second, requests, tokens, usd)

    def release(self, parts: Iterable[Part], requests: int, tokens: int, usd: int) -> None:
        """Ends a reservation: its parts are held no more, and what was used is spent. The oldest part is used first."""
        spent_usd = usd
        oldest = self.second - RING_SECONDS
        for second, asked_requests, asked_tokens, asked_usd in parts:
            used_requests = asked_requests if asked_requests < requests else requests
            used_tokens = asked_tokens if asked_tokens < tokens else tokens
            used_usd = asked_usd if asked_usd < usd else usd
            requests -= used_requests
            tokens -= used_tokens
            usd -= used_usd
            self.held_requests -= asked_requests
            self.held_tokens -= asked_tokens
            self.held_usd -= asked_usd
            if second > oldest:
                bucket = self.ring[second % RING_SECONDS]
                bucket[0] += used_requests
                bucket[1] += used_tokens
                bucket[2] += used_usd
                bucket[3] -= asked_requests
                bucket[4] -= asked_tokens
                bucket[5] -= asked_usd
                self.ring_requests += used_requests
                self.ring_tokens += used_tokens
                self.ring_usd += used_usd
                self.ring_held_requests -= asked_requests
                self.ring_held_tokens -= asked_tokens
                self.ring_held_usd -= asked_usd
        self.live -= 1
        if requests or tokens or usd:
            self._now(requests, tokens, usd)
        if spent_usd:
            self._calendar(spent_usd)

    def charge(self, requests: int, tokens: int, usd: int) -> None:
        """Spends now what no reservation covers."""
        if requests or tokens or usd:
            self._now(requests, tokens, usd)
            self._calendar(usd)

    def correct(
        self,
        parts: Iterable[Part],
        charged: tuple[int, int, int],
        used: tuple[int, int, int],
        windows: Sequence[int],
    ) -> None:
        """Replaces what was charged for a lost reservation by what was used.

        `windows` are hour, day and month of the charge: a calendar window that is over is not given anything back.
        """
        oldest = self.second - RING_SECONDS
        was, now = list(charged), list(used)
        for part in parts:
            changes = []
            for index in range(3):
                had, has = min(part[index + 1], was[index]), min(part[index + 1], now[index])
                was[index] -= had
                now[index] -= has
                changes.append(has - had)
            if part[0] > oldest:
                self._change(part[0], *changes)
        if any(now):
            self._now(*now)
        change = used[2] - charged[2]
        if change > 0:
            self._calendar(change)
        elif change < 0:
            self.hour_spent += change if windows[0] == self.hour else 0
            self.day_spent += change if windows[1] == self.day else 0
            self.month_spent += change if windows[2] == self.month else 0

    def _now(self, requests: int, tokens: int, usd: int) -> None:
        self.last = self.second
        self._change(self.second, requests, tokens, usd)

    def _change(self, second: int, requests: int, tokens: int, usd: int) -> None:
        bucket = self.ring[second % RING_SECONDS]
        bucket[0] += requests
        bucket[1] += tokens
        bucket[2] += usd
        self.ring_requests += requests
        self.ring_tokens += tokens
        self.ring_usd += usd

    def _calendar(self, usd: int) -> None:
        hour, day, month = self.hour_spent + usd, self.day_spent + usd, self.month_spent + usd
        self.hour_spent = hour if hour < MAX_SUM else MAX_SUM
        self.day_spent = day if day < MAX_SUM else MAX_SUM
        self.month_spent = month if month < MAX_SUM else MAX_SUM

    # -- figures -----------------------------------------------------------------------------------------------------

    def raise_to(self, windows: Sequence[int], spent: Sequence[int]) -> None:
        """Takes over what somebody remembers of hour, day and month, where that is later or more than what is here."""
        if windows[0] >= self.hour:
            self.hour_spent = max(self.hour_spent if windows[0] == self.hour else 0, spent[0])
            self.hour = windows[0]
        if windows[1] >= self.day:
            self.day_spent = max(self.day_spent if windows[1] == self.day else 0, spent[1])
            self.day = windows[1]
        if windows[2] >= self.month:
            self.month_spent = max(self.month_spent if windows[2] == self.month else 0, spent[2])
            self.month = windows[2]

    def raise_minute(self, spent: Sequence[int]) -> None:
        """Counts as spent now what is missing to `spent` requests, tokens and nano-USD in the ring."""
        missing = (
            max(spent[0] - self.ring_requests, 0),
            max(spent[1] - self.ring_tokens, 0),
            max(spent[2] - self.ring_usd, 0),
        )
        if any(missing):
            self._now(*missing)

    def minute_reset(self, steady_ms: int) -> int:
        """Milliseconds until the ring is empty, if nothing more is admitted; 0 when it is."""
        empty = self.last + RING_SECONDS <= self.second
        return 0 if empty else (self.last + RING_SECONDS) * 1000 - steady_ms

    def row(self, steady_ms: int) -> Row:
        empty = self.last + RING_SECONDS
        # `Row(...)` does the same through a function of 17 arguments, at twice the time.
        return tuple.__new__(Row, (
            self.ring_requests, self.ring_tokens, self.ring_usd,
            self.ring_held_requests, self.ring_held_tokens, self.ring_held_usd,
            self.held_requests, self.held_tokens, self.held_usd, self.live,
            self.hour, self.day, self.month, self.hour_spent, self.day_spent, self.month_spent,
            empty * 1000 - steady_ms if empty > self.second else 0,
        ))  # fmt: skip

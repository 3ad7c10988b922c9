"""What was used without a reservation, booked by the batch.

Nobody waits for these figures and nothing is admitted by them, so a tenth of a second of requests is one settlement for
each policy: most of the work is then done once, and not once a request. Reports and the end of the process do not wait
for that tenth.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from secrets import token_hex
from typing import Any, Final

import msgspec

from proxy.budget.amounts import MAX_AMOUNT, Amounts, Bounds, Row
from proxy.budget.policy import Policy
from proxy.budget.records import Line, entries_of
from proxy.budget.refusals import Refusals, passed
from proxy.store.base import Scope, Settled, Settlement

SECONDS: Final = 0.1
MOST: Final = 256
"""Attempts that are booked together."""


class Item(msgspec.Struct, frozen=True, gc=False):
    line: Line
    learn: int
    """Choices of a complete reply whose length is worth remembering; 0: it is not."""


class Daybook:
    """`settle` books one settlement and gives the store's answer, or None while the store is away.

    `run` starts a coroutine that somebody waits for at the end. `learn` hears tenant, label of the model, and output
    tokens of one choice. `recorded`: each attempt is also written for whoever reads the outbox.
    """

    def __init__(
        self,
        settle: Callable[[Settlement], Coroutine[Any, Any, Settled | None]],
        run: Callable[[Coroutine[Any, Any, None]], object],
        refusals: Refusals,
        learn: Callable[[str, str, int], None],
        *,
        recorded: bool,
    ) -> None:
        self._settle = settle
        self._run = run
        self._refusals = refusals
        self._learn = learn
        self._recorded = recorded
        self._items: dict[Policy, list[Item]] = {}
        self._due = False

    def add(self, policy: Policy, line: Line, learn: int) -> None:
        """One attempt that is over. Never waits."""
        items = self._items.get(policy)
        if items is None:
            items = self._items[policy] = []
            if not self._due:
                self._due = True
                asyncio.get_running_loop().call_later(SECONDS, self._flush_soon)
        items.append(Item(line, learn))
        if len(items) >= MOST:
            del self._items[policy]
            self._run(self._book(policy, items))

    async def flush(self) -> None:
        """Books what waits."""
        while self._items:
            policy, items = self._items.popitem()
            await self._book(policy, items)

    def _flush_soon(self) -> None:
        self._due = False
        while self._items:
            self._run(self._book(*self._items.popitem()))

    async def _book(self, policy: Policy, items: list[Item]) -> None:
        lines = [item.line for item in items]
        requests, tokens, nano_usd = sums(lines)
        actual = Amounts(requests, min(tokens, MAX_AMOUNT), min(nano_usd, MAX_AMOUNT))
        bound = policy.at("")
        entries = entries_of(lines, recorded=self._recorded)
        settled = await self._settle(Settlement(token_hex(16), bound.scopes, actual, (), entries))
        for item in items:
            if item.learn:
                self._learn(policy.tenant, item.line.target.label, -(-item.line.usage.output // item.learn))
        if settled is not None and bound.watched:
            for balance in settled.balances:
                for scope, bounds in bound.watched:
                    if scope is balance.scope:
                        self._judge(policy, scope, bounds, balance.row, lines)

    def _judge(self, policy: Policy, scope: Scope, bounds: Bounds, row: Row, lines: list[Line]) -> None:
        """Says of each request of a batch that it would have been refused: those that ended past the limit."""
        refused = passed(scope, bounds, row)
        if refused is None:
            return
        sizes = [_size(line, refused.window) for line in lines]
        total = refused.used + refused.reserved - sum(sizes)
        for line, size in zip(lines, sizes, strict=True):
            total += size
            if total > refused.limit:
                self._refusals.observed(line.request_id, policy.tenant, refused)


def sums(lines: Iterable[Line]) -> tuple[int, int, int]:
    """Client requests, tokens and nano-dollars."""
    requests = tokens = nano_usd = 0
    for line in lines:
        requests += line.attempt == 1
        tokens += line.usage.input + line.usage.output
        nano_usd += line.nano_usd or 0
    return requests, tokens, nano_usd


def _size(line: Line, window: str) -> int:
    if window.startswith("tokens"):
        return line.usage.input + line.usage.output
    return int(line.attempt == 1) if window.startswith("requests") else line.nano_usd or 0

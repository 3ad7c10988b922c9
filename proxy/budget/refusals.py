"""Who is told that a window was full: every refusal is counted, but what is only watched fills no log.

A request that was refused has a line of its own, for somebody will ask why. A budget that only watches may be past its
limit for hours: there, a scope's window has one line a second at most, which says how many it stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from proxy.budget.amounts import WINDOWS, Bounds, Row
from proxy.observability.events import BudgetRefused, Notice
from proxy.store.base import Refused, Scope

QUIET_SECONDS: Final = 1.0


class Refusals:
    """`clock` in seconds. `count` hears tenant, window and mode of every one."""

    def __init__(
        self,
        emit: Callable[[Notice], None],
        clock: Callable[[], float],
        count: Callable[[str, str, str], None] = lambda tenant, window, mode: None,
    ) -> None:
        self._emit = emit
        self._clock = clock
        self.count = count
        self._said: dict[tuple[str, str], list[float]] = {}
        """By tenant and window: when it was last said, and how many were not since then. Bounded by the tenants."""

    def enforced(self, request_id: str, tenant: str, refused: Refused) -> None:
        """It was answered with 429."""
        self.count(tenant, refused.window, "enforce")
        self._say(request_id, tenant, refused, "enforce")

    def observed(self, request_id: str, tenant: str, refused: Refused) -> None:
        """It was served, and would have been answered with 429."""
        self.count(tenant, refused.window, "observe")
        key, now = (tenant, refused.window), self._clock()
        said = self._said.get(key)
        if said is not None and now - said[0] < QUIET_SECONDS:
            said[1] += 1
            return
        self._said[key] = [now, 0]
        self._say(request_id, tenant, refused, "observe", 0 if said is None else int(said[1]))

    def _say(self, request_id: str, tenant: str, refused: Refused, mode: str, unsaid: int = 0) -> None:
        self._emit(
            BudgetRefused(
                request_id=request_id,
                tenant=tenant,
                scope=refused.scope.kind,
                name=refused.scope.name,
                window=refused.window,
                mode=mode,
                limit=refused.limit,
                used=refused.used,
                reserved=refused.reserved,
                retry_after_ms=refused.retry_after_ms,
                unsaid=unsaid,
            )
        )


def passed(scope: Scope, bounds: Bounds, row: Row) -> Refused | None:
    """What a scope that is past one of its limits would say by now. (Concurrency is not seen from here.)"""
    sums = (
        (row.minute_requests, row.minute_held_requests),
        (row.minute_tokens, row.minute_held_tokens),
        (row.minute_nano_usd, row.minute_held_nano_usd),
        (row.hour_nano_usd, row.held_nano_usd),
        (row.day_nano_usd, row.held_nano_usd),
        (row.month_nano_usd, row.held_nano_usd),
    )
    for window, limit, (spent, held) in zip(WINDOWS, bounds, sums, strict=False):
        if spent + held > limit:
            return Refused(scope, window, limit, spent, held, None, row.minute_reset_ms)
    return None

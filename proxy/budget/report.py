"""Budgets as the admin API shows them: what is spent and reserved of each window, and what may be overspent. Pure.

The *bound* of a window is the most by which this process's estimates can overshoot it: the limit's share that may be at
risk at once, or the largest single risk that was taken, whichever is more. `estimate: max` with `on_overrun: cut` takes
no risk, and its bound is 0. Where a lost reservation is given back (`on_lost: refund`), what is reserved now comes on
top: it can be lost, given back, and settled late all the same. *At risk* is the sum of now.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec

from proxy.budget.amounts import WINDOWS, Row, Window
from proxy.budget.clocks import DAY_MS, HOUR_MS, month_start
from proxy.budget.estimate import Exposure
from proxy.money import NANO, usd_text
from proxy.store.base import Balance, ScopeKind

_TOKENS: Final = "tokens_per_minute"


class WindowReport(msgspec.Struct, frozen=True):
    """Requests, tokens or nano-dollars, as the window counts. `limit` is None where there is none."""

    window: Window
    limit: int | None
    spent: int
    reserved: int
    reset_ms: int
    """Until the window is empty (minute) or over (calendar); 0 of `max_concurrent`."""
    at_risk: int = 0
    bound: int = 0


class ScopeReport(msgspec.Struct, frozen=True):
    kind: ScopeKind
    name: str
    enforced: bool
    live: int
    """Requests in progress, in all processes."""
    windows: tuple[WindowReport, ...]


def report(
    balance: Balance,
    exposure: Exposure | None,
    wall_ms: int,
    *,
    processes: int,
    strict: bool,
    refunds: bool = False,
) -> ScopeReport:
    """One scope. `exposure` is this process's; `strict`: no estimate is ever too low; `refunds`: what is lost is given
    back."""
    scope, row = balance.scope, balance.row
    windows = []
    for window, limit, spent, reserved, reset_ms in zip(
        WINDOWS, scope.limits.values(), _spent(row), _reserved(row), _resets(row, wall_ms), strict=True
    ):
        at_risk, bound = (0, 0) if strict else _risk(window, limit, exposure, processes)
        if refunds and limit is not None:
            bound += reserved  # Lost, given back, and settled late, when others have taken it.
        windows.append(WindowReport(window, limit, spent, reserved, reset_ms, at_risk, bound))
    return ScopeReport(scope.kind, scope.name, scope.enforced, row.live, tuple(windows))


def _spent(row: Row) -> tuple[int, ...]:
    return (
        row.minute_requests,
        row.minute_tokens,
        row.minute_nano_usd,
        row.hour_nano_usd,
        row.day_nano_usd,
        row.month_nano_usd,
        row.live,
    )


def _reserved(row: Row) -> tuple[int, ...]:
    minute = (row.minute_held_requests, row.minute_held_tokens, row.minute_held_nano_usd)
    return (*minute, row.held_nano_usd, row.held_nano_usd, row.held_nano_usd, 0)


def _resets(row: Row, wall_ms: int) -> tuple[int, ...]:
    ends = ((row.hour + 1) * HOUR_MS, (row.day + 1) * DAY_MS, month_start(row.month + 1))
    minute = row.minute_reset_ms
    return (minute, minute, minute, *(max(end - wall_ms, 0) for end in ends), 0)


def _risk(window: Window, limit: int | None, exposure: Exposure | None, processes: int) -> tuple[int, int]:
    if limit is None or not (window == _TOKENS or window.startswith("usd_")):
        return 0, 0
    share = limit // max(processes, 1)
    if exposure is None:
        return 0, share
    if window == _TOKENS:
        return exposure.tokens, max(share, exposure.largest_tokens)
    return exposure.nano_usd, max(share, exposure.largest_nano_usd)


def shown(reports: Iterable[ScopeReport]) -> list[dict[str, Any]]:
    """As JSON: dollars are exact decimal texts."""
    return [
        {
            "scope": one.kind,
            "name": one.name,
            "enforced": one.enforced,
            "live": one.live,
            "windows": {window.window: _figures(window) for window in one.windows},
        }
        for one in reports
    ]


def _figures(one: WindowReport) -> dict[str, Any]:
    names = ("limit", "spent", "reserved", "at_risk", "bound")
    amounts: dict[str, Any] = {name: getattr(one, name) for name in names}
    if one.window.startswith("usd_"):
        amounts = {name: None if nano is None else usd_text(nano) for name, nano in amounts.items()}
    return {**amounts, "reset_ms": one.reset_ms}


def gauges(reports: Iterable[ScopeReport]) -> tuple[dict[tuple[str, ...], float], dict[tuple[str, ...], float]]:
    """Of tenants: the used part of each limit by (tenant, window), and what is reserved by (tenant, unit)."""
    used: dict[tuple[str, ...], float] = {}
    reserved: dict[tuple[str, ...], float] = {}
    for one in reports:
        if one.kind != "tenant":
            continue
        held = {window.window: window.reserved for window in one.windows}
        reserved[one.name, "requests"] = held["requests_per_minute"]
        reserved[one.name, "tokens"] = held["tokens_per_minute"]
        reserved[one.name, "usd"] = held["usd_per_day"] / NANO
        for window in one.windows:
            if window.limit:
                used[one.name, window.window] = window.spent / window.limit
    return used, reserved


def by_tenant(reports: Iterable[ScopeReport], tenant: str) -> list[ScopeReport]:
    """A tenant's own scope and those of its keys."""
    return [
        one
        for one in reports
        if (one.kind == "tenant" and one.name == tenant) or (one.kind == "key" and one.name.startswith(f"{tenant}/"))
    ]

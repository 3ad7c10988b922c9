"""Whether a request is so small beside what is left of its limits that nobody needs to know its exact size. Pure.

To count the tokens of a prompt costs more than all else that is done for a reservation. Where every window has a
hundred times as much left, a proven bound (its bytes) is reserved instead, and given back a moment later with the
provider's own figure. What is left is what this process saw last: where the store then says no, the prompt is counted
and asked for again, so no request is refused for a bound.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from proxy.budget.amounts import Amounts, Row
from proxy.store.base import Scope

FAR: Final = 100
"""How many times over a request must fit into what is left."""


def is_far_below(ask: Amounts, seen: Iterable[tuple[Scope, Row | None]]) -> bool:
    """Whether `ask` fits FAR times into each window of the enforced scopes, as they were last `seen`."""
    tokens, nano = ask.tokens * FAR, ask.nano_usd * FAR
    for scope, row in seen:
        if not scope.enforced:
            continue
        if row is None:
            return False
        limits = scope.limits
        most = limits.tokens_per_minute
        if most is not None and tokens > most - row.minute_tokens - row.minute_held_tokens:
            return False
        most = limits.nano_usd_per_minute
        if most is not None and nano > most - row.minute_nano_usd - row.minute_held_nano_usd:
            return False
        most = limits.nano_usd_per_hour
        if most is not None and nano > most - row.hour_nano_usd - row.held_nano_usd:
            return False
        most = limits.nano_usd_per_day
        if most is not None and nano > most - row.day_nano_usd - row.held_nano_usd:
            return False
        most = limits.nano_usd_per_month
        if most is not None and nano > most - row.month_nano_usd - row.held_nano_usd:
            return False
    return True

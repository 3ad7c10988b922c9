"""Roll-ups by the hour and the outbox, in memory; and the adding up that every store's `usage` ends with."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from itertools import islice
from operator import add

from proxy.store.base import DIMENSIONS, ROLLUP_FIELDS, ROLLUP_KEPT_MS, ROLLUP_MS, Dimension, Entry, Record, Tally
from proxy.store.base import UsageRow as Row
from proxy.types import OTHER

Field = tuple[str, ...]
"""The dimensions of a roll-up, as `DIMENSIONS`."""


class MemoryLedger:
    """What settlements booked: hourly sums for 62 days, and the last `records` records."""

    def __init__(self, records: int) -> None:
        self._hours: dict[int, dict[str, dict[Field, list[int]]]] = {}
        self._outbox: deque[Record] = deque(maxlen=records)
        self._last_ms = self._sequence = 0

    def book(self, entries: Iterable[Entry], wall_ms: int) -> None:
        hour = wall_ms // ROLLUP_MS
        for entry in entries:
            tenants = self._hours.get(hour)
            if tenants is None:
                tenants = self._begin(hour)
            tenant = entry.dimensions[0]
            fields = tenants.setdefault(tenant, {})
            sums = fields.get(entry.dimensions)
            if sums is None:
                field = entry.dimensions if len(fields) < ROLLUP_FIELDS else overflow(tenant)
                sums = fields.setdefault(field, [0] * len(Tally.__struct_fields__))
            sums[:] = map(add, sums, tally_values(entry.usage))
            if entry.record:
                self.post(entry.record, wall_ms)

    def post(self, fields: tuple[str, ...], wall_ms: int) -> None:
        """One record into the outbox, under an id that orders it after all others."""
        if wall_ms > self._last_ms:
            self._last_ms, self._sequence = wall_ms, 0
        else:
            self._sequence += 1
        self._outbox.append(Record(f"{self._last_ms}-{self._sequence}", fields))

    def usage(self, since_ms: int, until_ms: int, by: Sequence[Dimension]) -> list[Row]:
        hours = (hour for hour in self._hours if since_ms <= hour * ROLLUP_MS < until_ms)
        tenants = (fields for hour in hours for fields in self._hours[hour].values())
        return grouped(((field, sums) for fields in tenants for field, sums in fields.items()), by)

    def records(self, after: str, count: int) -> list[Record]:
        # Asked twice a second by whoever follows it: nobody should pay for the thousands that were read long ago.
        start = bisect_right(self._outbox, outbox_place(after), key=lambda record: outbox_place(record.id))
        return list(islice(self._outbox, start, start + count))

    def _begin(self, hour: int) -> dict[str, dict[Field, list[int]]]:
        oldest = hour - ROLLUP_KEPT_MS // ROLLUP_MS
        for old in [each for each in self._hours if each < oldest]:
            del self._hours[old]
        return self._hours.setdefault(hour, {})


def overflow(tenant: str) -> Field:
    """Where a tenant's usage is counted once its hour has too many combinations."""
    return (tenant, *(OTHER,) * (len(DIMENSIONS) - 1))


def tally_values(usage: Tally) -> tuple[int, ...]:
    """In the order in which `Tally` names them."""
    return (
        usage.requests, usage.input, usage.output, usage.cache_read, usage.cache_write, usage.reasoning,
        usage.nano_usd, usage.cost_unknown,
    )  # fmt: skip


def outbox_place(record_id: str) -> tuple[int, int]:
    """An id's place in the order. Raises ValueError for what is no id."""
    milliseconds, _, sequence = (record_id or "0-0").partition("-")
    return int(milliseconds), int(sequence or 0)


def grouped(sums: Iterable[tuple[Field, Sequence[int]]], by: Sequence[Dimension]) -> list[Row]:
    """Adds up the sums of all fields that agree in the dimensions `by`. Sorted by them."""
    places = [DIMENSIONS.index(name) for name in by]
    groups: dict[Field, list[int]] = defaultdict(lambda: [0] * len(Tally.__struct_fields__))
    for field, counts in sums:
        group = groups[tuple(field[place] for place in places)]
        for index, count in enumerate(counts):
            group[index] += count
    return [Row(dimensions, Tally(*groups[dimensions])) for dimensions in sorted(groups)]

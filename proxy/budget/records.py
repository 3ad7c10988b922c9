"""The ledger's line for one attempt that was, or may have been, billed: for roll-ups and for sinks. Pure.

A record is names and values in turn, as texts, because that is what every store can hold. `decoded` gives the values
their types back: counts are integers again, flags true or false. `written` is a record as a line of a file has it:

    outbox            its id in the store's outbox, in ascending order
    time              when the attempt was over: UTC, RFC 3339, always with milliseconds
    id                of the reservation; one request can have several attempts under it, and in rare cases several ids
    request_id        as in `x-request-id` and in the log
    tenant, key       the tenant's name; the first digits of the key's digest, never the key
    model             the configured name or glob; `upstream_model` is what the provider was asked for
    provider, tags    the provider's name; what `x-breakwater-tags` said
    input, output     tokens; `cache_read` and `cache_write` are part of the input, `reasoning` of the output
    estimated         true: counted by the proxy, because the provider did not say
    cost_usd          dollars as an exact decimal text; null: nobody knows a price
    status, attempt   the provider's status, 0 for none; 1 for the first attempt of a request

A reservation that nobody settled, because its process died, has `outbox`, `time`, `lost` (its id), and what it was
charged: `requests`, `tokens`, `cost_usd`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from operator import add
from typing import Final

import msgspec

from proxy.budget.amounts import MAX_AMOUNT
from proxy.money import usd_text
from proxy.store.base import Entry, Record, Tally
from proxy.types import Target, Usage

MAX_TAGS: Final = 256
_TAGS: Final = re.compile(rb"[\x20-\x7e]{1,%d}" % MAX_TAGS)
_COUNTS: Final = frozenset(
    [*Tally.__struct_fields__, "at", "status", "attempt", "tokens"],
)
_FLAGS: Final = frozenset({"estimated", "priced"})

Value = str | int | bool | None
Dimensions = tuple[str, str, str, str, str, str]
"""As `store.base.DIMENSIONS`."""


class Line(msgspec.Struct, frozen=True, gc=False):
    """One attempt."""

    reservation: str
    at: int
    """Milliseconds since 1970, UTC, by this process's clock."""
    request_id: str
    tenant: str
    key: str
    target: Target
    tags: str
    usage: Usage
    nano_usd: int | None
    """None: nobody knows a price."""
    status: int
    """The provider's; 0 where it gave none."""
    attempt: int
    """1 for the first of its request."""


def entries_of(lines: Iterable[Line], *, recorded: bool) -> tuple[Entry, ...]:
    """Of each line its own with its record; or, where nobody reads records, the sums of lines that agree."""
    if recorded:
        return tuple([entry_of(line) for line in lines])
    counts: dict[Dimensions, list[int]] = {}
    for line in lines:
        dimensions = _dimensions(line)
        sums = counts.get(dimensions)
        if sums is None:
            counts[dimensions] = list(_counts(line))
        else:
            sums[:] = map(add, sums, _counts(line))
    return tuple([Entry(key, Tally(*[min(count, MAX_AMOUNT) for count in sums])) for key, sums in counts.items()])


def _dimensions(line: Line) -> Dimensions:
    target = line.target
    quality = "estimated" if line.usage.estimated else "true"
    return (line.tenant, line.key, target.label, target.provider, line.tags, quality)


def _counts(line: Line) -> tuple[int, ...]:
    """In the order in which `Tally` names them."""
    usage, nano = line.usage, line.nano_usd
    return (
        1, usage.input, usage.output, usage.cache_read, usage.cache_write, usage.reasoning,
        *((0, 1) if nano is None else (nano, 0)),
    )  # fmt: skip


def entry_of(line: Line) -> Entry:
    usage, target = line.usage, line.target
    nano = line.nano_usd or 0
    counts = _counts(line)
    if max(counts) > MAX_AMOUNT:
        counts = tuple(min(count, MAX_AMOUNT) for count in counts)
    return Entry(
        _dimensions(line),
        Tally(*counts),
        (
            "id", line.reservation,
            "at", str(line.at),
            "request_id", line.request_id,
            "tenant", line.tenant,
            "key", line.key,
            "model", target.label,
            "provider", target.provider,
            "upstream_model", target.model,
            "tags", line.tags,
            "input", str(usage.input),
            "output", str(usage.output),
            "cache_read", str(usage.cache_read),
            "cache_write", str(usage.cache_write),
            "reasoning", str(usage.reasoning),
            "estimated", "1" if usage.estimated else "0",
            "nano_usd", str(nano),
            "priced", "1" if line.nano_usd is not None else "0",
            "status", str(line.status),
            "attempt", str(line.attempt),
        ),
    )  # fmt: skip


def tags_in(header: bytes | None) -> str:
    """What `x-breakwater-tags` says, as it stands; empty where it says nothing that a ledger could hold."""
    return header.decode() if header is not None and _TAGS.fullmatch(header) else ""


def decoded(fields: Sequence[str]) -> dict[str, Value]:
    """Names and values in turn, as a mapping with typed values. Values of unknown names stay texts."""
    found: dict[str, Value] = {}
    for name, text in zip(fields[::2], fields[1::2], strict=False):
        if name in _FLAGS:
            found[name] = text == "1"
        elif name in _COUNTS and text.isdigit():
            found[name] = int(text)
        else:
            found[name] = text
    return found


def written(record: Record) -> dict[str, Value]:
    """The line of a file, as above."""
    found = decoded(record.fields)
    at = found.pop("at", None)
    milliseconds = at if isinstance(at, int) else int(record.id.partition("-")[0])
    nano, priced = found.pop("nano_usd", 0), found.pop("priced", True)
    line: dict[str, Value] = {"outbox": record.id, "time": time_text(milliseconds), **found}
    return {**line, "cost_usd": usd_text(nano) if priced and isinstance(nano, int) else None}


def time_text(milliseconds: int) -> str:
    """Milliseconds since 1970 as UTC, always of the same length, so that texts compare as times do."""
    seconds, rest = divmod(milliseconds, 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest:03d}Z"

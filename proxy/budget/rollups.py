"""Roll-ups of usage as they are asked for and read: the question, the document, CSV for a sheet, a table. Pure.

The document is what `GET /admin/usage` and `breakwater usage --json` give::

    since, from        the span that was asked for, and where it begins: whole hours, UTC
    by                 the dimensions that tell the rows apart
    rows               for each combination: its dimensions, `requests`, tokens (`cache_read` and `cache_write` are part
                       of `input`, `reasoning` of `output`), `cost_unknown` (requests without a price), `cost_usd`
    total              the same of all rows together

Rows are in the order of their cost, the dearest first. Dollars are exact decimal texts.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from proxy.budget.records import time_text
from proxy.errors import InvalidRequest
from proxy.money import usd_text
from proxy.store.base import DIMENSIONS, ROLLUP_MS, Dimension, Tally, UsageRow

FIGURES: Final = (*(name for name in Tally.__struct_fields__ if name != "nano_usd"), "cost_usd")
_SPAN: Final = re.compile(r"([1-9][0-9]{0,5})([mhd])", re.ASCII)
_UNIT_MS: Final = {"m": 60_000, "h": 3_600_000, "d": 86_400_000}
_FORMULA: Final = ("=", "+", "-", "@")
"""What a sheet takes for the beginning of a formula. Tags are written by clients."""

Document = dict[str, Any]


class Query(NamedTuple):
    since: str
    """As it was written."""
    since_ms: int
    """Milliseconds since 1970: the hour in which the span begins, from its start."""
    until_ms: int
    by: tuple[Dimension, ...]


def query_of(since: str, by: str, now_ms: int) -> Query:
    """`since` is a span such as 24h, `by` a list of dimensions. Raises InvalidRequest."""
    span = _SPAN.fullmatch(since)
    if span is None:
        raise InvalidRequest("since is a span of time such as 30m, 24h or 7d.", param="since")
    names = by.split(",")
    if len(set(names)) != len(names) or not set(names) <= set(DIMENSIONS):
        raise InvalidRequest(f"by is a list of: {', '.join(DIMENSIONS)}; each once.", param="by")
    begin = max(now_ms - int(span[1]) * _UNIT_MS[span[2]], 0) // ROLLUP_MS * ROLLUP_MS
    return Query(since, begin, now_ms + ROLLUP_MS, tuple(one for name in names for one in DIMENSIONS if one == name))


def document(query: Query, rows: Iterable[UsageRow]) -> Document:
    """As above."""
    found = sorted(rows, key=lambda row: (-row.usage.nano_usd, row.dimensions))
    return {
        "since": query.since,
        "from": time_text(query.since_ms),
        "by": list(query.by),
        "rows": [{**dict(zip(query.by, row.dimensions, strict=True)), **_figures(row.usage)} for row in found],
        "total": _figures(_sum([row.usage for row in found])),
    }


def _figures(usage: Tally) -> dict[str, int | str]:
    counts = {name: getattr(usage, name) for name in FIGURES if name != "cost_usd"}
    return {**counts, "cost_usd": usd_text(usage.nano_usd)}


def _sum(usages: Sequence[Tally]) -> Tally:
    return Tally(**{name: sum(getattr(one, name) for one in usages) for name in Tally.__struct_fields__})


def as_csv(found: Document) -> str:
    """A head and the rows; no total, so that a sheet may add them up. No cell is taken for a formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*found["by"], *FIGURES])
    for row in found["rows"]:
        writer.writerow([*(_cell(row[name]) for name in found["by"]), *(row[name] for name in FIGURES)])
    return text.getvalue()


def _cell(text: str) -> str:
    text = _plain(text)
    return f"'{text}" if text.startswith(_FORMULA) else text


def _plain(text: str) -> str:
    """Without what breaks a line or what a terminal obeys."""
    return text if text.isprintable() else "".join(one if one.isprintable() else "?" for one in text)


def as_table(found: Document) -> str:
    """For a person at a terminal, with the total below. Nothing in it that a terminal would obey."""
    head = [*found["by"], *FIGURES]
    lines = [head, *([_shown(row, name) for name in head] for row in found["rows"])]
    lines.append([*(["total", *[""] * len(found["by"])][: len(found["by"])]), *map(str, _of(found["total"]))])
    widths = [max(len(line[index]) for line in lines) for index in range(len(head))]
    words = len(found["by"])
    rows = [
        "  ".join(
            cell.ljust(width) if index < words else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([rows[0], rule, *rows[1:-1], *([rule] if found["rows"] else []), rows[-1], ""])


def _of(figures: Mapping[str, int | str]) -> list[int | str]:
    return [figures[name] for name in FIGURES]


def _shown(row: Mapping[str, int | str], name: str) -> str:
    value = row[name]
    if isinstance(value, int):
        return str(value)
    return _plain(value) or "-"

"""From figures to what a person reads, and to JSON. Pure: no clock, no process.

Every cell is the median over the rounds; the proxy's also shows the least and the most. A ratio is taken within each
round first, then its median. A target is held against the median.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Final

from tests.bench.measure import DIRECT, GROWTH_SIZES, PROXY, REDIS, Figures

NONE: Final = "-"
COLUMNS: Final = ("empty", "forward", PROXY, "min–max", "/empty", "/forward", REDIS, "/empty")
WIDTHS: Final = (10, 10, 12, 16, 10, 10, 12, 10)
LIMIT_PLAIN: Final = 4.5
LIMIT_STREAM: Final = 1.3
LIMIT_REDIS: Final = 6.5
LIMIT_TRIPS: Final = 2.0
LIMIT_READY_SECONDS: Final = 1.5
LIMIT_LOADED_MIB: Final = 90.0
LIMIT_VOCABULARY_MIB: Final = 190.0
LIMIT_GROWTH: Final = 10.0
LIMIT_LONG_MS: Final = 2.5


@dataclass(frozen=True, slots=True)
class Target:
    """A promise, and whether this run kept it."""

    name: str
    value: float
    limit: float
    unit: str

    @property
    def kept(self) -> bool:
        return self.value <= self.limit

    def line(self) -> str:
        verdict = "pass" if self.kept else "MISS"
        return f"  {verdict}  {self.name}: {_number(self.value)}{self.unit} (target ≤ {self.limit:g}{self.unit})"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: `servers` holds the values of each round."""

    label: str
    servers: dict[str, list[float]]


def ratios(figures: Figures, measure: str, over: str, *, of: str = PROXY) -> list[float]:
    """`of` / `over` round by round; empty where one of them was not measured."""
    servers = figures.get(measure, {})
    pairs = zip(servers.get(of, []), servers.get(over, []), strict=False)
    return [mine / other for mine, other in pairs if other > 0]


def added(figures: Figures, measure: str, base: str) -> dict[str, list[float]]:
    """What each server adds to `base`, round by round; nothing where `base` was not measured."""
    servers = figures.get(measure, {})
    floor = servers.get(base)
    if not floor:
        return {}
    return {
        name: [value - least for value, least in zip(values, floor, strict=True)]
        for name, values in servers.items()
        if name != base
    }


def growth_steps(figures: Figures) -> list[float]:
    """By what the proxy's added cost over the forwarder grows when the body grows tenfold, step by step.

    A step is NaN where an added cost drowns in the noise.
    """
    costs = [_middle(added(figures, f"growth_{size}", "forward").get(PROXY, [])) for size in GROWTH_SIZES]
    return [after / before if min(before, after) > 0 else math.nan for before, after in pairwise(costs)]


def long_growth(figures: Figures) -> list[float]:
    """By what the cost of a conversation grows when it has ten times as many messages, round by round."""
    pairs = zip(figures.get("long-4000", {}).get(PROXY, []), figures.get("long-400", {}).get(PROXY, []), strict=False)
    return [longer / long for longer, long in pairs]


def targets(figures: Figures) -> list[Target]:
    """The promises that this run can judge."""
    judged = [
        Target("plain chat, CPU against the empty app", _middle(ratios(figures, "plain", "empty")), LIMIT_PLAIN, "x"),
        Target(
            "paced streams, CPU against the forwarder", _middle(ratios(figures, "stream", "forward")), LIMIT_STREAM, "x"
        ),
        Target(
            "plain chat, reserved and settled in Redis, CPU against the empty app",
            _middle(ratios(figures, "plain", "empty", of=REDIS)),
            LIMIT_REDIS,
            "x",
        ),
        Target(
            "round trips to Redis a request, one connection",
            _middle(figures.get("latency_trips", {}).get(REDIS, [])),
            LIMIT_TRIPS,
            "",
        ),
        Target("spawn to ready", _of_proxy(figures, "ready"), LIMIT_READY_SECONDS, " s"),
        Target("memory when ready", _of_proxy(figures, "rss_ready"), LIMIT_LOADED_MIB, " MiB"),
        Target("memory after the load", _of_proxy(figures, "rss_loaded"), LIMIT_LOADED_MIB, " MiB"),
        Target("memory with a vocabulary", _of_proxy(figures, "rss_vocabulary"), LIMIT_VOCABULARY_MIB, " MiB"),
    ]
    for size, step in zip(GROWTH_SIZES[1:], growth_steps(figures), strict=False):
        judged.append(Target(f"added cost, body of {_size(size)} against a tenth of it", step, LIMIT_GROWTH, "x"))
    long = _of_proxy(figures, "long-400")
    judged.append(Target("a conversation of 400 messages, the last one new, CPU", long / 1000, LIMIT_LONG_MS, " ms"))
    growth = _middle(long_growth(figures))
    judged.append(Target("a conversation of 4,000 messages against one of 400, CPU", growth, LIMIT_GROWTH, "x"))
    return [target for target in judged if not math.isnan(target.value)]


def as_json(figures: Figures, facts: dict[str, Any]) -> dict[str, Any]:
    """The whole run for a program: facts, figures with every round's value, ratios, targets."""
    return {
        **facts,
        "figures": {
            measure: {
                **{name: _summary(values) for name, values in servers.items()},
                **{
                    f"{PROXY}/{other}": _summary(values)
                    for other in ("empty", "forward")
                    if (values := ratios(figures, measure, other))
                },
                **(
                    {f"{REDIS}/empty": _summary(stored)}
                    if (stored := ratios(figures, measure, "empty", of=REDIS))
                    else {}
                ),
            }
            for measure, servers in figures.items()
        },
        "added_latency_us": {
            measure: {name: _summary(values) for name, values in added(figures, measure, DIRECT).items()}
            for measure in ("latency_p50", "latency_p99", "latency_tls_p50", "latency_tls_p99")
            if measure in figures
        },
        "long_growth": long_growth(figures),
        "growth_steps": [None if math.isnan(step) else step for step in growth_steps(figures)],
        "targets": [
            {
                "name": target.name,
                "value": target.value,
                "limit": target.limit,
                "unit": target.unit,
                "kept": target.kept,
            }
            for target in targets(figures)
        ],
    }


def table(figures: Figures) -> str:
    """The run for a person."""
    # The empty app cannot stand in front of a TLS upstream: its cost is the same, so the plain figure serves.
    plain_tls = {**figures.get("plain_tls", {}), "empty": figures.get("plain", {}).get("empty", [])}
    chunk = "CPU per chunk"
    sections = [
        _section(
            "CPU time of the server process, microseconds",
            [
                Row("plain chat, 1.5 KB, 32 connections", figures.get("plain", {})),
                Row("plain chat, upstream over TLS", plain_tls),
                Row(f"{chunk}: 32 paced streams of 100", figures.get("stream_chunk", {})),
                Row(f"{chunk}: the client asks for usage", figures.get("stream_usage_chunk", {})),
                Row(f"{chunk}: upstream over TLS", figures.get("stream_tls_chunk", {})),
                Row(f"{chunk}: 100 in one write", figures.get("stream_burst_chunk", {})),
                Row("one more chunk", figures.get("chunk_alone", {})),
                Row("one more stream, its chunks apart", figures.get("stream_alone", {})),
            ],
        ),
        _section(
            "Pieces that a stream arrived in (101: the machine kept up, each chunk was a read of its own)",
            [
                Row("32 paced streams of 100", figures.get("stream_frames", {})),
                Row("upstream over TLS", figures.get("stream_tls_frames", {})),
            ],
        ),
        _section(
            "Round trips to Redis a request",
            [
                Row("plain chat, one connection", figures.get("latency_trips", {})),
                Row("plain chat, 32 connections", figures.get("plain_trips", {})),
                Row("32 paced streams of 100", figures.get("stream_trips", {})),
            ],
        ),
        _section(
            "Latency added at one connection, microseconds",
            [
                Row("p50", added(figures, "latency_p50", DIRECT)),
                Row("p99", added(figures, "latency_p99", DIRECT)),
                Row("p50, upstream over TLS", added(figures, "latency_tls_p50", DIRECT)),
                Row("p99, upstream over TLS", added(figures, "latency_tls_p99", DIRECT)),
            ],
        ),
        _section(
            "CPU per request by size of the conversation, microseconds",
            [Row(_size(size), figures.get(f"growth_{size}", {})) for size in GROWTH_SIZES],
        ),
        _section(
            "CPU per request of a long conversation whose last message is new, microseconds (the whole request)",
            [
                Row("400 messages, 300 KB, near the window", figures.get("long-400", {})),
                Row("4,000 messages, 3 MB, near the window", figures.get("long-4000", {})),
                Row("400 messages, 300 KB, cut to the window", figures.get("long-cut", {})),
            ],
        ),
        _section(
            "Resident memory, MiB",
            [
                Row("ready", figures.get("rss_ready", {})),
                Row("after the load", figures.get("rss_loaded", {})),
                Row("with a vocabulary", figures.get("rss_vocabulary", {})),
                Row("after bodies of 1.5 MB", figures.get("rss_grown", {})),
                Row("after conversations of 3 MB", figures.get("rss_talked", {})),
            ],
        ),
        _section("Spawn to ready, seconds", [Row("GET /livez is 200", figures.get("ready", {}))]),
    ]
    verdicts = [target.line() for target in targets(figures)]
    if verdicts:
        sections.append("\n".join(["Targets", *verdicts]))
    return "\n\n".join([_line("", COLUMNS), *filter(None, sections)])


def _section(title: str, rows: list[Row]) -> str:
    lines = [_line("  " + row.label, _cells(row)) for row in rows if row.servers]
    return "\n".join([title, *lines]) if lines else ""


def _line(label: str, cells: tuple[str, ...]) -> str:
    return f"{label:<46}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))


def _cells(row: Row) -> tuple[str, ...]:
    mine = row.servers.get(PROXY, [])
    spread = f"{_number(min(mine))}–{_number(max(mine))}" if len(mine) > 1 else NONE
    compared = []
    for other in ("empty", "forward"):
        values = [me / it for me, it in zip(mine, row.servers.get(other, []), strict=False) if it > 0]
        compared.append(f"{median(values):.2f}x" if values else NONE)
    medians = [_number(_middle(row.servers.get(name, []))) for name in ("empty", "forward", PROXY)]
    store = row.servers.get(REDIS, [])
    against = [it / least for it, least in zip(store, row.servers.get("empty", []), strict=False) if least > 0]
    return (*medians, spread, *compared, _number(_middle(store)), f"{median(against):.2f}x" if against else NONE)


def _summary(values: list[float]) -> dict[str, Any]:
    return {"median": _middle(values), "min": min(values), "max": max(values), "values": values}


def _of_proxy(figures: Figures, measure: str) -> float:
    return _middle(figures.get(measure, {}).get(PROXY, []))


def _middle(values: list[float]) -> float:
    return median(values) if values else math.nan


def _number(value: float) -> str:
    if math.isnan(value):
        return NONE
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _size(size: int) -> str:
    return f"{size / 1024:g} KB" if size < 1 << 20 else f"{size / 1024000:g} MB"

"""What is measured, against whom, in which order.

Every round runs every measurement once against each server in turn (A B C, A B C, …), so that whatever the machine
does meanwhile happens to all of them; ratios are taken within a round. Memory is read where its meaning changes:
ready, after the load, after a vocabulary was needed, after large bodies, after the long conversations.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from tests.bench.load import Done, Job
from tests.bench.payloads import CHUNKS, LONG, SHORT_CHUNKS, Ask, long_ask
from tests.bench.processes import Child, LoadWorker, Redis
from tests.bench.upstream import SLOTS, TICK

CONNECTIONS: Final = 32
GROWTH_CONNECTIONS: Final = 4
GROWTH_SIZES: Final = (1536, 15360, 153600, 1536000)
MIB: Final = 1 << 20
STEADY_STEP_SECONDS: Final = 0.25
STEADY_STEPS: Final = 40

PROXY: Final = "breakwater"
REDIS: Final = "with Redis"
"""The proxy again, with a budget that is enforced and kept in Redis: each request is reserved there and settled."""
DIRECT: Final = "direct"

Figures = dict[str, dict[str, list[float]]]
"""measure -> server -> one value a round. CPU in microseconds, latency in microseconds, memory in MiB, ready in s."""


@dataclass(frozen=True, slots=True)
class Server:
    """One of those that are measured. `child` is the process under load (for `direct`, the upstream's)."""

    name: str
    child: Child
    port: int
    ca: str | None = None
    store: Redis | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of load. `count` is per round and server."""

    measure: str
    ask: Ask
    count: int
    warmup: int
    connections: int = CONNECTIONS
    rate: float = 0.0
    servers: tuple[str, ...] = ("empty", "forward", PROXY)
    tls: bool = False
    latency: bool = False


_SECONDS_A_STREAM: Final = (CHUNKS + 1) * TICK * SLOTS
_STREAM_RATE: Final = CONNECTIONS / _SECONDS_A_STREAM
_FORWARDERS: Final = ("forward", PROXY)
_STREAM: Final = Shape("stream", Ask(stream=True), 120, 32, rate=_STREAM_RATE, servers=_FORWARDERS)
_LATENCY: Final = Shape("latency", Ask(), 600, 100, connections=1, servers=(DIRECT, "forward", PROXY), latency=True)

SHAPES: Final = (
    Shape("plain", Ask(), 5000, 400, servers=("empty", "forward", PROXY, REDIS)),
    replace(_STREAM, servers=(*_FORWARDERS, REDIS)),
    replace(_STREAM, measure="stream_usage", ask=Ask(stream=True, usage=True)),
    Shape("stream_short", Ask("bench-short", stream=True), 1200, 100, servers=_FORWARDERS),
    Shape("stream_burst", Ask("bench-burst", stream=True), 800, 64, servers=_FORWARDERS),
    replace(_LATENCY, servers=(DIRECT, "empty", "forward", PROXY, REDIS)),
    Shape("plain_tls", Ask(), 3000, 400, servers=_FORWARDERS, tls=True),
    replace(_STREAM, measure="stream_tls", tls=True),
    replace(_LATENCY, measure="latency_tls", tls=True),
)
GROWTH: Final = tuple(
    Shape(f"growth_{size}", Ask(size=size), count, max(count // 10, 8), connections=GROWTH_CONNECTIONS)
    for size, count in zip(GROWTH_SIZES, (1000, 600, 150, 24), strict=True)
)

LONG_COUNTS: Final = {"long-400": 200, "long-4000": 24, "long-cut": 200}
CONVERSATIONS: Final = tuple(
    Shape(model, long_ask(model), LONG_COUNTS[model], 16, connections=GROWTH_CONNECTIONS, servers=_FORWARDERS)
    for model in LONG
)
"""Their warm-up teaches the proxy all messages but the last one."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure. `scale` multiplies the counts of every shape."""

    rounds: int = 5
    scale: float = 1.0
    starts: int = 3

    def count(self, shape: Shape) -> int:
        return max(int(shape.count * self.scale), 16)

    def warmup(self, shape: Shape) -> int:
        return max(int(shape.warmup * min(self.scale, 1.0)), 8)


QUICK: Final = Effort(rounds=1, scale=0.06, starts=1)


class Bench:
    """Runs the measurements over servers that are ready, and gathers the figures."""

    def __init__(self, load: LoadWorker, servers: list[Server], secure: list[Server], effort: Effort) -> None:
        self.figures: Figures = defaultdict(lambda: defaultdict(list))
        self._load = load
        self._servers = {server.name: server for server in servers}
        self._secure = {server.name: server for server in secure}
        self._effort = effort
        self._first = 0

    def rounds(self, shapes: tuple[Shape, ...]) -> None:
        """Every shape against each of its servers, round by round."""
        for index in range(self._effort.rounds):
            for shape in shapes:
                among = self._secure if shape.tls else self._servers
                present = [among[name] for name in shape.servers if name in among]
                progress(f"round {index + 1}/{self._effort.rounds}: {shape.measure}")
                for server in present:
                    before = server.store.reads() if server.store is not None else 0
                    done = self.once(shape, server)
                    if server.store is not None:
                        sent = self._effort.count(shape) + self._effort.warmup(shape)
                        trips = (server.store.reads() - before) / sent
                        self.figures[f"{shape.measure}_trips"][server.name].append(trips)
                    self._record(shape, server, done)

    def once(self, shape: Shape, server: Server) -> Done:
        """One job: `shape` against `server`. Raises BenchError."""
        count, warmup = self._effort.count(shape), self._effort.warmup(shape)
        job = Job(
            port=server.port,
            ask=shape.ask,
            count=count,
            connections=shape.connections,
            warmup=warmup,
            rate=shape.rate,
            ca=server.ca,
            cpu_of=None if server.name == DIRECT else server.child.pid,
            first=self._first,
        )
        self._first += count + warmup
        return self._load.run(job, server.child)

    def memory(self, moment: str) -> None:
        """Notes what each server holds at `moment`."""
        for server in self._servers.values():
            if server.name != DIRECT:
                self.figures[f"rss_{moment}"][server.name].append(server.child.rss_bytes() / MIB)

    def need_vocabulary(self) -> None:
        """Sends requests whose replies say nothing of usage, plain and streamed, and waits until memory is steady."""
        server = self._servers.get(PROXY)
        if server is None:
            return
        progress("a reply without usage: the vocabulary")
        for stream in (False, True):
            shape = Shape("vocabulary", Ask("no-usage", stream=stream), 16, 4, connections=4)
            self.once(shape, server)
        _wait_steady(server.child.rss_bytes)

    def _record(self, shape: Shape, server: Server, done: Done) -> None:
        if shape.latency:
            self.figures[f"{shape.measure}_p50"][server.name].append(done.p50 * 1e6)
            self.figures[f"{shape.measure}_p99"][server.name].append(done.p99 * 1e6)
            return
        self.figures[shape.measure][server.name].append(done.cpu_ns / 1000 / done.requests)
        if done.chunks:
            self.figures[f"{shape.measure}_frames"][server.name].append(done.frames / done.requests)
        self.figures[f"{shape.measure}_per_second"][server.name].append(done.requests / done.seconds)

    def derive(self) -> None:
        """The figures that follow from others: cost per chunk, and what one more chunk and one more stream cost."""
        for measure in ("stream", "stream_usage", "stream_burst", "stream_tls"):
            for name, values in self.figures.get(measure, {}).items():
                self.figures[f"{measure}_chunk"][name] = [value / CHUNKS for value in values]
        for name, short in self.figures.get("stream_short", {}).items():
            pairs = list(zip(self.figures["stream"][name], short, strict=True))
            marginal = [(whole - brief) / (CHUNKS - SHORT_CHUNKS) for whole, brief in pairs]
            self.figures["chunk_alone"][name] = marginal
            rest = [brief - SHORT_CHUNKS * each for brief, each in zip(short, marginal, strict=True)]
            self.figures["stream_alone"][name] = rest


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _wait_steady(size: Callable[[], int]) -> None:
    """Until `size` has stayed within 1 MiB for three readings, ten seconds at most."""
    readings = [size()]
    for _ in range(STEADY_STEPS):
        time.sleep(STEADY_STEP_SECONDS)
        readings.append(size())
        if len(readings) > 3 and max(readings[-3:]) - min(readings[-3:]) < MIB:
            return

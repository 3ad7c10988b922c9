"""The load: a client cheap enough not to be what is measured, as a process of its own.

    python -m tests.bench.load

Reads one job a line from stdin and answers each with one line on stdout: `{"done": …}` or `{"failed": "why"}`. Every
answer is compared with the right one byte for byte; the first wrong one ends the job. A job opens its connections,
warms the server up over them, lets it come to rest, reads its CPU clock, sends the counted requests and reads the
clock again: neither connecting nor warming up is in the figure.

Closed loop: every connection sends its next request as soon as the answer is there. Open loop (`rate` > 0): requests
start by the clock, on a free connection or a new one, however slow the answers are.
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec
import uvloop

from tests.bench import procfs
from tests.bench.client import Client, Run, WrongAnswer
from tests.bench.payloads import Ask, chunk_count, expected_body, request_body

MAX_CONNECTIONS: Final = 512
MAX_VARIANT_BYTES: Final = 1 << 20
MAX_VARIANTS: Final = 64


class Job(msgspec.Struct, kw_only=True):
    """One run of load against one server."""

    port: int
    ask: Ask
    count: int
    """Requests to measure."""
    connections: int = 1
    warmup: int = 0
    rate: float = 0.0
    """Requests started per second, open loop. 0: closed loop."""
    ca: str | None = None
    """A CA file: speak TLS."""
    cpu_of: int | None = None
    """The process whose CPU time to measure."""
    timeout: float = 60.0
    """Seconds for the whole job."""
    first: int = 0
    """Of a long conversation: the number of its first request. No number comes twice, so each last message is new."""


class Done(msgspec.Struct, kw_only=True):
    """What a job came to. Times in seconds, except `cpu_ns`."""

    requests: int
    chunks: int
    """Chunks of the dialect that were asked for."""
    frames: int
    """HTTP chunks they came in: fewer, where the server found several at once."""
    seconds: float
    cpu_ns: int
    p50: float
    p99: float
    connections: int
    """The most that were open at once."""


class Outcome(msgspec.Struct, omit_defaults=True):
    done: Done | None = None
    failed: str = ""


class Load:
    """Carries out one job."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._clients: list[Client] = []
        self._free: list[Client] = []
        self._expected = expected_body(job.ask)
        self.requests = _requests(job)
        self._tls = None if job.ca is None else ssl.create_default_context(cafile=job.ca)

    async def run(self) -> Done:
        """Raises WrongAnswer, TimeoutError or OSError."""
        job = self._job
        try:
            async with asyncio.timeout(job.timeout):
                for _ in range(job.connections):
                    await self._connect()
                if job.warmup:
                    await self._closed_loop(job.warmup)
                before = 0 if job.cpu_of is None else procfs.settled_cpu_ns(job.cpu_of)
                began = time.perf_counter()
                run = await (self._open_loop() if job.rate else self._closed_loop(job.count))
                seconds = time.perf_counter() - began
                after = 0 if job.cpu_of is None else procfs.settled_cpu_ns(job.cpu_of)
        finally:
            for client in self._clients:
                client.transport.abort()
        latencies = sorted(run.latencies)
        return Done(
            requests=len(latencies),
            chunks=len(latencies) * chunk_count(job.ask),
            frames=run.frames,
            seconds=seconds,
            cpu_ns=after - before,
            p50=latencies[len(latencies) // 2],
            p99=latencies[len(latencies) * 99 // 100],
            connections=len(self._clients),
        )

    async def _connect(self) -> Client:
        if len(self._clients) >= MAX_CONNECTIONS:
            raise WrongAnswer(f"{MAX_CONNECTIONS} requests at once were not enough: the server does not keep up")
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(Client, "127.0.0.1", self._job.port, ssl=self._tls)
        self._clients.append(client)
        return client

    async def _closed_loop(self, count: int) -> Run:
        run = Run(self.requests, self._expected, count)
        for client in self._clients:
            if client.closed:
                raise WrongAnswer("a connection was closed after a complete answer")
            client.idle = None
            client.send_next(run)
        await run.finished
        return run

    async def _open_loop(self) -> Run:
        """Starts request k at k / rate, come what may; the connections of the warm-up are the first free ones."""
        job = self._job
        run = Run(self.requests, self._expected, job.count)
        self._free = [client for client in self._clients if not client.closed]
        loop = asyncio.get_running_loop()
        began = loop.time()
        for index in range(job.count):
            delay = began + index / job.rate - loop.time()
            if delay > 0:
                await asyncio.wait((run.finished,), timeout=delay)
            if run.finished.done():
                break
            client = await self._free_client()
            client.idle = self._free.append
            client.send_next(run)
        await run.finished
        return run

    async def _free_client(self) -> Client:
        while self._free:
            client = self._free.pop()
            if not client.closed:
                return client
        return await self._connect()


def _requests(job: Job) -> Iterator[bytes]:
    """Without end: a few in turn, or each another one."""
    if job.ask.messages:
        return (_request(job, variant) for variant in itertools.count(job.first))
    variants = max(1, min(MAX_VARIANTS, MAX_VARIANT_BYTES // job.ask.size))
    return itertools.cycle([_request(job, variant) for variant in range(variants)])


def _request(job: Job, variant: int) -> bytes:
    body = request_body(job.ask, variant)
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:%d\r\nauthorization: Bearer sk-bench-client-000000\r\n"
        b"content-type: application/json\r\naccept: application/json\r\nuser-agent: breakwater-bench\r\n"
        b"content-length: %d\r\n\r\n%s" % (job.port, len(body), body)
    )


async def answer(line: bytes) -> Outcome:
    job = msgspec.json.decode(line, type=Job)
    try:
        return Outcome(done=await Load(job).run())
    except TimeoutError:
        return Outcome(failed=f"not finished within {job.timeout} s")
    except (WrongAnswer, OSError) as error:
        return Outcome(failed=str(error))


def main() -> None:
    reply: Callable[[Any], bytes] = msgspec.json.encode
    for line in sys.stdin.buffer:
        outcome = uvloop.run(answer(line))
        sys.stdout.buffer.write(reply(outcome) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

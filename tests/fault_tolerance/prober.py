"""A process of its own that opens a circuit, takes the probe, says so, and then never ends it: to be killed."""

from __future__ import annotations

import asyncio
import random
import sys
import time

from proxy.errors import UpstreamUnavailable
from proxy.fault_tolerance.breaker import Rules
from proxy.fault_tolerance.guard import Circuits
from proxy.store.redis import RedisStore


async def main(url: str, namespace: str) -> None:
    store = RedisStore(url, namespace=namespace, timeout_ms=2000)
    circuits = Circuits(
        store.circuits,
        Rules(time.monotonic, random.random, threshold=1, recovery=0.05),
        process="prober",
        emit=lambda event: None,
    )
    circuits.start()
    permit = circuits.admit("openai", "gpt-4o")
    assert permit is not None
    permit.failed(UpstreamUnavailable("The provider answered 503."))
    while True:
        await asyncio.sleep(0.02)
        found = await circuits.probe([("openai", "gpt-4o")], all_open=False)
        if found is not None:
            break
    print("probing", flush=True)
    await asyncio.sleep(60)


asyncio.run(main(sys.argv[1], sys.argv[2]))

"""`breakwater` with faults planted in it: `python -m tests.e2e.faulty serve -c FILE`.

A program fails in the end, and its exceptions quote whatever it had in hand. Here they quote everything:

    model fault          an exception before the first byte
    model fault-late     an exception after the first event of a stream
    model fault-task     an exception in a task that nobody waits for; the event loop reports it
    model fault-log      a library that logs and warns what it has seen
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import warnings
from typing import Any

from proxy.cli import main
from proxy.errors import InternalError
from proxy.providers.openai import OpenAIProvider
from proxy.types import Ask, Reply

_open = OpenAIProvider.open


async def _faulty(self: OpenAIProvider, ask: Ask, model: str, **options: Any) -> Reply:
    seen = f"{self._fixed!r} {ask.call.headers!r} {ask.call.query!r} {ask.call.raw_path!r} {ask.call.body!r}"
    if model == "fault":
        try:
            raise KeyError(seen)
        except KeyError as error:
            raise RuntimeError(seen) from error
    plain = {"fault-late": "stall", "fault-task": "ok", "fault-log": "ok"}.get(model, model)
    reply = await _open(self, ask, plain, **options)
    if model == "fault-late":
        reply.__class__ = type("Late", (type(reply),), {"__slots__": (), "__anext__": _fail_second(seen)})
    if model == "fault-task":
        asyncio.get_running_loop().create_task(_boom(seen))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        gc.collect()
    if model == "fault-log":
        # What only a client knows has no name here and no shape: a library that logs it is beyond any scrubber.
        known = f"{self._fixed!r}"
        logging.getLogger("library").error("it failed: %s", known)
        logging.getLogger("library").error("it failed", exc_info=RuntimeError(known))
        warnings.warn(known, stacklevel=1)
    return reply


def _fail_second(seen: str) -> Any:
    async def later(self: Any) -> Any:
        event = self._ready
        if event is None:
            raise RuntimeError(seen)
        self._ready = None
        return event

    return later


async def _boom(seen: str) -> None:
    raise InternalError from RuntimeError(seen)


if __name__ == "__main__":
    OpenAIProvider.open = _faulty  # type: ignore[method-assign]
    sys.exit(main())

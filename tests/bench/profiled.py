"""Runs a module under cProfile and writes what it saw when the module ends, however SIGTERM ends it.

    python -m tests.bench.profiled OUT MODULE [ARGUMENT…]

The profile holds the main thread only, which is where the event loop runs. cProfile makes small functions look dearer
than they are: use it to find where the time goes, and the bench to say how much it is.
"""

from __future__ import annotations

import cProfile
import runpy
import signal
import sys
from types import FrameType


def _end(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def main() -> None:
    out, module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    # A server that has shut down in good order may raise the signal again: that must not cost us the profile.
    signal.signal(signal.SIGTERM, _end)
    profile = cProfile.Profile()
    try:
        profile.runcall(runpy.run_module, module, run_name="__main__", alter_sys=True)
    finally:
        profile.dump_stats(out)


if __name__ == "__main__":
    main()

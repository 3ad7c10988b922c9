"""Runs a module under cProfile: from SIGUSR1 on, until the module ends, however SIGTERM ends it.

    python -m tests.bench.profiled OUT MODULE [ARGUMENT…]

The signal comes when the server is warm, so that starting up is not in the profile. It holds the main thread only,
which is where the event loop runs. cProfile makes small functions look dearer than they are: use it to find where the
time goes, and the bench to say how much it is.
"""

from __future__ import annotations

import cProfile
import runpy
import signal
import sys
from types import FrameType


def main() -> None:
    out, module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    profile = cProfile.Profile()

    def begin(signum: int, frame: FrameType | None) -> None:
        profile.enable()

    def end(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    # A server that has shut down in good order may raise the signal again: that must not cost us the profile.
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGUSR1, begin)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        profile.disable()
        profile.dump_stats(out)


if __name__ == "__main__":
    main()

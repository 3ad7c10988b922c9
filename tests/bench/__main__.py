"""`python -m tests.bench [--json] [--quick] [--rounds N] [--reference] [--profile OUT]`

Figures to stdout, progress to stderr. Exit code 0 when the run is complete (also when a target was missed: a figure is
no verdict on a change), 1 when it is not: a wrong answer, a late one, a process that died.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pstats
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.bench import report
from tests.bench.measure import CONVERSATIONS, GROWTH, PROXY, QUICK, REDIS, SHAPES, Bench, Effort, progress
from tests.bench.processes import BenchError
from tests.bench.scene import Scene, headline

PROFILED = ("plain", "stream")


def measure(scene: Scene, effort: Effort, names: tuple[str, ...]) -> Bench:
    """The whole run over the servers `names`."""
    ready: dict[str, list[float]] = {name: [] for name in names}
    servers = [scene.direct()]
    for start in range(effort.starts):
        for name in names:
            server, seconds = scene.start(name)
            ready[name].append(seconds)
            if start + 1 < effort.starts:
                server.child.stop()
            else:
                servers.append(server)
    secure = [scene.direct(tls=True)]
    secure += [scene.start(name, tls=True)[0] for name in names if name not in ("empty", REDIS)]
    bench = Bench(scene.load, servers, secure, effort)
    bench.figures["ready"].update(ready)
    bench.memory("ready")
    bench.rounds(SHAPES)
    bench.derive()
    bench.memory("loaded")
    bench.need_vocabulary()
    bench.memory("vocabulary")
    bench.rounds(GROWTH)
    bench.memory("grown")
    bench.rounds(CONVERSATIONS)
    bench.memory("talked")
    return bench


def profile(scene: Scene, effort: Effort, out: Path) -> None:
    """Where the proxy's time goes: OUT.plain.pstats and OUT.stream.pstats, and the top of each on stdout."""
    for shape in SHAPES:
        if shape.measure not in PROFILED:
            continue
        path = out.with_name(f"{out.name}.{shape.measure}.pstats").absolute()
        server, _ = scene.start(PROXY, profile=path)
        bench = Bench(scene.load, [], [], effort)
        bench.once(dataclasses.replace(shape, count=shape.warmup), server)
        server.child.process.send_signal(signal.SIGUSR1)
        bench.once(shape, server)
        server.child.stop()
        print(f"{shape.measure}: {path}")
        pstats.Stats(str(path)).strip_dirs().sort_stats("tottime").print_stats(25)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="What the proxy costs, measured.")
    parser.add_argument("--json", action="store_true", help="the whole run as JSON")
    parser.add_argument("--quick", action="store_true", help="one short round: does everything work?")
    parser.add_argument("--rounds", type=int, help=f"interleaved rounds (default {Effort().rounds})")
    parser.add_argument(
        "--reference", action="store_true", help="the reference apps alone: how steady is this machine?"
    )
    parser.add_argument("--profile", type=Path, metavar="OUT", help="no figures: the proxy under cProfile")
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def main() -> int:
    options = parse()
    effort = QUICK if options.quick else Effort()
    if options.rounds is not None:
        effort = dataclasses.replace(effort, rounds=options.rounds)
    names: tuple[str, ...] = ("empty", "forward") if options.reference else ("empty", "forward", PROXY)
    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="breakwater-bench-") as directory, ExitStack() as stack:
            scene = Scene.set(stack, Path(directory))
            facts: dict[str, Any] = {**scene.facts(), "rounds": effort.rounds, "quick": options.quick}
            if options.profile:
                profile(scene, effort, options.profile)
                return 0
            if scene.store is not None and PROXY in names:
                names = (*names, REDIS)
            bench = measure(scene, effort, names)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    facts["seconds"] = round(time.perf_counter() - began, 1)
    if options.json:
        print(json.dumps(report.as_json(bench.figures, facts), indent=2))
    else:
        print(f"{headline(facts)}\n\n{report.table(bench.figures)}\n")
    progress(f"done in {facts['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

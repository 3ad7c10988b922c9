"""The bench itself: it works from end to end, and it cannot be satisfied by a wrong answer."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from proxy.tokens.vocabularies import SHARED
from tests.bench import procfs, report
from tests.bench.client import WrongAnswer
from tests.bench.load import Done, Job, Load
from tests.bench.measure import CONVERSATIONS, GROWTH_SIZES, SHAPES, Figures
from tests.bench.payloads import (
    DONE,
    LONG,
    LONG_WINDOWS,
    Ask,
    expected_body,
    long_ask,
    plain_reply,
    request_body,
    stream_body,
    stream_events,
)
from tests.bench.processes import BenchError, Child

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.mark.slow
def test_quick_run_measures_everything_and_every_answer_is_right() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", "--quick", "--json"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    run = json.loads(done.stdout)
    figures = run["figures"]
    for shape in (*SHAPES, *CONVERSATIONS):
        measures = [f"{shape.measure}_p50", f"{shape.measure}_p99"] if shape.latency else [shape.measure]
        for measure in measures:
            for server in shape.servers:
                assert figures[measure][server]["min"] > 0, (measure, server)
    for measure in ("ready", "rss_ready", "rss_loaded", "rss_vocabulary", *(f"growth_{size}" for size in GROWTH_SIZES)):
        assert figures[measure]["breakwater"]["median"] > 0, measure
    assert figures["plain"]["breakwater/empty"]["median"] > 1
    assert figures["long-4000"]["breakwater"]["median"] > figures["long-400"]["breakwater"]["median"]
    assert {"cpu", "python"} <= run["machine"].keys()
    assert {
        "plain chat, CPU against the empty app",
        "spawn to ready",
        "a conversation of 400 messages, the last one new, CPU",
        "a conversation of 4,000 messages against one of 400, CPU",
    } <= {target["name"] for target in run["targets"]}


@pytest.mark.parametrize("size", GROWTH_SIZES)
@pytest.mark.parametrize("stream", [False, True])
def test_requests_are_json_of_the_size_asked_for_and_differ_by_variant(size: int, stream: bool) -> None:
    ask = Ask(size=size, stream=stream, usage=stream)
    one, other = request_body(ask, 1), request_body(ask, 2)
    assert len(one) == len(other) == size
    first, second = json.loads(one)["messages"], json.loads(other)["messages"]
    assert first[:-1] == second[:-1]
    assert first[-1] != second[-1]


@pytest.mark.parametrize("model", LONG)
def test_a_long_conversation_has_its_messages_and_only_the_last_one_is_new(model: str) -> None:
    ask = long_ask(model)
    first, second = (json.loads(request_body(ask, variant))["messages"] for variant in (1, 2))
    assert len(request_body(ask, 3)) == ask.size
    assert len(first) == LONG[model]
    assert first[:-1] == second[:-1]
    assert first[-1] != second[-1]
    assert max(len(message["content"]) for message in first) < 1024
    tokens = sum(SHARED.load("o200k_base").count(message["content"]) for message in first)
    assert ask.size > LONG_WINDOWS[model]
    assert (tokens < LONG_WINDOWS[model]) is (model != "long-cut")


def test_no_request_of_a_long_conversation_comes_twice() -> None:
    job = Job(port=1, ask=long_ask("long-400"), count=1, first=7)
    requests = Load(job).requests
    sent = [next(requests).partition(b"\r\n\r\n")[2] for _ in range(3)]
    assert sent == [request_body(job.ask, variant) for variant in (7, 8, 9)]


def test_a_stream_without_usage_is_the_one_with_usage_less_what_usage_put_in() -> None:
    with_usage, without = stream_events("bench", True), stream_events("bench", False)
    assert [event.replace(b',"usage":null', b"") for event in with_usage[:-1]] == without
    assert json.loads(with_usage[-1][6:])["choices"] == []
    assert stream_body("bench", False) == b"".join(without) + DONE
    assert b'"usage"' not in stream_body("no-usage", True)
    assert "usage" not in json.loads(plain_reply("no-usage"))


def _plain(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def _chunked(*pieces: bytes) -> bytes:
    framed = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"


async def _run(
    answer: bytes, ask: Ask, *, cut: bool = False, rate: float = 0.0, step: int = 1 << 16, timeout: float = 20.0
) -> Done:
    """Three requests against a server that answers each with `answer`, `step` bytes a write."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(ask.size)
                for at in range(0, len(answer), step):
                    writer.write(answer[at : at + step])
                    await writer.drain()
                    await asyncio.sleep(0)
                if cut:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        return await Load(Job(port=port, ask=ask, count=3, connections=1, rate=rate, timeout=timeout)).run()


@pytest.mark.parametrize("rate", [0.0, 200.0])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("step", [1 << 16, 7])
def test_right_answers_are_counted_however_they_are_cut(rate: float, stream: bool, step: int) -> None:
    ask = Ask("bench-short" if stream else "bench", stream=stream)
    body = expected_body(ask)
    done = asyncio.run(_run(_chunked(body[:100], body[100:]) if stream else _plain(body), ask, rate=rate, step=step))
    assert done.requests == 3
    assert done.chunks == (6 if stream else 0)
    assert done.frames == (6 if stream else 0)
    assert 0 < done.p50 <= done.p99 <= done.seconds


@pytest.mark.parametrize(
    ("answer", "ask"),
    [
        (_plain(expected_body(Ask())[:-1] + b"!"), Ask()),
        (_plain(expected_body(Ask())[:-1]), Ask()),
        (_plain(expected_body(Ask()), b"500 Internal Server Error"), Ask()),
        (_chunked(stream_body("bench", False).replace(b"token050", b"token049")), Ask(stream=True)),
        (_chunked(stream_body("bench", False)[: -len(DONE)]), Ask(stream=True)),
        (_chunked(stream_body("bench", True)), Ask(stream=True)),
        (_plain(plain_reply("bench")), Ask(stream=True)),
    ],
    ids=["altered", "short", "status", "stream altered", "no terminator", "unasked usage", "not a stream"],
)
def test_a_wrong_answer_fails_the_job(answer: bytes, ask: Ask) -> None:
    with pytest.raises(WrongAnswer, match="a wrong answer"):
        asyncio.run(_run(answer, ask))


def test_a_cut_answer_and_a_stalled_one_fail_the_job() -> None:
    half = _chunked(stream_body("bench", False))[:-20]
    with pytest.raises(WrongAnswer, match="in the middle of an answer"):
        asyncio.run(_run(half, Ask(stream=True), cut=True))
    with pytest.raises(TimeoutError):
        asyncio.run(_run(half, Ask(stream=True), timeout=0.5))


def test_cpu_time_is_that_of_the_process_its_threads_and_its_children() -> None:
    burn = "t = __import__('time'); s = t.process_time()\nwhile t.process_time() - s < 0.2: pass\n"
    script = (
        "import subprocess, sys, threading\n"
        f"burn = {burn!r}\n"
        "thread = threading.Thread(target=exec, args=(burn,)); thread.start(); thread.join()\n"
        "child = subprocess.Popen([sys.executable, '-c', burn + 'print(1, flush=True); input()'],"
        " stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(1, flush=True); input()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(list(procfs.family(process.pid))) == 2
        assert 0.4e9 <= procfs.settled_cpu_ns(process.pid) < 10e9
        assert procfs.rss_bytes(process.pid) > 4 << 20
        process.kill()


def test_a_process_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such thing as a free port')"]
    with (
        Child("doomed", command, frozenset(), tmp_path / "log") as child,
        pytest.raises(BenchError, match=r"(?s)doomed ended with exit code 1.*free port"),
    ):
        child.wait_ready(1)


FIGURES: Figures = {
    "plain": {"empty": [50.0, 40.0], "forward": [80.0, 70.0], "breakwater": [200.0, 200.0]},
    "stream": {"forward": [4000.0], "breakwater": [5600.0]},
    "latency_p50": {"direct": [30.0, 20.0], "forward": [90.0, 100.0], "breakwater": [130.0, 140.0]},
    "ready": {"breakwater": [0.7]},
    "long-400": {"breakwater": [2000.0, 2400.0]},
    "long-4000": {"breakwater": [30_000.0, 24_000.0]},
    **{
        f"growth_{size}": {"forward": [10.0], "breakwater": [10.0 + cost]}
        for size, cost in zip(GROWTH_SIZES, (0.0, 100.0, 500.0, 50_000.0), strict=True)
    },
}


def test_ratios_are_taken_round_by_round() -> None:
    assert report.ratios(FIGURES, "plain", "empty") == [4.0, 5.0]
    assert report.added(FIGURES, "latency_p50", "direct") == {"forward": [60.0, 80.0], "breakwater": [100.0, 120.0]}


def test_growth_is_judged_step_by_step_and_noise_is_not_judged() -> None:
    first, second, third = report.growth_steps(FIGURES)
    assert math.isnan(first)
    assert (second, third) == (5.0, 100.0)


def test_targets_say_what_was_kept_and_what_was_missed() -> None:
    verdicts = {target.name: target.kept for target in report.targets(FIGURES)}
    assert verdicts == {
        "plain chat, CPU against the empty app": True,
        "paced streams, CPU against the forwarder": False,
        "spawn to ready": True,
        "added cost, body of 150 KB against a tenth of it": True,
        "added cost, body of 1.5 MB against a tenth of it": False,
        "a conversation of 400 messages, the last one new, CPU": True,
        "a conversation of 4,000 messages against one of 400, CPU": False,
    }
    table = report.table(FIGURES)
    assert "MISS  paced streams, CPU against the forwarder: 1.40x (target ≤ 1.3x)" in table
    assert "pass  plain chat, CPU against the empty app: 4.50x (target ≤ 4.5x)" in table


def test_the_json_of_a_run_is_json() -> None:
    run = json.loads(json.dumps(report.as_json(FIGURES, {"rounds": 2}), allow_nan=False))
    assert run["figures"]["plain"]["breakwater/empty"] == {"median": 4.5, "min": 4.0, "max": 5.0, "values": [4.0, 5.0]}
    assert run["added_latency_us"]["latency_p50"]["breakwater"]["median"] == 110.0
    assert run["long_growth"] == [15.0, 10.0]
    assert run["growth_steps"] == [None, 5.0, 100.0]

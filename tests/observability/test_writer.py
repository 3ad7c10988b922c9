"""A writer whose reader is slow, gone, full or strange: the caller never waits, and every lost line is counted."""

from __future__ import annotations

import fcntl
import gc
import io
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from proxy.observability.writer import LineWriter


def notice(count: int) -> bytes:
    return b"dropped %d\n" % count


@contextmanager
def pipe() -> Iterator[tuple[int, IO[bytes]]]:
    """The reading descriptor and the writing stream."""
    ours, theirs = os.pipe()
    try:
        with os.fdopen(theirs, "wb", buffering=0) as stream:
            yield ours, stream
    finally:
        os.close(ours)


def eventually(true: Callable[[], bool]) -> None:
    for _ in range(2000):
        if true():
            return
        time.sleep(0.005)
    raise AssertionError("never became true")


def drain(fd: int, size: int = 1 << 16) -> bytes:
    """Everything until the other end is closed."""
    pieces = []
    while piece := os.read(fd, size):
        pieces.append(piece)
    return b"".join(pieces)


def test_lines_arrive_whole_and_in_order_from_many_threads(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w") as stream:
        writer = LineWriter(stream, notice)

        def work(who: int) -> None:
            for n in range(500):
                writer.write(b"%d %d %s\n" % (who, n, b"x" * 50), urgent=n % 100 == 0)

        threads = [threading.Thread(target=work, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert writer.close(10)
    rows = [line.split() for line in path.read_bytes().splitlines()]
    assert len(rows) == 2000
    for who in range(4):
        assert [int(row[1]) for row in rows if int(row[0]) == who] == list(range(500))
    assert writer.dropped == 0


def test_lines_are_written_in_batches_soon_and_without_being_asked() -> None:
    with pipe() as (ours, stream):
        writer = LineWriter(stream, notice, delay=0.2)
        for n in range(100):
            writer.write(b"%d\n" % n)
        assert len(os.read(ours, 65536).splitlines()) == 100  # one write for all of them
        writer.close()


def test_an_urgent_line_does_not_wait() -> None:
    with pipe() as (ours, stream):
        writer = LineWriter(stream, notice, delay=3600)
        writer.write(b"first\n")
        writer.write(b"now\n", urgent=True)
        assert os.read(ours, 100) == b"first\nnow\n"
        writer.close()


def test_a_full_batch_does_not_wait() -> None:
    with pipe() as (ours, stream):
        writer = LineWriter(stream, notice, delay=3600, batch_bytes=2000)
        for _ in range(20):
            writer.write(b"x" * 99 + b"\n")
        assert os.read(ours, 4096).startswith(b"x")
        writer.close()


def test_an_idle_writer_sleeps_and_wakes_again() -> None:
    with pipe() as (ours, stream):
        writer = LineWriter(stream, notice, delay=0.001)
        for n in range(5):
            writer.write(b"%d\n" % n)
            assert os.read(ours, 100) == b"%d\n" % n
            eventually(lambda: writer._idle)
        writer.close()


def test_no_line_no_thread() -> None:
    before = threading.active_count()
    with pipe() as (_, stream):
        writer = LineWriter(stream, notice)
        assert threading.active_count() == before
        assert writer.flush(0)
        assert writer.close()


def test_a_reader_that_stops_reading_stops_nobody() -> None:
    with pipe() as (ours, stream):
        writer = LineWriter(stream, notice, capacity_bytes=1 << 20, delay=0.001)
        line = b"y" * 199 + b"\n"
        started = time.thread_time()
        slowest = 0.0
        for _ in range(20_000):
            before = time.thread_time()
            writer.write(line)
            slowest = max(slowest, time.thread_time() - before)
        assert slowest < 0.05
        assert time.thread_time() - started < 2
        eventually(lambda: writer._pending <= 1 << 20)
        lost = writer.dropped
        assert 10_000 < lost < 20_000  # a megabyte of lines and a pipe full of them were kept
        assert not writer.flush(0.05)

        reader: list[bytes] = []
        thread = threading.Thread(target=lambda: reader.append(drain(ours)))
        thread.start()
        assert writer.flush(20)
        writer.write(b"last\n")
        assert writer.close(10)
        stream.close()
        thread.join()
        rows = reader[0].splitlines(keepends=True)
        assert rows.count(line) == 20_000 - lost
        assert rows.count(b"dropped %d\n" % lost) == 1
        assert b"last\n" in rows
        assert len(rows) == 20_000 - lost + 2


def test_closing_with_a_reader_that_does_not_read_takes_a_bounded_time() -> None:
    with pipe() as (ours, stream):
        writer = LineWriter(stream, notice, delay=0.001)
        for _ in range(2000):
            writer.write(b"z" * 199 + b"\n")
        started = time.monotonic()
        assert not writer.close(0.2)
        assert time.monotonic() - started < 5
        writer.write(b"too late\n")
        assert writer.dropped == 1
        while not writer.close(0.01):  # reading lets the thread go, so that the test leaves none behind
            os.read(ours, 1 << 16)


def test_a_broken_pipe_neither_kills_nor_loops() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "wb", buffering=0) as stream:
        writer = LineWriter(stream, notice, delay=0.001)
        writer.write(b"a\n", urgent=True)
        eventually(lambda: writer.dropped == 1)
        for _ in range(100):
            writer.write(b"b\n", urgent=True)
        assert writer.dropped == 101
        before = cpu_of_threads()
        time.sleep(0.1)
        assert cpu_of_threads() - before < 0.08
        assert writer.close(10)


def cpu_of_threads() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def test_a_disk_that_is_full_costs_what_was_written_meanwhile(tmp_path: Path) -> None:
    """A file size limit stands in for the disk: the same short write, then an error, then room again."""
    path = tmp_path / "log"
    script = f"""
import resource, signal, sys
from proxy.observability.writer import LineWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (25, resource.RLIM_INFINITY))
with open({str(path)!r}, "w") as stream:
    writer = LineWriter(stream, lambda n: b"dropped %d\\n" % n)
    for n in range(5):
        writer.write(b"line %03d\\n" % n)
    assert writer.flush(20)
    first = writer.dropped
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    writer.write(b"again\\n")
    assert writer.close(20)
    print(first, writer.dropped)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("3 3\n", "")
    assert path.read_bytes() == b"line 000\nline 001\nline 00\nagain\ndropped 3\n"


def test_a_pipe_that_somebody_made_non_blocking_is_waited_for() -> None:
    with pipe() as (ours, stream):
        flags = fcntl.fcntl(stream.fileno(), fcntl.F_GETFL)
        fcntl.fcntl(stream.fileno(), fcntl.F_SETFL, flags | os.O_NONBLOCK)
        writer = LineWriter(stream, notice, delay=0.001)
        for _ in range(5000):
            writer.write(b"w" * 99 + b"\n")
        reader: list[bytes] = []
        thread = threading.Thread(target=lambda: reader.append(drain(ours, 1000)))
        thread.start()
        assert writer.close(20)
        stream.close()
        thread.join()
        assert reader[0] == (b"w" * 99 + b"\n") * 5000
        assert writer.dropped == 0


def test_the_descriptor_is_its_own(tmp_path: Path) -> None:
    """When the stream is closed and its number taken by another file, no line goes astray."""
    with (tmp_path / "log").open("w") as stream:
        writer = LineWriter(stream, notice)
        number = stream.fileno()
    with (tmp_path / "other").open("w") as other:
        assert other.fileno() == number
        writer.write(b"here\n")
        assert writer.close(10)
    assert (tmp_path / "log").read_bytes() == b"here\n"
    assert (tmp_path / "other").read_bytes() == b""


def test_closing_gives_the_descriptor_back_and_is_idempotent(tmp_path: Path) -> None:
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    with (tmp_path / "log").open("w") as stream:
        writer = LineWriter(stream, notice)
        writer.write(b"x\n")
        assert writer.close()
        assert writer.close()
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == before


def test_a_stream_without_a_descriptor_is_written_as_text() -> None:
    stream = io.StringIO()
    writer = LineWriter(stream, notice)
    writer.write("grün\n".encode())
    assert writer.flush(10)
    assert stream.getvalue() == "grün\n"
    stream.close()
    writer.write(b"lost\n")
    assert writer.close(10)
    assert writer.dropped == 1


def test_a_destructor_that_logs_while_the_lock_is_held_does_no_harm(tmp_path: Path) -> None:
    class Loud:
        def __init__(self, writer: LineWriter) -> None:
            self.writer = writer
            self.me: Any = self  # only the collector can take it

        def __del__(self) -> None:
            self.writer.write(b"from a destructor\n")

    with (tmp_path / "log").open("w") as stream:
        writer = LineWriter(stream, notice)
        with writer._lock:
            Loud(writer)
            gc.collect()
        assert writer.close(10)
    assert (tmp_path / "log").read_bytes() == b"from a destructor\n"


@pytest.mark.parametrize("size", [1, 64])
def test_a_line_that_alone_is_too_large_is_dropped_and_said(tmp_path: Path, size: int) -> None:
    with (tmp_path / "log").open("w") as stream:
        writer = LineWriter(stream, notice, capacity_bytes=100)
        writer.write(b"x" * 100)
        writer.write(b"y" * size)
        assert writer.close(10)
    assert (tmp_path / "log").read_bytes() == (b"y" + b"dropped 1\n" if size == 1 else b"dropped 2\n")

"""The ledger's file: nothing twice, nothing left out, whatever breaks, and one word for each change of state."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.budget.records import Line, decoded, entry_of, time_text, written
from proxy.budget.settings import BudgetSettings
from proxy.budget.sink import FileSink, LedgerFile
from proxy.observability.events import InternalFault, LedgerResumed, LedgerStalled
from proxy.store.base import BudgetStore, Record
from proxy.store.memory import MemoryStore
from proxy.types import Target, Usage
from tests.budget.scene import TENANT, WALL_MS, Clock, Scene, usd

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def ledger(path: Path, max_bytes: int = 2**30, keep: int = 3) -> LedgerFile:
    return LedgerFile(path, max_bytes=max_bytes, keep=keep)


def sink_of(scene: Scene, file: LedgerFile, *, shared: bool = True, store: BudgetStore | None = None) -> FileSink:
    loop = asyncio.get_running_loop()
    return FileSink(
        store or scene.store, file, shared=shared, clock=loop.time, emit=scene.events.append, poll_seconds=0.005
    )


async def until(scene: Scene, *kinds: type) -> list[Any]:
    """The events of these kinds, once there is one of each."""
    async with asyncio.timeout(5):
        while not set(kinds) <= {type(event) for event in scene.events}:
            await asyncio.sleep(0.002)
    return [event for event in scene.events if isinstance(event, kinds)]


def records(first: int, count: int) -> list[Record]:
    return [
        Record(f"{number}-0", ("id", f"{number:032x}", "nano_usd", str(number)))
        for number in range(first, first + count)
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


async def test_each_settled_attempt_becomes_one_line(tmp_path: Path) -> None:
    scene = Scene(BudgetSettings(usd_per_day=usd("1")))
    sink = sink_of(scene, ledger(tmp_path / "ledger.jsonl"))
    await scene.serve(usage=Usage(10, 5))
    await scene.serve(usage=Usage(20, 5, cache_read=8))
    assert await sink.drain() == 2
    assert await sink.drain() == 0
    first, second = lines(tmp_path / "ledger.jsonl")
    assert (first["tenant"], first["provider"], first["model"], first["estimated"]) == (TENANT, "alpha", "m", False)
    assert (first["input"], first["output"], first["cost_usd"]) == (10, 5, "0.00002")
    assert first["time"] == "2026-01-15T00:00:00.000Z"
    assert (second["cache_read"], second["attempt"], second["status"]) == (8, 1, 200)
    assert list(first) == [
        "outbox", "time", "id", "request_id", "tenant", "key", "model", "provider", "upstream_model", "tags", "input",
        "output", "cache_read", "cache_write", "reasoning", "estimated", "status", "attempt", "cost_usd",
    ]  # fmt: skip
    assert stat.S_IMODE((tmp_path / "ledger.jsonl").stat().st_mode) == 0o600
    await sink.aclose()


async def test_a_restart_goes_on_after_the_last_line(tmp_path: Path) -> None:
    scene = Scene(BudgetSettings(usd_per_day=usd("1")))
    first = sink_of(scene, ledger(tmp_path / "l"))
    first.start()
    await scene.serve()
    await first.aclose()
    await scene.serve()
    with (tmp_path / "l").open("ab") as file:
        file.write(b'{"outbox": "9999999999999-0", "torn')
    second = sink_of(scene, ledger(tmp_path / "l"))
    second.start()
    await scene.serve()
    await second.aclose()
    assert len({line["id"] for line in lines(tmp_path / "l")}) == len(lines(tmp_path / "l")) == 3


def test_a_full_file_is_renamed_and_the_oldest_leaves(tmp_path: Path) -> None:
    file = ledger(tmp_path / "l", max_bytes=300, keep=2)
    for number in range(0, 40, 2):
        file.append(records(number, 2))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names in (["l", "l.1", "l.2"], ["l.1", "l.2"])
    kept = [line["id"] for path in file.paths if path.exists() for line in lines(path)]
    assert f"{39:032x}" in kept
    assert f"{0:032x}" not in kept
    assert ledger(tmp_path / "l").last_id() == "39-0"
    assert (tmp_path / "l.1").stat().st_size < 600


def test_an_empty_or_missing_file_begins_at_the_beginning(tmp_path: Path) -> None:
    assert ledger(tmp_path / "l").last_id() == ""
    (tmp_path / "l").write_bytes(b"not json\n[1]\n{}\n")
    assert ledger(tmp_path / "l").last_id() == ""


async def test_of_two_processes_with_one_file_one_writes(tmp_path: Path) -> None:
    scene = Scene(BudgetSettings(usd_per_day=usd("1")))
    one, two = sink_of(scene, ledger(tmp_path / "l")), sink_of(scene, ledger(tmp_path / "l"))
    await scene.serve()
    assert (await one.drain(), await two.drain()) == (1, 0)
    await one.aclose()
    await scene.serve()
    assert await two.drain() == 1
    await two.aclose()
    assert len(lines(tmp_path / "l")) == 2


async def test_a_full_disk_loses_nothing_and_is_said_once(tmp_path: Path) -> None:
    path = tmp_path / "l"
    scene = Scene(BudgetSettings(usd_per_day=usd("1")))
    sink = sink_of(scene, ledger(path))
    await scene.serve()
    await sink.drain()
    path.rename(tmp_path / "moved")
    path.symlink_to("/dev/full")
    await scene.serve()
    sink.start()
    (stalled,) = await until(scene, LedgerStalled)
    assert (stalled.file, stalled.reason) == (str(path), "full")
    await asyncio.sleep(0.05)  # ten more attempts
    path.unlink()
    stalled, resumed = await until(scene, LedgerStalled, LedgerResumed)
    assert not resumed.gap
    await sink.aclose()
    assert len(lines(path)) == 1


async def test_a_directory_that_went_away_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    scene = Scene(BudgetSettings(usd_per_day=usd("1")))
    sink = sink_of(scene, ledger(folder / "l"))
    await scene.serve()
    sink.start()
    (stalled,) = await until(scene, LedgerStalled)
    assert stalled.reason == "missing"
    folder.mkdir()
    await until(scene, LedgerResumed)
    await sink.aclose()
    assert len(lines(folder / "l")) == 1


async def test_what_the_outbox_could_not_keep_is_said_to_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "l"
    clock = Clock()
    scene = Scene(BudgetSettings(usd_per_day=usd("1")), store=MemoryStore(clock=clock, records=3), clock=clock)
    sink = sink_of(scene, ledger(path))
    await scene.serve()
    await sink.drain()
    path.rename(tmp_path / "moved")
    path.symlink_to("/dev/full")
    sink.start()
    await scene.serve()
    await until(scene, LedgerStalled)
    for _ in range(5):
        await scene.serve()
    path.unlink()
    (resumed,) = [one for one in await until(scene, LedgerResumed) if isinstance(one, LedgerResumed)]
    assert resumed.gap
    await sink.aclose()
    assert len(lines(path)) == 3


class Refusing(LedgerFile):
    """Writes a part of a batch and then fails, and cannot take the part back."""

    refuse = False

    def append(self, records: Sequence[Record]) -> None:
        if self.refuse:
            super().append(records[:2])
            with self.path.open("ab") as file:
                file.write(b'{"outbox": "17')
            self.refuse = False
            raise OSError(5, "no such luck")
        super().append(records)


@pytest.mark.parametrize("shared", [True, False])
async def test_a_batch_that_was_written_in_part_is_not_repeated(tmp_path: Path, shared: bool) -> None:
    scene = Scene(BudgetSettings(usd_per_day=usd("1")))
    file = Refusing(tmp_path / "l", max_bytes=2**30, keep=1)
    sink = sink_of(scene, file, shared=shared)
    await scene.serve()
    await sink.drain()
    file.refuse = True
    for _ in range(4):
        await scene.serve()
    with pytest.raises(OSError, match="luck"):
        await sink.drain()
    await sink.drain()
    await sink.aclose()
    ids = [line["outbox"] for line in lines(tmp_path / "l")]
    assert len(ids) == len(set(ids)) == 5


async def test_a_clock_that_was_set_back_loses_no_record_of_a_memory_that_begins_anew(tmp_path: Path) -> None:
    clock = Clock()
    for turn in range(2):
        scene = Scene(BudgetSettings(usd_per_day=usd("1")), clock=clock)
        sink = sink_of(scene, ledger(tmp_path / "l"), shared=False)
        await scene.serve()
        assert await sink.drain() == 1
        await sink.aclose()
        clock.pass_seconds(-3600)
        assert len(lines(tmp_path / "l")) == turn + 1


async def test_a_memory_whose_file_another_process_holds_says_so_and_waits_for_it(tmp_path: Path) -> None:
    one, two = (Scene(BudgetSettings(usd_per_day=usd("1"))) for _ in range(2))
    first, second = (sink_of(scene, ledger(tmp_path / "l"), shared=False) for scene in (one, two))
    await one.serve()
    await two.serve()
    assert await first.drain() == 1
    second.start()
    (stalled,) = await until(two, LedgerStalled)
    assert stalled.reason == "locked"
    await first.aclose()
    await until(two, LedgerResumed)
    await second.aclose()
    assert len(lines(tmp_path / "l")) == 2


async def test_a_fault_of_ours_is_reported_once_and_does_not_end_the_ledger(tmp_path: Path) -> None:
    class Odd(LedgerFile):
        odd = True

        def append(self, records: Sequence[Record]) -> None:
            if self.odd:
                raise ValueError("odd")
            super().append(records)

    scene = Scene(BudgetSettings(usd_per_day=usd("1")))
    file = Odd(tmp_path / "l", max_bytes=2**30, keep=1)
    sink = sink_of(scene, file)
    await scene.serve()
    sink.start()
    await until(scene, InternalFault, LedgerStalled)
    await asyncio.sleep(0.05)  # ten more attempts
    assert len([event for event in scene.events if isinstance(event, InternalFault)]) == 1
    file.odd = False
    await until(scene, LedgerResumed)
    await sink.aclose()
    assert len(lines(tmp_path / "l")) == 1


def test_a_pipe_in_the_place_of_the_file_holds_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "l")
    file = ledger(tmp_path / "l")
    assert file.acquire()
    with pytest.raises(OSError, match="No such device"):
        file.append(records(1, 1))
    file.close()


async def test_a_sink_that_is_closed_while_it_writes_writes_nothing_twice(tmp_path: Path) -> None:
    scene = Scene(BudgetSettings(usd_per_day=usd("1")))
    for turn in range(20):
        path = tmp_path / str(turn)
        sink = sink_of(scene, ledger(path))
        sink.start()
        await scene.serve()
        for _ in range(turn):
            await asyncio.sleep(0)
        await sink.aclose()
        ids = [line["outbox"] for line in lines(path)]
        assert len(ids) == len(set(ids)) == turn + 1


def test_records_keep_the_types_of_their_values() -> None:
    line = Line(
        "ab" * 16,
        5,
        "req",
        "t",
        "k",
        Target("p", "up", "label"),
        "team=a",
        Usage(3, 2, 1, 1, 1, estimated=True),
        None,
        0,
        2,
    )
    entry = entry_of(line)
    found = decoded(entry.record)
    assert found["estimated"] is True
    assert found["priced"] is False
    assert (found["input"], found["nano_usd"], found["attempt"], found["tags"]) == (3, 0, 2, "team=a")
    assert entry.dimensions == ("t", "k", "label", "p", "team=a", "estimated")
    assert entry.usage.cost_unknown == 1


@given(st.lists(st.text(max_size=5), max_size=9))
def test_any_record_can_be_decoded(fields: list[str]) -> None:
    assert len(decoded(fields)) <= len(fields) // 2


@given(st.integers(0, 4_102_444_800_000), st.integers(0, 2**43), st.booleans())
def test_a_line_has_a_time_in_utc_and_an_exact_price(at: int, nano: int, priced: bool) -> None:
    fields = ("at", str(at), "nano_usd", str(nano if priced else 0), "priced", "1" if priced else "0")
    line = written(Record("5-1", fields))
    assert line["time"] == time_text(at)
    assert len(time_text(at)) == 24
    assert (None if line["cost_usd"] is None else Decimal(str(line["cost_usd"])) * 10**9) == (nano if priced else None)
    assert set(line) == {"outbox", "time", "cost_usd"}


def test_a_lost_reservation_has_the_time_of_the_store() -> None:
    line = written(Record(f"{WALL_MS}-7", ("lost", "ab" * 16, "requests", "1", "tokens", "30", "nano_usd", "1500")))
    assert line["time"] == "2026-01-15T00:00:00.000Z"
    assert (line["lost"], line["tokens"], line["cost_usd"]) == ("ab" * 16, 30, "0.0000015")

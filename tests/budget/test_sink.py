"""The ledger's file: nothing twice, nothing left out, whatever breaks; and the windows that a restart takes from it."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.budget.records import Line, decoded, entry_of
from proxy.budget.settings import BudgetSettings
from proxy.budget.sink import FileSink, LedgerFile, oldest_needed, restored
from proxy.store.base import Record, Scope
from proxy.types import Target, Usage
from tests.budget.scene import TENANT, WALL_MS, Clock, Scene, usd

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def ledger(path: Path, max_bytes: int = 2**30, keep: int = 3) -> LedgerFile:
    return LedgerFile(path, max_bytes=max_bytes, keep=keep)


def records(first: int, count: int) -> list[Record]:
    return [
        Record(f"{number}-0", ("id", f"{number:032x}", "nano_usd", str(number)))
        for number in range(first, first + count)
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


async def test_each_settled_attempt_becomes_one_line(tmp_path: Path) -> None:
    scene = Scene(BudgetSettings(usd_per_day=usd("1")))
    sink = FileSink(scene.store, ledger(tmp_path / "ledger.jsonl"))
    await scene.serve(usage=Usage(10, 5))
    await scene.serve(usage=Usage(20, 5, cache_read=8))
    assert await sink.drain() == 2
    assert await sink.drain() == 0
    first, second = lines(tmp_path / "ledger.jsonl")
    assert (first["tenant"], first["provider"], first["model"], first["estimated"]) == (TENANT, "alpha", "m", False)
    assert (first["input"], first["output"], first["nano_usd"], first["at"]) == (10, 5, 20_000, WALL_MS)
    assert (second["cache_read"], second["priced"], second["attempt"], second["status"]) == (8, True, 1, 200)
    assert stat.S_IMODE((tmp_path / "ledger.jsonl").stat().st_mode) == 0o600
    await sink.aclose()


async def test_a_restart_goes_on_after_the_last_line(tmp_path: Path) -> None:
    scene = Scene(BudgetSettings(usd_per_day=usd("1")))
    first = FileSink(scene.store, ledger(tmp_path / "l"), poll_seconds=0.01)
    first.start()
    await scene.serve()
    await first.aclose()
    await scene.serve()
    with (tmp_path / "l").open("ab") as file:
        file.write(b'{"outbox": "9999999999999-0", "torn')
    second = FileSink(scene.store, ledger(tmp_path / "l"), poll_seconds=0.01)
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
    kept = [int(str(line["nano_usd"])) for line in file.lines(0)]
    assert 39 in kept
    assert 0 not in kept
    assert ledger(tmp_path / "l").last_id() == "39-0"
    assert (tmp_path / "l.1").stat().st_size < 600


def test_an_empty_or_missing_file_begins_at_the_beginning(tmp_path: Path) -> None:
    assert ledger(tmp_path / "l").last_id() == ""
    (tmp_path / "l").write_bytes(b"not json\n[1]\n{}\n")
    assert ledger(tmp_path / "l").last_id() == ""


async def test_of_two_processes_with_one_file_one_writes(tmp_path: Path) -> None:
    scene = Scene(BudgetSettings(usd_per_day=usd("1")))
    one, two = FileSink(scene.store, ledger(tmp_path / "l")), FileSink(scene.store, ledger(tmp_path / "l"))
    await scene.serve()
    assert (await one.drain(), await two.drain()) == (1, 0)
    await one.aclose()
    await scene.serve()
    assert await two.drain() == 1
    await two.aclose()
    assert len(lines(tmp_path / "l")) == 2


async def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "l"
    scene = Scene(BudgetSettings(usd_per_day=usd("1")))
    sink = FileSink(scene.store, ledger(path), poll_seconds=0.005)
    await scene.serve()
    await sink.drain()
    path.unlink()
    path.symlink_to("/dev/full")
    await scene.serve()
    sink.start()
    async with asyncio.timeout(5):
        while sink.failures < 2:
            await asyncio.sleep(0)
    path.unlink()
    async with asyncio.timeout(5):
        while sink.failures:
            await asyncio.sleep(0.005)
    await sink.aclose()
    assert len(lines(path)) == 1


async def test_a_sink_that_is_closed_while_it_writes_writes_nothing_twice(tmp_path: Path) -> None:
    scene = Scene(BudgetSettings(usd_per_day=usd("1")))
    for turn in range(20):
        path = tmp_path / str(turn)
        sink = FileSink(scene.store, ledger(path), poll_seconds=0.0)
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


# -- windows after a restart -----------------------------------------------------------------------------------------

HOUR = 3_600_000
SCOPES = (Scope("tenant", "t"), Scope("global", ""), Scope("key", "t/k"), Scope("provider", "p"), Scope("tenant", "u"))


def paid(at: int, nano: int, tenant: str = "t", key: str = "") -> dict[str, Any]:
    return {"at": at, "nano_usd": nano, "tenant": tenant, "key": key, "provider": "p"}


def test_what_was_spent_is_found_again_window_by_window() -> None:
    now = WALL_MS + 12 * HOUR + 5
    found = restored(
        [
            paid(now - 1, 1),
            paid(now - 2 * HOUR, 10, key="k"),
            paid(now - 13 * HOUR, 100),
            paid(now - 40 * 24 * HOUR, 1000),
            paid(now + HOUR, 10_000),
            {"at": now, "nano_usd": "x"},
            {"lost": "id", "nano_usd": 5},
        ],
        SCOPES,
        now,
    )
    by_place = {one.scope.place: one.spent for one in found}
    assert by_place[SCOPES[0].place] == (1, 11, 111)
    assert by_place[SCOPES[1].place] == (1, 11, 111)
    assert by_place[SCOPES[2].place] == (0, 10, 10)
    assert by_place[SCOPES[3].place] == (1, 11, 111)
    assert by_place[SCOPES[4].place] == (0, 0, 0)
    assert oldest_needed(now) <= now - 13 * HOUR


async def test_a_restarted_process_knows_what_was_spent(tmp_path: Path) -> None:
    section = BudgetSettings(usd_per_day=usd("1"))
    clock = Clock()
    before = Scene(section, clock=clock)
    sink = FileSink(before.store, ledger(tmp_path / "l"))
    for _ in range(3):
        await before.serve(usage=Usage(100, 100))
    await sink.drain()
    await sink.aclose()
    clock.pass_seconds(30)
    after = Scene(section, clock=clock)
    after.policies.of(TENANT)
    file = ledger(tmp_path / "l")
    await after.store.seed(restored(file.lines(oldest_needed(clock())), after.policies.scopes, clock()), 0)
    assert (await after.row()).day_nano_usd == 3 * (100 * 1000 + 100 * 2000)


def test_files_older_than_the_month_are_not_read(tmp_path: Path) -> None:
    file = ledger(tmp_path / "l", max_bytes=100, keep=2)
    file.append(records(1, 3))
    os.utime(tmp_path / "l.1", (1000, 1000))
    assert list(file.lines(WALL_MS)) == []
    assert len(list(file.lines(0))) == 3

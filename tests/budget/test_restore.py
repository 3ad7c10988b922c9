"""What a restarted process takes from its ledger: exactly what the files say of this hour, day and month."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.app.ledger import Ledger
from proxy.budget.records import time_text
from proxy.budget.restore import restored
from proxy.budget.settings import BudgetSettings, LedgerSettings
from proxy.budget.sink import FileSink, LedgerFile
from proxy.money import LARGEST, nano_of, usd_text
from proxy.observability.events import LedgerRestored, Notice, StoreReset
from proxy.store.base import Cold, Scope
from proxy.types import Usage
from tests.budget.scene import WALL_MS, Clock, Scene, usd
from tests.redis_server import RedisServer

pytestmark = pytest.mark.anyio
HOUR = 3_600_000
NOW = WALL_MS + 12 * HOUR + 5


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def paid(at: int, nano: int | None, tenant: str = "t", key: str = "") -> bytes:
    cost = None if nano is None else usd_text(nano)
    line = {"outbox": f"{at}-0", "time": time_text(at), "tenant": tenant, "key": key, "provider": "p", "cost_usd": cost}
    return json.dumps(line).encode() + b"\n"


def found_in(*paths: Path, now_ms: int = NOW, block: int = 64) -> dict[str, tuple[int, int, int]]:
    found = restored(paths, now_ms, lambda: 0.0, block=block)
    assert found.complete
    return {one.scope.place: one.spent for one in found.remembered}


def place(kind: Any, name: str) -> str:
    return Scope(kind, name).place


@pytest.mark.parametrize("block", [1, 7, 64, 4096])
def test_what_was_spent_is_found_again_window_by_window(tmp_path: Path, block: int) -> None:
    lines = [
        paid(NOW - 40 * 24 * HOUR, 1000),
        paid(NOW - 13 * HOUR, 100),
        paid(NOW - 2 * HOUR, 10, key="k"),
        b'not json\n[1]\n\xff\xfe\n{"time": 5}\n\n{"time": "x", "cost_usd": "1"}\n',
        json.dumps({"time": time_text(NOW), "cost_usd": "-5", "tenant": "t"}).encode() + b"\n",
        paid(NOW - 1, 1),
        paid(NOW - 1, None),
        json.dumps({"time": time_text(NOW), "lost": "id", "cost_usd": usd_text(7)}).encode() + b"\n",
        paid(NOW, 5000)[:-9],  # torn
    ]
    (tmp_path / "l").write_bytes(b"".join(lines))
    by_place = found_in(tmp_path / "l", block=block)
    assert by_place == {
        place("tenant", "t"): (1, 11, 111),
        place("key", "t/k"): (0, 10, 10),
        place("provider", "p"): (1, 11, 111),
        place("global", ""): (8, 18, 118),
    }


spendings = st.lists(
    st.tuples(
        st.integers(0, 40 * 24),
        st.integers(0, 10**12),
        st.sampled_from(["t", "u"]),
        st.sampled_from(["", "k"]),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(spendings, st.integers(1, 700), st.integers(1, 5), st.integers(0, 200))
def test_any_ledger_in_any_number_of_files(
    tmp_path_factory: pytest.TempPathFactory,
    spent: list[tuple[int, int, str, str]],
    block: int,
    parts: int,
    torn: int,
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    ordered = sorted(spent, key=lambda one: -one[0])
    chunks = [ordered[len(ordered) * n // parts : len(ordered) * (n + 1) // parts] for n in range(parts)]
    paths = [folder / "l", *(folder / f"l.{number}" for number in range(1, parts))]
    for path, chunk in zip(reversed(paths), chunks, strict=True):
        path.write_bytes(b"".join(paid(NOW - hours * HOUR, nano, tenant, key) for hours, nano, tenant, key in chunk))
    with paths[0].open("ab") as file:
        file.write(paid(NOW, 10**9)[:torn] if torn < len(paid(NOW, 10**9)) else b"")
    expected: dict[str, list[int]] = {}
    for hours, nano, tenant, key in spent:
        at = time_text(NOW - hours * HOUR)
        if at[:7] != time_text(NOW)[:7]:
            continue
        scopes = [place("global", ""), place("tenant", tenant), place("provider", "p")]
        for each in [*scopes, place("key", f"{tenant}/{key}")] if key else scopes:
            sums = expected.setdefault(each, [0, 0, 0])
            sums[2] += nano
            sums[1] += nano if at[:10] == time_text(NOW)[:10] else 0
            sums[0] += nano if at[:13] == time_text(NOW)[:13] else 0
    assert found_in(*paths, block=block) == {name: tuple(sums) for name, sums in expected.items()}


def test_reading_stops_where_the_month_begins(tmp_path: Path) -> None:
    old = b"".join(paid(NOW - (40 * 24 + hour) * HOUR, 1) for hour in range(200, 0, -1))
    (tmp_path / "l.1").write_bytes(b"x" * 1000 + b"\n" + old)
    (tmp_path / "l").write_bytes(paid(NOW, 3))
    ticks = itertools.count()
    found = restored([tmp_path / "l", tmp_path / "l.1"], NOW, lambda: float(next(ticks)), seconds=4.0, block=500)
    assert (found.complete, found.records) == (True, 1)


def test_reading_ends_when_its_time_is_over_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "l").write_bytes(b"".join(paid(NOW, 1) for _ in range(100)))
    ticks = itertools.count()
    found = restored([tmp_path / "l"], NOW, lambda: float(next(ticks)), seconds=3.0, block=500)
    assert not found.complete
    assert 0 < found.records < 100


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "l").mkdir()
    assert not restored([tmp_path / "l", tmp_path / "l.1"], NOW, lambda: 0.0).complete
    assert restored([tmp_path / "l.1"], NOW, lambda: 0.0).complete


def test_a_file_that_is_renamed_meanwhile_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "l").write_bytes(paid(NOW, 3))
    (tmp_path / "l.1").hardlink_to(tmp_path / "l")
    assert found_in(tmp_path / "l", tmp_path / "l.1")[place("global", "")] == (3, 3, 3)


def test_a_long_ledger_is_read_quickly_and_in_little_memory(tmp_path: Path) -> None:
    line = paid(NOW, 1500, key="0123456789abcdef")
    (tmp_path / "l").write_bytes(line * 100_000)
    clock = iter(range(10**6))
    found = restored([tmp_path / "l"], NOW, lambda: next(clock) * 0.0)
    assert found.records == 100_000
    assert {one.spent for one in found.remembered} == {(150_000_000,) * 3}


@given(st.integers(0, LARGEST))
def test_dollars_are_read_back_exactly(nano: int) -> None:
    assert nano_of(usd_text(nano)) == nano


@given(st.text() | st.from_regex(r"[0-9+._e-]{1,20}", fullmatch=True))
def test_what_is_no_amount_is_a_value_error(text: str) -> None:
    try:
        nano = nano_of(text)
    except ValueError:
        return
    assert 0 <= nano <= LARGEST


# -- a process that starts -------------------------------------------------------------------------------------------


def ledger_of(path: Path, scene: Scene, events: list[Notice], *, alone: bool = True) -> Ledger:
    section = LedgerSettings.model_validate({"sinks": ({"file": path},)})
    return Ledger(section, scene.store, alone=alone, emit=events.append, wall_ms=scene.clock)


async def test_a_restarted_process_knows_what_was_spent(tmp_path: Path) -> None:
    section = BudgetSettings(usd_per_day=usd("1"))
    clock = Clock()
    events: list[Notice] = []
    for turn in range(3):
        scene = Scene(section, clock=clock)
        ledger = ledger_of(tmp_path / "l", scene, events)
        await ledger.start()
        assert (await scene.row()).day_nano_usd == turn * 300_000
        await scene.serve(usage=Usage(100, 100))
        await ledger.aclose()
        await scene.store.aclose()
        clock.pass_seconds(30)
    assert [event.records for event in events if isinstance(event, LedgerRestored)] == [1, 2]
    clock.pass_seconds(24 * 3600)
    scene = Scene(section, clock=clock)
    await ledger_of(tmp_path / "l", scene, events).start()
    row = await scene.row()
    assert (row.day_nano_usd, row.month_nano_usd) == (0, 900_000)


async def test_an_empty_redis_is_told_and_one_that_knows_is_not(tmp_path: Path, redis_server: RedisServer) -> None:
    from proxy.store.redis import RedisStore

    now = NOW
    path = tmp_path / "l"
    path.write_bytes(b"".join(paid(now, 1, tenant=f"t{number}") for number in range(250)) + paid(now, 400, "acme"))
    store = RedisStore(redis_server.url, namespace=f"restore-{os.getpid()}", clock=lambda: now)
    scene = Scene(BudgetSettings(usd_per_day=usd("1")), store=store, collect_ms=20)
    scene.clock.ms = now
    events: list[Notice] = []
    first = ledger_of(path, scene, events, alone=False)
    await first.start()
    now += 3000
    assert (await scene.row()).day_nano_usd == 400
    assert (await scene.store.balance((Scope("tenant", "t249"),)))[0].row.day_nano_usd == 1  # type: ignore[index]
    await first.aclose()
    path.write_bytes(paid(now, 9000, tenant="acme"))
    second = ledger_of(path, scene, events, alone=False)
    await second.start()
    assert (await scene.row()).day_nano_usd == 400
    await second.aclose()
    await store.aclose()
    assert [type(event) for event in events] == [StoreReset, LedgerRestored]
    assert not [event for event in scene.events if isinstance(event, StoreReset)]


async def test_of_two_files_each_window_becomes_the_larger(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(paid(NOW, 5) + paid(NOW, 1, tenant="u"))
    (tmp_path / "b").write_bytes(paid(NOW, 3) + paid(NOW, 2, tenant="u"))
    scene = Scene(BudgetSettings(usd_per_day=usd("1")))
    scene.clock.ms = NOW
    section = LedgerSettings.model_validate({"sinks": ({"file": tmp_path / "a"}, {"file": tmp_path / "b"})})
    ledger = Ledger(section, scene.store, alone=True, emit=scene.events.append, wall_ms=scene.clock)
    await ledger.start()
    scopes = [Scope("tenant", "t"), Scope("tenant", "u")]
    balances = await scene.store.balance(scopes)
    assert not isinstance(balances, Cold)
    assert [one.row.day_nano_usd for one in balances] == [5, 2]
    await ledger.aclose()


async def test_the_last_settlements_are_in_the_file_when_the_process_has_ended(tmp_path: Path) -> None:
    scene = Scene(BudgetSettings(usd_per_day=usd("1")))
    ledger = ledger_of(tmp_path / "l", scene, scene.events)
    await ledger.start()
    for _ in range(7):
        await scene.serve()
    await ledger.aclose()
    assert len((tmp_path / "l").read_bytes().splitlines()) == 7
    again = LedgerFile(tmp_path / "l", max_bytes=2**30, keep=1)
    assert again.acquire()
    again.close()


async def test_a_store_that_is_away_holds_no_start_up(tmp_path: Path) -> None:
    from proxy.store.redis import RedisStore

    (tmp_path / "l").write_bytes(paid(NOW, 5))
    store = RedisStore("redis://127.0.0.1:9/0", setup_ms=100)
    scene = Scene(BudgetSettings(usd_per_day=usd("1")), store=store)
    ledger = ledger_of(tmp_path / "l", scene, scene.events, alone=False)
    async with asyncio.timeout(5):
        await ledger.start()
        await ledger.aclose()
    await store.aclose()
    assert not [event for event in scene.events if isinstance(event, LedgerRestored)]


def test_a_sink_is_closed_once_and_again(tmp_path: Path) -> None:
    async def life() -> None:
        scene = Scene(BudgetSettings(usd_per_day=usd("1")))
        file = LedgerFile(tmp_path / "l", max_bytes=2**30, keep=1)
        clock = asyncio.get_running_loop().time
        sink = FileSink(scene.store, file, shared=False, clock=clock, emit=scene.events.append)
        sink.start()
        await sink.aclose()
        await sink.aclose()

    asyncio.run(life())

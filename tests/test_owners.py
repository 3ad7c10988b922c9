"""Whose an object is: what is asked, what is believed, and what becomes of a claim that nobody takes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from proxy.errors import InvalidRequest, NotFound
from proxy.errors import StoreUnavailable as AnswerUnavailable
from proxy.observability.events import Notice, OwnershipLost
from proxy.owners import Owners, made_in
from proxy.store.base import Reason, StoreUnavailable
from proxy.store.ownership import Owner
from proxy.store.ownership_memory import MemoryOwnership
from proxy.types import Ask, Event, Objects, Target, Tenant
from tests.providers.upstream import call

pytestmark = pytest.mark.anyio

ACME, BETA = Tenant("acme"), Tenant("beta")
HOME = Owner("acme", "up", "m-1", "m")
TARGET = Target("up", "m-1", "m")


class Store(MemoryOwnership):
    """One that can go away, and says how often it was asked. `gate`, where set, holds its answers back."""

    def __init__(self) -> None:
        super().__init__()
        self.away: Reason | None = None
        self.spoilt: set[str] = set()
        self.asked = 0
        self.gate: asyncio.Event | None = None

    async def _pass(self, object_id: str) -> None:
        self.asked += 1
        if self.gate is not None:
            await self.gate.wait()
        if object_id in self.spoilt:
            raise StoreUnavailable("corrupt")
        if self.away is not None:
            raise StoreUnavailable(self.away)

    async def claim(self, object_id: str, owner: Owner) -> Owner:
        await self._pass(object_id)
        return await super().claim(object_id, owner)

    async def owner(self, object_id: str) -> Owner | None:
        await self._pass(object_id)
        return await super().owner(object_id)


class Scene:
    def __init__(self, *, strict: bool = True, **more: Any) -> None:
        self.store = Store()
        self.events: list[Notice] = []
        self.owners = self.another(strict=strict, **more)

    def another(self, *, strict: bool = True, **more: Any) -> Owners:
        """A replica on the same store."""
        more.setdefault("pauses", (0.001, 0.002))
        providers = ("up", "other")
        return Owners(self.store, strict=strict, providers=providers, emit=self.events.append, **more)

    async def book(self, *ids: str, owner: Owner = HOME) -> None:
        await self.owners.book(ids, owner)

    @property
    def lost(self) -> list[int]:
        return [event.objects for event in self.events if isinstance(event, OwnershipLost)]


def naming(*refers: str, model: str = "m") -> Ask:
    return Ask("responses", "/v1/responses", call(), model, objects=Objects(tuple(("conversation", x) for x in refers)))


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.001)


# --- before a request -----------------------------------------------------------------------------------------------


async def test_with_tenants_what_is_not_known_to_be_mine_is_not_there() -> None:
    scene = Scene()
    await scene.book("mine")
    await scene.book("gone", owner=Owner("acme", "no-longer-configured"))
    assert await scene.owners.home(naming("mine"), ACME) == HOME
    told = set()
    for asked, tenant in [
        ("mine", BETA),
        ("unknown", ACME),
        ("unknown", BETA),
        ("gone", ACME),
        ("x" * 513, ACME),
        ("mine", Tenant("acme", providers=("other",))),
    ]:
        with pytest.raises(NotFound) as raised:
            await scene.owners.home(naming(asked), tenant)
        told.add((raised.value.message, raised.value.code, raised.value.param))
    assert len(told) == 1
    assert await scene.owners.home(naming(), ACME) is None


async def test_every_object_that_is_named_must_be_mine() -> None:
    scene = Scene()
    await scene.book("one", "two")
    await scene.book("far", owner=Owner("acme", "other"))
    await scene.book("theirs", owner=Owner("beta", "up"))
    assert await scene.owners.home(naming("one", "two"), ACME) == HOME
    for pair in (("one", "theirs"), ("theirs", "one"), ("one", "unknown"), ("unknown", "one")):
        with pytest.raises(NotFound):
            await scene.owners.home(naming(*pair), ACME)
    with pytest.raises(InvalidRequest):
        await scene.owners.home(naming("one", "far"), ACME)


async def test_without_tenants_what_is_unknown_passes() -> None:
    scene = Scene(strict=False)
    default = Tenant("default")
    await scene.book("mine", owner=Owner("default", "other"))
    await scene.book("theirs")
    assert await scene.owners.home(naming("unknown"), default) is None
    assert await scene.owners.home(naming("mine"), default) == Owner("default", "other")
    assert await scene.owners.home(naming("unknown", "mine"), default) == Owner("default", "other")
    with pytest.raises(NotFound):  # of a time when there were tenants
        await scene.owners.home(naming("theirs"), default)
    scene.store.away = "timeout"
    assert await scene.owners.home(naming("unknown"), default) is None


async def test_the_store_is_asked_once_of_mine_and_each_time_of_another_s() -> None:
    scene = Scene()
    await scene.book("mine")
    replica = scene.another()
    scene.store.asked = 0
    for _ in range(5):
        await replica.home(naming("mine"), ACME)
    assert scene.store.asked == 1
    for asked in (1, 2, 3):  # of an object that is known here to be another's, no less than of one that is unknown
        with pytest.raises(NotFound):
            await replica.home(naming("mine"), BETA)
        assert scene.store.asked == 1 + asked


async def test_while_the_store_is_away_a_process_goes_by_what_it_knows_itself() -> None:
    scene = Scene()
    await scene.book("before")
    scene.store.away = "timeout"
    await scene.book("meanwhile")
    for mine in ("before", "meanwhile"):
        assert await scene.owners.home(naming(mine), ACME) == HOME
        for owners, tenant in ((scene.owners, BETA), (scene.another(), ACME)):
            with pytest.raises(AnswerUnavailable) as raised:
                await owners.home(naming(mine), tenant)
            assert (b"retry-after", b"1") in raised.value.headers
    await scene.owners.aclose()


@pytest.mark.parametrize(
    ("home", "model", "target"),
    [
        (HOME, "m", TARGET),
        (Owner("acme", "up", "older", "older"), "m", TARGET),  # another model of the same provider
        (Owner("acme", "other", "m-7", "m"), "m", Target("other", "m-7", "m")),
        (Owner("acme", "other", "m-7", "n"), "m", None),
        (Owner("acme", "other"), "m", None),
    ],
)
def test_a_request_goes_where_its_object_lives(home: Owner, model: str, target: Target | None) -> None:
    owners = Scene().owners
    if target is None:
        with pytest.raises(InvalidRequest):
            owners.lead(naming("x", model=model), ((TARGET,),), home)
    else:
        assert owners.lead(naming("x", model=model), ((TARGET,),), home) == ((target,),)


# --- what a reply makes ---------------------------------------------------------------------------------------------


def sse(kind: str, **members: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **members})}\n\n".encode()


CREATED = sse("response.created", response={"id": "resp_1", "conversation": {"id": "conv_1"}})


@pytest.mark.parametrize(
    ("data", "ids"),
    [
        (b'{"id":"resp_1","output":[{"id":"msg_1"}]}', ("resp_1",)),
        (b' {"conversation":{"id":"conv_1"},"id":"resp_1"}', ("resp_1", "conv_1")),
        (b'{"id":"resp_1","conversation":"conv_1"}', ("resp_1", "conv_1")),
        (b'{"id":"resp_1","conversation":null}', ("resp_1",)),
        (b'{"id":7,"conversation":{"id":[]}}', ()),
        (b'{"id":""}', ()),
        (b'{"id":"' + b"x" * 513 + b'"}', ()),
        (b'{"id":', ()),
        (b'{"id":"\xff"}', ()),
        (b"[" * 100_000, ()),
        (b"", ()),
        (CREATED, ("resp_1", "conv_1")),
        (b": comment\n\n" + CREATED, ("resp_1", "conv_1")),
        (CREATED.replace(b"\n", b"\r\n"), ("resp_1", "conv_1")),
        (sse("response.queued", x=1) + CREATED, ("resp_1", "conv_1")),
        (b"data: " + json.dumps({"response": {"id": "r"}}).encode() + b"\n\n", ("r",)),
        (sse("response.output_text.delta", delta='say "response"'), ()),
        (b'data: {"response":{"id":\n\n', ()),
        (b'data: {"response":[]}\n\n' + CREATED, ("resp_1", "conv_1")),
        (b"data: [DONE]\n\n", ()),
    ],
)
def test_the_ids_that_a_reply_tells(data: bytes, ids: tuple[str, ...]) -> None:
    assert made_in(data) == ids


class Reply:
    """As much of one as counts here."""

    def __init__(self, status: int = 200, *, stream: bool) -> None:
        self.status = status
        self.stream = stream


def claims(scene: Scene, *, stream: bool, status: int = 200, makes: bool = True) -> Any:
    ask = Ask("responses", "/v1/responses", call(), "m", objects=Objects(makes=makes))
    return scene.owners.claims(ask, ACME, TARGET, Reply(status, stream=stream))  # type: ignore[arg-type]


async def stays(waiting: Awaitable[Any], turns: int = 50) -> asyncio.Task[Any]:
    """The task, which still waits after so many turns of the loop."""
    task = asyncio.ensure_future(waiting)
    for _ in range(turns):
        await asyncio.sleep(0)
    assert not task.done()
    return task


async def test_only_the_last_event_waits_for_the_store() -> None:
    scene = Scene()
    gate = scene.store.gate = asyncio.Event()
    one = claims(scene, stream=True)
    async with asyncio.timeout(20):
        await one.see(Event(b": hello\n\n"))
        await one.see(Event(CREATED))
        await one.see(Event(sse("response.output_text.delta", delta="x")))
    last = await stays(one.see(Event(sse("response.completed", response={"id": "resp_1"}), terminator=10)))
    gate.set()
    await last
    assert scene.store.asked == 2
    assert await scene.store.owner("resp_1") == await scene.store.owner("conv_1") == HOME


async def test_a_plain_reply_waits_and_so_does_a_stream_in_one_piece() -> None:
    for stream, event in ((False, Event(b'{"id":"resp_1"}')), (True, Event(CREATED, terminator=10))):
        scene = Scene()
        gate = scene.store.gate = asyncio.Event()
        seeing = await stays(claims(scene, stream=stream).see(event))
        gate.set()
        await seeing
        assert await scene.store.owner("resp_1") == HOME


async def test_a_client_that_leaves_takes_no_claim_with_it() -> None:
    scene = Scene()
    gate = scene.store.gate = asyncio.Event()
    seeing = await stays(claims(scene, stream=False).see(Event(b'{"id":"resp_1"}')))
    seeing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await seeing
    closing = await stays(scene.owners.aclose())
    gate.set()
    await closing
    assert await scene.store.owner("resp_1") == HOME
    assert scene.lost == []


def test_what_makes_nothing_claims_nothing() -> None:
    scene = Scene()
    assert claims(scene, stream=False, makes=False) is None
    assert claims(scene, stream=False, status=400) is None
    ask = Ask("chat", "/v1/chat/completions", call(), "m")
    assert scene.owners.claims(ask, ACME, TARGET, Reply(stream=False)) is None  # type: ignore[arg-type]


# --- a store that is away -------------------------------------------------------------------------------------------


async def test_a_claim_is_repeated_until_it_is_taken() -> None:
    scene = Scene()
    scene.store.away = "timeout"
    one = claims(scene, stream=True)
    async with asyncio.timeout(20):
        await one.see(Event(CREATED, terminator=10))  # the stream goes on
    await until(lambda: scene.store.asked > 5)
    scene.store.away = None
    await until(lambda: len(scene.store) == 2)
    asked = scene.store.asked
    await scene.owners.aclose()
    assert scene.store.asked == asked  # nothing waits any more
    assert scene.lost == []


async def test_a_claim_that_waited_takes_nothing_from_who_came_first() -> None:
    scene = Scene()
    scene.store.away = "timeout"
    await scene.book("resp_1")
    await MemoryOwnership.claim(scene.store, "resp_1", Owner("beta", "up"))
    scene.store.away = None
    await scene.owners.aclose()
    with pytest.raises(NotFound):
        await scene.owners.home(naming("resp_1"), ACME)
    assert (await scene.owners.home(naming("resp_1"), BETA)) == Owner("beta", "up")


async def test_what_waits_is_bounded_and_what_is_lost_is_told() -> None:
    scene = Scene(waiting=10)
    scene.store.away = "timeout"
    await scene.book(*(f"resp_{number}" for number in range(15)))
    scene.store.away = None
    await until(lambda: bool(scene.lost))
    assert scene.lost == [5]
    assert [await scene.store.owner(f"resp_{number}") for number in (4, 5, 14)] == [None, HOME, HOME]
    scene.store.away = "stopped"
    await scene.book("resp_x", "resp_y")
    await scene.owners.aclose()
    assert scene.lost == [5, 2]


async def test_a_key_that_is_spoilt_holds_up_no_other() -> None:
    scene = Scene()
    scene.store.spoilt.add("resp_0")
    await scene.book("resp_0", "resp_1")
    await until(lambda: bool(scene.lost))
    assert scene.lost == [1]
    assert await scene.store.owner("resp_1") == HOME
    await scene.owners.aclose()


async def test_what_is_known_is_bounded() -> None:
    scene = Scene()
    await scene.book(*(f"resp_{number}" for number in range(10_500)))
    assert len(scene.owners._known) == 10_000
    assert await scene.owners.home(naming("resp_0"), ACME) == HOME  # the store still knows

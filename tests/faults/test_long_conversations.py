"""A session of any length stays within the window of its model, keeps what it must, and keeps the prompt cache warm.

Measured at the provider: what it refused, what it had cached, and which facts each prompt still stated.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.faults.agents import Provider, Turn, cost, hit_ratio, lost, provider, recall, refused, run, sizes
from tests.faults.conversation import Session, session
from tests.faults.fleet import LONG, Config, fleet, report
from tests.redis_server import RedisServer, running

pytestmark = [pytest.mark.anyio, pytest.mark.faults]

TURNS: Final = 1000 if LONG else 150
SCALE: Final = 1.0 if LONG else 0.2
"""Of all messages, and of the windows: the short form cuts as often for each hundred turns."""
WINDOW: Final = 75_000 if LONG else 15_000
SMALL: Final = 16_000 if LONG else 3_200
EVERY: Final = 5
"""So many turns a fact is planted."""
AGES: Final = (10, 25, 50, 100, 200, 400) if LONG else (10, 25, 50, 100)

STRATEGIES: Final[dict[str, dict[str, Any]]] = {
    "oldest": {},
    "per-turn": {"trim_to": 1.0},
    "masked": {"mask_tool_outputs": True},
    "summary": {"trim_strategy": "summary", "summary_model": "digest"},
}
LEAST_HITS: Final = 0.90
MOST_COST: Final = 0.30 if LONG else 0.35
"""Of the input cost of trimming at every turn. In the short form a third of the session passes before the first cut,
at the same cost for both."""


@pytest.fixture
def server(redis_binary: object, tmp_path: Path) -> Iterator[RedisServer]:
    with running(tmp_path) as found:
        yield found


def key(name: str) -> str:
    """Prompt caches are per key: what one of them sent must not warm another's."""
    return f"sk-{name}-0123456789abcdef"


def changed(there: Provider) -> Any:
    """A tenant, a provider's account and a model for each strategy; and one account for summaries."""
    known = {"context_window": WINDOW, "max_output_tokens": 1_000}

    def change(config: Config, number: int) -> Config:
        accounts = {name: there.settings(key(name), **known) for name in STRATEGIES}
        digest = there.settings(key("digest"), context_window=1_000_000, max_output_tokens=8_000)
        models = [{"name": name, "targets": [f"{name}/window-{WINDOW}"]} for name in STRATEGIES]
        tenants = [{**one, "context": STRATEGIES[one["name"]]} for one in config["tenants"]]
        return {
            **config,
            "providers": {**accounts, "digest": digest},
            "models": [*models, {"name": "digest", "targets": ["digest/digest"]}],
            "tenants": tenants,
        }

    return change


async def test_a_session_of_any_length_fits_and_its_prompt_cache_stays_warm(server: RedisServer) -> None:
    talk = session(1, TURNS, scale=SCALE, every=EVERY)
    async with provider() as there:
        with fleet(server, 1, {name: {} for name in STRATEGIES}, change=changed(there)) as found:
            tokens = sizes(talk)
            runs = [run(found.ports[0], name, talk, tokens, [there.prompts[key(name)]]) for name in STRATEGIES]
            done = dict(zip(STRATEGIES, await asyncio.gather(*runs), strict=True))
        digests = there.prompts[key("digest")]
    plotted(done)
    for name, turns in done.items():
        judged(name, turns, talk)
    each_turn = cost(turn.prompt for turn in done["per-turn"])
    for name in ("oldest", "masked", "summary"):
        hits = hit_ratio(done[name])
        own = cost(turn.prompt for turn in done[name]) + (cost(digests) if name == "summary" else 0)
        report(f"context {name}: prompt tokens cached", TURNS, round(hits, 3), f">= {LEAST_HITS}")
        report(f"context {name}: input cost / trimming each turn", TURNS, round(own / each_turn, 3), MOST_COST)
        assert hits >= LEAST_HITS
        assert own <= MOST_COST * each_turn
    report("context per-turn: prompt tokens cached", TURNS, round(hit_ratio(done["per-turn"]), 3), "-")
    share = cost(digests) / (cost(digests) + cost(turn.prompt for turn in done["summary"]))
    report("context summary: share of its input cost that made the summaries", len(digests), round(share, 3), "-")
    without = sum(turn.trimmed.startswith("oldest;") for turn in done["summary"])
    report("context summary: cut prompts without a summary", len(digests), without, 0)
    assert len(digests) == sum(turn.cut for turn in done["summary"])  # one for each cut, and never the same again
    assert {one.status for one in digests} == {200}
    assert without == 0
    # The mock's digest keeps the facts that it was given: that is an assumption, and no figure for a real model.
    kept = {name: recall(turns, talk.planted)["all"] for name, turns in done.items()}
    report("context: recall of all facts, over all prompts", len(talk.planted), kept, "-")
    assert kept["summary"] > kept["oldest"]


def judged(name: str, turns: list[Turn], talk: Session) -> None:
    """What holds for every strategy."""
    cuts = sum(turn.cut for turn in turns)
    missing = lost(turns, talk.pinned)
    report(f"context {name}: prompts refused by the provider", len(turns), refused(turns), 0)
    report(f"context {name}: prompts without a fact of the system prompt or the task", len(turns), missing, 0)
    report(f"context {name}: cuts", len(turns), cuts, "-")
    report(f"context {name}: mean prompt", len(turns), sum(turn.prompt.tokens for turn in turns) // len(turns), "-")
    report(f"context {name}: recall by age in turns", len(talk.planted), recall(turns, talk.planted, AGES), "-")
    assert refused(turns) == 0
    assert missing == 0
    assert cuts > 0
    assert max(turn.prompt.tokens for turn in turns) <= WINDOW < turns[-1].sent
    assert all(len(turn.tries) == 1 for turn in turns)
    fresh = {fact.turn: fact.code for fact in talk.planted}
    assert all(fresh[turn.number] in turn.prompt.codes for turn in turns if turn.number in fresh)


def plotted(done: dict[str, list[Turn]]) -> None:
    """The series for `tests.faults.plot`, if somebody wants them: one line for each request."""
    path = os.environ.get("BREAKWATER_PLOT")
    if not path:
        return
    with Path(path).open("w") as file:
        for name, turns in done.items():
            for turn in turns:
                line = {"turn": turn.number, "client": turn.sent, "upstream": turn.prompt.tokens, "cut": turn.cut}
                print(json.dumps({"strategy": name, "window": WINDOW, **line}), file=file)


async def test_a_failover_to_a_smaller_model_trims_again(server: RedisServer) -> None:
    turns, at = (TURNS // 4, TURNS // 8) if LONG else (60, 40)
    talk = session(2, turns, scale=SCALE, every=EVERY)
    async with provider() as big, provider() as small:

        def change(config: Config, number: int) -> Config:
            windows = {"big": (big, WINDOW), "small": (small, SMALL)}
            accounts = {
                name: there.settings(key("t"), context_window=window, max_output_tokens=1_000)
                for name, (there, window) in windows.items()
            }
            targets = [f"{name}/window-{window}" for name, (_, window) in windows.items()]
            return {**config, "providers": accounts, "models": [{"name": "t", "targets": targets}]}

        def between(turn: int) -> None:
            if turn == at:
                big.outage()

        with fleet(server, 1, {"t": {}}, change=change) as found:
            places = [big.prompts[key("t")], small.prompts[key("t")]]
            done = await run(found.ports[0], "t", talk, sizes(talk), places, between)
    before, after = done[:at], done[at:]
    report("context failover: answered by the smaller model", len(after), len(after), len(after))
    report("context failover: prompts refused as too long", len(done), refused(done), 0)
    report(
        "context failover: most tokens for the smaller model", len(after), max(t.prompt.tokens for t in after), SMALL
    )
    assert {turn.prompt.model for turn in before} == {f"window-{WINDOW}"}
    assert {turn.prompt.model for turn in after} == {f"window-{SMALL}"}
    assert refused(done) == lost(done, talk.pinned) == 0
    assert before[-1].prompt.tokens > SMALL  # what the big one got would not have fitted
    assert [turn.trimmed for turn in before] != [turn.trimmed for turn in after]


async def test_an_unknown_window_is_met_once(server: RedisServer) -> None:
    turns = TURNS // 4 if LONG else 100
    talk = session(3, turns, scale=SCALE, every=EVERY)
    async with provider() as there:

        def change(config: Config, number: int) -> Config:
            models = [{"name": "t", "targets": [f"up/window-{WINDOW}"]}]
            return {**config, "providers": {"up": there.settings(key("t"))}, "models": models}

        with fleet(server, 1, {"t": {}}, change=change) as found:
            done = await run(found.ports[0], "t", talk, sizes(talk), [there.prompts[key("t")]])
    tries = [len(turn.tries) for turn in done]
    report("context unknown window: prompts that the provider refused", len(done), refused(done), 1)
    report("context unknown window: prompt tokens cached", len(done), round(hit_ratio(done), 3), "-")
    assert refused(done) == 1
    assert sorted(tries)[-2:] == [1, 2]
    assert lost(done, talk.pinned) == 0
    assert done[-1].sent > WINDOW

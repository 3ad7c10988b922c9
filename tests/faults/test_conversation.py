"""The sessions that the campaign sends are what it takes them for."""

from __future__ import annotations

import json
import statistics
from itertools import pairwise

from proxy.providers.mock.counting import real_counts
from tests.faults.agents import sizes
from tests.faults.conversation import RESULT_TOKENS, session


def test_a_session_is_made_from_its_seed_and_only_grows() -> None:
    talk = session(1, 40, scale=0.2)
    assert talk == session(1, 40, scale=0.2)
    assert talk != session(2, 40, scale=0.2)
    bodies = list(talk.bodies("m"))
    assert len(bodies) == 41
    for before, after in pairwise(bodies):
        assert after.startswith(before[:-2] + b",")
    assert json.loads(bodies[-1])["messages"][:2] == [json.loads(message) for message in talk.opening]


def test_a_provider_accepts_each_turn_of_it_and_its_size_is_that_of_all_turns() -> None:
    tokens = sizes(session(1, 60, scale=0.2))
    assert len(tokens) == 61
    assert tokens == sorted(tokens)


def test_each_fact_is_stated_once_where_it_is_said_to_be() -> None:
    talk = session(3, 60, scale=0.2, every=5)
    assert len(talk.pinned) == 6
    assert {fact.where for fact in talk.planted} == {"tool", "assistant", "user"}
    said = [b"".join(turn).decode() for turn in (talk.opening, *talk.turns)]
    for fact in talk.facts:
        assert [fact.text in turn for turn in said].count(True) == 1
        turn = talk.turns[fact.turn - 1] if fact.turn else talk.opening
        roles = [json.loads(message)["role"] for message in turn if fact.text in message.decode()]
        assert roles == ["user" if fact.where == "task" else fact.where]
    assert len({fact.code for fact in talk.facts}) == len({fact.place for fact in talk.facts}) == len(talk.facts)


def test_results_of_tools_have_the_mean_that_the_figures_rest_on() -> None:
    count = real_counts()
    results = [
        count(message["content"])
        for turn in session(1, 1000).turns
        for message in map(json.loads, turn)
        if message["role"] == "tool"
    ]
    assert 0.9 * RESULT_TOKENS < statistics.mean(results) < 1.1 * RESULT_TOKENS
    assert max(results) > 4 * RESULT_TOKENS
    assert min(results) < RESULT_TOKENS / 4

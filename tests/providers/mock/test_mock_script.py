"""Scripts: what they do to an answer, and what is said about a wrong one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mock_wire import CALM

from proxy.providers.mock import script as script_module
from proxy.providers.mock.handler import Mock
from proxy.providers.mock.script import Problem, ScriptError, parse_script, read_script
from proxy.transport.answer import Answer, End

SAMPLE = Path(script_module.__file__).with_name("script.example.yaml")


def scripted(text: str | bytes) -> Mock:
    return Mock(lambda words: len(words.split()), script=parse_script(text))


def ask(mock: Mock, model: str = "m", path: str = "/v1/chat/completions", stream: bool = False) -> Answer:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    return mock.handle(b"POST", path.encode(), [], json.dumps(body).encode()).answer


def body_of(answer: Answer) -> bytes:
    return b"".join(data for _, data in answer.steps)


def test_the_sample_does_what_its_comments_say() -> None:
    mock = Mock(lambda words: len(words.split()), script=read_script(SAMPLE))
    assert [ask(mock).status for _ in range(3)] == [429, 429, 200]
    flaky = ask(mock, "mock/flaky-1")
    assert (flaky.delay, flaky.end, len(body_of(flaky))) == (0.2, End.RESET, 120)
    assert flaky.length is not None
    assert flaky.length > 120
    assert [ask(mock, "broken").status for _ in range(4)] == [503, 503, 503, 200]
    gateway = ask(mock, "gateway")
    assert gateway.headers.count((b"content-type", b"text/html")) == 1
    assert [name for name, _ in gateway.headers].count(b"content-type") == 1
    told = ask(mock, "half-told", stream=True)
    assert (told.end, told.length, [delay for delay, _ in told.steps]) == (End.STALL, None, [0, 0.05, 0])
    assert body_of(told).count(b"data: {") == 2
    dribble = ask(mock, "dribble", stream=True)
    assert body_of(dribble) == body_of(ask(Mock(lambda words: len(words.split())), "dribble", stream=True))
    assert {len(data) for _, data in dribble.steps[:-1]} == {7}
    assert {delay for delay, _ in dribble.steps[1:]} == {0.005}


def test_the_first_step_that_matches_and_has_uses_left_is_taken() -> None:
    mock = scripted(
        """
        - {match: {model: "gpt-*"}, status: 500}
        - {match: {path: "/v1/emb*"}, times: always, status: 502}
        - {times: 2, status: 503}
        """
    )
    assert [ask(mock, "x").status, ask(mock, "gpt-1").status] == [503, 500]
    assert ask(mock, path="/v1/embeddings").status == 502
    assert [ask(mock, "gpt-1").status, ask(mock, "gpt-1").status] == [503, 200]
    assert ask(mock, path="/v1/embeddings").status == 502


def test_a_mock_without_its_script_answers_equal_requests_from_memory_and_with_it_does_not() -> None:
    mock = scripted("- {match: {model: other}, status: 500}\n- {status: 418}")
    assert [ask(mock).status, ask(mock).status] == [418, 200]
    assert ask(mock) is not ask(mock)


@pytest.mark.parametrize(
    ("then", "end", "whole"),
    [("complete", End.COMPLETE, True), ("reset", End.RESET, False), ("close", End.CLOSE, False)],
)
def test_a_cut_with_each_end(then: str, end: End, whole: bool) -> None:
    answer = ask(scripted(f"- {{cut_at: 10, then: {then}}}"))
    assert (body_of(answer), answer.end, answer.whole) == (b'{"id":"cha', end, whole)
    assert answer.length == (10 if whole else ask(scripted("- {times: 1}")).length)


def test_a_complete_body_and_then_a_reset_is_a_whole_answer() -> None:
    answer = ask(scripted("- {json: {a: 1}, then: reset}"))
    assert (answer.whole, answer.length, answer.end) == (True, 7, End.RESET)


def test_bodies_and_headers() -> None:
    answer = ask(scripted('- {status: 206, body: "häh", headers: {X-One: [a, b], retry-after: 2}}'))
    assert (answer.status, body_of(answer)) == (206, "häh".encode())
    assert [value for name, value in answer.headers if name == b"x-one"] == [b"a", b"b"]
    assert (b"retry-after", b"2") in answer.headers
    assert ask(scripted("- {status: 204}")).steps == ()
    text = """
- stream:
  - "[DONE]"
  - data: "two\\nlines"
  - {event: ping, data: {t: 1}}
  - data: [1, null]
  - raw: "half"
"""
    answer = ask(scripted(text))
    assert [data for _, data in answer.steps] == [
        b"data: [DONE]\n\n",
        b"data: two\ndata: lines\n\n",
        b'event: ping\ndata: {"t":1}\n\n',
        b"data: [1,null]\n\n",
        b"half",
    ]


def test_the_books_of_a_split_answer_count_whole_pieces_only() -> None:
    mock = scripted("- {split: 50}\n- {times: 1}")
    cut, whole = ask(mock, "bench-30", stream=True), ask(mock, "bench-30", stream=True)
    entries = list(mock.ledger._entries)
    assert entries[0].billed[-1] == entries[1].billed[-1] > 0
    assert list(entries[0].billed) == sorted(entries[0].billed)
    sizes = [len(data) for _, data in whole.steps]
    for i in range(len(cut.steps)):
        complete = sum(sum(sizes[: k + 1]) <= 50 * (i + 1) for k in range(len(sizes)))
        expected = entries[1].billed[complete - 1] if complete else 0
        if i < len(cut.steps) - 1:
            assert entries[0].billed[i] == expected


WRONG = r"""
- match: {model: 5, colour: x}
  status: 99
  body: a
  json: {a: 1, a: 2}
- times: 0
  delay_ms: -1
  then: explode
- stream: [{delay_ms: 5}, {raw: x, data: y}, {raw: ""}]
  headers: {content-length: 5, "bad name": x, ok: "a\nb"}
- status: 204
  body: x
- nothing
- {cut_at: yes, split: 0, times: often, times: 2}
- json: {d: !!set {a, b}}
"""


def test_every_mistake_is_told_at_once_with_its_place() -> None:
    with pytest.raises(ScriptError) as told:
        parse_script(WRONG)
    found = [(p.line, p.column, p.path) for p in told.value.problems]
    assert found == [
        (2, 18, "steps[0].match.model"),
        (2, 21, "steps[0].match.colour"),
        (3, 11, "steps[0].status"),
        (5, 9, "steps[0].json"),
        (6, 10, "steps[1].times"),
        (7, 13, "steps[1].delay_ms"),
        (8, 9, "steps[1].then"),
        (9, 12, "steps[2].stream[0]"),
        (9, 42, "steps[2].stream[1].data"),
        (9, 52, "steps[2].stream[2].raw"),
        (10, 13, "steps[2].headers.content-length"),
        (10, 32, "steps[2].headers.bad name"),
        (10, 51, "steps[2].headers.ok"),
        (12, 9, "steps[3].body"),
        (13, 3, "steps[4]"),
        (14, 12, "steps[5].cut_at"),
        (14, 24, "steps[5].split"),
        (14, 34, "steps[5].times"),
        (14, 41, "steps[5].times"),
        (15, 9, "steps[6].json"),
    ]
    assert str(told.value.problems[2]) == "3:11: steps[0].status: must be a whole number from 200 to 599"


def test_a_key_twice_inside_json_is_told() -> None:
    with pytest.raises(ScriptError, match=r"2:17: steps\[0\]\.json\.a\[0\]\.b: is there twice"):
        parse_script("- json:\n    {a: [{b: 1, b: 2}]}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "a: [",
        "- \x00",
        b"\xff\xfe\xfa",
        "- {json: &a [*a]}",
        "[" * 1200,
        "- {json: 2026-99-99}",
        "- !!python/name:os.x",
    ],
)
def test_what_is_no_script_is_refused(text: Any) -> None:
    with pytest.raises(ScriptError):
        parse_script(text)


@CALM
@given(st.text(alphabet="-: {}[]\n,'\"&*!|>abmatchjsonstatus0123456789", max_size=60))
def test_any_text_is_a_script_or_a_script_error(text: str) -> None:
    problems: list[Problem] = []
    try:
        parse_script("- " + text)
    except ScriptError as error:
        problems = error.problems
    assert all(problem.line >= 1 and problem.column >= 1 for problem in problems)

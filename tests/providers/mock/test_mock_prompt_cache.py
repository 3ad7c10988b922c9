"""The mock's prompt cache, window and digest: what a long conversation is measured with."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mock_wire import CALM

from proxy.providers.mock.counting import real_counts
from proxy.providers.mock.handler import Mock
from proxy.providers.mock.prefixes import LEAST, STEP, Prefixes, Unit
from proxy.providers.mock.refusal import Refusal
from proxy.providers.mock.responses import Stored

COUNT = real_counts()
KEY = b"Bearer sk-one"
SYSTEM = {"role": "system", "content": "Rule: be brief. " * 400}
USER = {"role": "user", "content": "What now?"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def mock() -> Mock:
    return Mock(COUNT, prompt_cache=True)


def post(mock: Mock, body: dict[str, Any], path: str = "/v1/chat/completions", key: bytes = KEY) -> Any:
    headers = [(b"authorization", key)]
    serving = mock.handle(b"POST", path.encode(), headers, json.dumps(body).encode())
    return serving.answer


def read(answer: Any) -> Any:
    return json.loads(b"".join(data for _, data in answer.steps))


def cached(mock: Mock, messages: list[Any], key: bytes = KEY, **more: Any) -> tuple[int, int]:
    """(cached tokens, prompt tokens) of a chat."""
    usage = read(post(mock, {"model": "m", "messages": messages, **more}, key=key))["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]


def whole(tokens: int) -> int:
    return tokens // STEP * STEP if tokens >= LEAST else 0


# -- by the units ----------------------------------------------------------------------------------------------------


def unit(role: str, text: str) -> Unit:
    return Unit.of([role, text], 2 + len(text), role, 2, text)


def expected(prompt: list[Unit], earlier: list[list[Unit]]) -> int:
    """Compares with each earlier prompt, one after the other."""
    best = 0
    for other in earlier:
        shared = 0
        for mine, its in zip(prompt, other, strict=False):
            if mine.digest != its.digest:
                if mine.head == its.head:
                    same = 0
                    while same < min(len(mine.text), len(its.text)) and mine.text[same] == its.text[same]:
                        same += 1
                    shared += 2 + (same if same == len(mine.text) else max(same - 1, 0))
                break
            shared += mine.tokens
        best = max(best, shared)
    return whole(best)


TEXTS = st.lists(st.sampled_from(["a", "b", "ab"]), max_size=4).map(lambda parts: "".join(part * 300 for part in parts))
PROMPTS = st.lists(st.builds(unit, st.sampled_from(["user", "tool"]), TEXTS), max_size=5)


@CALM
@given(st.lists(PROMPTS, max_size=12))
def test_what_is_cached_is_the_most_that_any_earlier_prompt_has_in_common(prompts: list[list[Unit]]) -> None:
    prefixes = Prefixes()
    for number, prompt in enumerate(prompts):
        assert prefixes.cached(b"o", prompt, len) == expected(prompt, prompts[:number])


@CALM
@given(st.lists(PROMPTS, max_size=30), st.integers(1, 6), st.integers(0, 2000))
def test_the_memory_is_bounded_and_what_is_told_is_never_too_much(
    prompts: list[list[Unit]], units: int, characters: int
) -> None:
    prefixes = Prefixes(units, characters)
    for number, prompt in enumerate(prompts):
        assert prefixes.cached(b"o", prompt, len) <= expected(prompt, prompts[:number])
        assert len(prefixes) <= units


def test_what_was_used_last_is_kept() -> None:
    prefixes = Prefixes(units=4)
    first, second, third = ([unit("user", letter * 3000)] for letter in "abc")
    for prompt in (first, second, first, third):
        prefixes.cached(b"o", prompt, len)
    assert prefixes.cached(b"o", first, len) > 0
    assert prefixes.cached(b"p", third, len) == 0
    assert prefixes.cached(b"o", second, len) == 0


# -- in the usage ----------------------------------------------------------------------------------------------------


def test_a_conversation_that_grows_is_cached_up_to_what_is_new(mock: Mock) -> None:
    messages = [SYSTEM, USER]
    assert cached(mock, messages)[0] == 0
    for turn in range(4):
        before = cached(mock, messages)[1] - 3  # the opening of the reply stands after the messages
        messages = [*messages, {"role": "assistant", "content": f"Turn {turn}. " + "Words. " * 90}, USER]
        assert cached(mock, messages)[0] == whole(before)


def test_a_message_that_differs_counts_as_far_as_it_is_the_same(mock: Mock) -> None:
    begin = "The same words again. " * 500
    cached(mock, [{"role": "user", "content": begin + "and then these"}])
    hit, total = cached(mock, [{"role": "user", "content": begin + "but then others, and more of them."}])
    assert whole(total - 30) <= hit <= whole(COUNT(begin) + 4)
    assert cached(mock, [{"role": "system", "content": begin}])[0] == 0


def test_tools_stand_before_everything_and_white_space_is_nothing(mock: Mock) -> None:
    cached(mock, [SYSTEM, USER], tools=[TOOL])
    assert cached(mock, [SYSTEM, USER], tools=[TOOL, TOOL])[0] == 0
    hit, total = cached(mock, [dict(reversed(SYSTEM.items())), USER], tools=[TOOL])
    assert hit == whole(total - 3)


def test_keys_and_models_do_not_share(mock: Mock) -> None:
    messages = [SYSTEM, USER]
    assert cached(mock, messages)[0] == 0
    assert cached(mock, messages, key=b"Bearer sk-two")[0] == 0
    assert cached(mock, messages, model="other")[0] == 0
    assert cached(mock, messages, model="mock/m")[0] > 0


def test_streams_responses_and_the_books_tell_the_same(mock: Mock) -> None:
    asked = {"model": "m", "input": [SYSTEM, USER], "instructions": "Be right."}
    first = read(post(mock, asked, "/v1/responses"))
    again = read(post(mock, asked, "/v1/responses"))
    assert first["usage"]["input_tokens_details"]["cached_tokens"] == 0
    told = again["usage"]["input_tokens_details"]["cached_tokens"]
    assert told == whole(again["usage"]["input_tokens"] - 3)
    follow = read(post(mock, {**asked, "previous_response_id": first["id"]}, "/v1/responses"))
    assert follow["usage"]["input_tokens_details"]["cached_tokens"] == 0
    cached(mock, [SYSTEM, USER])
    stream = post(
        mock, {"model": "m", "messages": [SYSTEM, USER], "stream": True, "stream_options": {"include_usage": True}}
    )
    chunk = json.loads(stream.steps[-2][1].removeprefix(b"data: "))
    streamed = chunk["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert streamed == whole(chunk["usage"]["prompt_tokens"] - 3)
    books = mock.ledger.read()
    assert [entry["cached_tokens"] for entry in books["entries"]] == [0, told, 0, 0, streamed]
    assert books["totals"]["cached_tokens"] == told + streamed


def test_what_was_refused_was_never_sent(mock: Mock) -> None:
    for changed in ({"model": "window-50"}, {"model": "m", "n": 1000}):
        assert post(mock, {"messages": [SYSTEM, USER], **changed}).status == 400
    assert post(mock, {"messages": [USER], "model": "window-50"}).status == 200
    assert cached(mock, [SYSTEM, USER])[0] == 0
    assert mock.ledger.read()["totals"]["cached_tokens"] == 0


def test_without_it_nothing_is_cached_and_equal_requests_get_equal_bytes() -> None:
    plain = Mock(COUNT)
    assert [cached(plain, [SYSTEM, USER])[0] for _ in range(2)] == [0, 0]


def test_a_turn_of_a_long_conversation_costs_little(mock: Mock) -> None:
    """By processor time against the first turn, which counts everything: a busy machine slows both."""
    result = "".join(f"{number} lines of output; " for number in range(1000))  # beyond what is kept as text
    turns = [{"role": "user", "content": f"{number}: {result}"} for number in range(21)]
    began = time.process_time()
    cached(mock, turns[:-1])
    first = time.process_time() - began
    began = time.process_time()
    cached(mock, turns)
    assert time.process_time() - began < first / 3


# -- the window ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "param", "member"),
    [
        ("/v1/chat/completions", "messages", {"messages": [SYSTEM, USER]}),
        ("/v1/completions", "prompt", {"prompt": SYSTEM["content"]}),
        ("/v1/responses", "input", {"input": SYSTEM["content"]}),
        ("/v1/embeddings", "input", {"input": SYSTEM["content"]}),
    ],
)
def test_a_window_is_refused_with_both_numbers(mock: Mock, path: str, param: str, member: dict[str, Any]) -> None:
    answer = post(mock, {"model": "window-1000", **member}, path)
    error = read(answer)["error"]
    usage = read(post(mock, {"model": "m", **member}, path))["usage"]
    tokens = usage.get("prompt_tokens", usage.get("input_tokens"))
    assert (answer.status, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert error["message"].startswith(
        f"This model's maximum context length is 1000 tokens. However, your messages resulted in {tokens} tokens."
    )
    assert post(mock, {"model": f"window-{tokens}", **member}, path).status == 200


# -- the digest ------------------------------------------------------------------------------------------------------

FACTS = ["The code of North Pier is K7-QX.", "The code of the old wall is 99.", "The code of Quay 3 is ab_c."]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_a_digest_says_the_facts_of_its_prompt_once_each(mock: Mock, path: str) -> None:
    text = f"{FACTS[0]} And so on.\n{FACTS[1]}{FACTS[2]} {FACTS[0]} The code of nothing"
    members = {"messages": [{"role": "user", "content": text}], "prompt": text, "input": text}
    answer = read(post(mock, {"model": "digest", **members}, path))
    said = answer["output"][0]["content"][0] if "output" in answer else answer["choices"][0]
    assert (said["text"] if "text" in said else said["message"]["content"]).split("\n") == FACTS


def test_a_digest_keeps_the_newest_facts_within_the_words_that_it_is_given(mock: Mock) -> None:
    for words, kept in ((100, FACTS), (15, FACTS[1:]), (14, FACTS[2:]), (1, ["No codes were stated."])):
        messages = [
            {"role": "system", "content": f"Sum up. At most {words} words."},
            {"role": "user", "content": " ".join([*FACTS, FACTS[0]])},
        ]
        answer = read(post(mock, {"model": "digest", "messages": messages}))
        assert answer["choices"][0]["message"]["content"].split("\n") == kept


def test_a_digest_is_bounded_by_the_maximum_of_the_request(mock: Mock) -> None:
    asked = {"model": "digest", "messages": [{"role": "user", "content": " ".join(FACTS)}], "max_tokens": 14}
    choice = read(post(mock, asked))["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith(FACTS[0])
    assert FACTS[2] not in choice["message"]["content"]
    nothing = read(post(mock, {"model": "digest", "messages": [USER]}))
    assert nothing["choices"][0]["message"]["content"] == "No codes were stated."


def test_stored_responses_are_bounded_by_their_prompts() -> None:
    stored = Stored(most=3, tokens=100)
    for number, tokens in enumerate((40, 40, 40, 500, 30, 30, 30, 1)):
        stored.add({"id": f"resp_{number}"}, [number], tokens)
        assert stored.get(f"resp_{number}")[1] == [number]
    for number in (5, 6, 7):
        assert stored.get(f"resp_{number}")[0] == {"id": f"resp_{number}"}
    for number in range(5):
        with pytest.raises(Refusal):
            stored.get(f"resp_{number}")
    stored.remove("resp_6")
    stored.add({"id": "resp_8"}, [], 69)
    assert stored.get("resp_5")
    assert stored.get("resp_7")


def test_a_call_costs_in_a_prompt_what_it_cost_as_an_answer(mock: Mock) -> None:
    asked = {"model": "m", "messages": [USER], "tools": [TOOL], "tool_choice": "required"}
    answer = read(post(mock, asked))
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": ""}
    turn = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, result]
    frames = 2 * 3 + COUNT("assistant") + COUNT("tool")
    assert cached(mock, turn)[1] - cached(mock, [USER])[1] - frames == answer["usage"]["completion_tokens"]

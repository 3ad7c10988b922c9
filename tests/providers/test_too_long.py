"""Prompts that are too long, in the vendors' own words; and what only sounds like it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.providers.refusals import meaning_in, too_long_in
from proxy.types import TooLong


def openai(message: str, **members: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": "messages", **members}}


def flat(message: str, **members: Any) -> dict[str, Any]:
    return {"object": "error", "message": message, "type": "BadRequestError", "param": None, "code": 400, **members}


RESULTED = "This model's maximum context length is 128000 tokens. However, your messages resulted in 130011 tokens."
REQUESTED = "This model's maximum context length is {} tokens. However, you requested {} tokens {}. Please reduce it."
TOO_LONG: list[tuple[str, Any, TooLong]] = [
    ("openai", openai(RESULTED, code="context_length_exceeded"), TooLong(128000, 130011)),
    ("openai without a code", openai(RESULTED, code=None), TooLong(128000, 130011)),
    (
        "openai, with the output",
        openai(REQUESTED.format(8192, 9000, "(8000 in the messages, 1000 in the completion)")),
        TooLong(8192, 9000, 1000),
    ),
    (
        "openai, with functions",
        openai(
            REQUESTED.format(8192, 9000, "(7000 in the messages, 1000 in the functions, and 1000 in the completion)")
        ),
        TooLong(8192, 9000, 1000),
    ),
    (
        "openai completions",
        openai(REQUESTED.format("4,097", "4,197", "(97 in your prompt; 4,100 for the completion)")),
        TooLong(4097, 4197, 4100),
    ),
    (
        "openai responses",
        openai("Your input exceeds the context window of this model. Please adjust your input and try again."),
        TooLong(),
    ),
    (
        "anthropic",
        {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": "prompt is too long: 210000 tokens > 200000 maximum"},
        },
        TooLong(200000, 210000),
    ),
    (
        "anthropic, with the output",
        openai(
            "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000, decrease input length or "
            "`max_tokens` and try again"
        ),
        TooLong(200000, 210000, 20000),
    ),
    (
        "gemini",
        [
            {
                "error": {
                    "code": 400,
                    "message": "The input token count (1100000) exceeds the maximum number of tokens allowed "
                    "(1048576).",
                    "status": "INVALID_ARGUMENT",
                }
            }
        ],
        TooLong(1048576, 1100000),
    ),
    (
        "gemini, with separators",
        {"error": {"message": "The input token count exceeds the maximum number of tokens allowed 1,048,576."}},
        TooLong(1048576),
    ),
    (
        "vllm",
        flat(
            "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens in the messages, "
            "Please reduce the length of the messages."
        ),
        TooLong(4096, 5000),
    ),
    (
        "vllm, with the output",
        flat(
            "You passed 5001 input tokens and requested 100 output tokens. However, the model's context length is only "
            "4096 tokens, resulting in a maximum input length of 3996 tokens. Please reduce the length of the input."
        ),
        TooLong(4096, 5101, 100),
    ),
    (
        "vllm blames the output, and tells the input",
        openai(
            "'max_tokens' or 'max_completion_tokens' is too large: 1000. This model's maximum context length is 4096 "
            "tokens and your request has 3500 input tokens (1000 > 4096 - 3500).",
            param="max_tokens",
        ),
        TooLong(4096, 4500, 1000),
    ),
    (
        "vllm engine",
        flat(
            "The decoder prompt (length 5000) is longer than the maximum model length of 4096. Make sure that it fits."
        ),
        TooLong(4096, 5000),
    ),
    (
        "sglang",
        flat("The input (5000 tokens) is longer than the model's context length (4096 tokens)."),
        TooLong(4096, 5000),
    ),
    (
        "sglang, with the output",
        flat(
            "Requested token count exceeds the model's maximum context length of 4096 tokens. You requested a total of "
            "5000 tokens: 4000 tokens from the input messages and 1000 tokens for the completion."
        ),
        TooLong(4096, 5000, 1000),
    ),
    (
        "mistral",
        {
            "object": "error",
            "message": "Prompt contains 40000 tokens and 0 draft tokens, too large for model with 32768 maximum "
            "context length",
            "type": "invalid_request_error",
            "param": None,
            "code": "3051",
        },
        TooLong(32768, 40000),
    ),
    ("groq", openai("Please reduce the length of the messages or completion."), TooLong()),
    (
        "groq, by its code",
        openai("Something else.", code="context_length_exceeded"),
        TooLong(),
    ),
    (
        "openrouter",
        {
            "error": {
                "message": "This endpoint's maximum context length is 131072 tokens. However, you requested about "
                "140000 tokens (130000 of text input, 10000 in the output). Please reduce the length of either one.",
                "code": 400,
                "metadata": {"provider_name": None},
            }
        },
        TooLong(131072, 140000, 10000),
    ),
    ("bedrock", {"message": "Input is too long for requested model."}, TooLong()),
    (
        "llama.cpp",
        {
            "error": {
                "code": 400,
                "type": "exceed_context_size_error",
                "message": "the request exceeds the available context size, try increasing it",
                "n_prompt_tokens": 9000,
                "n_ctx": 8192,
            }
        },
        TooLong(8192, 9000),
    ),
    (
        "llama.cpp, flat",
        {
            "code": 400,
            "type": "exceed_context_size_error",
            "message": "too much",
            "n_prompt_tokens": 9000,
            "n_ctx": 8192,
        },
        TooLong(8192, 9000),
    ),
    (
        "llama.cpp in words",
        openai("request (9000 tokens) exceeds the available context size (8192 tokens), try increasing it"),
        TooLong(8192, 9000),
    ),
    (
        "cohere",
        {"message": "too many tokens: total number of tokens in the prompt cannot exceed 4081"},
        TooLong(4081),
    ),
    (
        "cohere, with both",
        {"message": "too many tokens: total number of tokens in the prompt cannot exceed 4081 - received 5000."},
        TooLong(4081, 5000),
    ),
    (
        "xai",
        {
            "code": "Client specified an invalid argument",
            "error": "This model's maximum prompt length is 131072 but the request contains 140000 tokens.",
        },
        TooLong(131072, 140000),
    ),
    (
        "fireworks",
        openai("The prompt is too long: 140000, model maximum context length: 131071"),
        TooLong(131071, 140000),
    ),
    (
        "tgi",
        {
            "error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4097. Given: 5000 `inputs` "
            "tokens and 100 `max_new_tokens`",
            "error_type": "validation",
        },
        TooLong(4097, 5100, 100),
    ),
    ("nothing but the words", openai("PROMPT IS TOO LONG"), TooLong()),
    (
        "apostrophes of a typesetter",
        openai("This model\u2019s maximum context length is 4\u202f096 tokens."),
        TooLong(4096),
    ),
    ("numbers that are none", openai("prompt is too long: " + "9" * 400 + " tokens > 5 maximum"), TooLong()),
    (
        "fields that are no counts",
        {"error": {"type": "exceed_context_size_error", "message": 7, "n_prompt_tokens": -1, "n_ctx": True}},
        TooLong(),
    ),
]


@pytest.mark.parametrize(("body", "figures"), [case[1:] for case in TOO_LONG], ids=[case[0] for case in TOO_LONG])
def test_a_prompt_that_is_too_long_is_recognised_with_its_figures(body: Any, figures: TooLong) -> None:
    raw = json.dumps(body).encode()
    assert too_long_in(raw) == figures
    assert meaning_in(raw) == "context_length"


LIMIT = "Rate limit reached for gpt-4o on tokens per min (TPM): Limit 30000, Requested 40000. {}"
OTHERS: list[tuple[Any, str]] = [
    (
        openai(
            "max_tokens is too large: 100000. This model supports at most 16384 completion tokens, whereas you "
            "provided 100000.",
            param="max_tokens",
            code="invalid_value",
        ),
        "request",
    ),
    (openai("max_tokens: 100000 > 64000, which is the maximum allowed number of output tokens for it"), "request"),
    (
        openai("`max_tokens` must be less than or equal to `8192`, the maximum for it, less than the `context_window`"),
        "request",
    ),
    (openai("max_tokens exceeds the model's maximum context length of 4096.", param="max_tokens"), "request"),
    (openai("max_output_tokens: 9 is not below the maximum context length.", param="max_output_tokens"), "request"),
    (
        openai("Invalid 'messages[0].content': string too long. Expected a string with maximum length 1048576."),
        "request",
    ),
    (openai("The context of this window is not supported."), "request"),
    (openai("'context_length' is not a parameter."), "request"),
    ({"error": {"message": LIMIT.format(""), "type": "tokens", "code": "rate_limit_exceeded"}}, "rate"),
    (
        {"error": {"message": LIMIT.format("Please reduce the length of the messages."), "type": "rate_limit_error"}},
        "rate",
    ),
    ({"error": {"message": "prompt is too long", "type": "server_error"}}, "fault"),
    ({"error": {"message": "prompt is too long", "code": "insufficient_quota"}}, "quota"),
    ({"error": {"message": ["prompt is too long"]}}, "fault"),
    ({"error": None, "message": 7}, "fault"),
    ([{"error": {"message": "prompt is too long"}}] * 2, "fault"),
    ({"error": {"message": "x" * 5000 + "prompt is too long"}}, "fault"),
    ({}, "fault"),
]


@pytest.mark.parametrize(("body", "meaning"), OTHERS, ids=lambda value: ascii(value)[:70])
def test_what_only_sounds_like_it_is_something_else(body: Any, meaning: str) -> None:
    raw = json.dumps(body).encode()
    assert too_long_in(raw) is None
    assert meaning_in(raw) == meaning


WORDS = st.sampled_from(
    [
        "maximum context length is ",
        "prompt is too long: ",
        "exceed context limit: ",
        "input token count ",
        "requested ",
        "in the completion",
        "max_tokens",
        " tokens",
        " maximum",
        "4096",
        "1,000",
        "9" * 40,
        "\u0661\u0662",
        " > ",
        " + ",
        "(",
        "\n",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.lists(WORDS, max_size=12).map("".join),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["error", "message", "type", "code", "param", "n_ctx", "status"]), inner)
    ),
    max_leaves=10,
)


@given(JSON)
def test_any_body_has_one_meaning(value: Any) -> None:
    raw = json.dumps(value).encode()
    found = too_long_in(raw)
    assert (found is not None) == (meaning_in(raw) == "context_length")
    if found is not None:
        assert all(number is None or 0 <= number < 10**15 for number in found)
        assert found.output is None or (found.asked is not None and found.output <= found.asked)


@pytest.mark.parametrize("body", [b"", b"<html>prompt is too long", b"[" * 100_000, b"\xff", b'"prompt is too long"'])
def test_what_is_no_json_object_says_nothing(body: bytes) -> None:
    assert too_long_in(body) is None

"""No canary comes out of the scrubber, however it is written; ordinary text does, unchanged."""

from __future__ import annotations

import base64
import json
import random
import re
import time
from collections.abc import Callable
from functools import partial
from urllib.parse import quote

import pytest
from canaries import ALL, ENCODINGS, KNOWN, NAMED, SHAPED, Canary, base64s, leaks
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.observability import shapes, unescape
from proxy.observability.known import KnownSecrets
from proxy.observability.scrub import MAX_TEXT, REDACTED, Scrubber

KNOWING = Scrubber([canary.secret for canary in ALL])
NAIVE = Scrubber()


def named(canary: Canary) -> str:
    return canary.name


def test_the_canaries_would_be_seen() -> None:
    assert len(ALL) >= 40
    for canary in ALL:
        for encode in ENCODINGS.values():
            assert leaks(canary.secret, encode(canary.text)), canary


@pytest.mark.parametrize("canary", [*SHAPED, *NAMED], ids=named)
def test_an_unknown_secret_is_seen_by_shape_or_name_through_every_escape(canary: Canary) -> None:
    for name, encode in ENCODINGS.items():
        text = encode(canary.text)
        assert not NAIVE.is_clean(text), name
        scrubbed = NAIVE.scrub_text(f"before {text} after")
        assert not leaks(canary.secret, scrubbed), (name, scrubbed)
        assert REDACTED in scrubbed
        assert scrubbed.startswith("before ")


@pytest.mark.parametrize("canary", ALL, ids=named)
def test_a_known_secret_is_seen_in_every_encoding(canary: Canary) -> None:
    for name, encode in ENCODINGS.items():
        scrubbed = KNOWING.scrub_text(encode(canary.text))
        assert not leaks(canary.secret, scrubbed), (name, scrubbed)
        body = KNOWING.scrub_bytes(encode(canary.text).encode()).decode()
        assert not leaks(canary.secret, body), (name, body)
    for name, text in base64s(canary.secret):
        scrubbed = KNOWING.scrub_text(f"auth was {text}.")
        assert scrubbed == f"auth was {REDACTED}.", name
        for body in (f'{{"got":"{text}"}}', f'{{"got":"{quote(text, safe="")}"}}'):
            assert KNOWING.scrub_bytes(body.encode()) == b'{"got":"[redacted]"}', (name, body)


@pytest.mark.parametrize("canary", [*SHAPED, *NAMED], ids=named)
def test_what_is_not_known_passes_to_the_client_as_it_came(canary: Canary) -> None:
    for encode in ENCODINGS.values():
        body = encode(canary.text).encode()
        assert NAIVE.scrub_bytes(body) == body


def test_a_secret_found_twice_is_replaced_twice_and_all_else_stands() -> None:
    secret = KNOWN[0].secret
    body = f'{{"a": "{secret}", "b": "100%", "c": "\\u00e9\\n\\\\", "d": "{secret}é"}}'.encode()
    assert KNOWING.scrub_bytes(body) == body.replace(secret.encode(), b"[redacted]")


@given(
    before=st.binary(max_size=40),
    after=st.binary(max_size=40),
    length=st.integers(8, 40),
    seed=st.integers(0, 1000),
    escape=st.sets(st.integers(0, 39)),
)
@settings(max_examples=300, deadline=None)
def test_a_known_secret_is_found_at_any_offset_with_any_of_its_letters_escaped(
    before: bytes, after: bytes, length: int, seed: int, escape: set[int]
) -> None:
    secret = "".join(random.Random(seed).choices("ABCDEFGHKLMNPQRSTVWXYZ", k=length))
    written = "".join(f"\\u{ord(c):04x}" if i in escape else c for i, c in enumerate(secret)).encode()
    before = before.replace(b"\\", b"/").replace(b"%", b"/")  # an escape that runs into the secret is another text
    scrubbed = Scrubber([secret]).scrub_bytes(before + written + after)
    assert scrubbed.startswith(before + b"[redacted]")
    assert scrubbed == before + b"[redacted]" + after or secret.encode() in after


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_without_a_known_secret_no_byte_changes(body: bytes) -> None:
    assert KNOWING.scrub_bytes(body) == body


FRAGMENTS = [canary.text[:n] for canary in [*SHAPED, *NAMED] for n in (12, 40)]


@given(st.text(max_size=200) | st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=4).map("".join))
@settings(max_examples=300, deadline=None)
def test_the_cheap_answer_agrees_with_the_thorough_one(text: str) -> None:
    if NAIVE.is_clean(text):
        assert not shapes.find(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("canary", [*SHAPED, *NAMED], ids=named)
def test_scrubbing_twice_changes_nothing_more(canary: Canary) -> None:
    once = KNOWING.scrub_text(canary.text)
    assert KNOWING.scrub_text(once) == once


def test_a_public_prefix_stays_so_that_one_can_tell_whose_key_it_was() -> None:
    assert NAIVE.scrub_text("used sk-" + "ant-api03-" + "a1B2" * 12) == "used sk-ant-api03-[redacted]"
    assert NAIVE.scrub_text("redis://u:hunter2@h:1/0") == "redis://[redacted]@h:1/0"


ORDINARY = [
    "chatcmpl-9f8e7d6c5b4a3f2e1d0c9b8a7f6e5d4c",
    "req_0f9d8b7c6a5e4d3c2b1a09f8e7d6c5b4",
    "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "msg_01XFDUDYJgAACzvnptvVoYEL and toolu_01A09q90qw90lq917835lq9",
    "call_abcdefghijklmnopqrstuvwx",
    "gpt-4o-mini-2024-07-18, claude-haiku-4-5-20251001, meta-llama/Llama-3.3-70B-Instruct-Turbo",
    "text-embedding-3-large, deepseek-ai/DeepSeek-R1-Distill-Qwen-32B, gemini-2.5-flash-lite-preview-09-2025",
    '{"input_tokens": 12, "max_tokens": 4096, "prompt_tokens_details": {"cached_tokens": 1000}}',
    "max_tokens=4096 completion_tokens: 12 total_tokens 14",
    "time_to_first_token: 0.3",
    "the task-scheduling-and-disk-management module asked a risk-free-and-long-hyphenated question",
    "the basic authentication scheme; a bearer of good news; basic things",
    "tokens per minute, a secret garden, the key idea, author: someone",
    "http://127.0.0.1:8080/v1/chat/completions?x=1&y=a@b",
    "GET /v1/models HTTP/1.1 200 in 0.4 ms from 10.2.3.4:51234",
    "mail bob@example.com at 12:30, 100% sure\\n",
    "2024-01-01T00:00:00.123Z 550e8400-e29b-41d4-a716-446655440000",
    "Grüße, 你好, emoji 🎉 and a tab\t",
    "sk-learn is a library; github.com/x; gho; xoxo; hf_ and bw_ alone",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_passes_unchanged(text: str) -> None:
    for scrubber in (NAIVE, KNOWING):
        assert scrubber.scrub_text(text) == text
        assert scrubber.scrub_value({"x": [text]}) == {"x": [text]}
        assert scrubber.scrub_bytes(text.encode()) == text.encode()


def test_nested_data_is_scrubbed_by_name_at_every_depth() -> None:
    value = {
        "model": "gpt-4o",
        "tokens": 12,
        "max_tokens": 10,
        "stop_token": 7,
        "API-Key": "hunter2",
        "headers": {"Authorization": "Bearer x", "Set-Cookie": ["a=1", "b=2"], "accept": "*/*"},
        "calls": [{"arguments": '{"password": "hunter2", "path": "/tmp"}'}, ("clientSecret", b"sk-" + b"a1" * 20)],
        b"apikey": b"hunter2",
        "raw": [(b"authorization", b"Bearer x"), (b"accept", b"*/*")],
        "credentials": {"user": "bob", "deep": {"pw": "hunter2"}},
        "password": None,
        "object": object(),
    }
    scrubbed = NAIVE.scrub_value(value)
    assert scrubbed == {
        "model": "gpt-4o",
        "tokens": 12,
        "max_tokens": 10,
        "stop_token": 7,
        "API-Key": REDACTED,
        "headers": {"Authorization": REDACTED, "Set-Cookie": REDACTED, "accept": "*/*"},
        "calls": [
            {"arguments": '{"password": "[redacted]", "path": "/tmp"}'},
            ["clientSecret", REDACTED],
        ],
        "apikey": REDACTED,
        "raw": [["authorization", REDACTED], ["accept", "*/*"]],
        "credentials": REDACTED,
        "password": None,
        "object": "<object>",
    }
    assert value["API-Key"] == "hunter2"


def test_a_secret_as_the_name_of_a_member_goes_too() -> None:
    assert KNOWING.scrub_value({KNOWN[0].secret: 1}) == {REDACTED: 1}


def test_data_without_end_has_an_end() -> None:
    endless: list[object] = []
    endless.append(endless)
    assert REDACTED in json.dumps(NAIVE.scrub_value(endless))


def test_a_long_text_is_cut_and_a_secret_across_the_cut_goes_whole() -> None:
    secret = KNOWN[0].secret
    for shift in range(1, len(secret), 5):
        scrubbed = KNOWING.scrub_text("." * (MAX_TEXT - shift) + secret + "." * 100_000)
        assert not leaks(secret, scrubbed, size=4)
        assert scrubbed.endswith("…[cut]")
        assert len(scrubbed.encode()) <= MAX_TEXT + 32


def test_a_cut_never_splits_a_character_into_an_error() -> None:
    for shift in range(4):
        assert NAIVE.scrub_text("x" * shift + "🎉" * MAX_TEXT).endswith("…[cut]")


def test_switched_off_it_still_protects_clients() -> None:
    off = Scrubber([KNOWN[0].secret], texts=False)
    assert off.scrub_text(KNOWN[0].text) == KNOWN[0].text
    assert off.scrub_value({"password": "x"}) == {"password": "x"}
    assert off.scrub_bytes(KNOWN[0].text.encode()).endswith(b"[redacted]")


def test_values_too_short_to_be_secrets_are_not_looked_for() -> None:
    assert Scrubber(["", "redis", "x"]).scrub_text("redis says x") == "redis says x"


def test_a_thousand_secrets_are_all_found() -> None:
    secrets = [f"tenant-{base64.b64encode(random.Random(i).randbytes(18)).decode()}" for i in range(1000)]
    scrubber = Scrubber(secrets)
    for secret in secrets:
        assert scrubber.scrub_bytes(b"x" * (len(secret) % 8) + secret.encode()).endswith(b"[redacted]")


HOSTILE: dict[str, Callable[[int], str]] = {
    "a run": lambda n: "a" * n,
    "dashes": lambda n: "-" * n,
    "underscores": lambda n: "k_" * (n // 2),
    "prefixes": lambda n: "sk-" * (n // 3),
    "prefix and blanks": lambda n: "sk-a " * (n // 5),
    "anthropic": lambda n: "sk-ant-" * (n // 7),
    "jwt starts": lambda n: "eyJ." * (n // 4),
    "jwt dots": lambda n: "eyJ" + "a" * 20 + "." * n,
    "urls": lambda n: "://" * (n // 3),
    "url without at": lambda n: "://" + "a:" * (n // 2),
    "url starts": lambda n: "a://b:c " * (n // 8),
    "pem starts": lambda n: "-----BEGIN PRIVATE KEY-----" * (n // 27),
    "pem half": lambda n: "-----BEGIN " * (n // 11),
    "pem blanks": lambda n: "-----BEGIN " + " " * n,
    "pem without end": lambda n: "-----BEGIN PRIVATE KEY-----" + "-" * n,
    "bearers": lambda n: "bearer " * (n // 7),
    "bearer letters": lambda n: "bearer " + "a" * n,
    "bearer blanks": lambda n: "bearer" + " " * n,
    "basics": lambda n: "basic a" * (n // 7),
    "basic letters": lambda n: "basic " + "a" * n,
    "signatures": lambda n: "?sig=" * (n // 5),
    "names": lambda n: "password" * (n // 8),
    "names with colons": lambda n: "password:" * (n // 9),
    "name and blanks": lambda n: "password" + " " * n,
    "quotes": lambda n: 'password:"' + "\\" * n,
    "open quotes": lambda n: 'password="' * (n // 10),
    "single quotes": lambda n: "password='" + "\\'" * (n // 2),
    "tokens": lambda n: "token=1" * (n // 7),
    "token digits": lambda n: "token=" + "1" * n,
    "secret key": lambda n: "secret_access_" * (n // 14),
    "authorization": lambda n: "authorization: " * (n // 15),
    "cookies": lambda n: "cookie=" * (n // 7),
    "pairs": lambda n: "authorization', b'" * (n // 18),
    "backslashes": lambda n: "\\" * n,
    "json escapes": lambda n: "\\u0041" * (n // 6),
    "half escapes": lambda n: "\\u00" * (n // 4),
    "surrogates": lambda n: "\\ud800" * (n // 6),
    "percents": lambda n: "%25" * (n // 3),
    "half percents": lambda n: "%4" * (n // 2),
    "aws": lambda n: "AKIA" * (n // 4),
    "quotes only": lambda n: "\"'" * (n // 2),
    "line ends": lambda n: "cookie:\r\n" * (n // 9),
}

PATTERNS = [
    *[pattern for _, pattern in shapes._SHAPES],
    *shapes._FIELDS,
    unescape._ESCAPE,
]


def quick(work: Callable[[], object], limit: float) -> bool:
    """Within `limit` seconds of this thread's own time, at one of three attempts: the machine has other work too."""
    for _ in range(3):
        started = time.thread_time()
        work()
        if time.thread_time() - started < limit:
            return True
    return False


def search_all(pattern: re.Pattern[bytes], data: bytes) -> int:
    return sum(1 for _ in pattern.finditer(data))


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_no_text_makes_a_pattern_slow(hostile: Callable[[int], str]) -> None:
    text = hostile(200_000)
    data = text.encode()
    for pattern in PATTERNS:
        assert quick(partial(search_all, pattern, data), 0.1), pattern.pattern[:60]
    assert quick(partial(shapes._HOOK.search, text), 0.1)
    assert quick(partial(NAIVE.scrub_text, text), 0.4)


PIECES = "a 1 - _ \" ' \\ : = sk- token bearer\t :// @ eyJ %41 \\u0041 key".split(" ")  # noqa: SIM905


@given(st.lists(st.sampled_from([*PIECES, " "]), min_size=1, max_size=6))
@settings(max_examples=15, deadline=None)
def test_no_repeated_mixture_makes_a_pattern_slow(pieces: list[str]) -> None:
    piece = "".join(pieces)
    data = (piece * (200_000 // len(piece))).encode()
    for pattern in PATTERNS:
        assert quick(partial(search_all, pattern, data), 0.2), pattern.pattern[:60]


def test_every_secret_has_its_marks_whatever_its_length() -> None:
    for length in range(8, 80):
        secret = "".join(random.Random(length).choices("abcdefXYZ0123456789", k=length))
        known = KnownSecrets([secret])
        for offset in range(9):
            data = b"." * offset + secret.encode() + b"." * 3
            assert not known.absent(data)
            assert (offset, offset + length) in known.find(data)

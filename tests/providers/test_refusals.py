"""What a provider's error object means."""

from __future__ import annotations

import pytest

from proxy.providers.refusals import meaning_in, meaning_of

REQUEST = {"type": "invalid_request_error", "code": None, "message": "'x' is not a parameter."}


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        ({"type": "insufficient_quota", "code": "insufficient_quota", "message": "…"}, "quota"),
        ({"type": "x", "code": "billing_hard_limit_reached"}, "quota"),
        ({"type": "requests", "code": "rate_limit_exceeded"}, "rate"),
        ({"type": "rate_limit_error"}, "rate"),
        ({"type": "invalid_request_error", "code": "context_length_exceeded"}, "context_length"),
        ({**REQUEST, "message": "This model's maximum context length is 8192 tokens."}, "context_length"),
        ({"type": "invalid_request_error", "code": "content_policy_violation"}, "content_policy"),
        ({"code": "400", "innererror": {"code": "ResponsibleAIPolicyViolation"}}, "content_policy"),
        (REQUEST, "request"),
        ({"type": "server_error", "message": "the maximum context length was not to blame"}, "fault"),
        ({"type": 1, "code": ["x"], "message": {}}, "fault"),
        ({}, "fault"),
        ("down", "fault"),
        (None, "fault"),
    ],
)
def test_codes_come_first_and_texts_where_there_is_none(error: object, meaning: str) -> None:
    assert meaning_of(error) == meaning


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'"x"', b"\xff", b'{"error":"x"}'])
def test_a_body_without_an_error_object_says_nothing(body: bytes) -> None:
    assert meaning_in(body) == "fault"

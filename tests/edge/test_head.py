"""The verdict on a head, where the parser in front of it happens to refuse already: two locks on one door."""

from __future__ import annotations

import pytest

from proxy.edge.head import Limits, Target, judge, read_target
from proxy.edge.refusals import AMBIGUOUS_PATH, BODY_TOO_LARGE, FRAMING, NOT_ORIGIN_FORM, URL_TOO_LONG
from proxy.errors import ProxyError
from proxy.types import Headers

HOST = (b"host", b"a")
CHUNKED = (b"transfer-encoding", b"chunked")


@pytest.mark.parametrize(
    "named",
    [
        [HOST, (b"content-length", b"3"), (b"content-length", b"3")],
        [HOST, CHUNKED, (b"content-length", b"3")],
        [HOST, (b"content-length", b"3"), CHUNKED],
        [HOST, CHUNKED, CHUNKED],
        [HOST, (b"transfer-encoding", b"identity")],
    ],
)
def test_one_framing(named: Headers) -> None:
    assert judge(b"/x", named, "1.1", Limits()) is FRAMING


@pytest.mark.parametrize(
    ("target", "verdict"),
    [
        (b"/a%2Fb;c?d=%00", Target("/a/b;c", b"/a%2Fb;c", b"d=%00")),
        (b"/" + b"a" * 299, Target("/" + "a" * 299, b"/" + b"a" * 299, b"")),
        (b"/" + b"a" * 300, URL_TOO_LONG),
        (b"", NOT_ORIGIN_FORM),
        (b"?x", NOT_ORIGIN_FORM),
        (b"/" + b"a" * 270 + b"/..", AMBIGUOUS_PATH),
    ],
)
def test_the_target(target: bytes, verdict: Target | ProxyError) -> None:
    for _ in range(2):  # the second time it may be known
        assert judge(target, [HOST], "1.1", Limits(url_bytes=300)) == verdict


def test_the_limit_of_a_known_target_is_still_the_callers() -> None:
    assert judge(b"/known", [HOST], "1.1", Limits()) == read_target(b"/known")
    assert judge(b"/known", [HOST], "1.1", Limits(url_bytes=3)) is URL_TOO_LONG


def test_a_length_of_many_digits_is_only_large() -> None:
    assert judge(b"/x", [HOST, (b"content-length", b"9" * 4000)], "1.1", Limits()) is BODY_TOO_LARGE

"""Who is let in: one identical answer for every wrong key, and no page of a browser in keyless mode."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from proxy.edge.auth import AdminKeys, KeyedTenants, Keyless, is_loopback_host
from proxy.edge.headers import request_id, traceparent
from proxy.errors import InvalidKey, OriginNotAllowed, StoreUnavailable, envelope
from proxy.types import Call, Headers, Tenant

KEY = "bw_0123456789abcdef"
ACME = Tenant("acme")


def call(*headers: tuple[bytes, bytes]) -> Call:
    return Call("POST", "/v1/chat/completions", b"", b"", list(headers), b"", "req_1", "", "")


@pytest.mark.parametrize(
    "headers",
    [
        [(b"authorization", b"Bearer " + KEY.encode())],
        [(b"authorization", b"bearer " + KEY.encode())],
        [(b"api-key", KEY.encode())],
        [(b"x-api-key", KEY.encode())],
        [(b"x-api-key", KEY.encode()), (b"api-key", KEY.encode())],
        [(b"authorization", b"Bearer " + KEY.encode()), (b"x-api-key", KEY.encode())],
    ],
)
def test_a_key_names_its_tenant(headers: Headers) -> None:
    digits = hashlib.sha256(KEY.encode()).hexdigest()[:16]
    assert KeyedTenants({KEY: ACME}).identify(call(*headers)) == replace(ACME, key=digits)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"bearer  " + KEY.encode())],
        [(b"authorization", b"Basic " + KEY.encode())],
        [(b"authorization", KEY.encode())],
        [(b"authorization", b"Bearer " + KEY[:-1].encode())],
        [(b"authorization", b"Bearer " + KEY.upper().encode())],
        [(b"authorization", b"Bearer " + KEY.encode() + b" ")],
        [(b"authorization", b"Bearer " + KEY.encode() + b"\xff")],
        [(b"authorization", b"Bearer " + b"k" * 30_000)],
        [(b"authorization", b"Bearer ' OR 1=1--")],
        [(b"authorization", b"Bearer *")],
        [(b"authorization", b"Bearer " + KEY.encode()), (b"authorization", b"Bearer " + KEY.encode())],
        [(b"authorization", b"Bearer " + KEY.encode()), (b"x-api-key", b"another-key-of-someone")],
        [(b"x-api-key", b"another-key-of-someone"), (b"authorization", b"Bearer " + KEY.encode())],
        [(b"cookie", KEY.encode())],
    ],
)
def test_every_wrong_key_gets_one_identical_answer(headers: Headers) -> None:
    with pytest.raises(InvalidKey) as caught:
        KeyedTenants({KEY: ACME}).identify(call(*headers))
    assert envelope(caught.value) == envelope(InvalidKey())


MADE = "bw_made-at-run-time-0123456789"


def test_a_key_made_at_run_time_comes_and_goes() -> None:
    tenants, digest = KeyedTenants({KEY: ACME}), hashlib.sha256(MADE.encode()).digest()
    made = call((b"authorization", b"Bearer " + MADE.encode()))
    holder = Tenant("acme", key="key_0123456789abcdef")
    tenants.admit(digest, holder)
    assert tenants.identify(made) is holder
    tenants.dismiss(digest)
    tenants.dismiss(digest)
    with pytest.raises(InvalidKey) as caught:
        tenants.identify(made)
    assert envelope(caught.value) == envelope(InvalidKey())


def test_a_key_of_the_configuration_is_the_configuration_s_alone() -> None:
    tenants, digest = KeyedTenants({KEY: ACME}), hashlib.sha256(KEY.encode()).digest()
    before = tenants.identify(call((b"x-api-key", KEY.encode())))
    tenants.admit(digest, Tenant("beta"))
    assert tenants.identify(call((b"x-api-key", KEY.encode()))) is before
    tenants.dismiss(digest)
    assert tenants.identify(call((b"x-api-key", KEY.encode()))) is before


def test_while_keys_may_be_unknown_here_no_key_is_called_wrong() -> None:
    tenants = KeyedTenants({KEY: ACME}, complete=False)
    assert tenants.identify(call((b"x-api-key", KEY.encode()))).name == "acme"
    with pytest.raises(StoreUnavailable):
        tenants.identify(call((b"x-api-key", MADE.encode())))
    with pytest.raises(InvalidKey):
        tenants.identify(call())


@pytest.mark.parametrize(
    "host", [b"localhost", b"localhost:8080", b"127.0.0.1:8080", b"127.9.9.9", b"[::1]:80", b"[::1]"]
)
def test_keyless_serves_programs_on_this_machine(host: bytes) -> None:
    anything = (b"authorization", b"Bearer anything")
    assert Keyless().identify(call((b"host", host), anything)).name == "default"
    assert Keyless().identify(call((b"host", host), (b"sec-fetch-site", b"none"))).passthrough is None


@pytest.mark.parametrize(
    "header",
    [
        (b"origin", b"https://evil.example"),
        (b"origin", b"null"),
        (b"sec-fetch-site", b"cross-site"),
        (b"sec-fetch-site", b"same-site"),
        (b"host", b"evil.example"),
        (b"host", b"localhost.evil.example"),
        (b"host", b"127.0.0.1.evil.example"),
        (b"host", b"127.0.0.1@evil.example"),
        (b"host", b"192.168.0.1"),
        (b"host", b"0.0.0.0:8080"),
        (b"host", b""),
        (b"host", b"localhost:80x"),
        (b"host", b"[::1"),
    ],
)
def test_keyless_refuses_pages_and_foreign_names(header: tuple[bytes, bytes]) -> None:
    headers = [header] if header[0] == b"host" else [(b"host", b"localhost"), header]
    if header == (b"host", b"[::1"):
        assert is_loopback_host(header[1])  # harmless: it can only name loopback
        return
    with pytest.raises(OriginNotAllowed) as caught:
        Keyless().identify(call(*headers))
    assert caught.value.status == 403


def test_insecure_lifts_the_host_check_only() -> None:
    lenient = Keyless(any_host=True)
    assert lenient.identify(call((b"host", b"gateway.internal")))
    with pytest.raises(OriginNotAllowed):
        lenient.identify(call((b"host", b"gateway.internal"), (b"origin", b"https://evil.example")))


def test_without_admin_keys_nobody_is_an_administrator() -> None:
    header = [(b"authorization", b"Bearer " + KEY.encode())]
    assert not AdminKeys([])
    assert not AdminKeys([]).accept(header)
    assert AdminKeys([KEY]).accept(header)
    assert not AdminKeys([KEY + "x"]).accept(header)


def zeros(n: int) -> bytes:
    return b"\xab" * n


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (b"my-id_1.2", True),
        (b"x" * 64, True),
        (b"x" * 65, False),
        (b"a b", False),
        (b"a\r\nb", False),
        (b"", False),
        (None, False),
    ],
)
def test_a_request_id_is_kept_only_if_harmless(sent: bytes | None, kept: bool) -> None:
    found = request_id(sent, zeros)
    assert found == (sent.decode() if kept and sent else "req_" + "ab" * 12)


def test_a_trace_is_continued_by_a_span_of_ours() -> None:
    sent = b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-00"
    assert traceparent(sent, zeros) == "00-" + "1" * 32 + "-" + "ab" * 8 + "-00"


@pytest.mark.parametrize(
    "sent",
    [
        None,
        b"",
        b"garbage",
        b"01-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01",
        b"00-" + b"0" * 32 + b"-" + b"2" * 16 + b"-01",
    ],
)
def test_a_broken_trace_starts_anew(sent: bytes | None) -> None:
    assert traceparent(sent, zeros) == "00-" + "ab" * 16 + "-" + "ab" * 8 + "-01"

"""The URL of the store."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import trustme

from proxy.store.address import Address, Credentials, parse_address
from proxy.store.dial import slot_of

USER = Credentials("ann", "p@ss/word")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://localhost", Address("standalone", (("localhost", 6379),))),
        ("redis://localhost:7000/3", Address("standalone", (("localhost", 7000),), db=3)),
        ("valkey://10.0.0.1", Address("standalone", (("10.0.0.1", 6379),))),
        ("redis://[::1]:7000/0", Address("standalone", (("::1", 7000),))),
        ("redis://:secret@h", Address("standalone", (("h", 6379),), Credentials("", "secret"))),
        ("redis://ann:p%40ss%2Fword@h", Address("standalone", (("h", 6379),), USER)),
        (
            "redis+sentinel://ann:p%40ss%2Fword@a,b:7000/my%20master/4",
            Address("sentinel", (("a", 26379), ("b", 7000)), USER, 4, "my master"),
        ),
        (
            "redis+sentinel://a/m?sentinel_username=u&sentinel_password=w",
            Address("sentinel", (("a", 26379),), service="m", sentinel_credentials=Credentials("u", "w")),
        ),
        ("redis+cluster://a:1,b,c:3", Address("cluster", (("a", 1), ("b", 6379), ("c", 3)))),
        ("valkey+cluster://a/0", Address("cluster", (("a", 6379),))),
    ],
)
def test_a_url_says_where_the_store_is(url: str, expected: Address) -> None:
    assert parse_address(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        "http://localhost",
        "redis://",
        "redis://:secret@",
        "redis:///0",
        "redis://h:0",
        "redis://h:70000",
        "redis://h:port",
        "redis://h/one",
        "redis://h/-1",
        "redis://h/0/1",
        "redis://h/١",
        "redis://a,b",
        "redis://h#fragment",
        "redis://h?db=1",
        "redis://h?ssl_cert_reqs=none",
        "redis://h?nonsense",
        "redis+sentinel://a",
        "redis+sentinel://a/",
        "redis+sentinel://a,,b/m",
        "redis+cluster://a/1",
        "rediss://h?ssl_cert_reqs=optional",
        "rediss://h?ssl_check_hostname=yes",
        "rediss://h?sentinel_password=x",
        "redis+proxy://h",
        "redis://secret-word@[::1",
    ],
)
def test_a_url_that_will_not_do_is_refused_without_being_quoted(url: str) -> None:
    with pytest.raises(ValueError) as caught:  # each has its own sentence
        parse_address(url)
    assert "secret" not in f"{caught.value!r} {caught.value.__cause__!r}"


def test_a_password_is_not_in_the_representation() -> None:
    address = parse_address("redis+sentinel://ann:pa55word@h/m?sentinel_password=0ther")
    assert "pa55word" not in repr(address)
    assert "0ther" not in repr(address)


def test_tls_looks_at_certificates_unless_told_otherwise(tmp_path: Path) -> None:
    authority = trustme.CA()
    ca, certificate = tmp_path / "ca.pem", tmp_path / "client.pem"
    authority.cert_pem.write_to_path(ca)
    authority.issue_cert("client").private_key_and_cert_chain_pem.write_to_path(certificate)
    strict = parse_address(f"rediss://h?ssl_ca_certs={ca}&ssl_certfile={certificate}").tls
    lax = parse_address("rediss+cluster://h?ssl_cert_reqs=none").tls
    named = parse_address("rediss+sentinel://h/m?ssl_check_hostname=false").tls
    assert strict is not None
    assert (strict.verify_mode, strict.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert len(strict.get_ca_certs()) == 1
    assert lax is not None
    assert (lax.verify_mode, lax.check_hostname) == (ssl.CERT_NONE, False)
    assert named is not None
    assert (named.verify_mode, named.check_hostname) == (ssl.CERT_REQUIRED, False)
    with pytest.raises(OSError, match="No such file"):
        parse_address(f"rediss://h?ssl_ca_certs={tmp_path / 'none.pem'}")


@pytest.mark.parametrize(("tag", "slot"), [(b"123456789", 12739), (b"foo", 12182), (b"", 0)])
def test_the_slot_of_a_tag_is_that_of_the_cluster_specification(tag: bytes, slot: int) -> None:
    assert slot_of(tag) == slot

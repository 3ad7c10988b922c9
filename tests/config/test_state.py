"""Where the store is: what is taken, what is said of the rest, and that a password is never shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trustme
from written import MINIMAL, File

from proxy.config.effective import nested
from proxy.store.address import passwords_in

PASSWORD = "pa55%2Fword-in-the-url"


def test_by_default_there_is_no_server(config: File) -> None:
    settings = config.load(MINIMAL).settings
    assert settings.state.get_secret_value() == "memory://"
    assert (settings.state_namespace, settings.state_timeout_ms) == ("0", 50)
    assert settings.secrets() == set()


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://:pw@localhost:6380/3",
        "valkey://localhost",
        "rediss://localhost?ssl_check_hostname=false",
        "redis+sentinel://a,b:26380/mymaster/1",
        "redis+cluster://a,b:7001",
    ],
)
def test_every_kind_of_place_is_taken(config: File, url: str) -> None:
    assert config.load(f"state: {url}\n{MINIMAL}").settings.state.get_secret_value() == url


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory", "expected a URL such as redis://localhost:6379/0, rediss://…, redis+sentinel://…"),
        ("http://:{}@localhost", "expected a URL such as redis://localhost:6379/0, rediss://…, redis+sentinel://…"),
        ("redis://:{}@localhost/x", "the path of the URL is the number of a database, such as /0"),
        ("redis://:{}@localhost:99999", "expected host or host:port, several of them separated by commas"),
        ("redis://:{}@a,b", "one host, or the scheme redis+sentinel or redis+cluster"),
        ("redis+sentinel://:{}@a", "after the sentinels, the URL names the master, such as /mymaster"),
        ("redis+cluster://:{}@a/1", "a cluster has only database 0"),
        ("redis://:{}@a?ssl_cert_reqs=none", "the URL has an option that does not apply: ssl_cert_reqs"),
        ("rediss://:{}@a?ssl_cert_reqs=no", "ssl_cert_reqs is one of: required, none"),
        (
            "rediss://:{}@a?ssl_ca_certs=nowhere.pem",
            "a file that the URL names cannot be read, or holds no certificate or key",
        ),
    ],
)
def test_a_bad_url_is_named_with_its_place_and_never_quoted(config: File, url: str, message: str) -> None:
    text = f"listen: {{port: 0}}\nstate: {url.format(PASSWORD)}\n{MINIMAL}"
    assert config.errors(text) == [f"config.yaml:2:8: state: {message}"]


def test_it_is_named_beside_all_other_problems(config: File) -> None:
    text = f"state: nowhere\nstate_namespace: 'a}}b'\nstate_timeout_ms: 0\nlisten: {{port: -1}}\n{MINIMAL}"
    found = config.errors(text)
    assert [line.split(": ")[1] for line in found] == ["state", "state_namespace", "state_timeout_ms", "listen.port"]
    assert found[1].endswith("expected 1 to 64 letters, digits, '.', '_' or '-'")
    assert config.errors(f"state: {{url: x}}\n{MINIMAL}")
    assert config.errors(f"state: [redis://localhost]\n{MINIMAL}")


def test_an_encrypted_key_is_an_error_and_no_question_at_the_terminal(config: File) -> None:
    identity = trustme.CA().issue_cert("localhost")
    certificate = config.directory / "cert.pem"
    identity.cert_chain_pems[0].write_to_path(str(certificate))
    key = config.directory / "key.pem"
    _encrypt(identity.private_key_pem.bytes(), key)
    text = f"state: rediss://localhost?ssl_certfile={certificate}&ssl_keyfile={key}\n{MINIMAL}"
    assert config.errors(text) == [
        "config.yaml:1:8: state: a file that the URL names cannot be read, or holds no certificate or key"
    ]


def _encrypt(plain: bytes, file: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(plain, None)
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )


def test_it_may_come_from_a_file_or_the_environment(config: File) -> None:
    (config.directory / "state.url").write_text("redis://:pw@localhost\n")
    loaded = config.load(f"state: {{file: state.url}}\n{MINIMAL}")
    assert loaded.settings.state.get_secret_value() == "redis://:pw@localhost"
    loaded = config.load(MINIMAL, env={"BREAKWATER_STATE": "redis://elsewhere"})
    assert loaded.settings.state.get_secret_value() == "redis://elsewhere"


def test_the_password_is_known_as_a_secret_and_shown_nowhere(config: File) -> None:
    url = f"redis+sentinel://ann:{PASSWORD}@h/m?sentinel_username=eve&sentinel_password=an0ther%20one"
    settings = config.load(f"state: {url}\n{MINIMAL}").settings
    assert settings.secrets() == {url, PASSWORD, "pa55/word-in-the-url", "an0ther one"}
    shown = json.dumps(nested(settings)) + repr(settings)
    assert not [secret for secret in settings.secrets() if secret in shown]
    assert config.load(f"state: redis://localhost:1/2\n{MINIMAL}").settings.secrets() == set()


def test_of_a_url_that_nobody_understands_everything_is_a_password() -> None:
    assert passwords_in("redis://[::1") == {"redis://[::1"}

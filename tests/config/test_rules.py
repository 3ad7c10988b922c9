"""Each rule of the configuration: the line that breaks it, and the exact problem."""

from __future__ import annotations

import pytest
import trustme
from written import MINIMAL, File

KEY = "bw-0123456789abcdef"
OTHER_KEY = "bw-fedcba9876543210"
MAKE_ONE = (
    "a key needs at least 16 characters; make one with:"
    " python3 -c 'import secrets; print(\"bw-\" + secrets.token_urlsafe(32))'"
)


def provider(line: str) -> str:
    return f"providers:\n  openai:\n    kind: openai\n    {line}\n"


def tenant(line: str) -> str:
    return MINIMAL + f"tenants:\n- name: acme\n  keys: [{KEY}]\n  {line}\n"


SHORT_KEYS = (
    "{providers: {m: {kind: mock}}, tenants: [{name: a, keys: [short-secret]}], admin: {keys: ['0123456789abcde']}}"
)
NEEDS_HTTPX = "needs another transport: add the line 'transport: httpx'"
HEADER_TEXT = "must be printable ASCII without spaces, because it travels in a header"
A_KEY = "needs at least 1 key: only with a Redis as state can a tenant do with keys from `breakwater keys create` alone"
GOOD_TARGET = "expected PROVIDER/MODEL, such as openai/gpt-4o-mini"


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        # unknown keys
        (MINIMAL + "lisen: {}\n", ["2:1: lisen: unknown key: did you mean 'listen'?"]),
        (MINIMAL + "listen:\n  PORT: 1\n", ["3:3: listen.PORT: unknown key: did you mean 'port'?"]),
        (
            MINIMAL + "observability: {x: 1}\n",
            ["2:17: observability.x: unknown key: known here: scrub_secrets, metrics_public"],
        ),
        (provider("base_urll: x"), ["4:5: providers.openai.base_urll: unknown key: did you mean 'base_url'?"]),
        (
            provider("timeouts: {idle: 1}"),
            ["4:16: providers.openai.timeouts.idle: unknown key: did you mean 'idle_ms'?"],
        ),
        # types
        (MINIMAL + "listen: {port: eighty}\n", ["2:16: listen.port: expected a whole number, got text"]),
        (
            MINIMAL + "listen: {port: '80'}\n",
            ["2:16: listen.port: expected a whole number, got text: take the quotes away"],
        ),
        (MINIMAL + "listen: {port: 80.5}\n", ["2:16: listen.port: expected a whole number, got a number"]),
        (MINIMAL + "listen: {port: true}\n", ["2:16: listen.port: expected a whole number, got true or false"]),
        (MINIMAL + "listen: {port: }\n", ["2:15: listen.port: expected a whole number, got null"]),
        (MINIMAL + "listen: {port: [1]}\n", ["2:16: listen.port: expected a whole number, got a list"]),
        (MINIMAL + "listen: {host: 127}\n", ["2:16: listen.host: expected text, got a whole number: put it in quotes"]),
        (MINIMAL + "listen: {host: ''}\n", ["2:16: listen.host: expected text, got an empty text"]),
        (MINIMAL + "listen: 8080\n", ["2:9: listen: expected a section with keys, got a whole number"]),
        (MINIMAL + "listen: [a]\n", ["2:9: listen: expected a section with keys, got a list"]),
        ("providers: [a]\n", ["1:12: providers: expected a section with keys, got a list"]),
        (
            MINIMAL + "observability: {scrub_secrets: on, metrics_public: 1}\n",
            [
                "2:32: observability.scrub_secrets: expected true or false, got text: write true",
                "2:52: observability.metrics_public: expected true or false, got a whole number: write true",
            ],
        ),
        (tenant("models: gpt-4o"), ['5:11: tenants[0].models: expected a list, such as ["..."], got text']),
        (
            tenant("models: [1, ok]"),
            ["5:12: tenants[0].models[0]: expected text, got a whole number: put it in quotes"],
        ),
        # ranges
        (MINIMAL + "listen: {port: 65536}\n", ["2:16: listen.port: must be at most 65535"]),
        (MINIMAL + "listen: {max_in_flight: 0}\n", ["2:25: listen.max_in_flight: must be at least 1"]),
        (provider("timeouts: {idle_ms: 0}"), ["4:25: providers.openai.timeouts.idle_ms: must be at least 1"]),
        (
            "providers: {m: {kind: mock, tokens_per_second: .nan, first_token_ms: -1}}\n",
            [
                "1:48: providers.m.tokens_per_second: expected a finite number",
                "1:70: providers.m.first_token_ms: must be at least 0",
            ],
        ),
        # listen
        (
            MINIMAL + "listen: {host: '127.0.0.1:80'}\n",
            [
                "2:16: listen.host: expected an address or a host name alone, such as 127.0.0.1;"
                " the port has its own key"
            ],
        ),
        (
            MINIMAL + "listen: {port: 90, admin_port: 90}\n",
            ["2:32: listen.admin_port: must differ from listen.port; null serves both on one port"],
        ),
        # providers
        ("providers: {}\n", ["1:12: providers: at least one is needed, such as: providers: {openai: {kind: openai}}"]),
        ("providers: {a: {}}\n", ["1:16: providers.a.kind: is missing: add 'kind: openai' or 'kind: mock'"]),
        (
            "providers: {a: {kind: opneai}}\n",
            ["1:23: providers.a.kind: expected openai or mock: did you mean 'openai'?"],
        ),
        (
            "providers: {A b: {kind: mock}}\n",
            [
                "1:13: providers[\"A b\"]: expected a name of 1 to 64 lower-case letters, digits, '.', '_' or '-',"
                " not beginning with a sign"
            ],
        ),
        (
            provider("base_url: api.openai.com/v1"),
            [
                "4:15: providers.openai.base_url: expected an http or https URL, such as https://api.openai.com/v1",
            ],
        ),
        (
            provider("base_url: http://user:secret@x/v1"),
            [
                "4:15: providers.openai.base_url: must not hold a user name or a password; a key belongs into api_key",
            ],
        ),
        (
            provider("base_url: http://x/v1?key=secret"),
            ["4:15: providers.openai.base_url: must not hold a query or a fragment"],
        ),
        (
            provider('api_keys: ["sk-one", "sk-two", "sk-one"]'),
            ["4:15: providers.openai.api_keys: holds the same key twice"],
        ),
        (
            provider('api_keys: ["sk-one", client]'),
            ["4:15: providers.openai.api_keys: 'client' passes the caller's own key on and stands alone"],
        ),
        (
            provider("api_keys: []"),
            [
                "4:15: providers.openai.api_keys: needs at least one key; leave the line out for none",
            ],
        ),
        (
            provider("api_key: a\n    api_keys: [b]"),
            [
                "5:15: providers.openai.api_keys: api_key is given too: keep one of the two",
            ],
        ),
        (provider('api_key: "a secret"'), [f"4:14: providers.openai.api_key: {HEADER_TEXT}"]),
        (provider('organization: "a\\nb"'), [f"4:19: providers.openai.organization: {HEADER_TEXT}"]),
        (
            provider("transport: htpx"),
            ["4:16: providers.openai.transport: expected http1 or httpx: did you mean 'httpx'?"],
        ),
        (provider("http2: true"), [f"4:12: providers.openai.http2: {NEEDS_HTTPX}"]),
        (provider("egress_proxy: http://p:1"), [f"4:19: providers.openai.egress_proxy: {NEEDS_HTTPX}"]),
        (
            provider("transport: httpx\n    egress_proxy: socks5://p:1"),
            [
                "5:19: providers.openai.egress_proxy: expected an http or https URL,"
                " such as http://proxy.example.com:3128"
            ],
        ),
        (
            provider("ca_file: config.yaml"),
            ["4:14: providers.openai.ca_file: expected a PEM file of certificates"],
        ),
        (provider("ca_file: nowhere.pem"), ["4:14: providers.openai.ca_file: no such file"]),
        ("providers: {m: {kind: mock, script: .}}\n", ["1:37: providers.m.script: no such file"]),
        # models
        (
            MINIMAL + "models: []\n",
            [
                "2:9: models: needs at least 1 entry; leave the line out for the default, if there is one",
            ],
        ),
        (MINIMAL + "models: [{name: a, targets: [a]}]\n", [f"2:30: models[0].targets[0]: {GOOD_TARGET}"]),
        (MINIMAL + "models: [{name: a, targets: [openai/]}]\n", [f"2:30: models[0].targets[0]: {GOOD_TARGET}"]),
        (MINIMAL + "models: [{name: a}]\n", ["2:10: models[0].targets: is missing"]),
        (
            MINIMAL + "models: [{name: a, targets: [openai/a, [openai/b, openai/a]]}]\n",
            ["2:29: models[0].targets: the same target stands there twice"],
        ),
        (
            MINIMAL + "models: [{name: a, targets: []}]\n",
            ["2:29: models[0].targets: needs at least 1 entry; leave the line out for the default, if there is one"],
        ),
        (
            MINIMAL + "models: [{name: a, targets: [[]]}]\n",
            ["2:30: models[0].targets[0]: needs at least 1 entry; leave the line out for the default, if there is one"],
        ),
        (
            MINIMAL + "models: [{name: a, targets: [[openai/a, b], c]}]\n",
            [f"2:41: models[0].targets[0][1]: {GOOD_TARGET}", f"2:45: models[0].targets[1]: {GOOD_TARGET}"],
        ),
        (
            MINIMAL + "models: [{name: a, targets: [[openai/a, opnai/b]]}]\n",
            ["2:41: models[0].targets[0][1]: no provider is named 'opnai': did you mean 'openai'?"],
        ),
        (
            MINIMAL + "models: [{name: a, targets: [{a: b}]}]\n",
            ["2:30: models[0].targets[0]: expected text, got a section"],
        ),
        (
            MINIMAL + "fault_tolerance: {fallback_provider: opnai}\n",
            ["2:38: fault_tolerance.fallback_provider: no provider is named 'opnai': did you mean 'openai'?"],
        ),
        (
            MINIMAL + "models: [{name: a, targets: [opnai/a/b]}]\n",
            ["2:30: models[0].targets[0]: no provider is named 'opnai': did you mean 'openai'?"],
        ),
        *(
            (
                MINIMAL + f"models: [{{name: '{name}', targets: ['openai/*']}}]\n",
                [
                    f"2:{29 + len(name) + 1}: models[0].targets: a * in a target needs a name with exactly one *,"
                    " for it is what that matched"
                ],
            )
            for name in ("a", "*-*")
        ),
        (
            MINIMAL + "models: [{name: 'a*', targets: ['*/x']}]\n",
            [
                "2:32: models[0].targets: a * may stand in the model's part only: PROVIDER/*",
                "2:33: models[0].targets[0]: no provider is named '*': known here: openai",
            ],
        ),
        (
            MINIMAL + "models:\n- {name: a, targets: [openai/a]}\n- {name: a, targets: [openai/b]}\n",
            ["4:10: models[1].name: 'a' is the name of models[0] already"],
        ),
        # tenants and keys
        (
            SHORT_KEYS,
            [f"1:59: tenants[0].keys[0]: {MAKE_ONE}", f"1:91: admin.keys[0]: {MAKE_ONE}"],
        ),
        (MINIMAL + "tenants: [{name: a}]\n", [f"2:11: tenants[0].keys: {A_KEY}"]),
        (MINIMAL + "tenants: [{name: a, keys: []}]\n", [f"2:27: tenants[0].keys: {A_KEY}"]),
        (MINIMAL + "state: memory://\ntenants: [{name: a}]\n", [f"3:11: tenants[0].keys: {A_KEY}"]),
        (
            MINIMAL + "state: [a]\ntenants: [{name: a}]\n",  # nobody can tell yet whether the keys are missing
            ["2:8: state: expected a secret: text, ${VAR} in quotes, or {file: PATH}, got a list"],
        ),
        *(
            (
                MINIMAL + f"tenants: [{{name: {name}, keys: [{KEY}]}}]\n",
                [f"2:18: tenants[0].name: the name '{name}' is reserved: choose another"],
            )
            for name in ("other", "default")
        ),
        (
            MINIMAL + f"tenants: [{{name: a b, keys: [{KEY}]}}]\n",
            ["2:18: tenants[0].name: expected 1 to 64 letters, digits, '.', '_' or '-'"],
        ),
        (
            MINIMAL + f"tenants:\n- {{name: a, keys: [{KEY}]}}\n- {{name: a, keys: [{OTHER_KEY}]}}\n",
            ["4:10: tenants[1].name: 'a' is the name of tenants[0] already"],
        ),
        (
            MINIMAL + f"tenants:\n- {{name: a, keys: [{KEY}]}}\n- {{name: b, keys: [{KEY}]}}\n",
            ["4:20: tenants[1].keys[0]: the same key stands in tenants[0].keys[0]: each holder needs keys of its own"],
        ),
        (
            MINIMAL + f"tenants: [{{name: a, keys: [{KEY}]}}]\nadmin: {{keys: [{KEY}]}}\n",
            ["2:28: tenants[0].keys[0]: the same key stands in admin.keys[0]: each holder needs keys of its own"],
        ),
        (
            tenant("providers: [opanai]"),
            ["5:15: tenants[0].providers[0]: no provider is named 'opanai': did you mean 'openai'?"],
        ),
        (
            tenant("passthrough: [/audio/*]"),
            [
                '5:17: tenants[0].passthrough[0]: expected a path or glob that begins with /v1/, such as "/v1/audio/*"',
            ],
        ),
        *(
            (
                f"providers: {{a: {{kind: openai, {line}}}}}\ntenants: [{{name: a, keys: [{KEY}]}}]\n",
                [
                    f"1:{column}: providers.a.{path}: 'client' passes the caller's own key on, but with tenants"
                    " that is a key of this proxy: set the provider's own key"
                ],
            )
            for line, path, column in (("api_key: client", "api_key", 40), ("api_keys: [client]", "api_keys[0]", 42))
        ),
        # variables
        (
            provider("api_key: ${NOPE}"),
            [
                "4:14: providers.openai.api_key: variable NOPE is not set, or empty: set it, or write ${NOPE:-default}",
            ],
        ),
        (MINIMAL + "listen: {port: '${WORD}'}\n", ["2:16: listen.port: expected a whole number, got text"]),
    ],
)
def test_a_broken_rule_names_its_place(config: File, text: str, errors: list[str]) -> None:
    env = {"A": "sk-a", "B": "sk-b", "WORD": "word"}
    assert config.errors(text, env) == [f"config.yaml:{error}" for error in errors]


def test_all_errors_at_once(config: File) -> None:
    """One of each sort, in one file and one environment; none hides another."""
    text = f"""\
        listen: {{port: x, prot: 1}}
        providers:
          openai: {{kind: openai, api_key: "${{NOPE}}", http2: true}}
          second: {{kind: opnai}}
        models:
          - {{name: a, targets: [secnd/a]}}
          - {{name: a, targets: [second/a, second/a]}}
        tenants:
          - {{name: other, keys: [short], providers: [opanai]}}
          - {{name: b, keys: [{KEY}, {KEY}]}}
        admin: {{keys: [{{file: nowhere}}]}}
        listen: {{}}
        """
    places = [line.split(": ")[0:2] for line in config.errors(text, {"BREAKWATER_LISTEN__PROT": "1"})]
    assert places == [
        ["config.yaml:1:16", "listen.port"],
        ["config.yaml:1:19", "listen.prot"],
        ["config.yaml:3:35", "providers.openai.api_key"],
        ["config.yaml:3:53", "providers.openai.http2"],
        ["config.yaml:4:18", "providers.second.kind"],
        ["config.yaml:6:25", "models[0].targets[0]"],
        ["config.yaml:7:12", "models[1].name"],
        ["config.yaml:7:24", "models[1].targets"],
        ["config.yaml:9:12", "tenants[0].name"],
        ["config.yaml:9:26", "tenants[0].keys[0]"],
        ["config.yaml:9:46", "tenants[0].providers[0]"],
        ["config.yaml:10:43", "tenants[1].keys[1]"],
        ["config.yaml:11:23", "admin.keys[0].file"],
        ["config.yaml:12:1", "listen"],
        ["environment BREAKWATER_LISTEN__PROT", "matches no key"],
    ]


def test_a_secret_from_a_file_is_stripped_and_found_beside_the_configuration(config: File) -> None:
    (config.directory / "secrets").mkdir()
    (config.directory / "secrets" / "key").write_text(f"  {KEY}\n")
    loaded = config.load(MINIMAL + "admin: {keys: [{file: secrets/key}]}\n")
    assert loaded.settings.admin.keys[0].get_secret_value() == KEY
    assert loaded.origins["admin.keys[0]"] == f"{config.path}:2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n", "the file of this secret is empty"),
        (b"x" * 70_000, "the file of this secret is larger than 65536 bytes"),
        (b"\xff\xfe" * 20, "the file of this secret cannot be read: it is not text"),
        (b"short", MAKE_ONE),
        (b"two words that are long", HEADER_TEXT),
    ],
)
def test_a_bad_secret_file_is_an_error_with_its_line(config: File, content: bytes, message: str) -> None:
    (config.directory / "key").write_bytes(content)
    (error,) = config.errors(MINIMAL + "admin: {keys: [{file: key}]}\n")
    assert error == f"config.yaml:2:16: admin.keys[0]: {message}"


def test_a_secret_file_that_cannot_be_read(config: File) -> None:
    (error,) = config.errors(MINIMAL + "admin: {keys: [{file: /proc/self/mem}]}\n")
    assert error == "config.yaml:2:16: admin.keys[0]: the file of this secret cannot be read: input/output error"


@pytest.mark.parametrize("form", ["{path: key}", "{file: key, mode: 1}", "{}"])
def test_a_secret_is_a_text_or_a_file(config: File, form: str) -> None:
    (error,) = config.errors(MINIMAL + f"admin: {{keys: [{form}]}}\n")
    assert error.endswith("admin.keys[0]: expected a secret: text, ${VAR} in quotes, or {file: PATH}, got a section")


CANARY = "canary-7f3a91"


@pytest.mark.parametrize(
    "text",
    [
        provider(f"api_key: '{CANARY} {CANARY}'"),
        provider(f"api_key: [{CANARY}]"),
        provider(f"api_keys: {CANARY}"),
        provider(f"transport: {CANARY}"),
        provider(f"base_url: {CANARY}"),
        provider(f"base_url: https://u:{CANARY}@x/v1"),
        provider(f"max_connections: {CANARY}"),
        provider(f"transport: httpx\n    egress_proxy: ftp://u:{CANARY}@x"),
        provider("api_key: '${SECRET} '"),
        provider(f"api_key: *{CANARY}"),
        provider(f"api_key: '{CANARY}"),
        provider(f"api_key: @{CANARY}"),
        provider(f"http2: {CANARY}"),
        MINIMAL + f"admin: {{keys: [{CANARY}]}}\n",
        MINIMAL + f"listen: {{host: '{CANARY} '}}\n",
        tenant(f"passthrough: [{CANARY}]"),
        MINIMAL + f"models: [{{name: a, targets: [{CANARY}]}}]\n",
    ],
)
def test_no_message_quotes_a_value(config: File, text: str) -> None:
    assert CANARY not in "\n".join(config.errors(text, {"SECRET": CANARY}))


def test_good_values_of_every_kind(config: File) -> None:
    trustme.CA().cert_pem.write_to_path(str(config.directory / "ca.pem"))
    text = f"""\
        listen: {{host: "::1", port: "${{PORT:-8081}}", admin_port: ~}}
        admin:
        providers:
          a-1.b_c:
            kind: openai
            base_url: HTTPS://Example.com:8443/v1/
            api_keys: ["${{DIGITS}}"]
            organization: ${{NONE:-}}
            transport: httpx
            http2: true
            egress_proxy: http://u:p%40ss@proxy:3128
            ca_file: ca.pem
            max_connections: "${{COUNT}}"
          m: {{kind: mock, tokens_per_second: 5}}
        models:
          - {{name: "on", targets: [m/a/b]}}
          - {{name: "gpt-*", targets: ["a-1.b_c/x-*-y-*"]}}
        tenants:
          - {{name: A.b_c-1, keys: [{KEY}, "$${{literal-dollar}}"], models: ~, providers: [m]}}
        """
    loaded = config.load(text, {"DIGITS": "12345678901234567890", "COUNT": "7"})
    settings = loaded.settings
    provider_settings = settings.providers["a-1.b_c"]
    assert list(settings.providers) == ["a-1.b_c", "m"]
    assert provider_settings.kind == "openai"
    assert [key.get_secret_value() for key in provider_settings.credentials] == ["12345678901234567890"]
    assert provider_settings.max_connections == 7
    assert provider_settings.organization is None
    assert provider_settings.base_url == "HTTPS://Example.com:8443/v1"
    assert provider_settings.ca_file == config.directory / "ca.pem"
    assert settings.listen.port == 8081
    assert settings.tenants[0].keys[1].get_secret_value() == "${literal-dollar}"
    assert settings.secrets() == {
        "12345678901234567890", "http://u:p%40ss@proxy:3128", "p%40ss", "p@ss", KEY, "${literal-dollar}"
    }  # fmt: skip


def test_the_word_client_is_no_secret(config: File) -> None:
    settings = config.load("providers: {a: {kind: openai, api_key: client}}").settings
    provider_settings = settings.providers["a"]
    assert provider_settings.kind == "openai"
    assert provider_settings.passes_client_key
    assert provider_settings.credentials == ()
    assert settings.secrets() == frozenset()

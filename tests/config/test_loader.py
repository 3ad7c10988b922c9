"""Precedence, origins, the environment's names, the hash, and the warnings."""

from __future__ import annotations

import pytest
from pydantic import SecretStr, ValidationError
from written import MINIMAL, File

from proxy.config.loader import load
from proxy.config.settings import ModelSettings, Settings
from proxy.edge.settings import ListenSettings, TenantSettings
from proxy.providers.settings import MockSettings, OpenAISettings, Timeouts

KEY = "bw-0123456789abcdef"
PREFIX = "BREAKWATER_"


def test_defaults(config: File) -> None:
    settings = config.load(MINIMAL).settings
    assert settings.listen == ListenSettings()
    assert (settings.listen.host, settings.listen.port, settings.listen.admin_port) == ("127.0.0.1", 8080, None)
    assert settings.listen.max_body_bytes == 20 * 1024 * 1024
    assert (settings.listen.max_in_flight, settings.listen.drain_ms, settings.listen.grace_ms) == (2000, 5000, 30_000)
    assert settings.models == (ModelSettings(name="*", targets=("openai/*",)),)
    assert settings.tenants == ()
    provider = settings.providers["openai"]
    assert isinstance(provider, OpenAISettings)
    assert provider.base_url == "https://api.openai.com/v1"
    assert provider.timeouts == Timeouts(connect_ms=5000, first_event_ms=300_000, idle_ms=300_000, total_ms=600_000)
    assert provider.credentials == ()
    assert not provider.passes_client_key


def test_the_first_provider_of_the_file_is_the_default_model_s(config: File) -> None:
    settings = config.load("providers: {z: {kind: mock}, a: {kind: mock}}").settings
    assert settings.models[0].targets == ("z/*",)


def test_precedence_and_origins(config: File) -> None:
    text = MINIMAL + "listen:\n  host: ::1\n  port: 1\n  admin_port: 2\n"
    env = {"BREAKWATER_LISTEN__PORT": "11", "BREAKWATER_LISTEN__ADMIN_PORT": "12"}
    loaded = config.load(text, env, {"listen.port": 111, "listen.host": None})
    assert (loaded.settings.listen.host, loaded.settings.listen.port, loaded.settings.listen.admin_port) == (
        "::1",
        111,
        12,
    )
    assert loaded.origins["listen.host"] == f"{config.path}:3"
    assert loaded.origins["listen.port"] == "flag"
    assert loaded.origins["listen.admin_port"] == "environment BREAKWATER_LISTEN__ADMIN_PORT"
    assert loaded.origins["listen.drain_ms"] == "default"
    assert loaded.origins["providers.openai.kind"] == f"{config.path}:1"
    assert loaded.origins["models[0].name"] == "default"


def test_without_a_file_flags_can_bring_everything() -> None:
    loaded = load(
        None, {"BREAKWATER_PROVIDERS__M__SEED": "7"}, {"providers": {"m": {"kind": "mock"}}, "listen.port": 0}
    )
    assert loaded.settings.providers == {"m": MockSettings(kind="mock", seed=7)}
    assert loaded.settings.listen.port == 0


def test_flags_win_over_the_environment_key_by_key() -> None:
    env = {"BREAKWATER_PROVIDERS__M__SEED": "7", "BREAKWATER_PROVIDERS__M__FIRST_TOKEN_MS": "8"}
    loaded = load(None, env, {"providers": {"m": {"kind": "mock", "seed": 1}}})
    assert loaded.settings.providers == {"m": MockSettings(kind="mock", seed=1, first_token_ms=8)}


def test_a_flag_for_an_unknown_key_is_a_fault_of_the_program(config: File) -> None:
    for path in ("listen.prot", "lisen.port", "providers.openai.kind"):
        with pytest.raises(KeyError):
            config.load(MINIMAL, {}, {path: 1})


@pytest.mark.parametrize(
    ("name", "value", "path", "expected"),
    [
        ("LISTEN__PORT", "9000", "listen.port", 9000),
        ("LISTEN__HOST", "0.0.0.0", "listen.host", "0.0.0.0"),
        ("LISTEN__ADMIN_PORT", "null", "listen.admin_port", None),
        ("LISTEN__ADMIN_PORT", "", "listen.admin_port", None),
        ("OBSERVABILITY__SCRUB_SECRETS", "false", "observability.scrub_secrets", False),
        ("PROVIDERS__OPENAI__BASE_URL", "http://127.0.0.1:1/v1", "providers.openai.base_url", "http://127.0.0.1:1/v1"),
        ("PROVIDERS__OPENAI__TIMEOUTS__IDLE_MS", "5", "providers.openai.timeouts.idle_ms", 5),
        ("PROVIDERS__OPENAI__ORGANIZATION", "123", "providers.openai.organization", "123"),
        ("PROVIDERS__OPENAI__PROJECT", "${NOT_A_VARIABLE}", "providers.openai.project", "${NOT_A_VARIABLE}"),
        ("PROVIDERS__MY_MOCK_2__TOKENS_PER_SECOND", "2.5", "providers.my-mock.2.tokens_per_second", 2.5),
    ],
)
def test_scalars_from_the_environment(config: File, name: str, value: str, path: str, expected: object) -> None:
    text = "providers: {openai: {kind: openai}, my-mock.2: {kind: mock}}\n"
    at: object = config.load(text, {PREFIX + name: value}).settings
    for step in path.replace("my-mock.2", "my-mock@2").split("."):
        key = step.replace("@", ".")
        at = at[key] if isinstance(at, dict) else getattr(at, key)
    assert at == expected
    assert type(at) is type(expected)


@pytest.mark.parametrize(
    ("value", "keys"),
    [
        (KEY, [KEY]),
        (f"{KEY}1, {KEY}2", [f"{KEY}1", f"{KEY}2"]),
        (f'["{KEY}1", "{KEY},2"]', [f"{KEY}1", f"{KEY},2"]),
        ("12345678901234567890", ["12345678901234567890"]),
        ("$$$$$$$$$$$$$$$$", ["$$$$$$$$$$$$$$$$"]),
        ("", []),
        ("[]", []),
    ],
)
def test_lists_from_the_environment(config: File, value: str, keys: list[str]) -> None:
    text = MINIMAL + "admin: {keys: [0123456789abcdef-in-the-file]}\n"
    settings = config.load(text, {"BREAKWATER_ADMIN__KEYS": value}).settings
    assert [key.get_secret_value() for key in settings.admin.keys] == keys


def test_a_secret_s_file_from_the_environment_starts_at_the_current_directory(
    config: File, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "key").write_text("sk-from-a-file\n")
    (elsewhere / "admin").write_text(KEY)
    monkeypatch.chdir(elsewhere)
    env = {"BREAKWATER_PROVIDERS__OPENAI__API_KEY__FILE": "key", "BREAKWATER_ADMIN__KEYS": "[{file: admin}]"}
    settings = config.load("providers: {openai: {kind: openai, api_key: sk-in-the-file}}", env).settings
    assert settings.secrets() == {"sk-from-a-file", KEY}


def test_an_override_makes_the_variable_in_the_file_needless(config: File) -> None:
    text = 'providers: {openai: {kind: openai, api_key: "${NOT_SET}"}}'
    settings = config.load(text, {"BREAKWATER_PROVIDERS__OPENAI__API_KEY": "sk-env"}).settings
    assert settings.secrets() == {"sk-env"}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("LISTEN__PROT", "1", ": matches no key: did you mean 'BREAKWATER_LISTEN__PORT'?"),
        ("PROVIDERS__OPNAI__BASE_URL", "x", ": matches no key: did you mean 'BREAKWATER_PROVIDERS__OPENAI__BASE_URL'?"),
        ("FOO__BAR", "x", ": matches no key: see breakwater config schema"),
        ("LISTEN__PORT__", "1", ": matches no key: did you mean 'BREAKWATER_LISTEN__PORT'?"),
        ("LISTEN__PORT", "x", ": listen.port: expected a whole number, got text"),
        ("LISTEN__PORT", "", ": listen.port: expected a whole number, got null"),
        ("LISTEN__PORT", "99999", ": listen.port: must be at most 65535"),
        (
            "OBSERVABILITY__SCRUB_SECRETS",
            "0",
            ": observability.scrub_secrets: expected true or false, got a whole number: write false",
        ),
        (
            "PROVIDERS__OPENAI",
            "x",
            ": providers.openai: names a section, not a value: add two underscores and one of its keys",
        ),
        ("PROVIDERS__OPENAI__SEED", "1", ": providers.openai.seed: unknown key: known here: "),
        ("PROVIDERS__A_B__KIND", "mock", ": providers.a-b.kind: matches more than one name: set this one in the file"),
        ("ADMIN__KEYS", "[a", ': admin.keys: expected items divided by commas, or a list such as ["a", "b"]'),
        ("ADMIN__KEYS", "[a]: b", ': admin.keys: expected items divided by commas, or a list such as ["a", "b"]'),
        (
            "ADMIN__KEYS",
            "[a, [b]]",
            ": admin.keys[1]: expected a secret: text, ${VAR} in quotes, or {file: PATH}, got a list",
        ),
    ],
)
def test_errors_of_the_environment(config: File, name: str, value: str, error: str) -> None:
    text = "providers: {openai: {kind: openai}, a-b: {kind: mock}, a.b: {kind: mock}}"
    problems = config.errors(text, {PREFIX + name: value})
    assert any(problem.startswith(f"environment {PREFIX}{name}{error}") for problem in problems)


@pytest.mark.parametrize("name", ["PORT", "SERVICE_HOST", "LISTEN", "PORT_8080_TCP_ADDR", "MODELS", ""])
def test_names_without_two_underscores_are_left_alone(config: File, name: str) -> None:
    assert config.load(MINIMAL, {PREFIX + name: "tcp://10.0.0.1:80"}).settings == config.load(MINIMAL).settings


def test_names_of_other_programs_are_left_alone(config: File) -> None:
    assert (
        config.load(MINIMAL, {"OTHER__LISTEN__PORT": "x", "breakwater_listen__port": "x"}).settings.listen.port == 8080
    )


def test_the_hash_follows_the_values_and_not_the_secrets_or_the_way_they_were_given(config: File) -> None:
    text = 'providers: {openai: {kind: openai, api_key: "${KEY}"}}\n'
    first = config.load(text, {"KEY": "sk-one"})
    assert first.hash == config.load(text + "# another comment\n", {"KEY": "sk-two"}).hash
    assert first.hash == config.load(text + "listen: {port: 8080}\n", {"KEY": "sk-one"}).hash
    assert first.hash != config.load(text + "listen: {port: 8081}\n", {"KEY": "sk-one"}).hash
    assert first.hash != config.load(text.replace("openai:", "other:"), {"KEY": "sk-one"}).hash
    assert len(first.hash) == 16
    int(first.hash, 16)


def test_the_order_of_providers_enters_the_hash(config: File) -> None:
    models = "models: [{name: a, targets: [a/a]}]\n"
    one = config.load("providers: {a: {kind: mock}, b: {kind: mock}}\n" + models)
    other = config.load("providers: {b: {kind: mock}, a: {kind: mock}}\n" + models)
    assert one.hash != other.hash


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("providers: {a: {kind: openai}}", "1:16: providers.a.base_url: no api_key is set, so requests go without one"),
        (
            "providers: {a: {kind: openai, api_key: x, base_url: http://example.com/v1}}",
            "1:53: providers.a.base_url: the key travels unencrypted",
        ),
        (
            "providers: {a: {kind: openai, api_key: x, base_url: https://example.com}}",
            "1:53: providers.a.base_url: has no path; most compatible servers expect https://example.com/v1",
        ),
        (
            "listen: {host: 0.0.0.0}\nproviders: {a: {kind: mock}}",
            "1:16: listen.host: reachable from other machines, without tenants: serve refuses this unless --insecure",
        ),
        (
            "providers: {a: {kind: mock}}\nmodels: [{name: gpt, targets: [a/b]}]\n"
            f"tenants: [{{name: t, keys: [{KEY}], models: ['gp*', claude]}}]",
            "3:66: tenants[0].models[1]: matches none of the configured models",
        ),
    ],
)
def test_warnings(config: File, text: str, warning: str) -> None:
    warnings = [str(one).removeprefix(f"{config.directory}/") for one in config.load(text).warnings]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"config.yaml:{warning}")


@pytest.mark.parametrize(
    "text",
    [
        "providers: {a: {kind: openai, api_key: x, base_url: http://127.0.0.1/v1}}",
        "providers: {a: {kind: openai, base_url: http://vllm:8000/v1}}",
        "providers: {a: {kind: openai, api_key: client}}",
        "listen: {host: 0.0.0.0}\nproviders: {a: {kind: mock}}\n"
        f"tenants: [{{name: t, keys: [{KEY}], models: [x]}}]",
    ],
)
def test_no_warning_without_reason(config: File, text: str) -> None:
    assert config.load(text).warnings == ()


def test_settings_made_by_a_program_obey_the_rules_between_sections() -> None:
    mock = MockSettings(kind="mock")
    tenants = (TenantSettings(name="t", keys=(SecretStr(KEY),), providers=("b",)),)
    with pytest.raises(ValidationError, match=r"tenants\[0\]\.providers\[0\]: no provider is named 'b'") as caught:
        Settings(providers={"a": mock}, tenants=tenants)
    assert KEY not in str(caught.value)
    with pytest.raises(ValidationError):
        Settings(providers={})
    assert Settings(providers={"a": mock}).models[0].targets == ("a/*",)


def test_settings_are_frozen_and_hide_their_secrets() -> None:
    tenant = TenantSettings(name="t", keys=(SecretStr(KEY),))
    with pytest.raises(ValidationError):
        tenant.name = "u"
    assert KEY not in repr(tenant)
    assert KEY not in str(Settings(providers={"a": MockSettings(kind="mock")}, tenants=(tenant,)))


def test_loading_twice_gives_the_same(config: File) -> None:
    assert config.load(MINIMAL) == config.load(MINIMAL)

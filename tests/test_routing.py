"""Which model name leads where."""

from __future__ import annotations

import pytest

from proxy.errors import NotFound
from proxy.routing import Route, Routing
from proxy.types import Target, Tenant

ANYONE = Tenant("default", passthrough=None)
ROUTES = [
    Route("gpt-4o", "openai/gpt-4o-2024"),
    Route("gpt-*", "openai/gpt-*"),
    Route("gpt-4o-*", "azure/deployment-*"),
    Route("local/*", "vllm/org/*"),
    Route("*-chat", "vllm/*"),
    Route("*", "openai/*"),
]


def routing() -> Routing:
    return Routing(ROUTES, ["openai", "azure", "vllm"])


@pytest.mark.parametrize(
    ("model", "provider", "upstream", "label"),
    [
        ("gpt-4o", "openai", "gpt-4o-2024", "gpt-4o"),
        ("gpt-4o-mini", "azure", "deployment-mini", "gpt-4o-*"),
        ("gpt-5", "openai", "gpt-5", "gpt-*"),
        ("local/llama:7b", "vllm", "org/llama:7b", "local/*"),
        ("qwen-chat", "vllm", "qwen", "*-chat"),
        ("anything/else", "openai", "anything/else", "*"),
        ("a.b[c]", "openai", "a.b[c]", "*"),
    ],
)
def test_exact_then_longest_glob_then_file_order(model: str, provider: str, upstream: str, label: str) -> None:
    assert routing().target(model, ANYONE) == Target(provider, upstream, label)


def test_equally_long_globs_are_taken_in_file_order() -> None:
    table = Routing([Route("a*", "one/*"), Route("*b", "two/*")], ["one", "two"])
    assert table.target("ab", ANYONE).provider == "one"


def test_what_no_route_matches_does_not_exist() -> None:
    with pytest.raises(NotFound) as caught:
        Routing([Route("only", "openai/only")], ["openai"]).target("other", ANYONE)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("tenant", "model", "allowed"),
    [
        (Tenant("t", models=["gpt-4o*"]), "gpt-4o", True),
        (Tenant("t", models=["gpt-4o*"]), "gpt-5", False),
        (Tenant("t", models=[]), "gpt-4o", False),
        (Tenant("t", providers=["azure"]), "gpt-4o", False),
        (Tenant("t", providers=["azure"]), "gpt-4o-mini", True),
    ],
)
def test_a_tenant_sees_only_its_own(tenant: Tenant, model: str, allowed: bool) -> None:
    if allowed:
        assert routing().target(model, tenant)
        return
    with pytest.raises(NotFound) as refused:
        routing().target(model, tenant)
    with pytest.raises(NotFound) as unknown:
        Routing([], ["openai"]).target(model, tenant)
    assert refused.value.message == unknown.value.message


def test_pass_through_goes_to_the_first_provider_if_the_tenant_may_use_it() -> None:
    assert routing().passthrough(ANYONE) == Target("openai", "", "other")
    with pytest.raises(NotFound):
        routing().passthrough(Tenant("t", providers=["azure"]))


def test_a_key_narrows_its_tenant_and_never_widens_it() -> None:
    narrow = Tenant("acme", models=("gpt-*",), key_models=("gpt-5*", "qwen-*"))
    assert routing().target("gpt-5", narrow).provider == "openai"
    for model in ("gpt-4o", "qwen-chat"):
        with pytest.raises(NotFound) as caught:
            routing().target(model, narrow)
        assert caught.value.code == "model_not_found"
    assert routing().target("qwen-chat", Tenant("acme", key_models=("qwen-*",))).provider == "vllm"

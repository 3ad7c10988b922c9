"""Which model name leads where."""

from __future__ import annotations

import pytest

from proxy.errors import NotFound
from proxy.routing import MATCHED, Route, Routing
from proxy.types import Target, Tenant

ANYONE = Tenant("default", passthrough=None)


def leads(name: str, *targets: str | list[str]) -> Route:
    return Route(name, [[one] if isinstance(one, str) else one for one in targets])


ROUTES = [
    leads("gpt-4o", "openai/gpt-4o-2024"),
    leads("gpt-*", "openai/gpt-*"),
    leads("gpt-4o-*", "azure/deployment-*"),
    leads("local/*", "vllm/org/*"),
    leads("*-chat", "vllm/*"),
    leads("*", "openai/*"),
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
    assert routing().targets(model, ANYONE) == ((Target(provider, upstream, label),),)


def test_however_many_names_clients_make_up_only_so_many_are_remembered() -> None:
    one = routing()
    for number in range(MATCHED + 10):
        ((target,),) = one.targets(f"gpt-{number}", ANYONE)
        assert target == Target("openai", f"gpt-{number}", "gpt-*")
    assert len(one._matched) <= MATCHED
    assert one.targets("gpt-1", ANYONE) is one.targets("gpt-1", ANYONE)


def test_equally_long_globs_are_taken_in_file_order() -> None:
    table = Routing([leads("a*", "one/*"), leads("*b", "two/*")], ["one", "two"])
    assert table.targets("ab", ANYONE)[0][0].provider == "one"


def test_what_no_route_matches_does_not_exist() -> None:
    with pytest.raises(NotFound) as caught:
        Routing([leads("only", "openai/only")], ["openai"]).targets("other", ANYONE)
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
        assert routing().targets(model, tenant)
        return
    with pytest.raises(NotFound) as refused:
        routing().targets(model, tenant)
    with pytest.raises(NotFound) as unknown:
        Routing([], ["openai"]).targets(model, tenant)
    assert refused.value.message == unknown.value.message


def test_pass_through_goes_to_the_first_provider_if_the_tenant_may_use_it() -> None:
    assert routing().passthrough(ANYONE) == ((Target("openai", "", "other"),),)
    with pytest.raises(NotFound):
        routing().passthrough(Tenant("t", providers=["azure"]))


def test_a_key_narrows_its_tenant_and_never_widens_it() -> None:
    narrow = Tenant("acme", models=("gpt-*",), key_models=("gpt-5*", "qwen-*"))
    assert routing().targets("gpt-5", narrow)[0][0].provider == "openai"
    for model in ("gpt-4o", "qwen-chat"):
        with pytest.raises(NotFound) as caught:
            routing().targets(model, narrow)
        assert caught.value.code == "model_not_found"
    assert routing().targets("qwen-chat", Tenant("acme", key_models=("qwen-*",)))[0][0].provider == "vllm"


def test_targets_keep_their_order_and_their_groups() -> None:
    table = Routing([leads("m", ["a/x", "b/y"], "c/z")], ["a", "b", "c"])
    shared, last = table.targets("m", ANYONE)
    assert [(target.provider, target.model) for target in shared] == [("a", "x"), ("b", "y")]
    assert [(target.provider, target.model) for target in last] == [("c", "z")]


@pytest.mark.parametrize(
    ("providers", "left"),
    [(["b", "c"], [["b"], ["c"]]), (["a"], [["a"]]), (["c"], [["c"]]), (None, [["a", "b"], ["c"]])],
)
def test_a_tenant_is_led_to_its_own_providers_only(providers: list[str] | None, left: list[list[str]]) -> None:
    table = Routing([leads("m", ["a/x", "b/y"], "c/z")], ["a", "b", "c"])
    groups = table.targets("m", Tenant("t", providers=providers))
    assert [[target.provider for target in group] for group in groups] == left


@pytest.mark.parametrize(
    ("fallback", "asked", "model"),
    [
        ("spare/small", "exact", "small"),
        ("spare", "exact", "exact"),
        ("spare", "gpt-5", "gpt-5"),
        ("spare", "a-mid-b", "a-mid-b"),
        ("spare/fixed", "gpt-5", "fixed"),
    ],
)
def test_a_fallback_comes_last_and_is_asked_for_its_own_model_or_the_same(
    fallback: str, asked: str, model: str
) -> None:
    routes = [
        leads("exact", "main/x"),
        leads("gpt-*", "main/gpt-*"),
        leads("*-mid-*", "main/m"),
        leads("own", "spare/o"),
    ]
    table = Routing(routes, ["main", "spare"], fallback=fallback)
    last = table.targets(asked, ANYONE)[-1]
    assert [(target.provider, target.model) for target in last] == [("spare", model)]
    assert len(table.targets(asked, ANYONE)) == 2
    assert len(table.targets("own", ANYONE)) == 1

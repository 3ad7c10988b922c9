"""What of a body decides how much is made and billed: maxima, choices, prompts, kinds of tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.budget.plan import Want, want_of
from proxy.budget.pricing import Rates, ceiling
from proxy.budget.settings import BudgetSettings
from proxy.errors import InvalidRequest, ModelPriceUnknown
from proxy.types import Ask, Call, Event, Record, Tenant
from proxy.validation import requests
from tests.budget.scene import RATES, TARGET, TENANT, Scene, usd

pytestmark = pytest.mark.anyio

ANYONE = Tenant("acme")
SPOKEN = Rates(1_000_000_000, 1_000_000_000, 1_000_000_000, 2_000_000_000, 2_000_000_000, audio=(10**9, 80 * 10**9))


def parsed(path: str, **members: Any) -> Ask:
    body = json.dumps({"model": "m", **members}).encode()
    return requests.parse(Call("POST", path, path, b"", [], body, "r", "t", "c"), ANYONE, tenants_configured=True)  # type: ignore[arg-type]


def completion(**members: Any) -> Want:
    return want_of(parsed("/v1/completions", **members))


async def test_embeddings_without_a_price_do_not_pass_under_a_limit_in_dollars() -> None:
    limited = BudgetSettings(usd_per_day=usd("1"))
    scene = Scene(limited, rates={"alpha": None})
    with pytest.raises(ModelPriceUnknown):
        await scene.serve(want_of(parsed("/v1/embeddings", input="a text")))
    await Scene(limited, rates={"alpha": RATES}).serve(want_of(parsed("/v1/embeddings", input="a text")))


async def test_what_is_passed_through_is_priced_by_its_reply() -> None:
    path = "/v1/images/generations"
    call = Call("POST", path, path.encode(), b"", [], b"{}", "r", "t", "c")  # type: ignore[arg-type]
    ask = requests.parse(call, Tenant("acme", passthrough=None), tenants_configured=False)
    await Scene(BudgetSettings(usd_per_day=usd("1")), rates={"alpha": None}).serve(want_of(ask))


async def test_under_strict_the_cap_affords_the_dearest_kind_of_output() -> None:
    limit = usd("0.01")
    strict = BudgetSettings(usd_per_day=limit, estimate="max", on_overrun="cut")
    scene = Scene(strict, rates={"alpha": SPOKEN})
    want = want_of(parsed("/v1/chat/completions", messages=[{"role": "user", "content": "Speak"}], stream=True))
    async with scene.budget.hold(TENANT, "", want, [TARGET], Record()) as charge:
        await charge.cover(TARGET)
        assert charge.output_cap is not None
        assert ceiling(want.input_bound, charge.output_cap, SPOKEN) <= 10_000_000
        assert ceiling(want.input_bound, charge.output_cap + 1, SPOKEN) > 10_000_000


@pytest.mark.parametrize(
    ("members", "made", "returned"),
    [
        ({"prompt": "one"}, 1, 1),
        ({"prompt": "one", "n": 2}, 2, 2),
        ({"prompt": "one", "n": 2, "best_of": 5}, 5, 2),
        ({"prompt": "one", "best_of": None}, 1, 1),
        ({"prompt": ["one", 'two, "three"', "four"], "n": 2, "best_of": 4}, 12, 6),
        ({"prompt": [1, 2, 3]}, 1, 1),
        ({"prompt": [[1, 2], [3]]}, 2, 2),
        ({"prompt": []}, 1, 1),
        ({"prompt": ["x"] * 40_000}, 40_000, 40_000),
    ],
)
def test_every_reply_that_is_made_is_counted(members: dict[str, Any], made: int, returned: int) -> None:
    want = completion(**members)
    assert (want.choices, want.returned) == (made, returned)


@pytest.mark.parametrize("value", [0, -1, 2**63, True, "10", 129])
def test_a_best_of_that_is_no_count_is_400(value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion(prompt="one", best_of=value)
    assert caught.value.param == "best_of"


def test_only_a_maximum_of_the_api_itself_bounds_the_output() -> None:
    messages = [{"role": "user", "content": "hi"}]
    chat = "/v1/chat/completions"
    assert want_of(parsed(chat, messages=messages, max_output_tokens=1)).asked is None
    assert want_of(parsed(chat, messages=messages, max_tokens=1, max_completion_tokens=4000)).asked == 4000
    assert want_of(parsed(chat, messages=messages, max_tokens=7)).asked == 7
    assert completion(prompt="one", max_completion_tokens=1).asked is None
    assert want_of(parsed("/v1/responses", input="hi", max_tokens=1, store=False)).asked is None
    assert want_of(parsed("/v1/responses", input="hi", max_output_tokens=9, store=False)).asked == 9


@pytest.mark.parametrize(("estimate", "output"), [("adaptive", 700), ("max", 700)])
async def test_a_reply_in_the_background_is_charged_what_was_reserved_for_it(estimate: Any, output: int) -> None:
    """Its usage is told later, and polling for it is free: so it would never be charged."""
    scene = Scene(BudgetSettings(tokens_per_minute=10_000, estimate=estimate))
    want = want_of(parsed("/v1/responses", input="hi", background=True, max_output_tokens=700))
    async with scene.budget.hold(TENANT, "", want, [TARGET], Record()) as charge:
        await charge.cover(TARGET)
        charge.answered(200)
        charge.see(Event(b'{"id":"resp_1","status":"queued","usage":null,"output":[]}'))
    row = await scene.row()
    assert row.held_tokens == 0
    assert [(one.usage.output, one.usage.input > 0) for one in await scene.used()] == [(output, True)]

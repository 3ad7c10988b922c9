"""The section `context`: what it may say, for all and for a tenant, and what it probably does not mean."""

from __future__ import annotations

import pytest
from written import MINIMAL, File

from proxy.config.advice import warnings
from proxy.context.settings import ContextSettings, merged

TENANT = "tenants:\n  - name: acme\n    keys: [bw-acme-0123456789abcdef]\n"


def test_unwritten_it_acts_at_the_window_of_the_target(config: File) -> None:
    section = config.load(MINIMAL).settings.context
    assert (section.mode, section.max_tokens, section.trim_strategy) == ("enforce", None, "oldest")
    assert (section.preflight_check, section.trim_to, section.mask_tool_outputs) == (True, 0.7, False)


def test_false_switches_it_off(config: File) -> None:
    assert config.load(MINIMAL + "context: false\n").settings.context.mode == "off"
    (tenant,) = config.load(MINIMAL + TENANT + "    context: false\n").settings.tenants
    assert tenant.context is not None
    assert merged(ContextSettings(), tenant.context).mode == "off"


def test_the_environment_reaches_it(config: File) -> None:
    loaded = config.load(MINIMAL, {"BREAKWATER_CONTEXT__MAX_TOKENS": "75000", "BREAKWATER_CONTEXT__TRIM_TO": "0.5"})
    assert (loaded.settings.context.max_tokens, loaded.settings.context.trim_to) == (75_000, 0.5)


def test_a_tenant_says_only_what_is_different(config: File) -> None:
    text = MINIMAL + "context: {max_tokens: 75000, trim_to: 0.5}\n" + TENANT + "    context: {max_tokens: null}\n"
    settings = config.load(text).settings
    section = merged(settings.context, settings.tenants[0].context)
    assert (section.max_tokens, section.trim_to) == (None, 0.5)


SUMMARY = "trim_strategy: summary"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("context: {max_tokens: 0}\n", "2:23: context.max_tokens: must be at least 1"),
        ("context: {trim_to: 0}\n", "2:20: context.trim_to: must be at least 0.1"),
        ("context: {trim_to: 1.5}\n", "2:20: context.trim_to: must be at most 1"),
        ("context: {trim_to: .nan}\n", "2:20: context.trim_to: "),
        ("context: {trim_strategy: newest}\n", "2:26: context.trim_strategy: "),
        ("context: {max_token: 1}\n", "2:11: context.max_token: unknown key"),
        (f"context: {{{SUMMARY}}}\n", "2:26: context.trim_strategy: needs a model that makes the summaries"),
        (
            f"models: [{{name: gpt-4o, targets: [openai/gpt-4o]}}]\ncontext: {{{SUMMARY}, summary_model: gpt-4}}\n",
            "3:50: context.summary_model: no entry of models answers for 'gpt-4': did you mean 'gpt-4o'?",
        ),
        (
            TENANT + f"    context: {{{SUMMARY}}}\n",
            "5:30: tenants[0].context.trim_strategy: needs a model that makes the summaries",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_line(config: File, text: str, error: str) -> None:
    assert [one for one in config.errors(MINIMAL + text) if one.startswith(f"config.yaml:{error}")]


def test_a_tenant_may_take_the_model_of_the_section(config: File) -> None:
    text = "context: {summary_model: gpt-4o}\n" + TENANT + f"    context: {{{SUMMARY}}}\n"
    settings = config.load(MINIMAL + text).settings
    assert merged(settings.context, settings.tenants[0].context).summary_model == "gpt-4o"


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("context: {max_tokens: 75000}\nbudget: {tokens_per_minute: 40000}\n", ["context.max_tokens"]),
        ("context: {max_tokens: 40000}\nbudget: {tokens_per_minute: 40000}\n", []),
        ("context: {max_tokens: 75000}\n", []),  # unwritten, the budget refuses nothing
        ("context: {max_tokens: 75000}\nbudget: {mode: observe, tokens_per_minute: 40000}\n", []),
        ("context: {mode: off, max_tokens: 75000}\nbudget: {tokens_per_minute: 40000}\n", []),
        (
            "context: {max_tokens: 75000}\n" + TENANT + "    budget: {tokens_per_minute: 1000}\n",
            ["tenants[0].budget.tokens_per_minute"],
        ),
        (
            "budget: {tokens_per_minute: 1000}\n" + TENANT + "    context: {max_tokens: 2000}\n",
            ["tenants[0].context.max_tokens"],
        ),
    ],
)
def test_a_minute_that_is_smaller_than_a_prompt_may_be_is_warned_of(config: File, text: str, paths: list[str]) -> None:
    found = [path for path, message in warnings(config.load(MINIMAL + text).settings) if "no prompt" in message]
    assert found == [tuple(one) for one in map(_path, paths)]


def _path(text: str) -> list[str | int]:
    return [0 if one == "0" else one for one in text.replace("[0]", ".0").split(".")]

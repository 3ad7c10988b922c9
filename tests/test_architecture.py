"""The shape of the program: who may import whom, and a few rules of the house. No sentence here needs a reviewer.

A module imports lower ranks only, or its own room at its own rank. Two rooms never look into each other: what they
share stands at rank 1 or below. Under each rule stands a source that breaks it, and must be found.
"""

from __future__ import annotations

import pytest

from tests import architecture, wording
from tests.architecture import Layout, Rule, Sources, module, read

LAYOUT = Layout(
    ranks=(
        (0, "proxy.__init__ proxy.types proxy.errors proxy.settings proxy.globs"),  # the words that everything shares
        (0, "proxy.budget.amounts"),  # what the store's port and the arithmetic of windows both speak of
        (0, "proxy.money proxy.budget.settings proxy.context.settings"),  # written under providers and tenants too
        (1, "proxy.*.base proxy.*.settings proxy.*.__init__"),  # ports, and what a room can be told
        (1, "proxy.store.registry"),  # another port of the store's
        (1, "proxy.transport.sse proxy.transport.answer proxy.observability.events proxy.observability.scrub"),
        (1, "proxy.observability.upstream_events"),
        (1, "proxy.observability.shapes proxy.observability.known proxy.observability.unescape"),
        (1, "proxy.budget.clocks proxy.budget.windows proxy.budget.pricing proxy.budget.estimate proxy.budget.cut"),
        (1, "proxy.store.ownership proxy.store.summaries"),  # ports of their own
        (1, "proxy.context.atoms proxy.context.trim proxy.context.rewrite proxy.context.limits"),
        (1, "proxy.context.heads proxy.context.answers proxy.context.learned"),
        (1, "proxy.context.digest proxy.context.transcript"),
        (1, "proxy.store.address"),  # where the store lives, which the configuration checks
        (1, "proxy.tokens proxy.validation proxy.routing"),  # policies: they decide and never wait
        (1, "proxy.fault_tolerance.backoff proxy.fault_tolerance.evidence proxy.fault_tolerance.breaker"),
        (1, "proxy.fault_tolerance.fleet proxy.fault_tolerance.retry proxy.fault_tolerance.sharing"),
        (1, "proxy.observability.context_events"),
        (1, "proxy.fault_tolerance.verdict proxy.fault_tolerance.permits"),
        (2, "proxy.store proxy.budget proxy.fault_tolerance proxy.context"),
        (
            2,
            "proxy.transport proxy.providers proxy.observability proxy.catalog proxy.owners",
        ),  # shells: they wait and never decide
        (3, "proxy.children"),
        (4, "proxy.pipeline"),
        (5, "proxy.edge proxy.admin"),
        (6, "proxy.config proxy.config.settings"),
        (7, "proxy.app proxy.app.__init__"),  # the only room that names concrete classes
        (8, "proxy.cli proxy.cli.__init__"),
        (9, "proxy.__main__"),
    ),
    shared=1,
    free=("proxy.pipeline", "proxy.children", "proxy.app", "proxy.cli", "proxy.__main__"),
    late=("proxy.cli", "proxy.app"),  # a command, or the admin application, that most runs never need
    only_in={
        "prometheus_client": "proxy.observability",
        "structlog": "proxy.observability",
        "genai_prices": "proxy.budget.library",
    },
    own_errors=("proxy.cli", "proxy.config"),
    max_file=400,
    max_function=60,
)

RULES: tuple[Rule, ...] = (
    architecture.ranks,
    architecture.rooms,
    architecture.cycles,
    architecture.late_imports,
    architecture.libraries,
    architecture.settings_places,
    wording.exception_texts,
    wording.broad_excepts,
    wording.sizes,
    wording.marks,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_program_keeps(rule: Rule) -> None:
    violations = list(rule(read("proxy"), LAYOUT))
    assert not violations, "\n".join(violations)


def test_the_tests_use_no_mocks_and_leave_nothing_unfinished() -> None:
    sources = read("tests")
    violations = [*architecture.libraries(sources, LAYOUT), *wording.marks(sources, LAYOUT)]
    assert not violations, "\n".join(violations)


def test_the_program_was_read() -> None:
    sources = read("proxy")
    assert {"proxy.__init__", "proxy.types", "proxy.errors", "proxy.transport.base"} <= sources.keys()


# -- each rule finds what it is there for ----------------------------------------------------------------------------


def program(**texts: str) -> Sources:
    """Modules of a made-up program: `transport__base` is proxy.transport.base."""
    names = {key: ".".join(["proxy", *key.split("__")]) for key in texts}
    return {names[key]: module(names[key], text) for key, text in texts.items()}


HANDLER = "try:\n    work()\nexcept OSError as exc:\n    {}\n"
LONG = "def f():\n" + "    x = 1\n" * 60

VIOLATIONS: list[tuple[Rule, Sources, str]] = [
    (architecture.ranks, program(types="from proxy import pipeline", pipeline=""), "proxy.types:1"),
    (architecture.ranks, program(pipeline="import proxy.edge.asgi", edge__asgi=""), "proxy.pipeline:1"),
    (architecture.ranks, program(edge__asgi="from proxy.app import create", app=""), "proxy.edge.asgi:1"),
    (architecture.ranks, program(config__loader="import proxy.cli.serve", cli__serve=""), "proxy.config.loader:1"),
    (
        architecture.ranks,
        program(transport__base="from .http1 import X", transport__http1=""),
        "proxy.transport.base:1",
    ),
    (architecture.ranks, program(tokens__count="def f():\n    import proxy.app", app=""), "proxy.tokens.count:2"),
    (architecture.ranks, program(errors="load = import_module('proxy.app')", app=""), "proxy.errors:1"),
    (architecture.ranks, program(cellar=""), "proxy.cellar: has no row"),
    (
        architecture.rooms,
        program(providers__openai="import proxy.transport.pool", transport__pool=""),
        "proxy.providers",
    ),
    (
        architecture.rooms,
        program(edge__asgi="from ..observability import logs", observability__logs=""),
        "proxy.edge.asgi:1",
    ),
    (architecture.cycles, program(tokens__a="from proxy.tokens import b", tokens__b="from . import a"), " -> "),
    (architecture.late_imports, program(pipeline="async def f():\n    import json"), "proxy.pipeline:2"),
    (architecture.late_imports, program(edge__asgi="f = lambda: __import__('json')"), "proxy.edge.asgi:1"),
    (architecture.libraries, program(pipeline="from unittest import mock"), "proxy.pipeline:1: a mock"),
    (architecture.libraries, program(pipeline="import unittest.mock"), "proxy.pipeline:1: a mock"),
    (architecture.libraries, program(edge__asgi="from prometheus_client import Counter"), "proxy.edge.asgi:1"),
    (architecture.libraries, program(app="import structlog"), "proxy.app:1"),
    (architecture.settings_places, program(edge__auth="from pydantic import BaseModel"), "proxy.edge.auth:1"),
    (wording.exception_texts, program(pipeline=HANDLER.format("text = str(exc)")), "proxy.pipeline:4"),
    (wording.exception_texts, program(pipeline=HANDLER.format("text = repr([exc])")), "proxy.pipeline:4"),
    (wording.exception_texts, program(pipeline=HANDLER.format("text = f'no: {exc}'")), "proxy.pipeline:4"),
    (wording.exception_texts, program(pipeline=HANDLER.format("text = f'{exc.args[0]}'")), "proxy.pipeline:4"),
    (wording.exception_texts, program(pipeline=HANDLER.format("text = 'no: %s' % exc")), "proxy.pipeline:4"),
    (wording.exception_texts, program(pipeline=HANDLER.format("text = 'no: {}'.format(exc)")), "proxy.pipeline:4"),
    (
        wording.exception_texts,
        program(pipeline=HANDLER.format("log.warning('no', error=exc)")),
        "proxy.pipeline:4",
    ),
    (
        wording.exception_texts,
        program(pipeline=HANDLER.format("raise InvalidRequest(exc.strerror)")),
        "proxy.pipeline",
    ),
    (wording.exception_texts, program(pipeline=HANDLER.format("text = 'no: ' + exc.strerror")), "proxy.pipeline:4"),
    (wording.exception_texts, program(pipeline="def f(e: OSError):\n    return str(e)"), "proxy.pipeline:2"),
    (wording.broad_excepts, program(pipeline="try:\n    f()\nexcept Exception:\n    pass"), "without its reason"),
    (wording.broad_excepts, program(pipeline="try:\n    f()\nexcept (KeyError, Exception):\n    pass"), "reason"),
    (wording.broad_excepts, program(pipeline="try:\n    f()\nexcept:  # why\n    pass"), "swallows cancellation"),
    (wording.sizes, program(pipeline="x = 1\n" * 400), "400 lines"),
    (wording.sizes, program(pipeline=LONG), "f has 61 lines"),
    (wording.marks, program(pipeline="x = 1  # TO" + "DO later"), "proxy.pipeline:1"),
]


@pytest.mark.parametrize(("rule", "sources", "expected"), VIOLATIONS)
def test_a_violation_is_found(rule: Rule, sources: Sources, expected: str) -> None:
    found = list(rule(sources, LAYOUT))
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("rule", "sources"),
    [
        (architecture.ranks, program(transport__http1="from proxy.transport.pool import P", transport__pool="")),
        (architecture.ranks, program(cli____init__="import proxy.app", app="")),
        (architecture.rooms, program(providers__openai="from proxy.transport.base import T", transport__base="")),
        (architecture.rooms, program(app="import proxy.transport.http1", transport__http1="")),
        (architecture.cycles, program(types="if TYPE_CHECKING:\n    import proxy.errors", errors="import proxy.types")),
        (architecture.late_imports, program(cli__serve="def f():\n    import json")),
        (architecture.libraries, program(observability__metrics="from prometheus_client import Counter")),
        (
            wording.exception_texts,
            program(pipeline=HANDLER.format("raise InvalidRequest(f'{type(exc)}') from exc")),
        ),
        (wording.exception_texts, program(pipeline=HANDLER.format("log.error('no', exc_info=exc)"))),
        (wording.broad_excepts, program(pipeline="try:\n    f()\nexcept BaseException:\n    g()\n    raise")),
        (wording.sizes, program(pipeline="x = 1\n" * 399)),
    ],
)
def test_what_keeps_the_rules_is_let_be(rule: Rule, sources: Sources) -> None:
    assert list(rule(sources, LAYOUT)) == []


def test_every_rule_is_proved() -> None:
    assert {rule.__name__ for rule, _, _ in VIOLATIONS} == {rule.__name__ for rule in RULES}

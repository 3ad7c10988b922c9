"""Faults of the text, and their exact places."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from written import MINIMAL, File

from proxy.config.loader import MAX_FILE_BYTES, Loaded, load
from proxy.config.problems import ConfigErrors, Problem
from proxy.config.yaml import MAX_DEPTH, MAX_NODES, read


def test_a_fault_of_syntax_has_its_place(config: File) -> None:
    assert config.errors("listen:\n  port: 1\n   host: x\n") == [
        "config.yaml:3:8: not valid YAML: mapping values are not allowed here"
    ]


def test_a_variable_in_a_flow_list_needs_quotes(config: File) -> None:
    (error,) = config.errors("admin: {keys: [${KEY}]}\n")
    assert error.startswith("config.yaml:1:17: not valid YAML: ")
    assert error.endswith('write a variable in quotes: "${NAME}"')


@pytest.mark.parametrize("text", ["api_key: *sk-very-secret-value\n", "api_key: !sk!very-secret-value x\n"])
def test_a_fault_of_syntax_quotes_nothing(config: File, text: str) -> None:
    (error,) = config.errors(text)
    assert "config.yaml:1:10: not valid YAML: " in error
    assert "secret" not in error


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "a: 1\n---\nb: 2\n",
            "config.yaml:2:1: not valid YAML: expected a single document in the stream, but found another document",
        ),
        ("- a\n", "config.yaml:1:1: expected sections at the top, such as: providers: {openai: {kind: openai}}"),
        ("text\n", "config.yaml:1:1: expected sections at the top, such as: providers: {openai: {kind: openai}}"),
        ('a: "\\UFFFFFFFF"\n', "config.yaml:1:1: not valid YAML: an escape or a directive is malformed"),
        ("a:\n  b: \x07\n", "config.yaml:2:6: not valid YAML: a control character is not allowed here"),
        ("? {a: b}\n: c\n", "config.yaml:1:3: a key must be plain text"),
        ("? [a]\n: c\n", "config.yaml:1:3: a key must be plain text"),
        (
            "listen: !!python/name:os.system ''\n",
            "config.yaml:1:9: listen: tags (!name) are not supported: write the value alone",
        ),
        ("listen: !!int 1\n", "config.yaml:1:9: listen: tags (!name) are not supported: write the value alone"),
        ("listen: &a [*a]\n", "config.yaml:1:9: listen[0]: an alias must not hold itself"),
        ("a: &a 1\n<<: *a\n", "config.yaml:2:1: merge keys (<<) are not supported: use an alias for a whole value"),
    ],
)
def test_faults_of_the_text(config: File, text: str, error: str) -> None:
    assert error in config.errors(text)


def test_duplicate_keys_name_both_lines(config: File) -> None:
    assert config.errors(MINIMAL + "listen:\n  port: 1\n  host: ::1\n  port: 2\nlisten: {}\n") == [
        "config.yaml:5:3: listen.port: given twice; the first is on line 3",
        "config.yaml:6:1: listen: given twice; the first is on line 2",
    ]


def test_an_alias_repeats_a_value_with_places_of_its_own(config: File) -> None:
    text = """\
        providers:
          a: {kind: openai, timeouts: &slow {connect_ms: 9000}}
          b: {kind: openai, timeouts: *slow}
        """
    assert [provider.timeouts.connect_ms for provider in config.load(text).settings.providers.values()] == [9000, 9000]


def test_aliases_cannot_multiply_without_bound(config: File) -> None:
    levels = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 10))
    began = time.monotonic()
    errors = config.errors("l0: &l0 [x, x]\n" + levels)
    assert any(f"more than {MAX_NODES} values, with aliases written out" in error for error in errors)
    assert len(errors) < 100
    assert time.monotonic() - began < 30


def test_nesting_has_a_bound(config: File) -> None:
    (error,) = config.errors("a: " + "[" * 5000)
    assert error == f"config.yaml:1:{3 + MAX_DEPTH}: nested deeper than {MAX_DEPTH} levels"


def test_the_file_has_a_bound(config: File) -> None:
    (error,) = config.errors("#" * (MAX_FILE_BYTES + 1))
    assert error == f"config.yaml: larger than {MAX_FILE_BYTES} bytes"


def test_not_utf8(config: File) -> None:
    config.path.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(ConfigErrors) as caught:
        load(config.path, {})
    assert str(caught.value).endswith("config.yaml:2:4: not UTF-8: save the file in that encoding")


def test_a_byte_order_mark_is_no_part_of_the_first_key(config: File) -> None:
    assert config.load("\ufeff" + MINIMAL).settings.providers


def test_a_missing_file(config: File) -> None:
    with pytest.raises(ConfigErrors) as caught:
        load(config.path, {})
    assert str(caught.value) == f"{config.path}: cannot be read: no such file or directory"


@pytest.mark.parametrize("text", ["", "# nothing\n", "~\n", "---\n"])
def test_an_empty_file_lacks_a_provider(config: File, text: str) -> None:
    (error,) = config.errors(text)
    assert error.startswith("config.yaml:1:1: providers: at least one is needed, such as: ")


TOKENS = [
    "listen", "port", "providers", "openai", "kind", "mock", "api_key", "keys", "tenants", "name", "models", "targets",
    "admin", "file", "timeouts", "client", "*", "&a ", "*a", "!t ", ": ", ":\n", "\n", "\n  ", "\n    ", "\n- ", "- ",
    "[", "]", "{", "}", ", ", "'", '"', "\\", "\\x0", "\\ud800", "\\U99999999", "${A}", "${", "$$", "${B:-[1, 2]}", "#",
    "? ", "<<: ", "~", "null", "true", "1", "1.5", "|\n", ">\n", "%YAML 1.1\n", "%TAG ! x\n", "---\n", "...\n", "\x00",
    "\x85", "\u2028", "\ufeff", "\t", "é", "😀",
]  # fmt: skip


def outcome(
    path: Path | None, env: dict[str, str], overrides: dict[str, object]
) -> tuple[Loaded | None, tuple[Problem, ...]]:
    try:
        return load(path, env, overrides), ()
    except ConfigErrors as errors:
        return None, errors.problems


@given(st.one_of(st.text(), st.lists(st.sampled_from(TOKENS), max_size=40).map("".join)))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_gives_settings_or_problems(config: File, text: str) -> None:
    config.path.write_text(text, "utf-8", "surrogatepass")
    loaded, problems = outcome(config.path, {"A": "x: [1]", "BREAKWATER_LISTEN__PORT": "1"}, {})
    assert bool(loaded) != bool(problems)
    assert all(str(problem).isprintable() for problem in problems)


SECTIONS = ["listen", "admin", "providers", "models", "tenants"]
KNOWN_KEYS = st.sampled_from([*SECTIONS, "port", "keys", "kind", "name", "file"])
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from(["openai", "mock", "a/*"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(KNOWN_KEYS, st.text()), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(SECTIONS), VALUES))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_values_from_flags_give_settings_or_problems(values: dict[str, object]) -> None:
    loaded, problems = outcome(None, {}, values)
    assert bool(loaded) != bool(problems)
    assert all(problem.path and problem.message for problem in problems)


def test_places_count_from_one() -> None:
    tree, problems = read("a:\n  b: 1\n", "f")
    assert not problems
    assert tree.keys["a"].origin == "f:1"
    assert (tree.nodes["a"].place.line, tree.nodes["a"].place.column) == (2, 3)

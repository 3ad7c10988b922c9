"""The lock files as they stand, and the checker that `make check` runs, on locks that are wrong in one way each."""

from __future__ import annotations

import tomllib

import pytest
from packaging.requirements import Requirement

from tests.locks import LOCKS, ROOT, direct, disagreements, installed, parse, translate

HASHES = " \\\n    --hash=sha256:" + "0" * 64
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_holds_pins_hashes_and_notes_only(name: str) -> None:
    pins, problems = parse((ROOT / name).read_text())
    assert problems == []
    assert len(pins) > 20


@pytest.mark.parametrize("name", LOCKS)
def test_every_requirement_of_the_project_is_pinned_at_a_version_that_satisfies_it(name: str) -> None:
    pins, _ = parse((ROOT / name).read_text())
    wanted = direct(PROJECT, LOCKS[name])
    assert wanted
    for requirement in wanted:
        pin = pins[requirement.name]
        assert requirement.specifier.contains(pin.version), requirement
        assert pin.hashes, requirement


def test_the_development_lock_holds_the_other_one() -> None:
    (run, _), (dev, _) = (parse((ROOT / name).read_text()) for name in LOCKS)
    assert {name: pin.version for name, pin in run.items()}.items() <= {
        n: pin.version for n, pin in dev.items()
    }.items()


def test_a_resolution_for_every_platform_is_read() -> None:
    pins, problems = parse(
        f"colorama==0.4.6 ; sys_platform == 'no such'{HASHES}\n    # via\n    #   x (pyproject.toml:dev)\n"
    )
    assert problems == []
    assert not pins["colorama"].here


@pytest.mark.parametrize(
    "line",
    [
        "--index-url https://index.example/simple",
        "--find-links /srv/wheels",
        "idna @ https://index.example/idna-3.11-py3-none-any.whl",
        "-e .",
        "    # from https://index.example/simple",
        "# made by a tool on host.example",
        "idna>=3",
        "    --hash=md5:" + "0" * 32,
    ],
)
def test_nothing_else_may_stand_in_a_lock(line: str) -> None:
    _, problems = parse(f"idna==3.11{HASHES}\n{line}\n")
    assert len(problems) == 1
    assert problems[0].startswith("line 3:")


def test_a_pin_without_a_hash_and_a_pin_given_twice_are_found() -> None:
    assert parse("idna==3.11\n")[1] == ["idna: no hash"]
    assert parse(f"idna==3.11{HASHES}\nidna==3.12{HASHES}\n")[1] == ["line 3: idna is pinned twice"]


def lock(*names: str, **versions: str) -> str:
    """A lock of packages that are installed here, at their own version or the one given."""
    found = {name: package[0] for name in names if (package := installed(name))} | versions
    return "".join(f"{name}=={version}{HASHES}\n" for name, version in found.items())


@pytest.mark.parametrize(
    ("text", "wanted", "expected"),
    [
        (lock("pytest", "iniconfig", "packaging", "pluggy", "pygments"), "pytest", None),
        (lock("iniconfig"), "iniconfig>=9999", "the pin is"),
        (lock("iniconfig", "pluggy"), "iniconfig", "pluggy is pinned, and nothing requires it"),
        (lock("pytest", "iniconfig", "packaging", "pygments"), "pytest", "pytest requires pluggy"),
        (lock(iniconfig="9999"), "iniconfig", "is installed"),
        (lock("iniconfig"), "no-such-package", "has no pin"),
    ],
)
def test_a_lock_that_does_not_fit_is_found(text: str, wanted: str, expected: str | None) -> None:
    found = list(disagreements(parse(text)[0], [Requirement(wanted)]))
    assert any(expected in each for each in found) if expected else found == []


def test_extras_are_followed() -> None:
    text = lock("httpx2", "anyio", "certifi", "httpcore2", "idna", "h11", "truststore", "typing-extensions", "sniffio")
    assert any("h2" in each for each in disagreements(parse(text)[0], [Requirement("httpx2[http2]")]))
    assert not any("h2" in each for each in disagreements(parse(text)[0], [Requirement("httpx2")]))


def test_the_configuration_of_pip_is_given_to_the_resolver() -> None:
    listed = (
        ":env:.index-url='https://second.example/simple'\n"
        "global.cert='/etc/ssl/own.crt'\n"
        "global.index-url='https://first.example/simple'\n"
        "global.extra-index-url='\\nhttps://a.example/simple\\nhttps://b.example/simple'\n"
        "global.timeout='60'\n"
        "install.no-index='false'\n"
    )
    assert translate(listed) == [
        *("--default-index", "https://second.example/simple"),
        *("--index", "https://a.example/simple", "--index", "https://b.example/simple"),
        *("--cert", "/etc/ssl/own.crt"),
    ]
    assert translate("install.no-index='1'\n") == ["--no-index"]
    assert translate("") == []

"""The two lock files: how they are made, and the proof that they still say what pyproject.toml says.

    python -m tests.locks check             exit 1 and a list when they do not agree
    python -m tests.locks write [OPTION…]   resolve again, keeping the present pins unless an option says otherwise

`check` proves it twice. First from what is here: each requirement of pyproject.toml, and of every package that is
installed, has a pin with hashes that satisfies it, and each pin is required by something. Then, if the package index
answers, by resolving again with the present pins: the outcome must be the same file. The first proof covers this
platform only but needs no network; the second covers every platform.

Both resolve against the index that pip is configured for, and neither lets its address into a lock.
"""

from __future__ import annotations

import ast
import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCKS: Mapping[str, tuple[str, ...]] = {
    "requirements.lock": ("--extra", "demo", "--group", "build"),
    "requirements-dev.lock": ("--extra", "demo", "--group", "build", "--group", "dev"),
}
COMPILE = ("--universal", "--python-version", "3.11", "--generate-hashes", "--no-emit-index-url", "--no-header", "-q")

PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;]+)(?: ; (?P<marker>[^\\]+?))?(?: \\)?$")
HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}(?: \\)?$")
NOTE = re.compile(r"^    #( via)?( {1,3}[A-Za-z0-9._-]+(\[[a-z0-9,-]+\])?( \(pyproject\.toml(:[a-z]+)?\))?)?$")


class Pin(NamedTuple):
    name: str
    version: str
    marker: Marker | None
    hashes: int

    @property
    def here(self) -> bool:
        return self.marker is None or self.marker.evaluate()


def parse(text: str) -> tuple[dict[str, Pin], list[str]]:
    """Pins by canonical name, and what is wrong with the text: a closed grammar, so no address can hide in it."""
    pins: dict[str, Pin] = {}
    problems = []
    name = ""
    for number, line in enumerate(text.splitlines(), 1):
        if match := PIN.match(line):
            name = canonicalize_name(match["name"])
            marker = Marker(match["marker"]) if match["marker"] else None
            if name in pins:
                problems.append(f"line {number}: {name} is pinned twice")
            pins[name] = Pin(name, match["version"], marker, 0)
        elif HASH.match(line) and name:
            pins[name] = pins[name]._replace(hashes=pins[name].hashes + 1)
        elif not NOTE.match(line):
            problems.append(f"line {number}: neither a pin, a sha256 hash, nor a note of who asked for it")
    problems += [f"{pin.name}: no hash" for pin in pins.values() if not pin.hashes]
    return pins, problems


def direct(project: Mapping[str, Any], options: Iterable[str]) -> list[Requirement]:
    """What pyproject.toml asks for, with the extras and groups that a lock is made with."""
    words = list(options)
    texts = list(project["project"]["dependencies"])
    for option, name in zip(words[::2], words[1::2], strict=True):
        if option == "--extra":
            texts += project["project"]["optional-dependencies"][name]
        else:
            texts += project["dependency-groups"][name]
    return [Requirement(text) for text in texts]


def installed(name: str) -> tuple[str, list[Requirement]] | None:
    """Version and requirements of an installed package."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    return found.version, [Requirement(text) for text in found.requires or []]


def disagreements(pins: Mapping[str, Pin], wanted: Iterable[Requirement]) -> Iterator[str]:
    """Walks from `wanted` over the installed packages' requirements; yields what does not fit the pins."""
    queue = [("pyproject.toml", requirement) for requirement in wanted]
    seen: set[tuple[str, str]] = set()
    while queue:
        origin, requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        pin = pins.get(name)
        if pin is None:
            yield f"{origin} requires {requirement}, which has no pin"
            continue
        if not requirement.specifier.contains(pin.version, prereleases=True):
            yield f"{origin} requires {requirement}, and the pin is {pin.version}"
        package = installed(name)
        if package is None or package[0] != pin.version:
            yield f"{name} {pin.version} is pinned, and {package[0] if package else 'nothing'} is installed"
            continue
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                queue += [
                    (name, each) for each in package[1] if not each.marker or each.marker.evaluate({"extra": extra})
                ]
    reached = {name for name, _ in seen}
    yield from (
        f"{pin.name} is pinned, and nothing requires it"
        for pin in pins.values()
        if pin.here and pin.name not in reached
    )


def pip_options() -> list[str]:
    """uv's options for the index that pip is configured for, since uv does not read pip's configuration."""
    command = [sys.executable, "-m", "pip", "config", "list", "--disable-pip-version-check"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    return translate(listed.stdout)


def translate(listed: str) -> list[str]:
    """`listed` is the output of `pip config list`: one `section.key='value'` a line, the environment last."""
    found: dict[str, str] = {}
    order = {"global": 0, "install": 1, ":env:": 2}
    rows = [match.groups() for match in re.finditer(r"^(global|install|:env:)\.([a-z-]+)=(.*)$", listed, re.MULTILINE)]
    for _, key, value in sorted(rows, key=lambda row: order[row[0]]):
        found[key] = str(ast.literal_eval(value))
    names = {"index-url": "--default-index", "extra-index-url": "--index", "find-links": "--find-links"}
    names |= {"trusted-host": "--allow-insecure-host", "cert": "--cert"}
    options = [word for key, option in names.items() for each in found.get(key, "").split() for word in (option, each)]
    if found.get("no-index", "").lower() in {"1", "true", "yes", "on"}:
        options.append("--no-index")
    return options


def compile_lock(name: str, output: Path, extra: Iterable[str] = ()) -> None:
    """Resolves into `output`, whose present pins are kept. Raises CalledProcessError; uv has then said why."""
    command = [
        "uv",
        "pip",
        "compile",
        "pyproject.toml",
        *LOCKS[name],
        *COMPILE,
        *pip_options(),
        *extra,
        "-o",
        str(output),
    ]
    command[0] = str(Path(sys.executable).parent / "uv")
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "UV_NO_PROGRESS": "1"})


def check() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    problems: list[str] = []
    all_pins = []
    for name, options in LOCKS.items():
        pins, wrong = parse((ROOT / name).read_text())
        all_pins.append(pins)
        problems += [f"{name}: {each}" for each in (*wrong, *disagreements(pins, direct(project, options)))]
    for pin in all_pins[0].values():
        other = all_pins[1].get(pin.name)
        if other is None or (pin.version, pin.marker) != (other.version, other.marker):
            problems.append(f"requirements-dev.lock does not hold {pin.name} as requirements.lock does")
    return problems or resolved_again()


def resolve(directory: Path, options: Iterable[str] = ()) -> dict[str, str]:
    """The text of each lock, resolved anew in `directory` from the present pins. Raises CalledProcessError."""
    for name in LOCKS:
        shutil.copyfile(ROOT / name, directory / name)
        compile_lock(name, directory / name, options)
    return {name: (directory / name).read_text() for name in LOCKS}


def resolved_again() -> list[str]:
    """Lines in which a fresh resolution differs from the locks."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            fresh = resolve(Path(directory))
        except subprocess.CalledProcessError:
            print("note: the locks agree with what is installed here, but could not be resolved again", file=sys.stderr)
            return []
    differences: list[str] = []
    for name, text in fresh.items():
        old, new = (ROOT / name).read_text().splitlines(), text.splitlines()
        differences += difflib.unified_diff(old, new, name, "resolved again", lineterm="", n=0)
    return differences


def write(options: Iterable[str]) -> int:
    """Both files or none."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            fresh = resolve(Path(directory), options)
        except subprocess.CalledProcessError:
            print("Nothing was written: the resolver says why above.", file=sys.stderr)
            return 1
    for name, text in fresh.items():
        (ROOT / name).write_text(text)
    return 0


def main(arguments: list[str]) -> int:
    if arguments == ["check"]:
        problems = check()
        if problems:
            print("The lock files do not say what pyproject.toml says (make lock writes them again):")
            print("\n".join(f"  {line}" for line in problems[:40]))
        return 1 if problems else 0
    if arguments[:1] == ["write"]:
        return write(arguments[1:])
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

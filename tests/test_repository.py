"""The repository as a stranger finds it: its files, its commands, and that its documents are true."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
DOCUMENTS = sorted(path for place in (ROOT, ROOT / "docs") for path in place.glob("*.md"))
LICENCE_SHA256 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTEST"))}


def git(*arguments: str) -> str:
    """git, also where the tree belongs to another user."""
    command = ["git", "-c", "safe.directory=*", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def committed() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of committed files")
    return [ROOT / name for name in git("ls-files", "-z").split("\0") if name and (ROOT / name).is_file()]


# -- files -----------------------------------------------------------------------------------------------------------


PUBLIC = """
pyproject.toml proxy/__init__.py tests README.md LICENSE CHANGELOG.md CONTRIBUTING.md SECURITY.md Makefile .ci/run
requirements.lock requirements-dev.lock config.example.yaml Dockerfile docker-compose.yml deploy docs
"""


@pytest.mark.parametrize("name", PUBLIC.split())
def test_the_public_files_are_there(name: str) -> None:
    assert (ROOT / name).exists()


def test_no_resolver_lock_is_committed_since_it_names_hosts(committed: list[Path]) -> None:
    assert not [path.name for path in committed if path.name in {"uv.lock", "poetry.lock", "Pipfile.lock", "pip.conf"}]


def test_the_licence_is_the_apache_licence_word_for_word() -> None:
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == LICENCE_SHA256


def test_the_ci_script_can_be_executed() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)


# Written in pieces, so that this file does not find itself.
FOREIGN = re.compile(
    r"(?<![\w./~-])/(?:wo" + r"rk|ro" + r"ot|ho" + r"me/\w+|Us" + r"ers/\w+|mnt|opt/wheels)(?:/[\w.-]|\b(?=[\s'\"`),]))"
    r"|\b(?:pyp" + r"i\.org|pythonho" + r"sted\.org|npm" + r"js\.(?:org|com)|regis" + r"try\.yarn)"
)


def foreign(text: str) -> list[str]:
    """Paths of some machine, and hosts of package indexes."""
    return [match[0] for match in FOREIGN.finditer(text)]


def test_no_committed_file_names_a_machine_or_a_package_index(committed: list[Path]) -> None:
    found = {}
    for path in committed:
        data = path.read_bytes()
        if b"\0" not in data[:8192] and len(data) < 1_000_000 and (hits := foreign(data.decode("utf-8", "replace"))):
            found[str(path.relative_to(ROOT))] = hits
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        "cd /wo" + "rk/main",
        "cd /ro" + "ot\n",
        "open('/ro" + "ot/.netrc')",
        "/ho" + "me/ann/x",
        "index https://pyp" + "i.org/simple",
        "https://files.pythonho" + "sted.org/a.whl",
    ],
)
def test_a_machine_or_an_index_is_found(text: str) -> None:
    assert foreign(text)


@pytest.mark.parametrize("text", ["the network/root", "GET /v1/work", "{root}/proxy", "work/life", "$HOME/work/x"])
def test_other_words_are_let_be(text: str) -> None:
    assert not foreign(text)


# -- documents -------------------------------------------------------------------------------------------------------


def targets() -> dict[str, str]:
    """Targets of the Makefile with their one-line help."""
    return dict(re.findall(r"^([a-z]+):[^#\n]*## (.+)$", MAKEFILE, re.MULTILINE))


def code(text: str) -> Iterator[str]:
    """Code blocks, fenced or indented, and code spans of a Markdown text."""
    yield from re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    yield from re.findall(r"^    .+$", text, re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", text)


def links(text: str) -> Iterator[str]:
    """Link targets of a Markdown text that are not addresses."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(text: str) -> set[str]:
    """The names that a Markdown text's headings get."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_make_command_in_a_document_exists(document: Path) -> None:
    named = {name for part in code(document.read_text()) for name in re.findall(r"\bmake ([a-z]+)", part)}
    assert named <= targets().keys()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_in_a_document_leads_somewhere(document: Path) -> None:
    broken = []
    for link in links(document.read_text()):
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    assert broken == []


def test_the_readme_names_the_two_commands() -> None:
    parts = list(code((ROOT / "README.md").read_text()))
    assert any("make run" in part for part in parts)
    assert any("make test" in part for part in parts)


def test_the_documents_are_read_as_meant() -> None:
    text = "# A b: c\n\n[x](y.md#a-b-c) [z](https://e.example) `make one`\n"
    text += "\n```sh\nmake two\n[no](no)\n```\n\n    make three\n"
    assert list(links(text)) == ["y.md#a-b-c"]
    assert anchors(text) == {"a-b-c"}
    assert {"make one", "make two\n[no](no)\n", "    make three"} <= set(code(text))


def test_the_changelog_opens_with_what_is_unreleased() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", heading) for heading in headings[1:])


# -- commands --------------------------------------------------------------------------------------------------------


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=CLEAN, check=False, timeout=60)


def test_make_alone_lists_every_target() -> None:
    done = make()
    assert done.returncode == 0
    assert set(re.findall(r"^  make ([a-z]+) ", done.stdout, re.MULTILINE)) == targets().keys()
    phony = re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == {*targets(), "FORCE"}


def test_run_takes_a_port_and_ignores_one_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "demo --port 8080" in make("-n", "run").stdout
    assert "demo --port 9000" in make("-n", "run", "PORT=9000").stdout
    monkeypatch.setitem(CLEAN, "PORT", "9999")
    assert "demo --port 8080" in make("-n", "run").stdout


def interpreter(directory: Path, refuses: str) -> Path:
    """A Python that fails on the one question that holds `refuses`."""
    path = directory / "python3"
    path.write_text(f'#!/bin/sh\ncase "$*" in *{refuses}*) exit 1;; esac\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(("refuses", "expected"), [("version_info", "is older"), ("ensurepip", "comes without venv")])
def test_a_python_that_will_not_do_is_told_in_one_sentence(tmp_path: Path, refuses: str, expected: str) -> None:
    python = interpreter(tmp_path, refuses)
    done = make("run", f"PYTHON={python}")
    sentence, *rest = done.stderr.splitlines()
    assert expected in sentence
    assert str(python) in sentence
    assert all(line.startswith("make: ***") for line in rest)
    assert done.returncode == 2
    assert done.stdout == ""


def test_no_python_at_all_is_told_in_one_sentence() -> None:
    done = make("run", "PYTHON=no-such-python")
    assert "'no-such-python' is not there" in done.stderr.splitlines()[0]
    assert done.returncode == 2


# -- continuous integration ------------------------------------------------------------------------------------------

STAND_IN = """
check:
	@echo "home:$$HOME venv:$$VIRTUAL_ENV python:$$PYTHONPATH conf:$$PIP_CONFIG_FILE cache:$$XDG_CACHE_HOME"
	@ls -A "$$HOME" | wc -l; echo "path:$$PATH"; if read line; then echo "stdin:$$line"; fi
	@exit $(CHECK)
test:
	@echo "1 failed, 2 passed in 0.10s" | sed 's/1 failed, //$(SED)'; exit $(TEST)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose Makefile tells what it was given, beside a home with a configured pip and an active venv."""
    (tmp_path / "tree/.ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci/run", tmp_path / "tree/.ci/run")
    (tmp_path / "tree/Makefile").write_text(STAND_IN)
    (tmp_path / "home/.config/pip").mkdir(parents=True)
    (tmp_path / "home/.config/pip/pip.conf").write_text("[global]\n")
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/pyvenv.cfg").write_text("")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/promtool").write_text("#!/bin/sh\n")
    (tmp_path / "tools/promtool").chmod(0o755)
    return tmp_path


def ci(checkout: Path, check: int, test: int) -> subprocess.CompletedProcess[str]:
    environment = {
        "HOME": f"{checkout}/home",
        "PATH": f"{checkout}/venv/bin:{checkout}/tools:/usr/bin:/bin",
        "VIRTUAL_ENV": f"{checkout}/venv",
        "PYTHONPATH": "/elsewhere",
        "XDG_CACHE_HOME": f"{checkout}/home/.cache",
        "CHECK": str(check),
        "TEST": str(test),
        "SED": ";s/^/1 failed, /" if test else "",
    }
    script = [checkout / "tree/.ci/run"]
    return subprocess.run(
        script, input="typed\n", cwd="/", env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_ci_runs_with_a_fresh_home_and_no_inherited_environment(checkout: Path) -> None:
    done = ci(checkout, check=0, test=0)
    first, count, path, *rest = done.stdout.splitlines()
    home = re.match(r"home:(\S+) ", first)
    assert home is not None
    assert home[1] != f"{checkout}/home"
    assert not Path(home[1]).exists(), "it was removed again"
    assert f"venv: python: conf:{checkout}/home/.config/pip/pip.conf cache:" in first
    assert count.strip() == "0"
    assert path == f"path:{checkout}/tools:/usr/bin:/bin"
    assert rest == ["2 passed in 0.10s"], "nothing was read from the terminal, and the closing line stands last, once"
    assert done.returncode == 0


@pytest.mark.parametrize(("check", "test"), [(1, 0), (0, 1), (1, 1)])
def test_ci_fails_with_either_command_and_still_ends_with_the_closing_line(
    checkout: Path, check: int, test: int
) -> None:
    done = ci(checkout, check, test)
    assert done.returncode != 0
    assert done.stdout.splitlines()[-1] == ("1 failed, 2 passed in 0.10s" if test else "2 passed in 0.10s")
    assert ("make check failed" in done.stderr) is bool(check)
    assert ("make test failed" in done.stderr) is bool(test)

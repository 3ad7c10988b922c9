"""The installer, with a real environment, a real pip, and a project small enough to need no index."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from tests.install import Environment, exclusive

BACKEND = '''
"""A build backend of its own, so that the project installs without anything but pip."""
import base64, hashlib, pathlib, zipfile

def build_editable(directory, config_settings=None, metadata_directory=None):
    name = "breakwater-0.0-py3-none-any.whl"
    files = {
        "breakwater.pth": str(pathlib.Path.cwd()),
        "breakwater-0.0.dist-info/METADATA": "Metadata-Version: 2.1\\nName: breakwater\\nVersion: 0.0\\n",
        "breakwater-0.0.dist-info/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    with zipfile.ZipFile(pathlib.Path(directory) / name, "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr("breakwater-0.0.dist-info/RECORD", "".join(f"{path},,\\n" for path in files))
    return name

build_wheel = build_editable
'''
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "breakwater"
version = "0.0"
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with empty locks; pip may ask no index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    root = tmp_path / "project"
    (root / "proxy").mkdir(parents=True)
    (root / "proxy" / "__init__.py").write_text("")
    (root / "backend.py").write_text(textwrap.dedent(BACKEND))
    (root / "pyproject.toml").write_text(PYPROJECT)
    for name in ("requirements.lock", "requirements-dev.lock"):
        (root / name).write_text("# nothing\n")
    return root


def stray(root: Path) -> Path:
    """A file that only a new environment removes."""
    (site,) = root.glob(".venv/lib/python*/site-packages")
    path = site / "stray.py"
    path.write_text("")
    return path


def works(root: Path) -> bool:
    return subprocess.run([root / ".venv/bin/python", "-c", "import proxy"], cwd="/", check=False).returncode == 0


def test_an_environment_is_made_once_and_again_when_it_is_not_whole(root: Path) -> None:
    environment = Environment(root)
    environment.ensure("run")
    assert works(root)
    assert not environment.stamp_file("dev").exists()

    made = environment.stamp_file("run").stat()
    environment.ensure("run")
    assert environment.stamp_file("run").stat() == made

    extra = stray(root)
    environment.ensure("dev")
    assert extra.exists(), "the development packages are an addition"
    assert set(environment.found()) == {"run", "dev"}

    (root / "pyproject.toml").write_text(PYPROJECT + "# changed\n")
    before = environment.found()
    environment.ensure("dev")
    assert extra.exists(), "only the project is installed again"
    assert environment.found()["dev"].project != before["dev"].project
    assert environment.found()["run"] == environment.wanted("run")

    for kind in before:
        environment.stamp_file(kind).unlink()
    environment.ensure("run")
    assert not extra.exists(), "an interrupted environment is made anew"
    assert works(root)


def test_another_lock_makes_another_environment_and_a_failure_leaves_none_that_looks_whole(root: Path) -> None:
    environment = Environment(root)
    environment.ensure("run")
    extra = stray(root)
    unknown = "no-such-package==1 --hash=sha256:" + "0" * 64 + "\n"

    (root / "requirements-dev.lock").write_text(unknown)
    with pytest.raises(subprocess.CalledProcessError):
        environment.ensure("dev")
    assert set(environment.found()) == {"run"}, "pip changed nothing, so what was there still counts"
    assert extra.exists()

    (root / "requirements.lock").write_text(unknown)
    with pytest.raises(subprocess.CalledProcessError):
        environment.ensure("run")
    assert environment.found() == {}
    assert not extra.exists()


def test_a_tree_that_was_moved_is_not_taken_for_whole(root: Path) -> None:
    Environment(root).write({})
    moved = root.with_name("moved")
    wanted = Environment(root).wanted("run")
    root.rename(moved)
    assert Environment(moved).wanted("run").packages != wanted.packages
    assert Environment(moved).wanted("run").project == wanted.project


@pytest.mark.parametrize("text", ["", "half", "one two three\n"])
def test_a_damaged_stamp_is_no_stamp(root: Path, text: str) -> None:
    environment = Environment(root)
    environment.path.mkdir()
    environment.stamp_file("run").write_text(text)
    assert environment.found() == {}


def test_a_second_installation_waits_for_the_first(tmp_path: Path) -> None:
    """The first holder is another process, killed without a chance to say goodbye: the lock comes back all the same."""
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pathlib import Path
from tests.install import exclusive
with exclusive(Path({str(tmp_path)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    entered = threading.Event()

    def second() -> None:
        with exclusive(tmp_path):
            entered.set()

    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        waiting = threading.Thread(target=second)
        waiting.start()
        assert not entered.wait(0.3)
        first.kill()
        assert entered.wait(30)
        waiting.join(30)

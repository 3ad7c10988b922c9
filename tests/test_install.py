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


@pytest.mark.slow
def test_the_life_of_an_environment(root: Path) -> None:
    """One story, for each new environment costs seconds."""
    environment = Environment(root)
    environment.ensure("run")
    assert works(root)
    assert set(environment.found()) == {"run"}

    made = environment.stamp_file("run").stat()
    environment.ensure("run")
    assert environment.stamp_file("run").stat() == made, "nothing was to be done"

    extra = stray(root)
    environment.ensure("dev")
    assert extra.exists(), "the development packages are an addition"
    assert set(environment.found()) == {"run", "dev"}

    (root / "pyproject.toml").write_text(PYPROJECT + "# changed\n")
    before = environment.found()
    environment.ensure("dev")
    assert extra.exists(), "only the project was installed again"
    assert environment.found()["dev"].project != before["dev"].project
    assert environment.found()["run"] == environment.wanted("run")

    unknown = "no-such-package==1 --hash=sha256:" + "0" * 64 + "\n"
    environment.stamp_file("dev").unlink()
    (root / "requirements-dev.lock").write_text(unknown)
    with pytest.raises(subprocess.CalledProcessError):
        environment.ensure("dev")
    assert set(environment.found()) == {"run"}, "pip changed nothing, so what was there still counts"
    assert extra.exists()

    (root / "requirements.lock").write_text(unknown)
    with pytest.raises(subprocess.CalledProcessError):
        environment.ensure("run")
    assert not extra.exists(), "another lock makes an environment from nothing"
    assert environment.found() == {}, "and a failure leaves none that looks whole"


def test_only_a_whole_environment_of_the_present_locks_is_added_to(root: Path) -> None:
    environment = Environment(root)
    environment.python.parent.mkdir(parents=True)
    environment.python.symlink_to(sys.executable)
    run = environment.wanted("run")
    assert environment.reusable({"run": run})
    assert environment.reusable({"run": run._replace(project="other")}), "the project alone is installed again"
    assert not environment.reusable({}), "interrupted, or not ours"
    assert not environment.reusable({"run": run._replace(packages="other")})
    environment.python.unlink()
    environment.python.symlink_to(root / "gone")
    assert not environment.reusable({"run": run}), "its interpreter was removed"


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

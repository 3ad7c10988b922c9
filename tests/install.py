"""Makes `.venv` what a lock file says, and does nothing when it is that already. Run by the Makefile.

    python3 tests/install.py run     the packages of requirements.lock, and this project
    python3 tests/install.py dev     those of requirements-dev.lock, a superset at the same versions

Two stamps record what was done, `.venv/.run-stamp` and `.venv/.dev-stamp`. The rules:

- A stamp exists only while the environment is whole: both go before pip may change a package and come back when it is
  done. An environment without a stamp was interrupted, or is not ours, and is made again from nothing.
- A stamp holds digests, not times: of the lock (with the version of Python and the place, since scripts carry
  absolute paths), and of the project's own metadata. Another lock means an environment made from nothing, so that a
  package that left the lock leaves the environment. Other metadata means that only the project is installed again.
- One installation at a time: a file lock on the repository's directory. pip inherits it, so that it stays held if we
  are killed while pip goes on, and the kernel gives it back when both are gone.

Only the standard library: this runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

Kind = Literal["run", "dev"]
LOCKS: dict[Kind, str] = {"run": "requirements.lock", "dev": "requirements-dev.lock"}
METADATA = ("pyproject.toml", "proxy/__init__.py")


class Stamp(NamedTuple):
    """What an environment was made from: hex digests."""

    packages: str
    project: str


def digest(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


class Environment:
    """The virtual environment `root/.venv`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / ".venv"
        self.python = self.path / "bin" / "python"

    def stamp_file(self, kind: Kind) -> Path:
        return self.path / f".{kind}-stamp"

    def wanted(self, kind: Kind) -> Stamp:
        place = f"{self.path} {sys.version_info.major}.{sys.version_info.minor}".encode()
        return Stamp(
            digest((self.root / LOCKS[kind]).read_bytes(), place),
            digest(*((self.root / name).read_bytes() for name in METADATA)),
        )

    def found(self) -> dict[Kind, Stamp]:
        stamps: dict[Kind, Stamp] = {}
        for kind in LOCKS:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                lines = self.stamp_file(kind).read_text().split()
                if len(lines) == 2:
                    stamps[kind] = Stamp(*lines)
        return stamps

    def packages(self) -> list[str]:
        """What lies in site-packages: the same before and after means that pip changed nothing."""
        return sorted(str(entry) for entry in self.path.glob("lib/python*/site-packages/*"))

    def write(self, stamps: dict[Kind, Stamp]) -> None:
        for kind, stamp in stamps.items():
            part = self.stamp_file(kind).with_suffix(".part")
            part.write_text("\n".join(stamp) + "\n")
            part.replace(self.stamp_file(kind))

    def pip(self, held: int, *arguments: str) -> None:
        command = [str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
        subprocess.run(command, cwd=self.root, check=True, pass_fds=[held])

    def ensure(self, kind: Kind) -> None:
        """Raises CalledProcessError when pip fails, OSError when the disk does."""
        with exclusive(self.root) as held:
            wanted, found = self.wanted(kind), self.found()
            if found.get(kind) == wanted and self.python.exists():
                return
            if not self.reusable(found):
                say(f"making .venv from {LOCKS[kind]} (about a minute)")
                venv.EnvBuilder(clear=True, symlinks=True, with_pip=True).create(self.path)
                found = {}
            self.change(kind, found, held)

    def reusable(self, found: dict[Kind, Stamp]) -> bool:
        """Whole, and from the present locks: what is missing is then only an addition."""
        return (
            bool(found)
            and self.python.exists()
            and all(stamp.packages == self.wanted(kind).packages for kind, stamp in found.items())
        )

    def change(self, kind: Kind, found: dict[Kind, Stamp], held: int) -> None:
        """Installs the packages of `kind` unless they are there, then the project."""
        wanted, before = self.wanted(kind), self.packages()
        for stale in LOCKS:
            self.stamp_file(stale).unlink(missing_ok=True)
        try:
            if kind not in found:
                say(f"installing {LOCKS[kind]}")
                self.pip(held, "--require-hashes", "-r", LOCKS[kind])
            if all(stamp.project != wanted.project for stamp in found.values()):
                self.pip(held, "--no-deps", "--no-build-isolation", "-e", ".")
        except subprocess.CalledProcessError:
            # An index out of reach is the usual reason, and then the environment is as good as it was.
            if self.packages() == before:
                self.write(found)
            raise
        kinds: set[Kind] = {kind, "run", *found}  # the development lock holds all of the other one
        self.write({each: self.wanted(each) for each in kinds})


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[int]:
    """Waits for any other installation in `directory` to end; gives the descriptor that holds the lock."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another installation in this directory")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    match arguments:
        case ["run" | "dev" as kind]:
            pass
        case _:
            say("usage: install.py run|dev")
            return 2
    try:
        Environment(Path(__file__).resolve().parent.parent).ensure(kind)
    except subprocess.CalledProcessError:
        say("The installation failed: what pip says is above. Nothing was started; run the same command again.")
        return 1
    except OSError as error:
        say(f"The environment cannot be made: {error}")
        return 1
    except KeyboardInterrupt:
        say("Interrupted; the next run makes the environment whole.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

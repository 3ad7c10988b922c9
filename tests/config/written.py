"""A configuration written to a real file and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent

import pytest

from proxy.config.loader import Loaded, load
from proxy.config.problems import ConfigErrors

MINIMAL = "providers: {openai: {kind: openai}}\n"


class File:
    """`config.yaml` in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "config.yaml"

    def load(
        self, text: str = "", env: Mapping[str, str] | None = None, overrides: Mapping[str, object] | None = None
    ) -> Loaded:
        self.path.write_text(dedent(text), "utf-8", "surrogatepass")
        return load(self.path, env or {}, overrides)

    def errors(
        self, text: str = "", env: Mapping[str, str] | None = None, overrides: Mapping[str, object] | None = None
    ) -> list[str]:
        """Every problem as printed, with the file's directory left out. At least one."""
        with pytest.raises(ConfigErrors) as caught:
            self.load(text, env, overrides)
        assert caught.value.problems
        return [str(one).removeprefix(f"{self.directory}/") for one in caught.value.problems]

"""What the settings of every layer share: the frozen model, and the types of a secret and of a span of time.

A layer's settings live beside the layer. They are plain pydantic models: strict (no `"8080"` for 8080), frozen, and
closed to unknown keys, so that programs and the configuration file are held to the same rules. Messages raised here
and in the layers' own validators reach the user as they are, so they name what is expected and never quote a value.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr

_HEADER_SAFE = re.compile(r"[\x21-\x7e]+")


class Section(BaseModel):
    """One section of the configuration. The docstring under a field is its documentation and its schema text."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
    )


def _header_value(value: str) -> str:
    if not _HEADER_SAFE.fullmatch(value):
        raise ValueError("must be printable ASCII without spaces, because it travels in a header")
    return value


def _secret_header_value(value: SecretStr) -> SecretStr:
    _header_value(value.get_secret_value())
    return value


HeaderText = Annotated[str, AfterValidator(_header_value)]
"""Text that is sent as an HTTP header value."""

HeaderSecret = Annotated[SecretStr, AfterValidator(_secret_header_value)]
"""A secret that is sent, or received, as an HTTP header value."""


class Made:
    """Marks the path of a file that is made where it is not there; its directory is not."""


MadeFile = Annotated[Path, Made()]
"""A file that is written to."""

DAY_MS = 86_400_000

Milliseconds = Annotated[int, Field(ge=1, le=DAY_MS)]
"""A time limit: at least a millisecond, at most a day."""

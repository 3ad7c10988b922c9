"""What is asked of administration, held to the same rules and messages as the configuration file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, TypeVar

from pydantic import ValidationError

from proxy.config.bind import Binding
from proxy.config.problems import NOWHERE, ConfigErrors
from proxy.config.shape import record
from proxy.config.tree import native
from proxy.config.validate import translated
from proxy.settings import Section

_Model = TypeVar("_Model", bound=Section)


def checked(model: type[_Model], wanted: Mapping[str, Any]) -> _Model:
    """`wanted`, as it comes from JSON or from flags, as a `model`. A text will do where a number is expected.

    Raises ConfigErrors with everything that is wrong. The model must have no secrets and no paths: whoever asks names
    no file of this machine.
    """
    binding = Binding({}, FilePath())
    values = binding.bind(native(wanted, NOWHERE), record(model), ())
    problems = list(binding.problems)
    try:
        found = model.model_validate(values)
    except ValidationError as error:
        problems += translated(error, (), binding)
    else:
        if not problems:
            return found
    raise ConfigErrors(dict.fromkeys(problems))

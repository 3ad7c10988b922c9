"""Settings of the context layer: how much of a conversation is sent, and what becomes of the rest."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from proxy.budget.settings import Count, Mode
from proxy.settings import Section


class ContextSettings(Section):
    """How conversations are kept within a window. Unwritten, it acts at the window of the target, where the provider
    would refuse."""

    mode: Mode = "enforce"
    """off: nothing is looked at; observe: what would be removed is said, nothing is; enforce: it is removed."""
    max_tokens: Count | None = None
    """Most tokens of a prompt; null: what the window of the target has room for."""
    trim_strategy: Literal["oldest", "summary"] = "oldest"
    """What takes the place of removed messages: oldest: a line that says so; summary: what summary_model makes of
    them."""
    preflight_check: bool = True
    """Refuse what can not fit with 400 before it is sent; false: let the provider say it."""
    trim_to: float = Field(default=0.7, ge=0.1, le=1, allow_inf_nan=False)
    """Part of the limit that a cut leaves: it is made in one go and then stays, so that the prompt cache keeps warm."""
    mask_tool_outputs: bool = False
    """Before messages are removed, replace the oldest outputs of tools by a placeholder."""
    summary_model: str | None = Field(default=None, min_length=1, max_length=256)
    """The configured model that makes summaries."""

    @model_validator(mode="before")
    @classmethod
    def _may_be_switched_off(cls, value: Any) -> Any:
        return {"mode": "off"} if value is False else value


def merged(base: ContextSettings, over: ContextSettings | None) -> ContextSettings:
    """`base` with what the section of a tenant says in its place. Only what was written counts."""
    if over is None:
        return base
    return base.model_copy(update={name: getattr(over, name) for name in over.model_fields_set})

"""The models that the simulated gateway lists, in the form in which Vercel's gateway does."""

from __future__ import annotations

from typing import Any, Final

_CREATED: Final = 1_755_815_280
_UNLISTED_MAX_OUTPUT: Final = 1_000_000

_MODELS: Final = {
    # id: (context window, most output tokens, type)
    "openai/gpt-4o": (128_000, 16_384, "language"),
    "openai/gpt-4o-mini": (128_000, 16_384, "language"),
    "anthropic/claude-sonnet-4": (200_000, 64_000, "language"),
    "openai/text-embedding-3-small": (8_192, 0, "embedding"),
    "sim/slow": (128_000, 16_384, "language"),
    "sim/no-usage": (128_000, 16_384, "language"),
    "sim/tools": (128_000, 16_384, "language"),
    "sim/reason": (128_000, 16_384, "language"),
}


def shown(model: str) -> dict[str, Any] | None:
    """One entry of the list; None for a model that is not in it."""
    told = _MODELS.get(model)
    if told is None:
        return None
    context_window, max_tokens, kind = told
    return {
        "id": model,
        "object": "model",
        "created": _CREATED,
        "owned_by": model.partition("/")[0],
        "name": model.partition("/")[2],
        "context_window": context_window,
        "max_tokens": max_tokens,
        "type": kind,
    }


def listed() -> dict[str, Any]:
    """The whole list."""
    return {"object": "list", "data": [shown(model) for model in _MODELS]}


def max_output(model: str) -> int:
    """What a model may say at most; those that are not listed are served too, up to a million."""
    told = _MODELS.get(model)
    return told[1] or _UNLISTED_MAX_OUTPUT if told else _UNLISTED_MAX_OUTPUT

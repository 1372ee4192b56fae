"""What is known of models: encoding, maximum output, chat overheads, image formula, metric label."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, Final

from tiktoken.model import encoding_name_for_model

from sentinel_proxy.tokens.encodings import DEFAULT_ENCODING, canonical_name
from sentinel_proxy.tokens.images import Area, Crops, ImageFormula, Patches, Tiles

_NAME_CHARS_MAX: Final = 200
_CACHED_MODELS_MAX: Final = 1024
_IMAGE_FORMULAS: Final[Mapping[str, type[ImageFormula]]] = {
    "tiles": Tiles,
    "patches": Patches,
    "area": Area,
    "crops": Crops,
}


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """How a model's tokens are counted, and how many it can produce."""

    name: str
    """Of the family, not of the model: one of few, so it is fit for a metric label; unknown models are `other`."""
    encoding: str
    """The canonical name of a shipped encoding."""
    openai: bool
    """Counted by OpenAI's own rules; else the count is an estimate that the running ratio may correct."""
    max_output_tokens: int | None
    """None = not known."""
    message_tokens: int
    name_tokens: int
    reply_tokens: int
    image: ImageFormula

    @property
    def label(self) -> str:
        """The value of the metric label `model`."""
        return self.name


@dataclass(frozen=True, slots=True)
class _Families:
    by_prefix: tuple[tuple[str, ModelFamily], ...]
    """Longest prefix first."""
    by_provider: Mapping[str, ModelFamily]
    fallback: ModelFamily


def lookup(model: str) -> ModelFamily:
    """The family of a model as callers name it (`openai/gpt-4o-2024-08-06`, `ft:gpt-4o:acme::1`); never raises.

    The answers for the 1,024 models asked last are remembered.
    """
    return _lookup(model[:_NAME_CHARS_MAX])


def names() -> frozenset[str]:
    """Every name a family can have: the bound on what `lookup` puts into metric labels."""
    table = _families()
    return frozenset(family.name for _, family in table.by_prefix) | {table.fallback.name}


@lru_cache(maxsize=_CACHED_MODELS_MAX)
def _lookup(model: str) -> ModelFamily:
    path = model.strip().lower().split("/")
    name = path[-1].removeprefix("ft:").partition(":")[0]
    family = _family(name, path[:-1])
    # Our table names an encoding only where tiktoken's own does not know the model.
    return family if family.encoding else replace(family, encoding=_encoding(name))


def _family(name: str, providers: list[str]) -> ModelFamily:
    table = _families()
    for prefix, family in table.by_prefix:
        if name.startswith(prefix):
            return family
    for provider in reversed(providers):
        if provider in table.by_provider:
            return table.by_provider[provider]
    return table.fallback


def _encoding(name: str) -> str:
    try:
        return canonical_name(encoding_name_for_model(name))
    except KeyError:
        return DEFAULT_ENCODING


@cache
def _families() -> _Families:
    data = tomllib.loads((files(__package__) / "data" / "families.toml").read_text("utf-8"))
    default: dict[str, Any] = data["default"]
    by_prefix: dict[str, ModelFamily] = {}
    by_provider: dict[str, ModelFamily] = {}
    for entry in data["family"]:
        family = _read({**default, **entry})
        by_prefix.update(dict.fromkeys(entry["prefixes"], family))
        if "provider" in entry:
            by_provider[entry["provider"]] = family
    longest_first = sorted(by_prefix.items(), key=lambda item: len(item[0]), reverse=True)
    return _Families(tuple(longest_first), by_provider, _read(default))


def _read(entry: Mapping[str, Any]) -> ModelFamily:
    image = dict(entry["image"])
    return ModelFamily(
        name=entry["name"],
        encoding=entry.get("encoding", ""),
        openai=entry["openai"],
        max_output_tokens=entry.get("max_output_tokens"),
        message_tokens=entry["message_tokens"],
        name_tokens=entry["name_tokens"],
        reply_tokens=entry["reply_tokens"],
        image=_IMAGE_FORMULAS[image.pop("method")](**image),
    )

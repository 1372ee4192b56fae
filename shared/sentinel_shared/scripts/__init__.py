"""The Lua scripts, one file each. `--@ name` in a script stands for the file of that name: Redis has no import."""

from __future__ import annotations

from importlib.resources import files
from typing import Final

from sentinel_shared.redis_lane import Script

_INCLUDE: Final = "--@ "
_ALLOW_OOM: Final = frozenset({"settle", "extend", "reap", "claim", "ack", "lease_batch", "note", "split", "bury"})
"""Scripts that pay debts run even when Redis is full: they free memory, or keep usage from being lost."""


def load(name: str) -> Script:
    """The script `name`, its includes in place and its comments left out."""
    return Script.of(name, _compact(_source(name), allow_oom=name in _ALLOW_OOM))


def _source(name: str) -> str:
    lines = (files(__package__) / f"{name}.lua").read_text(encoding="utf-8").splitlines()
    return "\n".join(_source(line.removeprefix(_INCLUDE)) if line.startswith(_INCLUDE) else line for line in lines)


def _compact(source: str, *, allow_oom: bool) -> bytes:
    lines = (line.strip() for line in source.splitlines())
    kept = [line for line in lines if line and not line.startswith("--")]
    if allow_oom:
        kept.insert(0, "#!lua flags=allow-oom")
    return "\n".join(kept).encode() + b"\n"

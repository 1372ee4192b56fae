"""A Lua script and the name that Redis knows it by."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Script:
    """`sha1` is what EVALSHA takes: 40 hexadecimal digits of `source`'s SHA-1."""

    name: str
    source: bytes
    sha1: str

    @classmethod
    def of(cls, name: str, source: bytes) -> Self:
        return cls(name, source, hashlib.sha1(source, usedforsecurity=False).hexdigest())

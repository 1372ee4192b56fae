"""Edits of a JSON object in its own bytes: what is not edited stays as the caller wrote it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from sentinel_proxy.openai_wire.decoding import decoded

Edits = Mapping[str, object]

_MEMBERS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_SPACE: Final = rb"[ \t\n\r]*+"
_KEY: Final = re.compile(rb'%b"[^"\\]*+(?:\\.[^"\\]*+)*+"%b:%b' % (_SPACE, _SPACE, _SPACE))
_END: Final = re.compile(rb"%b([,}])" % _SPACE)
# No honest body has more; each costs a microsecond to find, which millions of them would turn into a stall.
_MEMBERS_PLACED_MAX: Final = 256


def edit_body(raw: bytes, edits: Edits) -> bytes:
    """Sets members of the JSON object `raw`, adding what is absent; a mapping edits within the member's own object.

    All other bytes stay: order, white space, numbers and escapes as they were. Only an object that names a member
    twice (whoever reads it next might take either) or that has hundreds of members is written anew, each member once
    with its last value's own bytes. Raises ApiError (400) if `raw` is no JSON object.
    """
    members = _members(raw)
    places = _places(raw, members)
    if places is None:
        return _rewritten(members, edits)
    added = {name: value for name, value in edits.items() if name not in members}
    pieces = []
    at = 0
    if added:
        at = raw.index(b"{") + 1
        pieces = [raw[:at], msgspec.json.encode(added)[1:-1], b"," if members else b""]
    for name, (start, end) in places.items():
        if name in edits:
            pieces += raw[at:start], _edited_value(raw[start:end], edits[name])
            at = end
    pieces.append(raw[at:])
    return b"".join(pieces)


def add_members(raw: bytes, edits: Edits) -> bytes:
    """As edit_body where `raw` has members, and none of `edits` is among them: quicker."""
    members = _members(raw)
    if not _names_once(raw, members):
        return _rewritten(members, edits)
    if not edits:
        return raw
    at = raw.index(b"{") + 1
    return b"".join((raw[:at], msgspec.json.encode(edits)[1:-1], b",", raw[at:]))


def _members(raw: bytes) -> dict[str, msgspec.Raw]:
    return decoded(_MEMBERS, raw)


def _names_once(raw: bytes, members: dict[str, msgspec.Raw]) -> bool:
    """Whether no member is named twice, so that all who read `raw` read the same."""
    if len(members) > _MEMBERS_PLACED_MAX:
        return False
    # As SDKs write it, without white space, its length tells: one more member, or a key with escapes, makes it longer.
    shortest = 1 + sum(len(name) + 4 + memoryview(value).nbytes for name, value in members.items())
    return len(raw) == shortest or _places(raw, members) is not None


def _places(raw: bytes, members: dict[str, msgspec.Raw]) -> dict[str, tuple[int, int]] | None:
    # The decoder, in C, told the length of each value: so only the keys are left to be scanned here. A member named
    # twice is in `members` once, and the walk does not come out at the closing brace with the last one.
    if len(members) > _MEMBERS_PLACED_MAX:
        return None
    places = {}
    at = raw.index(b"{") + 1
    closing = b"}" if not members else b","
    for name, value in members.items():
        if closing != b"," or not (key := _KEY.match(raw, at)):
            return None
        text = bytes(value)
        start, end = key.end(), key.end() + len(text)
        if not raw.startswith(text, start) or not (after := _END.match(raw, end)):
            return None
        places[name] = (start, end)
        at, closing = after.end(), after[1]
    return places if closing == b"}" else None


def _rewritten(members: dict[str, msgspec.Raw], edits: Edits) -> bytes:
    for name, value in edits.items():
        old = members.get(name)
        members[name] = msgspec.Raw(_edited_value(b"" if old is None else bytes(old), value))
    return msgspec.json.encode(members)


def _edited_value(old: bytes, value: object) -> bytes:
    if isinstance(value, Mapping) and old.startswith(b"{"):
        return edit_body(old, value)
    return msgspec.json.encode(value)

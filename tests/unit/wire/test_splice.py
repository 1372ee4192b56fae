"""Edits change what they name, and not one byte more."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sentinel_proxy.errors import ApiError
from sentinel_proxy.openai_wire import edit_body

ODD = (
    b' \r\n{ "model" :\t"m" , "max_tokens":100,\n  "seed": 123456789012345678901234567890, "t":1.50e+02,"z":-0.0,'
    b'"text":"{\\"max_tokens\\": 7, \\\\\\" }] \\u4e2d","nested":{"max_tokens":{"max_tokens":[1,"]}"]}},'
    b'"caf\xc3\xa9":"\xe4\xb8\xad"  }\n'
)


@pytest.mark.parametrize(
    ("edits", "old", "new"),
    [
        ({}, b"", b""),
        ({"max_tokens": 5}, b'"max_tokens":100', b'"max_tokens":5'),
        ({"model": "other"}, b'"m"', b'"other"'),
        ({"seed": None}, b"123456789012345678901234567890", b"null"),
        ({"text": True}, b'"{\\"max_tokens\\": 7, \\\\\\" }] \\u4e2d"', b"true"),
        ({"caf\xe9": 0}, b'"\xe4\xb8\xad"', b"0"),
        ({"stream": True}, b" \r\n{", b' \r\n{"stream":true,'),
        ({"stream_options": {"include_usage": True}}, b" \r\n{", b' \r\n{"stream_options":{"include_usage":true},'),
        ({"nested": {"max_tokens": 1}}, b'{"max_tokens":[1,"]}"]}', b"1"),
        ({"nested": {"max_tokens": {"max_tokens": 2}}}, b'[1,"]}"]', b"2"),
        ({"model": {"a": 1}}, b'"m"', b'{"a":1}'),
    ],
    ids=repr,
)
def test_all_bytes_but_the_edited_value_stay(edits: Mapping[str, object], old: bytes, new: bytes) -> None:
    assert edit_body(ODD, edits) == ODD.replace(old, new, 1)


def test_several_edits_are_made_in_one_go() -> None:
    edited = edit_body(ODD, {"z": 1, "new": [2], "model": "x", "also": None})
    expected = ODD.replace(b'"m"', b'"x"').replace(b"-0.0", b"1")
    assert edited == expected.replace(b"{", b'{"new":[2],"also":null,', 1)


@pytest.mark.parametrize(
    ("raw", "edited"),
    [
        (b"{}", b'{"a":1}'),
        (b" { } ", b' {"a":1 } '),
        (b'{"\\u0061":0}', b'{"\\u0061":1}'),
        (b'{"\\"a\\"":0}', b'{"a":1,"\\"a\\"":0}'),
        (b'{"b":"\\\\","a":"\\""}', b'{"b":"\\\\","a":1}'),
        (b'{"b":"\\\\\\"a\\":","a":[]}', b'{"b":"\\\\\\"a\\":","a":1}'),
        (b'{"b":[{"a":2},"}",[]],"a":{"a":3}}', b'{"b":[{"a":2},"}",[]],"a":1}'),
        (b'{"a":1e5}', b'{"a":1}'),
        (b'{"b":12,"a":1}', b'{"b":12,"a":1}'),
    ],
)
def test_a_member_is_found_wherever_and_however_it_is_written(raw: bytes, edited: bytes) -> None:
    assert edit_body(raw, {"a": 1}) == edited


@pytest.mark.parametrize(
    ("raw", "edited"),
    [
        (b'{"a":1,"a":2}', b'{"a":9}'),
        (b'{"a":1,"b":1,"\\u0061":22}', b'{"a":9,"b":1}'),
        (b'{"b":1.0,"b":2.0}', b'{"b":2.0,"a":9}'),
        (b'{"b":"x","a":1,"b":"xy"}', b'{"b":"xy","a":9}'),
        (b'{"b":"\\",\\"c\\":\\"","b":"","c":1e2}', b'{"b":"","c":1e2,"a":9}'),
        (b'{"b":1,"b":1}', b'{"b":1,"a":9}'),
        (b'{"b":1,"c":1,"b":1}', b'{"b":1,"c":1,"a":9}'),
        # The last value's length, counted from the first one's start, ends just before a brace.
        (b'{"a":1 ,"a":{"q":{},"":1}}', b'{"a":9}'),
    ],
)
def test_of_a_member_named_twice_only_the_last_is_left(raw: bytes, edited: bytes) -> None:
    assert edit_body(raw, {"a": 9}) == edited


def test_a_namesake_within_the_edited_object_goes_too() -> None:
    raw = b'{"o": {"include_usage":false, "k":1e2, "include_usage":null}, "x" : 1}'
    assert edit_body(raw, {"o": {"include_usage": True}}) == b'{"o": {"include_usage":true,"k":1e2}, "x" : 1}'


def test_an_object_of_very_many_members_is_written_anew_with_its_own_values() -> None:
    raw = b"{" + b", ".join(b'"k%d" : %d.50' % (i, i) for i in range(100_000)) + b"}"
    edited = edit_body(raw, {"k7": "x", "new": 1})
    values = json.loads(edited, parse_float=str)
    assert values == {**json.loads(raw, parse_float=str), "k7": "x", "new": 1}


@pytest.mark.parametrize("raw", [b"", b"[]", b"1", b"{", b'{"a":}', b'{"\xff":1}', b'{"a":' + b"[" * 200_000])
def test_what_is_no_object_is_a_400(raw: bytes) -> None:
    with pytest.raises(ApiError) as raised:
        edit_body(raw, {"a": 1})
    assert raised.value.status == 400


# JSON with every freedom that a serializer may take, and a stable reading of it that keeps a number's text.
SPACE = st.text(" \t\r\n", max_size=2)
NAMES = st.sampled_from(["a", "b", "max_tokens", "é", '"', "\\", "{", "stream_options"]) | st.text(max_size=4)
NUMBERS = st.from_regex(
    re.compile(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,4})?([eE][+-]?[0-9]{1,2})?", re.ASCII), fullmatch=True
)


@st.composite
def strings(draw: Any) -> str:
    text = draw(NAMES)
    ascii_only = draw(st.booleans())
    written = json.dumps(text, ensure_ascii=ascii_only)
    if written.isascii() and text.isalpha() and draw(st.booleans()):
        return '"' + "".join(f"\\u{ord(letter):04x}" for letter in text) + '"' if text.isascii() else written
    return written


def _joined(opening: str, parts: list[str], closing: str, spaces: list[str]) -> str:
    first, second = spaces
    return opening + first + f"{first},{second}".join(parts) + second + closing


VALUES = st.recursive(
    st.sampled_from(["null", "true", "false"]) | NUMBERS | strings(),
    lambda inner: (
        st.builds(
            _joined, st.just("["), st.lists(inner, max_size=3), st.just("]"), st.lists(SPACE, min_size=2, max_size=2)
        )
        | st.builds(
            _joined,
            st.just("{"),
            st.lists(st.builds("{}{}:{}".format, strings(), SPACE, inner), max_size=3),
            st.just("}"),
            st.lists(SPACE, min_size=2, max_size=2),
        )
    ),
    max_leaves=8,
)
MEMBERS = st.lists(st.tuples(strings(), VALUES), max_size=6)
EDITS = st.dictionaries(NAMES, st.none() | st.booleans() | st.integers(1, 2**53) | st.text(max_size=5), max_size=3)


def _read(raw: bytes) -> Any:
    return json.loads(raw, parse_int=lambda text: ("number", text), parse_float=lambda text: ("number", text))


@settings(max_examples=500, deadline=None)
@given(members=MEMBERS, spaces=st.tuples(SPACE, SPACE, SPACE, SPACE), edits=EDITS)
def test_an_edited_body_reads_as_the_old_one_with_just_the_edits(
    members: list[tuple[str, str]], spaces: tuple[str, str, str, str], edits: dict[str, Any]
) -> None:
    outer, before, after, between = spaces
    parts = [f"{name}{before}:{after}{value}" for name, value in members]
    raw = (outer + "{" + between + f"{before},{after}".join(parts) + between + "}" + outer).encode()
    edited = edit_body(raw, edits)
    assert _read(edited) == {**_read(raw), **_read(msgspec.json.encode(edits))}

    names = [json.loads(name) for name, _ in members]
    if len(set(names)) < len(names):
        return
    # What is cut out at both places is the same bytes: take the edited values and additions out again.
    added = {name: value for name, value in edits.items() if name not in names}
    expected_parts = [
        f"{name}{before}:{after}{json.dumps(edits[json.loads(name)], ensure_ascii=False)}"
        if json.loads(name) in edits
        else part
        for part, (name, _) in zip(parts, members, strict=True)
    ]
    opening = (
        "{" + json.dumps(added, ensure_ascii=False, separators=(",", ":"))[1:-1] + ("," if added and members else "")
    )
    expected = outer + opening + between + f"{before},{after}".join(expected_parts) + between + "}" + outer
    assert _same_but_escapes(edited) == _same_but_escapes(expected.encode())


def _same_but_escapes(raw: bytes) -> bytes:
    # Two serializers differ in how they escape control characters in the edits' own texts.
    return re.sub(rb"\\(u00[01][0-9a-f]|[bfnrt])|\x7f|\\u007f", b"", raw)


@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=60) | st.text('{}[]",:\\ab1 ', max_size=30).map(str.encode))
def test_any_bytes_are_edited_or_refused(raw: bytes) -> None:
    try:
        edited = edit_body(raw, {"a": 1})
    except ApiError:
        return
    assert json.loads(edited, parse_constant=str)["a"] == 1

"""Requests are read once and little: a good one passes as it is, a bad one is a 400 that names the field."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sentinel_proxy.errors import ApiError
from sentinel_proxy.openai_wire import (
    MeteredRequest,
    parse_chat,
    parse_completions,
    parse_embeddings,
    parse_responses,
)

MESSAGES = [{"role": "user", "content": "hi"}]
Parse = Callable[[bytes], MeteredRequest]
PARSERS: tuple[Parse, ...] = (parse_chat, parse_completions, parse_embeddings, parse_responses)


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode()


def completions(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "hi", **fields}).encode()


def responses(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "input": "hi", **fields}).encode()


def refused(parse: Parse, raw: bytes) -> ApiError:
    with pytest.raises(ApiError) as raised:
        parse(raw)
    assert (raised.value.status, raised.value.type) == (400, "invalid_request_error")
    return raised.value


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"   ",
        b"{",
        b'{"model": "m"',
        b'{"model": "m",}',
        b"{'model': 'm'}",
        b'{"model": "m", "messages": [1], "prompt": "x", "input": "x"} trailing',
        b'{"model": "m", "max_tokens": NaN}',
        b'{"model": "m", "max_tokens": Infinity}',
        b'{"model": "m", "n": 01}',
        b'{"model": "\xff"}',
        b'{"model": "\xed\xa0\x80"}',
        b'{"model": "\\ud800"}',
        '{"model": "m"}'.encode("utf-16"),
        b'\xef\xbb\xbf{"model": "m"}',
        b"\x00",
        b"model=m",
        b"[]",
        b'"text"',
        b"null",
        b"17",
        b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"x":' + b'{"a":' * 200_000 + b"1" + b"}" * 200_000 + b"}",
        b"[" * 200_000,
    ],
    ids=lambda raw: repr(raw[:40]),
)
def test_what_is_no_json_object_is_refused(parse: Parse, raw: bytes) -> None:
    assert refused(parse, raw).param is None


def test_a_body_that_is_no_json_is_told_where() -> None:
    error = refused(parse_chat, b'{"model": "m" "messages": []}')
    assert error.message.startswith("We could not parse the JSON body of your request")
    assert "byte 14" in error.message


@pytest.mark.parametrize("read", ["messages", "tools", "response_format"])
def test_deep_nesting_in_what_is_read_is_refused(read: str) -> None:
    deep = b"[" * 200_000 + b"]" * 200_000
    assert "too deeply" in refused(parse_chat, b'{"model":"m","messages":[1],"%b":%b}' % (read.encode(), deep)).message


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize(
    ("model", "code"),
    [
        ({}, "missing_required_parameter"),
        ({"model": ""}, "empty_string"),
        ({"model": None}, "invalid_type"),
        ({"model": 5}, "invalid_type"),
        ({"model": ["m"]}, "invalid_type"),
        ({"model": "m" * 513}, "string_above_max_length"),
    ],
    ids=repr,
)
def test_a_model_is_a_short_text(parse: Parse, model: dict[str, object], code: str) -> None:
    error = refused(parse, json.dumps({"messages": MESSAGES, "prompt": "hi", "input": "hi", **model}).encode())
    assert (error.param, error.code) == ("model", code)
    assert "'model'" in error.message


NO_COUNTS = [-1, 2**53 + 1, 10**40, -(10**40), 1.5, 1.0, True, "5", [], {}]


@pytest.mark.parametrize(
    ("parse", "body", "field"),
    [
        (parse_chat, chat, "max_tokens"),
        (parse_chat, chat, "max_completion_tokens"),
        (parse_chat, chat, "n"),
        (parse_completions, completions, "max_tokens"),
        (parse_completions, completions, "n"),
        (parse_completions, completions, "best_of"),
        (parse_responses, responses, "max_output_tokens"),
    ],
)
@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
def test_a_count_that_is_none_names_its_field(
    parse: Parse, body: Callable[..., bytes], field: str, value: object
) -> None:
    error = refused(parse, body(**{field: value}))
    assert error.param == field
    assert f"'{field}'" in error.message


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 5_000])
def test_a_number_beyond_all_bounds_names_its_field(number: str) -> None:
    raw = b'{"model":"m","messages":[1],"max_tokens":%b}' % number.encode()
    assert refused(parse_chat, raw).param == "max_tokens"


@pytest.mark.parametrize(
    ("parse", "body", "field"),
    [(parse_chat, chat, "max_tokens"), (parse_chat, chat, "n"), (parse_responses, responses, "max_output_tokens")],
)
def test_zero_is_no_cap_and_no_number_of_choices(parse: Parse, body: Callable[..., bytes], field: str) -> None:
    error = refused(parse, body(**{field: 0}))
    assert (error.param, error.code) == (field, "integer_below_min_value")
    assert error.message.endswith("Expected a value >= 1.")


def test_a_completion_may_score_its_prompt_and_produce_nothing() -> None:
    assert parse_completions(completions(max_tokens=0, echo=True)).cap_tokens == 0


def test_n_ends_at_128() -> None:
    assert parse_chat(chat(n=128)).choices == 128
    assert refused(parse_chat, chat(n=129)).code == "integer_above_max_value"


@pytest.mark.parametrize("messages", [None, [], {}, "hi", 5])
def test_messages_are_a_list_with_something_in_it(messages: object) -> None:
    assert refused(parse_chat, chat(messages=messages)).param == "messages"


@pytest.mark.parametrize(
    ("parse", "fields", "param"),
    [
        (parse_chat, {}, "messages"),
        (parse_completions, {}, "prompt"),
        (parse_completions, {"prompt": 5}, "prompt"),
        (parse_completions, {"prompt": []}, "prompt"),
        (parse_completions, {"prompt": {}}, "prompt"),
        (parse_embeddings, {}, "input"),
        (parse_embeddings, {"input": None}, "input"),
        (parse_embeddings, {"input": []}, "input"),
        (parse_embeddings, {"input": 1.5}, "input"),
        (parse_responses, {}, "input"),
        (parse_responses, {"input": None}, "input"),
        (parse_responses, {"input": {}}, "input"),
    ],
)
def test_something_must_be_asked(parse: Parse, fields: dict[str, object], param: str) -> None:
    assert refused(parse, json.dumps({"model": "m", **fields}).encode()).param == param


@pytest.mark.parametrize("stands_in", ["prompt", "previous_response_id", "conversation"])
def test_a_response_may_come_without_input_where_something_stands_for_it(stands_in: str) -> None:
    assert parse_responses(json.dumps({"model": "m", stands_in: "x_1"}).encode()).input is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": "true"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": "include_usage"}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": False, "stream_options": {}}, "stream_options"),
        ({"stream": None, "stream_options": {}}, "stream_options"),
    ],
)
def test_stream_and_its_options_must_fit(fields: dict[str, object], param: str) -> None:
    assert refused(parse_chat, chat(**fields)).param == param
    assert refused(parse_completions, completions(**fields)).param == param


@pytest.mark.parametrize(
    "field", ["max_tokens", "max_completion_tokens", "n", "stream", "stream_options", "tools", "response_format"]
)
def test_null_is_as_good_as_absent(field: str) -> None:
    request = parse_chat(chat(**{field: None}))
    assert (request.streamed, request.cap_tokens, request.choices) == (False, None, 1)
    assert not parse_completions(completions(**{field: None, "best_of": None})).streamed
    assert parse_responses(responses(max_output_tokens=None, stream=None, stream_options=None)).cap_tokens is None


def test_the_larger_of_two_caps_counts() -> None:
    assert parse_chat(chat(max_tokens=1, max_completion_tokens=1_000_000)).cap_tokens == 1_000_000
    assert parse_chat(chat(max_tokens=7, max_completion_tokens=None)).cap_tokens == 7


@pytest.mark.parametrize(
    ("fields", "choices"),
    [
        ({}, 1),
        ({"n": 3}, 3),
        ({"n": 2, "best_of": 5}, 5),
        ({"n": 3, "best_of": 0}, 3),
        ({"prompt": ["a", "b"]}, 2),
        ({"prompt": ["a", "b"], "n": 3}, 6),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1, 2], [3]], "n": 2}, 4),
        ({"prompt": None}, 1),
        ({"prompt": ""}, 1),
    ],
)
def test_all_that_a_completion_generates_is_counted(fields: dict[str, object], choices: int) -> None:
    assert parse_completions(completions(**fields)).choices == choices


def test_of_a_field_named_twice_the_last_counts_however_it_is_spelt() -> None:
    request = parse_chat(b'{"model":"a","messages":[1],"max_tokens":9,"model":"b","max\\u005ftokens":5}')
    assert (request.model, request.cap_tokens) == ("b", 5)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model":"a","messages":[1],"max_tokens":999999,"max_tokens":5}',
        b'{"max\\u005ftokens": 999999, "model": "a", "messages": [1], "max_tokens": 5}',
        b'{"model":"b","messages":[1],"model":"a","max_tokens":5}',
        b'{"n":1,"model":"a","messages":[1],"max_tokens":5,"n": 1 }',
        b'{ "stream":true,"model":"a","messages":[1],"max_tokens":5,"stream":false}',
    ],
)
def test_what_is_named_twice_goes_upstream_once_and_as_it_was_read(raw: bytes) -> None:
    sent = parse_chat(raw).for_upstream(raw)
    pairs = json.loads(sent, object_pairs_hook=lambda members: members)
    assert len({name for name, _ in pairs}) == len(pairs)
    assert dict(pairs)["max_tokens"] == 5
    assert json.loads(sent) == json.loads(raw)


def test_a_hundred_thousand_lists_are_read_without_a_search_for_cycles_at_each_seven_hundredth() -> None:
    searches = []

    def note(phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            searches.append(phase)

    gc.callbacks.append(note)
    try:
        parse_chat(b'{"model":"m","messages":[' + b"[]," * 100_000 + b"{}]}")
        refused(parse_chat, b'{"model":"m","messages":[' + b"[]," * 100_000)
    finally:
        gc.callbacks.remove(note)
    assert len(searches) < 10
    assert gc.isenabled()


def test_unknown_fields_are_nobody_s_business() -> None:
    raw = b'{"model":"m","messages":[1],"seed":123456789012345678901234567890,"x":1e999,"top_k":-0.0,"a":{"n":0}}'
    assert parse_chat(raw).for_upstream(raw) is raw


@pytest.mark.parametrize(
    ("parse", "raw"),
    [
        (parse_chat, chat()),
        (parse_chat, chat(max_tokens=100, n=2)),
        (parse_chat, chat(stream=True, stream_options={"include_usage": True})),
        (parse_completions, completions()),
        (parse_responses, responses(stream=True)),
        (parse_embeddings, responses()),
    ],
)
def test_a_body_that_needs_no_edit_goes_on_as_the_very_same_bytes(parse: Parse, raw: bytes) -> None:
    assert parse(raw).for_upstream(raw) is raw


@pytest.mark.parametrize(
    ("options", "sent", "hides_usage"),
    [
        ({}, {"include_usage": True}, True),
        ({"stream_options": None}, {"include_usage": True}, True),
        ({"stream_options": {}}, {"include_usage": True}, True),
        ({"stream_options": {"include_usage": False}}, {"include_usage": True}, True),
        ({"stream_options": {"include_usage": None}}, {"include_usage": True}, True),
        (
            {"stream_options": {"include_obfuscation": False}},
            {"include_usage": True, "include_obfuscation": False},
            True,
        ),
        ({"stream_options": {"include_usage": True, "x": 1}}, {"include_usage": True, "x": 1}, False),
    ],
)
def test_a_stream_is_always_made_to_report_its_usage(
    options: dict[str, object], sent: dict[str, object], hides_usage: bool
) -> None:
    bodies: list[tuple[Parse, bytes]] = [
        (parse_chat, chat(stream=True, **options)),
        (parse_completions, completions(stream=True, **options)),
    ]
    for parse, raw in bodies:
        request = parse(raw)
        assert request.streamed
        assert request.hides_usage is hides_usage
        assert json.loads(request.for_upstream(raw)) == {**json.loads(raw), "stream_options": sent}


def test_the_responses_api_is_not_asked_for_what_it_sends_anyway() -> None:
    request = parse_responses(responses(stream=True, stream_options={"include_obfuscation": False}))
    assert request.streamed
    assert not request.hides_usage


@pytest.mark.parametrize(
    ("own", "sent"),
    [
        ({}, {"max_completion_tokens": 50}),
        ({"max_tokens": None}, {"max_tokens": None, "max_completion_tokens": 50}),
        ({"max_completion_tokens": None}, {"max_completion_tokens": 50}),
        ({"max_tokens": 100}, {"max_tokens": 50}),
        ({"max_tokens": 20}, {"max_tokens": 20}),
        ({"max_tokens": 20, "max_completion_tokens": 90}, {"max_tokens": 20, "max_completion_tokens": 50}),
        ({"max_tokens": 70, "max_completion_tokens": 90}, {"max_tokens": 50, "max_completion_tokens": 50}),
    ],
)
def test_a_cap_lowers_what_the_caller_set_and_never_raises_it(own: dict[str, object], sent: dict[str, object]) -> None:
    raw = chat(**own)
    assert json.loads(parse_chat(raw).for_upstream(raw, cap_tokens=50)) == {**json.loads(chat()), **sent}


def test_a_cap_goes_into_the_field_of_its_endpoint() -> None:
    raw = completions()
    assert json.loads(parse_completions(raw).for_upstream(raw, cap_tokens=50))["max_tokens"] == 50
    raw = responses()
    assert json.loads(parse_responses(raw).for_upstream(raw, cap_tokens=50))["max_output_tokens"] == 50
    assert parse_embeddings(raw).for_upstream(raw, cap_tokens=50) is raw


def test_no_earlier_namesake_of_a_lowered_cap_is_left_for_an_upstream_to_prefer() -> None:
    raw = b'{"max_tokens":1000000,"model":"m","messages":[1],"max_tokens":90}'
    sent = parse_chat(raw).for_upstream(raw, cap_tokens=50)
    assert json.loads(sent, object_pairs_hook=lambda pairs: pairs) == [
        ("max_tokens", 50),
        ("model", "m"),
        ("messages", [1]),
    ]


def test_a_cap_and_usage_are_set_in_one_go() -> None:
    raw = chat(stream=True, max_tokens=100)
    sent = json.loads(parse_chat(raw).for_upstream(raw, cap_tokens=50))
    assert sent == {**json.loads(raw), "max_tokens": 50, "stream_options": {"include_usage": True}}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    ["model", "messages", "prompt", "input", "stream", "stream_options", "n", "best_of", "tools", "max_tokens"]
)
BODIES = st.binary(max_size=200) | st.dictionaries(FIELDS, JSON).map(lambda body: json.dumps(body).encode())


@settings(max_examples=300, deadline=None)
@given(raw=BODIES, cap_tokens=st.none() | st.integers(1, 2**53))
def test_any_body_is_read_or_refused_with_a_400(raw: bytes, cap_tokens: int | None) -> None:
    statuses = set()
    for parse in PARSERS:
        try:
            sent = parse(raw).for_upstream(raw, cap_tokens=cap_tokens)
        except ApiError as error:
            statuses.add(error.status)
        else:
            assert isinstance(json.loads(sent), dict)
    assert statuses <= {400}

"""Walks what a model produced, events of a stream or one whole answer, and tallies it per choice.

Only for when the upstream gave no usage. What the model thought without showing it cannot be counted here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Final

from sentinel_proxy.tokens.prompts import Kind, tally_call
from sentinel_proxy.tokens.tally import Tally

_RESPONSES_ENDS: Final = frozenset({"response.completed", "response.incomplete", "response.failed"})
_Channel = tuple[object, ...]


def tally_outputs(kind: Kind, events: Iterable[object], tally: Tally) -> None:
    """Tallies decoded events; one event that is a whole answer serves too. Anything else in there counts as nothing.

    Pieces of one text are put together first: tokens do not end where chunks do.
    """
    if kind == "responses":
        _tally_responses(events, tally)
    elif kind in ("chat", "completions"):
        _tally_choices(events, tally)


def _tally_choices(events: Iterable[object], tally: Tally) -> None:
    channels: dict[_Channel, list[str]] = defaultdict(list)
    calls: set[_Channel] = set()
    for event in events:
        choices = event.get("choices") if isinstance(event, dict) else None
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                _read_choice(choice, channels, calls)
    _tally_channels(channels, tally)
    for _ in calls:
        tally_call({}, tally)


def _read_choice(choice: dict[str, object], channels: dict[_Channel, list[str]], calls: set[_Channel]) -> None:
    index = _index(choice)
    _add(channels, (index, "text"), choice.get("text"))
    message = choice.get("delta") or choice.get("message")
    if not isinstance(message, dict):
        return
    for channel in ("content", "refusal"):
        _add(channels, (index, channel), message.get(channel))
    # Some gateways send the same reasoning under both names.
    _add(channels, (index, "reasoning"), message.get("reasoning_content") or message.get("reasoning"))
    audio = message.get("audio")
    _add(channels, (index, "audio"), audio.get("transcript") if isinstance(audio, dict) else None)
    tool_calls = message.get("tool_calls")
    for position, call in enumerate(tool_calls if isinstance(tool_calls, list) else ()):
        if isinstance(call, dict):
            key = (index, "call", _index(call, position))
            _read_call(key, call.get("function") or call.get("custom"), channels, calls)
    _read_call((index, "call"), message.get("function_call"), channels, calls)


def _read_call(key: _Channel, function: object, channels: dict[_Channel, list[str]], calls: set[_Channel]) -> None:
    if isinstance(function, dict):
        calls.add(key)
        for channel in ("name", "arguments", "input"):
            _add(channels, (*key, channel), function.get(channel))


def _tally_responses(events: Iterable[object], tally: Tally) -> None:
    channels: dict[_Channel, list[str]] = defaultdict(list)
    whole: object = None
    calls = 0
    for event in events:
        if not isinstance(event, dict):
            continue
        kind = event.get("type")
        if not isinstance(kind, str):
            whole = event
        elif kind in _RESPONSES_ENDS:
            whole = event.get("response")
        elif kind.endswith(".delta"):
            place = (event.get("output_index"), event.get("content_index"), event.get("summary_index"))
            _add(channels, (kind, *map(_hashable, place)), event.get("delta"))
        elif kind == "response.output_item.added":
            calls += _tally_named(event.get("item"), tally)
    if channels or calls:
        _tally_channels(channels, tally)
    elif isinstance(whole, dict) and isinstance(output := whole.get("output"), list):
        for item in output:
            _tally_item(item, tally)


def _tally_named(item: object, tally: Tally) -> int:
    """The name of a call whose arguments come as deltas; 1 if the item is one, else 0."""
    if isinstance(item, dict) and isinstance(name := item.get("name"), str):
        tally_call({"name": name}, tally)
        return 1
    return 0


def _tally_item(item: object, tally: Tally) -> None:
    if not isinstance(item, dict):
        return
    if isinstance(item.get("name"), str):
        tally_call(item, tally)
    for parts in (item.get("content"), item.get("summary")):
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict):
                tally.text(part.get("text") or part.get("refusal"))


def _tally_channels(channels: dict[_Channel, list[str]], tally: Tally) -> None:
    for texts in channels.values():
        tally.text("".join(texts))


def _add(channels: dict[_Channel, list[str]], key: _Channel, text: object) -> None:
    if isinstance(text, str) and text:
        channels[key].append(text)


def _index(numbered: dict[str, object], default: int = 0) -> object:
    index = numbered.get("index")
    return index if isinstance(index, int) else default


def _hashable(index: object) -> object:
    return index if isinstance(index, int) else None

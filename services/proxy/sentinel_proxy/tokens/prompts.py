"""Walks a request and tallies what its input amounts to: one function per kind of request.

Nothing here raises on what a caller may have put where something else belongs: that counts as nothing, and the
upstream will refuse it. What is exact and what is an approximation stands in docs/tokens.md.
"""

from __future__ import annotations

import math
from typing import Final, Literal, Protocol

from sentinel_proxy.tokens.families import ModelFamily
from sentinel_proxy.tokens.images import UNKNOWN_SIZE_PX, size_of_data_url
from sentinel_proxy.tokens.tally import Tally
from sentinel_proxy.tokens.tools import as_typescript

Kind = Literal["chat", "completions", "embeddings", "responses"]

# One token each in both encodings of chat models, so no need to ask.
_ROLES_OF_ONE_TOKEN: Final = frozenset({"user", "assistant", "system", "developer", "tool", "function"})
_CALL_TOKENS: Final = 3
_TOOLS_TOKENS: Final = 9
# With a system message the tools join it; without, they bring one.
_TOOLS_IN_SYSTEM_TOKENS: Final = _TOOLS_TOKENS - 4
_SCHEMA_TOKENS: Final = 10
_AUDIO_TOKENS_PER_S: Final = 10
_AUDIO_BYTES_PER_S: Final = {"wav": 48_000, "pcm16": 48_000}
_COMPRESSED_AUDIO_BYTES_PER_S: Final = 8_000
_UNKNOWN_AUDIO_TOKENS: Final = 300
_FILE_BYTES_PER_TOKEN: Final = 32
_TEXT_FILE_BYTES_PER_TOKEN: Final = 4
_UNKNOWN_FILE_TOKENS: Final = 2_000


class ChatBody(Protocol):
    """What is read of `POST /v1/chat/completions`: plain decoded JSON, None where the caller sent nothing."""

    @property
    def messages(self) -> object: ...
    @property
    def tools(self) -> object: ...
    @property
    def tool_choice(self) -> object: ...
    @property
    def functions(self) -> object: ...
    @property
    def function_call(self) -> object: ...
    @property
    def response_format(self) -> object: ...


class CompletionsBody(Protocol):
    """What is read of `POST /v1/completions`."""

    @property
    def prompt(self) -> object: ...
    @property
    def suffix(self) -> object: ...


class EmbeddingsBody(Protocol):
    """What is read of `POST /v1/embeddings`."""

    @property
    def input(self) -> object: ...


class ResponsesBody(Protocol):
    """What is read of `POST /v1/responses`."""

    @property
    def input(self) -> object: ...
    @property
    def instructions(self) -> object: ...
    @property
    def tools(self) -> object: ...
    @property
    def text(self) -> object: ...


def tally_chat(body: ChatBody, family: ModelFamily, tally: Tally) -> None:
    """Messages with their overhead, tools and functions, the schema of the answer."""
    messages = body.messages if isinstance(body.messages, list) else []
    functions, others = _functions(body.tools)
    if isinstance(body.functions, list):
        functions += [function for function in body.functions if isinstance(function, dict)]
    system = None
    if functions:
        system = next((m for m in messages if isinstance(m, dict) and m.get("role") in ("system", "developer")), None)
        _tally_functions(functions, tally, with_system=system is not None)
        _tally_choice(body.tool_choice, body.function_call, tally)
    for tool in others:
        tally.json(tool)
    for message in messages:
        if isinstance(message, dict):
            _tally_message(message, family, tally, end="\n" if message is system else "")
    _tally_schema(body.response_format, tally)
    tally.fixed_tokens += family.reply_tokens


def tally_completions(body: CompletionsBody, _family: ModelFamily, tally: Tally) -> None:
    """The prompt, or the sum of the prompts, as text or as token ids; no overhead."""
    _tally_texts_or_ids(body.prompt, tally)
    tally.text(body.suffix)


def tally_embeddings(body: EmbeddingsBody, _family: ModelFamily, tally: Tally) -> None:
    """The input, or the sum of the inputs, as text or as token ids; no overhead."""
    _tally_texts_or_ids(body.input, tally)


def tally_responses(body: ResponsesBody, family: ModelFamily, tally: Tally) -> None:
    """Instructions and input items as messages, tools, the schema of the answer.

    A stored conversation that the request goes on from (`previous_response_id`) cannot be seen and is not counted.
    """
    instructions = isinstance(body.instructions, str)
    if instructions:
        tally.fixed_tokens += family.message_tokens + 1
        tally.text(body.instructions)
    if isinstance(body.input, str):
        tally.fixed_tokens += family.message_tokens + 1
        tally.text(body.input)
    elif isinstance(body.input, list):
        for item in body.input:
            if isinstance(item, dict):
                _tally_item(item, family, tally)
    functions, others = _functions(body.tools)
    if functions:
        _tally_functions(functions, tally, with_system=instructions)
    for tool in others:
        tally.json(tool)
    if isinstance(body.text, dict):
        _tally_schema(body.text.get("format"), tally)
    tally.fixed_tokens += family.reply_tokens


def _tally_message(message: dict[str, object], family: ModelFamily, tally: Tally, *, end: str = "") -> None:
    tally.visit()
    tally.fixed_tokens += family.message_tokens
    role, content = message.get("role"), message.get("content")
    if isinstance(role, str) and role in _ROLES_OF_ONE_TOKEN:
        # The name of a function stands in the place of the role, so its message is two tokens shorter.
        tally.fixed_tokens += 1 if role != "function" else -1
    else:
        tally.text(role)
    if isinstance(content, str):
        tally.text(content + end if end else content)
    else:
        _tally_parts(content, family, tally)
    if isinstance(name := message.get("name"), str):
        tally.fixed_tokens += family.name_tokens
        tally.text(name)
    if len(message) > 2:
        _tally_calls(message, tally)


def _tally_calls(message: dict[str, object], tally: Tally) -> None:
    tally.text(message.get("refusal"))
    tally.text(message.get("reasoning_content") or message.get("reasoning"))
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        if isinstance(call, dict):
            tally_call(call.get("function") or call.get("custom"), tally)
    tally_call(message.get("function_call"), tally)


def tally_call(function: object, tally: Tally) -> None:
    """One call of a function: its name and arguments (or a custom tool's `input`)."""
    if isinstance(function, dict):
        tally.visit()
        tally.fixed_tokens += _CALL_TOKENS
        tally.text(function.get("name"))
        tally.text(function.get("arguments"))
        tally.text(function.get("input"))


def _tally_item(item: dict[str, object], family: ModelFamily, tally: Tally) -> None:
    match item.get("type", "message"):
        case "message":
            _tally_message(item, family, tally)
        case "function_call" | "custom_tool_call":
            tally.fixed_tokens += family.message_tokens
            tally_call(item, tally)
        case "function_call_output" | "custom_tool_call_output":
            tally.visit()
            tally.fixed_tokens += family.message_tokens + 1
            tally.text(item.get("output"))
            _tally_parts(item.get("output"), family, tally)
        case "reasoning":
            _tally_parts(item.get("summary"), family, tally)
            _tally_parts(item.get("content"), family, tally)
        case "item_reference":
            tally.visit()
        case _:
            tally.visit()
            tally.json(item)


def _tally_parts(parts: object, family: ModelFamily, tally: Tally) -> None:
    for part in parts if isinstance(parts, list) else ():
        if not isinstance(part, dict):
            tally.text(part)
            continue
        match part.get("type"):
            case "image_url" | "input_image" | "image":
                tally.visit()
                tally.fixed_tokens += _image_tokens(part, family)
            case "input_audio":
                tally.visit()
                tally.fixed_tokens += _audio_tokens(part.get("input_audio"))
            case "file" | "input_file":
                tally.visit()
                file = part.get("file")
                tally.fixed_tokens += _file_tokens(file if isinstance(file, dict) else part)
            case _:
                tally.text(part.get("text") or part.get("refusal"))


def _image_tokens(part: dict[str, object], family: ModelFamily) -> int:
    image = part.get("image_url")
    # Nested in chat, flat in responses.
    url, detail = (image.get("url"), image.get("detail")) if isinstance(image, dict) else (image, part.get("detail"))
    size = size_of_data_url(url) if isinstance(url, str) else None
    width_px, height_px = size or UNKNOWN_SIZE_PX
    return family.image.tokens(width_px, height_px, detail if isinstance(detail, str) else "auto")


def _audio_tokens(audio: object) -> int:
    if not isinstance(audio, dict):
        return _UNKNOWN_AUDIO_TOKENS
    data, kind = audio.get("data"), audio.get("format")
    if not isinstance(data, str):
        return _UNKNOWN_AUDIO_TOKENS
    bytes_per_s = _AUDIO_BYTES_PER_S.get(kind) if isinstance(kind, str) else None
    return math.ceil(_decoded_bytes(data) / (bytes_per_s or _COMPRESSED_AUDIO_BYTES_PER_S) * _AUDIO_TOKENS_PER_S)


def _file_tokens(file: dict[str, object]) -> int:
    data = file.get("file_data")
    if not isinstance(data, str):
        return _UNKNOWN_FILE_TOKENS
    per_token = _TEXT_FILE_BYTES_PER_TOKEN if data.startswith("data:text/") else _FILE_BYTES_PER_TOKEN
    return math.ceil(_decoded_bytes(data) / per_token)


def _decoded_bytes(base64: str) -> int:
    return len(base64) * 3 // 4


def _functions(tools: object) -> tuple[list[dict[str, object]], list[object]]:
    """The function definitions among `tools`, in the nested form of chat or the flat one of responses; and the rest."""
    functions, others = [], []
    for tool in tools if isinstance(tools, list) else ():
        if isinstance(tool, dict) and tool.get("type", "function") == "function":
            function = tool.get("function", tool)
            functions.append(function if isinstance(function, dict) else {})
        else:
            others.append(tool)
    return functions, others


def _tally_functions(functions: list[dict[str, object]], tally: Tally, *, with_system: bool) -> None:
    tally.fixed_tokens += _TOOLS_IN_SYSTEM_TOKENS if with_system else _TOOLS_TOKENS
    tally.text(as_typescript(functions, tally.visit))


def _tally_choice(tool_choice: object, function_call: object, tally: Tally) -> None:
    for choice, named_tokens in ((tool_choice, 7), (function_call, 4)):
        if choice == "none":
            tally.fixed_tokens += 1
        elif isinstance(choice, dict):
            tally.fixed_tokens += named_tokens
            named = choice.get("function", choice)
            tally.text(named.get("name") if isinstance(named, dict) else None)


def _tally_schema(response_format: object, tally: Tally) -> None:
    if isinstance(response_format, dict) and response_format.get("type") == "json_schema":
        # Nested in chat, flat in responses.
        nested = response_format.get("json_schema", response_format)
        if isinstance(nested, dict):
            tally.fixed_tokens += _SCHEMA_TOKENS
            tally.text(nested.get("name"))
            tally.text(nested.get("description"))
            tally.json(nested.get("schema"))


def _tally_texts_or_ids(value: object, tally: Tally) -> None:
    if not isinstance(value, list):
        tally.text(value)
    elif value and isinstance(value[0], int):
        tally.fixed_tokens += len(value)
    else:
        for one in value:
            if isinstance(one, list):
                tally.visit()
                tally.fixed_tokens += len(one)
            else:
                tally.text(one)

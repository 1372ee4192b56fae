"""The rest of the simulated gateway: embeddings, models, files, audio, images, moderations, and an echo."""

from __future__ import annotations

import base64
import hashlib
import re
import struct
from collections import OrderedDict
from typing import Any, Final

import msgspec

from sentinel_dev.gateway import catalogue
from sentinel_dev.gateway.call import BadRequest, Call, whole

_FILES_MOST_BYTES: Final = 64 * 1024 * 1024
_FILES_MOST: Final = 1_000
_INPUTS_MOST: Final = 2_048
_DIMENSIONS: Final = 8
_DIMENSIONS_MOST: Final = 3_072
_SPEECH_BYTES: Final = 65_536
_IMAGE_TOKENS: Final = 1_056
_DISPOSITION: Final = re.compile(rb'(\w+)="([^"]*)"')


async def embeddings(call: Call) -> None:
    """`POST /v1/embeddings`: short vectors that depend on the text alone. Raises BadRequest."""
    asked = call.asked
    told = msgspec.json.decode(asked.input) if memoryview(asked.input) else None
    if not told or not isinstance(told, str | list):
        raise BadRequest("Missing required parameter: 'input'.", "input")
    one = isinstance(told, str) or isinstance(told[0], int)
    inputs = [told] if one else told[:_INPUTS_MOST]
    size = whole(asked.dimensions, "dimensions", _DIMENSIONS_MOST) or _DIMENSIONS
    tokens = await call.count_input(asked.input, chat=False)
    encoded = asked.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(text, size, encoded=encoded)}
        for index, text in enumerate(inputs)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    told = {"object": "list", "data": data, "model": call.model}
    if call.behaviour.usage != "none":
        told["usage"] = None if call.behaviour.usage == "null" else usage
    await call.answer_json(told, 0)


def _vector(text: Any, size: int, *, encoded: bool) -> list[float] | str:
    digest = hashlib.sha256(msgspec.json.encode(text)).digest()
    numbers = [digest[index % len(digest)] / 256 for index in range(size)]
    return base64.b64encode(struct.pack(f"<{size}f", *numbers)).decode() if encoded else numbers


async def moderations(call: Call) -> None:
    """`POST /v1/moderations`: nothing is ever flagged."""
    result = {"flagged": False, "categories": {"violence": False}, "category_scores": {"violence": 0.0}}
    result["category_applied_input_types"] = {"violence": ["text"]}
    call.request.charged = True
    await call.answer_json({"id": f"modr-{call.id}", "model": call.model, "results": [result]}, 0)


async def images(call: Call) -> None:
    """`POST /v1/images/generations`: a picture of no size, with usage."""
    tokens = await call.count_input(call.asked.prompt, chat=False)
    usage = {
        "input_tokens": tokens,
        "output_tokens": _IMAGE_TOKENS,
        "total_tokens": tokens + _IMAGE_TOKENS,
        "input_tokens_details": {"text_tokens": tokens, "image_tokens": 0},
    }
    data = [{"b64_json": base64.b64encode(b"picture").decode()}]
    await call.answer_json({"created": call.created, "data": data, "usage": usage}, _IMAGE_TOKENS)


async def speech(call: Call) -> None:
    """`POST /v1/audio/speech`: every byte value, in pieces."""
    call.request.charged = True
    await call.exchange.start(200, b"audio/mpeg", call.headers)
    for _ in range(_SPEECH_BYTES // 4_096):
        if await call.exchange.pause(call.behaviour.pause_s):
            return
        await call.exchange.write(bytes(range(256)) * 16)
    await call.exchange.end()
    call.request.finished = True


async def transcriptions(call: Call) -> None:
    """`POST /v1/audio/transcriptions`: says how much it heard, with usage."""
    heard = next((part for part in form_parts(call) if part.filename), None)
    if heard is None:
        raise BadRequest("Missing required parameter: 'file'.", "file")
    call.request.input_tokens = max(1, len(heard.data) // 1_000)
    call.request.charged = True
    usage = {
        "type": "tokens",
        "input_tokens": call.request.input_tokens,
        "output_tokens": 3,
        "total_tokens": call.request.input_tokens + 3,
    }
    await call.answer_json({"text": f"heard {len(heard.data)} bytes", "usage": usage}, 3)


async def models(call: Call, model: str | None) -> None:
    """`GET /v1/models` and `GET /v1/models/{id}`; charged as nothing. Raises BadRequest."""
    told = catalogue.listed() if model is None else catalogue.shown(model)
    if told is None:
        raise BadRequest(f"The model '{model}' does not exist", "model", status=404, code="model_not_found")
    await call.answer_json(told, 0)


async def echo(call: Call) -> None:
    """Any other path: what came, described; a body that is not JSON comes back as it is."""
    call.request.charged = True
    kind = call.exchange.header(b"content-type")
    body = call.request.body
    if body and not kind.startswith("application/json"):
        await call.exchange.answer(200, body, kind.encode("latin-1") or b"application/octet-stream", call.headers)
        call.request.finished = True
        return
    told = {
        "object": "echo",
        "method": call.request.method,
        "path": call.request.path,
        "query": call.request.query.decode("latin-1"),
        "bytes": len(body),
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    await call.answer_json(told, 0)


class Part(msgspec.Struct):
    """One field of a form."""

    name: str
    filename: str
    data: bytes


def form_parts(call: Call) -> list[Part]:
    """The fields of a multipart body; raises BadRequest."""
    found = re.search(r'boundary="?([^";]+)', call.exchange.header(b"content-type"))
    if found is None:
        raise BadRequest("Expected multipart/form-data.")
    parts = []
    for raw in (b"\r\n" + call.request.body).split(b"\r\n--" + found[1].encode("latin-1"))[1:]:
        head, gap, data = raw.partition(b"\r\n\r\n")
        told = {key: value.decode("utf-8", "replace") for key, value in _DISPOSITION.findall(head)}
        if gap and b"name" in told:
            parts.append(Part(told[b"name"], told.get(b"filename", ""), data))
    return parts


class Files:
    """What was uploaded: the latest 64 MiB of it."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, tuple[dict[str, Any], bytes]] = OrderedDict()
        self._bytes = 0

    async def serve(self, call: Call, parts: list[str]) -> None:
        """`/v1/files` and what is below. Raises BadRequest."""
        call.request.charged = True
        match call.request.method, parts:
            case "POST", []:
                await call.answer_json(self._add(call), 0)
            case "GET", []:
                told = [shown for shown, _ in self._files.values()]
                await call.answer_json({"object": "list", "data": told, "has_more": False}, 0)
            case "GET", [file_id]:
                await call.answer_json(self._found(file_id)[0], 0)
            case "GET", [file_id, "content"]:
                data = self._found(file_id)[1]
                await call.exchange.answer(200, data, b"application/octet-stream", call.headers)
                call.request.finished = True
            case "DELETE", [file_id]:
                self._bytes -= len(self._found(file_id)[1])
                del self._files[file_id]
                await call.answer_json({"id": file_id, "object": "file", "deleted": True}, 0)
            case _:
                raise BadRequest("Unknown request URL.", status=404)

    def _add(self, call: Call) -> dict[str, Any]:
        parts = form_parts(call)
        sent = next((part for part in parts if part.filename), None)
        if sent is None:
            raise BadRequest("Missing required parameter: 'file'.", "file")
        purpose = next((part.data.decode("utf-8", "replace") for part in parts if part.name == "purpose"), "user_data")
        shown = {
            "id": f"file-{call.id}",
            "object": "file",
            "bytes": len(sent.data),
            "created_at": call.created,
            "filename": sent.filename,
            "purpose": purpose,
            "status": "processed",
        }
        self._files[f"file-{call.id}"] = shown, sent.data
        self._bytes += len(sent.data)
        while self._bytes > _FILES_MOST_BYTES or len(self._files) > _FILES_MOST:
            _, (_, data) = self._files.popitem(last=False)
            self._bytes -= len(data)
        return shown

    def _found(self, file_id: str) -> tuple[dict[str, Any], bytes]:
        if file_id not in self._files:
            raise BadRequest(f"No such File object: {file_id}", "id", status=404)
        return self._files[file_id]

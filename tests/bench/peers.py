"""What Sentinel is measured beside: a bare uvicorn that answers by itself, a naive relay, nginx if installed."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from typing import Any, Final

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

OK: Final = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "openai/gpt-4o",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11},
    }
).encode()
EVENT: Final = (
    b'data: {"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"the "}}]}\n\n'
)

NGINX: Final = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_body_buffer_size 1m; client_max_body_size 30m; keepalive_requests 10000000;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream gateway {{ server {gateway}; keepalive 64; keepalive_requests 10000000; }}
  server {{ listen 127.0.0.1:{port}; location / {{
    proxy_pass http://gateway; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    proxy_set_header Authorization "Bearer {key}"; }} }}
}}
"""


async def bare(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """An ASGI app that answers every request by itself; one whose body asks for a stream with 50 events."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if b'"stream": true' not in body:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(OK))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": OK})
        return
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for _ in range(50):
        await send({"type": "http.response.body", "body": EVENT, "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def swallowing(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """A gateway that keeps nothing of what it is sent, so that huge prompts cost the machine little there."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body", False):
        pass
    body = OK if scope["method"] == "POST" else b'{"object":"list","data":[]}'
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def naive() -> FastAPI:
    """The usual way: a decorated route and httpx, no limits."""
    app = FastAPI()
    http = httpx.AsyncClient(base_url=os.environ["BENCH_GATEWAY"], timeout=60)
    headers = {"authorization": f"Bearer {os.environ['BENCH_GATEWAY_KEY']}", "content-type": "application/json"}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.body()
        if not (await request.json()).get("stream"):
            answer = await http.post("/v1/chat/completions", content=body, headers=headers)
            return Response(answer.content, answer.status_code, media_type="application/json")

        async def events() -> AsyncIterator[bytes]:
            async with http.stream("POST", "/v1/chat/completions", content=body, headers=headers) as answer:
                async for piece in answer.aiter_raw():
                    yield piece

        return StreamingResponse(events(), media_type="text/event-stream")

    return app

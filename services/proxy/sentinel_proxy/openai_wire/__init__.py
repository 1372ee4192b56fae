"""OpenAI's requests on the wire: read once and little, forwarded as the caller's own bytes."""

from sentinel_proxy.openai_wire.requests import (
    ChatRequest,
    CompletionsRequest,
    EmbeddingsRequest,
    MeteredRequest,
    ResponsesRequest,
    parse_chat,
    parse_completions,
    parse_embeddings,
    parse_responses,
)
from sentinel_proxy.openai_wire.splice import edit_body

__all__ = [
    "ChatRequest",
    "CompletionsRequest",
    "EmbeddingsRequest",
    "MeteredRequest",
    "ResponsesRequest",
    "edit_body",
    "parse_chat",
    "parse_completions",
    "parse_embeddings",
    "parse_responses",
]

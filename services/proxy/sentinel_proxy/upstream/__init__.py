"""The way to the OpenAI-compatible gateway: what it is sent, what is made of its answers, over HTTP/1.1 of our own."""

from sentinel_proxy.upstream.failures import UpstreamError, UpstreamTimeout, UpstreamUnreachable
from sentinel_proxy.upstream.gateway import Answer, Call, RawHeaders, Stream, Upstream

__all__ = [
    "Answer",
    "Call",
    "RawHeaders",
    "Stream",
    "Upstream",
    "UpstreamError",
    "UpstreamTimeout",
    "UpstreamUnreachable",
]

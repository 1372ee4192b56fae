"""Tokens counted offline: how many a request amounts to, and how many an answer had that came without usage."""

from sentinel_proxy.tokens.counter import TokenCounter
from sentinel_proxy.tokens.encodings import EncodingCorrupt
from sentinel_proxy.tokens.families import ModelFamily, lookup
from sentinel_proxy.tokens.prompts import ChatBody, CompletionsBody, EmbeddingsBody, Kind, ResponsesBody
from sentinel_proxy.tokens.ratio import Ratios, Sums
from sentinel_proxy.tokens.tally import upper_bound

__all__ = [
    "ChatBody",
    "CompletionsBody",
    "EmbeddingsBody",
    "EncodingCorrupt",
    "Kind",
    "ModelFamily",
    "Ratios",
    "ResponsesBody",
    "Sums",
    "TokenCounter",
    "lookup",
    "upper_bound",
]

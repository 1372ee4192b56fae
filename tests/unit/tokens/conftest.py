"""One loaded counter for all tests of a process, and tiktoken's own encodings to hold it against."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Iterator
from importlib.resources import files

import pytest
import tiktoken
import tiktoken_ext.openai_public as published

from sentinel_proxy.tokens import TokenCounter


@pytest.fixture(scope="session")
def counter() -> Iterator[TokenCounter]:
    counter = TokenCounter.load()
    yield counter
    counter.close()


@pytest.fixture(scope="session")
def tiktokens_own() -> dict[str, tiktoken.Encoding]:
    """Built by tiktoken's own constructors, patterns and special tokens included, from the shipped ranks."""

    def shipped(url: str, expected_hash: str | None = None) -> dict[bytes, int]:
        name = url.rpartition("/")[2]
        first_bytes = 835_554 if name.startswith("r50k") else None
        file = files("sentinel_proxy.tokens") / "data" / f"{name.replace('r50k', 'p50k')}.gz"
        lines = gzip.decompress(file.read_bytes())[:first_bytes].splitlines()
        return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "load_tiktoken_bpe", shipped)
        names = ("o200k_base", "cl100k_base", "p50k_base", "r50k_base")
        return {name: tiktoken.Encoding(**published.ENCODING_CONSTRUCTORS[name]()) for name in names}

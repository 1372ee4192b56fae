"""OpenAI's encodings, from the files that ship with this package: no network, no cache folder, nothing written."""

from __future__ import annotations

import binascii
import gzip
import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

import tiktoken

from sentinel_shared.errors import SentinelError


class EncodingCorrupt(SentinelError):
    """A shipped encoding is missing, unreadable, or not the published one; the message names the file."""


@dataclass(frozen=True, slots=True)
class _Source:
    file: str
    sha256: str
    """Of the unpacked file."""
    pattern: str
    first_bytes: int | None = None
    """Only so much of the file belongs to the encoding; None = all of it."""


_GPT2_PATTERN: Final = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_P50K_SHA256: Final = "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069"

# The patterns are tiktoken's own, which has them only inside functions that download; a test holds them equal.
_SOURCES: Final = {
    "o200k_base": _Source(
        file="o200k_base.tiktoken.gz",
        sha256="446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        pattern=(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
            r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
    ),
    "cl100k_base": _Source(
        file="cl100k_base.tiktoken.gz",
        sha256="223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        pattern=(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
            r"\s++$|\s*[\r\n]|\s+(?!\S)|\s"
        ),
    ),
    "p50k_base": _Source(file="p50k_base.tiktoken.gz", sha256=_P50K_SHA256, pattern=_GPT2_PATTERN),
    "r50k_base": _Source(file="p50k_base.tiktoken.gz", sha256=_P50K_SHA256, pattern=_GPT2_PATTERN, first_bytes=835_554),
}

# Encodings that differ from another one in special tokens alone, which are never counted as such here.
_SAME_ORDINARY_TOKENS: Final = {"o200k_harmony": "o200k_base", "p50k_edit": "p50k_base", "gpt2": "r50k_base"}

DEFAULT_ENCODING: Final = "o200k_base"


def canonical_name(encoding: str) -> str:
    """The shipped encoding that cuts ordinary text as `encoding` does; an unknown one becomes the default."""
    encoding = _SAME_ORDINARY_TOKENS.get(encoding, encoding)
    return encoding if encoding in _SOURCES else DEFAULT_ENCODING


def load_encoding(name: str) -> tiktoken.Encoding:
    """One encoding by its canonical name, 40 to 200 ms of CPU; for ordinary text only, without special tokens.

    Raises EncodingCorrupt when the file is missing or does not unpack to the published bytes.
    """
    source = _SOURCES[name]
    try:
        data = gzip.decompress((files(__package__) / "data" / source.file).read_bytes())
    except (OSError, EOFError, ValueError) as error:
        raise EncodingCorrupt(f"{source.file}: {error}") from error
    if hashlib.sha256(data).hexdigest() != source.sha256:
        raise EncodingCorrupt(f"{source.file}: does not unpack to the published encoding")
    fields = data[: source.first_bytes].split()
    ranks = dict(zip(map(binascii.a2b_base64, fields[::2]), map(int, fields[1::2]), strict=True))
    encoding = tiktoken.Encoding(name, pat_str=source.pattern, mergeable_ranks=ranks, special_tokens={})
    # tiktoken keeps our dict for decoding only: 35 MB for both large encodings, and nothing is decoded here.
    ranks.clear()
    return encoding

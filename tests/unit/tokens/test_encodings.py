"""The shipped encodings are the published ones, and loading them touches nothing but their files."""

from __future__ import annotations

import gzip
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from sentinel_proxy.tokens import EncodingCorrupt, encodings, tally, upper_bound
from sentinel_proxy.tokens.encodings import canonical_name, load_encoding
from sentinel_proxy.tokens.tally import pieces

NAMES = ("o200k_base", "cl100k_base", "p50k_base", "r50k_base")

# Text as people send it: prose in several scripts, code, numbers, special tokens, and anything at all.
_WORDS = st.sampled_from(
    (
        *("the", " quick", " don't", " naïve", "\n\n", "    ", "日本語", "\uff0c", "привет", " नमस्ते", "😀", "👩‍👩‍👧"),
        *("3.14159", "==", "</div>", "<|endoftext|>", "<|im_start|>", "\x00", "\u200d", "e\u0301", "\uff21", "\r\n"),
        *("\u017f", "'LL", "_x", "ﬁ", "²½"),
    )
)
TEXTS = st.one_of(st.text(max_size=200), st.lists(_WORDS, max_size=80).map("".join))


@pytest.fixture(scope="module")
def shipped() -> dict[str, tiktoken.Encoding]:
    return {name: load_encoding(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_patterns_are_tiktokens_own(tiktokens_own: dict[str, tiktoken.Encoding], name: str) -> None:
    assert encodings._SOURCES[name].pattern == tiktokens_own[name]._pat_str


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_every_text_has_as_many_tokens_as_tiktoken_says(
    shipped: dict[str, tiktoken.Encoding], tiktokens_own: dict[str, tiktoken.Encoding], name: str, text: str
) -> None:
    assert shipped[name].encode_ordinary(text) == tiktokens_own[name].encode(text, disallowed_special=())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(text=st.one_of(TEXTS, st.text(alphabet=st.characters(), max_size=50)))
def test_the_upper_bound_is_never_below_the_count(shipped: dict[str, tiktoken.Encoding], name: str, text: str) -> None:
    assert len(shipped[name].encode_ordinary(text)) <= upper_bound(text)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(text=st.lists(_WORDS, min_size=1, max_size=120).map("".join), chars_max=st.integers(20, 60))
def test_a_text_cut_after_letters_has_the_tokens_of_the_whole(
    shipped: dict[str, tiktoken.Encoding], name: str, text: str, chars_max: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sentinel_proxy.tokens.tally.PIECE_CHARS_MAX", chars_max)
        patch.setattr("sentinel_proxy.tokens.tally._CUT_SEARCH_CHARS", chars_max - 1)
        cut = list(pieces(text))
    assert "".join(cut) == text
    assert max(map(len, cut)) <= chars_max

    def fit_for_a_cut(position: int) -> bool:
        return text[position - 1].isalpha() and text[position] in tally._CUTS

    cuts = list(accumulate(map(len, cut)))[:-1]
    hard_cuts = [position for position in cuts if not fit_for_a_cut(position)]
    for position in hard_cuts:  # only where there was no better place in reach
        assert not any(map(fit_for_a_cut, range(position - chars_max + 2, position + 1)))
    whole = len(shipped[name].encode_ordinary(text))
    apart = sum(len(shipped[name].encode_ordinary(piece)) for piece in cut)
    # A hard cut may part a token or let others form.
    assert abs(apart - whole) <= 8 * len(hard_cuts)


def test_special_tokens_in_a_text_are_text(shipped: dict[str, tiktoken.Encoding]) -> None:
    assert len(shipped["o200k_base"].encode_ordinary("<|endoftext|>")) > 1


@pytest.mark.parametrize(
    ("name", "shipped_as"),
    [("o200k_harmony", "o200k_base"), ("p50k_edit", "p50k_base"), ("gpt2", "r50k_base"), ("o900k", "o200k_base")],
)
def test_encodings_that_cut_text_alike_share_one_file(name: str, shipped_as: str) -> None:
    assert canonical_name(name) == shipped_as


@pytest.mark.parametrize(
    "broken", [gzip.compress(b"YQ== 0\n", mtime=0), b"not gzip", None], ids=["other", "garbage", "missing"]
)
def test_a_file_that_is_not_the_published_one_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: bytes | None
) -> None:
    (tmp_path / "data").mkdir()
    if broken is not None:
        (tmp_path / "data" / "cl100k_base.tiktoken.gz").write_bytes(broken)
    monkeypatch.setattr(encodings, "files", lambda package: tmp_path)
    with pytest.raises(EncodingCorrupt, match="cl100k_base"):
        load_encoding("cl100k_base")


def test_loading_needs_no_network_and_writes_nothing() -> None:
    script = """
import os, sys
from sentinel_proxy.tokens import TokenCounter
def refuse(event, args):
    if event.startswith(("socket.connect", "socket.getaddrinfo", "os.mkdir", "os.rename", "tempfile.")):
        raise SystemExit(event)
    if event == "open" and args[2] is not None and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        raise SystemExit(f"opened to write: {args[0]}")
sys.addaudithook(refuse)
TokenCounter.load().close()
print("loaded")
"""
    done = subprocess.run([sys.executable, "-B", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "loaded\n", "")

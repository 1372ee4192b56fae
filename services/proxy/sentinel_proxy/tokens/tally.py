"""What there is to count: texts that still have to be cut into tokens, and tokens that are known without."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

# tiktoken panics on a run of about a million whitespace characters, and while it makes its answer into a list nothing
# else runs (0.03 ms per thousand tokens); so it never sees more than this at once.
PIECE_CHARS_MAX: Final = 8_192
_CUT_SEARCH_CHARS: Final = 1_024
# After a letter, none of these can belong to the letter's piece in any of the patterns, so the pieces on both sides
# of a cut before one of them are the same as without the cut. (Marks and apostrophes can belong to it.)
_CUTS: Final = frozenset(' \n.,:;!?()[]{}<>=+-*/\\"_0123456789。，、！？；：「」（）')  # noqa: RUF001 - CJK punctuation is meant
_LONG_TEXT_CHARS: Final = 65_536
_NODES_BETWEEN_PAUSES: Final = 500
_PAUSE_S: Final = 0.0001
_JSON_DEPTH_MAX: Final = 64
_JSON_WORDS: Final = {"True": "true", "False": "false", "None": "null"}


class WalkTooLong(Exception):
    """There are more nodes than may be walked here and now; the walk starts again where it hurts nobody."""


class Tally:
    """Collects what a request or an answer amounts to.

    With `nodes_max` the walk ends there with WalkTooLong. Without, it is meant for a thread, and pauses now and then:
    a thread that is busy in Python keeps the event loop waiting for up to 5 ms at each of the loop's system calls.
    """

    __slots__ = ("_nodes_left", "_pausing", "chars", "fixed_tokens", "texts")

    def __init__(self, *, nodes_max: int | None = None) -> None:
        self.fixed_tokens = 0
        self.texts: list[str] = []
        self.chars = 0
        self._pausing = nodes_max is None
        self._nodes_left = _NODES_BETWEEN_PAUSES if nodes_max is None else nodes_max

    def visit(self) -> None:
        """One more node of the structure; raises WalkTooLong at the bound."""
        if self._nodes_left == 0:
            if not self._pausing:
                raise WalkTooLong
            self._nodes_left = _NODES_BETWEEN_PAUSES
            time.sleep(_PAUSE_S)
        self._nodes_left -= 1

    def text(self, value: object) -> None:
        """Text to be counted as it stands; anything that is no text counts as nothing."""
        if isinstance(value, str) and value:
            self.visit()
            self.texts.append(value)
            self.chars += len(value)

    def json(self, value: object) -> None:
        """A structure that the model is shown as compact JSON."""
        if value is not None:
            self.text(self._compact(value, 0))

    def _compact(self, value: object, depth: int) -> str:
        # Not json.dumps: that is one call which neither the bound nor another thread can interrupt.
        self.visit()
        if isinstance(value, str):
            return f'"{value}"'
        if isinstance(value, dict) and depth < _JSON_DEPTH_MAX:
            return "{" + ",".join([f'"{key}":{self._compact(one, depth + 1)}' for key, one in value.items()]) + "}"
        if isinstance(value, list) and depth < _JSON_DEPTH_MAX:
            return "[" + ",".join([self._compact(one, depth + 1) for one in value]) + "]"
        return _JSON_WORDS.get(str(value), str(value)) if isinstance(value, int | float | None) else "{}"

    def upper_bound(self) -> int:
        """No encoding makes more tokens of it than this."""
        return self.fixed_tokens + sum(map(upper_bound, self.texts))

    def estimate_by_length(self) -> int:
        """For when it cannot be tokenised."""
        return self.fixed_tokens + sum(map(estimate_by_length, self.texts))


def upper_bound(text: str) -> int:
    """No fewer than the tokens of `text` in any of the encodings, at the price of a length.

    Every token stands for at least one byte of the UTF-8, so that length is a bound; for a long text that is not
    ASCII it is itself bounded, by four bytes a character. (Lone surrogates become U+FFFD: three bytes both ways.)
    """
    if text.isascii():
        return len(text)
    if len(text) > _LONG_TEXT_CHARS:
        return 4 * len(text)
    return len(text.encode("utf-8", "surrogatepass"))


def estimate_by_length(text: str) -> int:
    """Tokens by a rule of thumb, one for three bytes: more than prose in any script has, less than random text."""
    return -(-upper_bound(text) // 3)


def pieces(text: str) -> Iterator[str]:
    """`text` in pieces of at most PIECE_CHARS_MAX characters that have, together, as many tokens as the whole.

    Exact wherever a cut is found after a letter and before a space, a digit or punctuation. A text without any for
    1,024 characters (one letter repeated, whitespace, emoji) is cut anyhow, at a difference of a few tokens per piece.
    """
    start = 0
    while len(text) - start > PIECE_CHARS_MAX:
        end = _cut(text, start + PIECE_CHARS_MAX)
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def _cut(text: str, end: int) -> int:
    for position in range(end, end - _CUT_SEARCH_CHARS, -1):
        if text[position] in _CUTS and text[position - 1].isalpha():
            return position
    return end


def turns(texts: list[str], *, chars_max: int, texts_max: int) -> Iterator[list[str]]:
    """All pieces of all texts, in lists of about `chars_max` characters and at most `texts_max` pieces."""
    turn: list[str] = []
    chars = 0
    for text in texts:
        for piece in pieces(text):
            turn.append(piece)
            chars += len(piece)
            if chars >= chars_max or len(turn) >= texts_max:
                yield turn
                turn, chars = [], 0
    if turn:
        yield turn

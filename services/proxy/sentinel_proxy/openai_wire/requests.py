"""The four metered requests: only what is read of them, checked as far as it is read."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from sentinel_proxy.errors import invalid_request
from sentinel_proxy.openai_wire.decoding import decoded
from sentinel_proxy.openai_wire.refusals import missing_parameter
from sentinel_proxy.openai_wire.splice import Edits, add_members, edit_body

# What still is exact as a double, which upstreams and Redis's scripts may read it as.
_TOKENS_MAX: Final = 2**53
_CHOICES_MAX: Final = 128

_Model = Annotated[str, Meta(min_length=1, max_length=512)]
_Items = Annotated[list[Any], Meta(min_length=1)]
_Choices = Annotated[int, Meta(ge=1, le=_CHOICES_MAX)]
_Cap = Annotated[int, Meta(ge=1, le=_TOKENS_MAX)]
# Absent and null mean the same to an upstream, but only what is absent can be added without looking for it.
_OwnCap = _Cap | UnsetType | None


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class MeteredRequest(msgspec.Struct, kw_only=True, gc=False):
    """What all metered requests have. Fields with a default may be absent or null."""

    model: _Model

    # In the order of preference for a cap that the caller did not set.
    cap_fields: ClassVar[tuple[str, ...]] = ()

    @property
    def streamed(self) -> bool:
        """The answer is to be a stream of events."""
        return False

    @property
    def hides_usage(self) -> bool:
        """The caller did not ask for the usage chunk that the upstream is asked for."""
        return False

    @property
    def cap_tokens(self) -> int | None:
        """The caller's own cap on one choice's output, the larger if there are several; None: not capped."""
        return max((own for name in self.cap_fields if isinstance(own := getattr(self, name), int)), default=None)

    @property
    def choices(self) -> int:
        """How many outputs are generated, each up to the cap."""
        return 1

    def for_upstream(self, raw: bytes, *, cap_tokens: int | None = None) -> bytes:
        """The body to send for `raw`, the bytes that this was parsed from: those very bytes unless an edit is needed.

        `cap_tokens` caps each choice: the caller's own caps are lowered to it, never raised; without any, one is
        added. A stream is made to report its usage. A member that was named twice is sent once, as it was read.
        """
        edits = dict(self._usage_edits())
        if cap_tokens is not None:
            edits |= self._cap_edits(cap_tokens)
        if any(getattr(self, name) is not UNSET for name in edits):
            return edit_body(raw, edits)
        return add_members(raw, edits)

    def _usage_edits(self) -> Edits:
        return {}

    def _cap_edits(self, cap_tokens: int) -> Edits:
        own = {name: value for name in self.cap_fields if isinstance(value := getattr(self, name), int)}
        if own or not self.cap_fields:
            return {name: cap_tokens for name, value in own.items() if value > cap_tokens}
        return {self.cap_fields[0]: cap_tokens}


class _ChoicesRequest(MeteredRequest, kw_only=True, gc=False):
    stream: bool | None = None
    stream_options: _StreamOptions | UnsetType | None = UNSET
    n: _Choices | None = None

    @property
    def streamed(self) -> bool:
        return self.stream is True

    @property
    def hides_usage(self) -> bool:
        return self.streamed and not (
            isinstance(self.stream_options, _StreamOptions) and self.stream_options.include_usage
        )

    @property
    def choices(self) -> int:
        return self.n or 1

    def _usage_edits(self) -> Edits:
        return {"stream_options": {"include_usage": True}} if self.hides_usage else {}


class ChatRequest(_ChoicesRequest, kw_only=True, gc=False):
    """`POST /v1/chat/completions`."""

    messages: _Items
    max_completion_tokens: _OwnCap = UNSET
    max_tokens: _OwnCap = UNSET
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None

    cap_fields: ClassVar[tuple[str, ...]] = ("max_completion_tokens", "max_tokens")


class CompletionsRequest(_ChoicesRequest, kw_only=True, gc=False):
    """`POST /v1/completions`. 0 `max_tokens` is legal here: with `echo` it scores the prompt."""

    prompt: str | _Items | None
    suffix: Any = None
    max_tokens: Annotated[int, Meta(ge=0, le=_TOKENS_MAX)] | UnsetType | None = UNSET
    best_of: Annotated[int, Meta(ge=0, le=_CHOICES_MAX)] | None = None

    cap_fields: ClassVar[tuple[str, ...]] = ("max_tokens",)

    @property
    def choices(self) -> int:
        """Each of several prompts is answered `n` times, and of each the best of `best_of` is sent."""
        # A list of integers is one prompt, given as tokens.
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        prompts = len(self.prompt) if several and self.prompt else 1
        return prompts * max(self.n or 1, self.best_of or 1)


class EmbeddingsRequest(MeteredRequest, kw_only=True, gc=False):
    """`POST /v1/embeddings`."""

    input: str | _Items


class ResponsesRequest(MeteredRequest, kw_only=True, gc=False):
    """`POST /v1/responses`. Its streams report their usage unasked."""

    input: str | list[Any] | None = None
    instructions: Any = None
    prompt: Any = None
    previous_response_id: Any = None
    conversation: Any = None
    tools: Any = None
    text: Any = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_output_tokens: _OwnCap = UNSET

    cap_fields: ClassVar[tuple[str, ...]] = ("max_output_tokens",)

    @property
    def streamed(self) -> bool:
        return self.stream is True


_CHAT: Final = msgspec.json.Decoder(ChatRequest)
_COMPLETIONS: Final = msgspec.json.Decoder(CompletionsRequest)
_EMBEDDINGS: Final = msgspec.json.Decoder(EmbeddingsRequest)
_RESPONSES: Final = msgspec.json.Decoder(ResponsesRequest)


def parse_chat(raw: bytes) -> ChatRequest:
    """Reads a chat request; raises ApiError (400) naming the field at fault. Of a field named twice the last counts."""
    return _with_stream_if_options(decoded(_CHAT, raw))


def parse_completions(raw: bytes) -> CompletionsRequest:
    """As parse_chat."""
    return _with_stream_if_options(decoded(_COMPLETIONS, raw))


def parse_embeddings(raw: bytes) -> EmbeddingsRequest:
    """As parse_chat."""
    return decoded(_EMBEDDINGS, raw)


def parse_responses(raw: bytes) -> ResponsesRequest:
    """As parse_chat; input may be left out where a stored prompt or an earlier turn stands for it."""
    request = decoded(_RESPONSES, raw)
    if not (request.input or request.prompt or request.previous_response_id or request.conversation):
        raise missing_parameter("input")
    return request


_Choosing = TypeVar("_Choosing", bound=_ChoicesRequest)


def _with_stream_if_options(request: _Choosing) -> _Choosing:
    if isinstance(request.stream_options, _StreamOptions) and not request.streamed:
        raise invalid_request(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options"
        )
    return request

"""The upstream's models: its lists and descriptions, cached briefly, and each model's maximum output."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from sentinel_proxy.tokens import lookup
from sentinel_proxy.upstream import Answer, UpstreamError

if TYPE_CHECKING:
    from sentinel_proxy.metrics import ProxyMetrics
    from sentinel_proxy.upstream import Upstream
    from sentinel_shared.clock import Clock

LIST_PATH: Final = "/models"
_FRESH_S: Final = 60.0
_STALE_S: Final = 3_600.0
_KEPT_MAX: Final = 1_000
_RELEARN_S: Final = 300.0

_log: Final = logging.getLogger(__name__)


class _Model(msgspec.Struct):
    id: str
    max_tokens: Any = None


class _Models(msgspec.Struct):
    data: list[_Model]


@dataclass(frozen=True, slots=True)
class _Kept:
    answer: Answer
    at_s: float


class Models:
    """One per process. Memory is bounded by 1,000 answers."""

    def __init__(
        self, upstream: Upstream, *, default_max_output_tokens: int, clock: Clock, metrics: ProxyMetrics
    ) -> None:
        self._upstream = upstream
        self._default_max_output_tokens = default_max_output_tokens
        self._clock = clock
        self._metrics = metrics
        self._kept: dict[str, _Kept] = {}
        self._asking: dict[str, asyncio.Task[Answer]] = {}
        self._max_output_tokens: dict[str, int] = {}

    def max_output_tokens(self, model: str) -> int:
        """The most that one choice of this model can produce: the upstream's word, else ours, else the default."""
        return self._max_output_tokens.get(model) or lookup(model).max_output_tokens or self._default_max_output_tokens

    async def get(self, path: str, *, request_id: str) -> Answer:
        """The upstream's answer to `GET path`, at most a minute old; an hour while the upstream gives none.

        Only good answers are kept. Raises UpstreamError.
        """
        now_s = self._clock.monotonic_s()
        kept = self._kept.get(path)
        if kept is not None and now_s - kept.at_s < _FRESH_S:
            self._metrics.cache("models", "hit").inc()
            return kept.answer
        self._metrics.cache("models", "miss").inc()
        try:
            return await asyncio.shield(self._ask_once(path, request_id))
        except UpstreamError:
            if kept is None or now_s - kept.at_s >= _STALE_S:
                raise
            self._metrics.cache("models", "stale").inc()
            return kept.answer

    async def learn(self) -> None:
        """Until cancelled: keep what the upstream's list says of maximum outputs, every five minutes."""
        while True:
            try:
                await self.get(LIST_PATH, request_id="models")
            except UpstreamError as error:
                _log.info("the upstream's models could not be read: %s", error)
            await self._clock.sleep(_RELEARN_S if self._max_output_tokens else _RELEARN_S / 10)

    def _ask_once(self, path: str, request_id: str) -> asyncio.Task[Answer]:
        task = self._asking.get(path)
        if task is None:
            task = asyncio.create_task(self._ask(path, request_id))
            self._asking[path] = task
            task.add_done_callback(lambda done: self._asked(path, done))
        return task

    def _asked(self, path: str, task: asyncio.Task[Answer]) -> None:
        self._asking.pop(path, None)
        if not task.cancelled():
            task.exception()  # whoever still waits gets it

    async def _ask(self, path: str, request_id: str) -> Answer:
        answer = await self._upstream.send("GET", path, [], b"", request_id=request_id)
        if answer.status == 200:
            if len(self._kept) >= _KEPT_MAX:
                self._kept.clear()
            self._kept[path] = _Kept(answer, self._clock.monotonic_s())
            if path == LIST_PATH:
                self._read(answer.body)
        return answer

    def _read(self, body: bytes) -> None:
        try:
            models = msgspec.json.decode(body, type=_Models).data
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            _log.info("the upstream's list of models cannot be read")
            return
        self._metrics.model_label.learn(model.id for model in models)
        self._max_output_tokens = {
            model.id: model.max_tokens for model in models if type(model.max_tokens) is int and model.max_tokens > 0
        }

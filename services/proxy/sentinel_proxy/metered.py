"""The way of a metered request: who is asking, what might it cost, may they, forward, what did it cost, settle.

Two trips to Redis: the admission before, the settlement after; none in mid-stream. Once admitted, a request is settled
exactly once whatever happens: charged with what the upstream says, else with what was counted here, or refunded.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from sentinel_proxy.denials import WITH_INPUT, WITH_OUTPUT
from sentinel_proxy.exchange import ClientGone
from sentinel_proxy.openai_wire import parse_chat, parse_completions, parse_embeddings, parse_responses
from sentinel_proxy.relaying import Abandonment, Outlet, of_a_stream, relay_stream
from sentinel_proxy.settings import QuotaMode
from sentinel_proxy.sse import SseRelay, find_usage
from sentinel_proxy.tokens import lookup
from sentinel_proxy.toolbox import ACCOUNT_STATUSES, account_refused, as_answer, authenticate
from sentinel_proxy.upstream import Answer, UpstreamError, UpstreamTimeout
from sentinel_shared.accounts import Cost

if TYPE_CHECKING:
    from collections.abc import Callable

    from sentinel_proxy.exchange import Exchange, Served
    from sentinel_proxy.limiter import Admission
    from sentinel_proxy.meter import Running
    from sentinel_proxy.openai_wire import MeteredRequest
    from sentinel_proxy.sse import Usage
    from sentinel_proxy.tokens import Kind, ModelFamily
    from sentinel_proxy.toolbox import Toolbox
    from sentinel_proxy.upstream import Stream

_TOKENS_MAX: Final = 2**53
"""What the ledger counts exactly."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A metered path of the API; `path` is under the upstream's base URL."""

    kind: Kind
    path: str
    parse: Callable[[bytes], MeteredRequest]
    generates: bool = True


ENDPOINTS: Final = {
    "/v1" + endpoint.path: endpoint
    for endpoint in (
        Endpoint("chat", "/chat/completions", parse_chat),
        Endpoint("completions", "/completions", parse_completions),
        Endpoint("embeddings", "/embeddings", parse_embeddings, generates=False),
        Endpoint("responses", "/responses", parse_responses),
    )
}


class _Asked(msgspec.Struct, frozen=True):
    """A request that has been read. `began_s` is `perf_counter` when it had been."""

    endpoint: Endpoint
    request: MeteredRequest
    raw: bytes
    request_id: str
    served: Served
    began_s: float


@dataclass(slots=True)
class _Job:
    """One admitted request on its way."""

    asked: _Asked
    family: ModelFamily
    local_tokens: int
    """The input as counted here, or, unless `counted`, a bound on it."""
    counted: bool
    input_tokens: int
    """As reserved: corrected by the family's ratio."""
    admission: Admission
    running: Running
    upstream_s: float = 0.0
    """Spent waiting for the upstream and the client."""


async def serve(tools: Toolbox, endpoint: Endpoint, exchange: Exchange, served: Served) -> None:
    """Answer one request. Raises ApiError, Denied and ClientGone."""
    _, served.external_id = await authenticate(tools, exchange)
    raw = await exchange.body(max_bytes=tools.settings.max_body_bytes)
    began_s = time.perf_counter()
    request = endpoint.parse(raw)
    served.model = request.model
    job = await _admit(tools, _Asked(endpoint, request, raw, exchange.request_id, served, began_s))
    served.decision = "allow"
    try:
        if request.streamed:
            await _forward_stream(tools, job, exchange)
        else:
            await _forward(tools, job, exchange)
    except UpstreamError as error:
        _give_back(tools, job, reached=error.reached)
        tools.metrics.upstream_errors.labels("timeout" if isinstance(error, UpstreamTimeout) else "unreachable").inc()
        await exchange.refuse(as_answer(error), job.admission.headers)
    except ClientGone:
        # No answer came in the time that it was waited for: the request and its input. Whoever has a prompt bills it.
        if tools.meter.holds(job.running):
            tools.meter.soon(job.running, _charge_counted(tools, job, SseRelay(hides_usage=False)))
        raise
    except BaseException:
        # Whatever it was (a defect, the process ending), nothing good has been delivered: see the two forwards.
        _give_back(tools, job, reached=True)
        raise
    took_s = time.perf_counter() - began_s
    tools.metrics.duration(endpoint.path).observe(took_s)
    served.own_s = max(0.0, took_s - job.upstream_s)
    tools.metrics.overhead(endpoint.path).observe(served.own_s)


# --- what might it cost, may they ---


async def _admit(tools: Toolbox, asked: _Asked) -> _Job:
    model, external_id = asked.request.model, asked.served.external_id
    writes = asked.endpoint.generates and asked.request.cap_tokens != 0
    tools.limiter.check_denials(external_id, WITH_OUTPUT if writes else WITH_INPUT)
    family = lookup(model)
    spare_tokens = 0 if tools.samples.take(len(asked.raw)) else tools.limiter.spare_input_tokens(external_id)
    counting = tools.counter.input_tokens(
        asked.endpoint.kind, asked.request, model, body_bytes=len(asked.raw), spare_tokens=spare_tokens
    )
    local_tokens = counting if isinstance(counting, int) else await counting
    corrected = tools.ratios.corrected(local_tokens, family) if tools.settings.token_calibration else local_tokens
    input_tokens = max(1, corrected)
    rid = tools.new_rid()
    cost = _cost(tools, asked, input_tokens)
    admission = await tools.limiter.admit(rid=rid, external_id=external_id, cost=cost)
    running = tools.meter.begin(
        rid=rid,
        external_id=external_id,
        request_id=asked.request_id,
        model=model,
        endpoint=asked.endpoint.path,
    )
    return _Job(asked, family, local_tokens, not spare_tokens, input_tokens, admission, running)


def _cost(tools: Toolbox, asked: _Asked, input_tokens: int) -> Cost:
    request = asked.request
    if not asked.endpoint.generates:
        return Cost(input_tokens, 0, 0)
    choices = request.choices
    cap = request.cap_tokens
    return Cost(
        input_tokens=input_tokens,
        output_wanted_tokens=-1 if cap is None else min(cap * choices, _TOKENS_MAX),
        model_max_output_tokens=tools.models.max_output_tokens(request.model) * choices,
        choices=choices,
    )


def _cap_tokens(tools: Toolbox, job: _Job) -> int | None:
    """The cap to tell the upstream because the grant is below what the request could produce; None: no need."""
    granted = job.admission.granted_output_tokens
    if granted < 0 or not job.asked.endpoint.generates or tools.settings.quota_mode is QuotaMode.SOFT:
        return None
    each = granted // job.asked.request.choices
    own = job.asked.request.cap_tokens
    most = tools.models.max_output_tokens(job.asked.request.model) if own is None else own
    return each if each < most else None


# --- forward, what did it cost ---


async def _forward(tools: Toolbox, job: _Job, exchange: Exchange) -> None:
    body, headers = _prepared(tools, job)
    sent_s = time.perf_counter()
    with Abandonment(exchange, tools.settings.disconnect_drain_s) as abandonment:
        abandonment.watch()
        answer = await tools.upstream.send(
            "POST", _path(job, exchange), exchange.headers, body, request_id=exchange.request_id
        )
    job.upstream_s = time.perf_counter() - sent_s
    await _deliver(tools, job, exchange, answer, headers)


async def _deliver(
    tools: Toolbox, job: _Job, exchange: Exchange, answer: Answer, headers: list[tuple[bytes, bytes]]
) -> None:
    if answer.status in ACCOUNT_STATUSES:
        _give_back(tools, job, reached=True)
        await exchange.refuse(account_refused(tools, answer.status), job.admission.headers)
        return
    if answer.status >= 300:
        _give_back(tools, job, reached=True)
    else:
        usage = find_usage(answer.body)
        if usage is not None:
            _charge(tools, job, usage)
        else:
            tools.meter.soon(job.running, _charge_counted(tools, job, _Whole(answer.body)))
    await exchange.answer(answer.status, answer.headers + headers, answer.body)


async def _forward_stream(tools: Toolbox, job: _Job, exchange: Exchange) -> None:
    body, headers = _prepared(tools, job)
    sent_s = time.perf_counter()
    with Abandonment(exchange, tools.settings.disconnect_drain_s) as abandonment:
        abandonment.watch()
        try:
            async with tools.upstream.stream(
                "POST", _path(job, exchange), exchange.headers, body, request_id=exchange.request_id
            ) as stream:
                if stream.status < 300 and _is_event_stream(stream):
                    outlet = Outlet(
                        tools,
                        job.running,
                        exchange,
                        abandonment,
                        status=stream.status,
                        headers=of_a_stream(stream.headers + headers),
                        began_s=job.asked.began_s,
                    )
                    await _relay(tools, job, stream, outlet)
                    return
                answer = Answer(stream.status, stream.headers, await stream.read_all())
        finally:
            job.upstream_s = time.perf_counter() - sent_s
    await _deliver(tools, job, exchange, answer, headers)


async def _relay(tools: Toolbox, job: _Job, stream: Stream, outlet: Outlet) -> None:
    relay = SseRelay(hides_usage=job.asked.request.hides_usage)
    try:
        await relay_stream(stream, relay, outlet)
    finally:
        outlet.abandonment.end()
        if relay.usage is not None:
            _charge(tools, job, relay.usage)
        elif relay.started or outlet.abandonment.given_up:
            tools.meter.soon(job.running, _charge_counted(tools, job, relay))
        else:
            _give_back(tools, job, reached=True)


# --- settle ---


def _charge(tools: Toolbox, job: _Job, usage: Usage) -> None:
    served = job.asked.served
    served.input_tokens, served.output_tokens = usage.input_tokens, usage.output_tokens
    tools.meter.charge(job.running, input_tokens=usage.input_tokens, output_tokens=usage.output_tokens)
    granted = job.admission.granted_output_tokens
    if 0 <= granted < usage.output_tokens:
        tools.metrics.overshoot_tokens.inc(usage.output_tokens - granted)
    if job.counted and job.local_tokens > 0 and usage.input_tokens > 0:
        tools.metrics.estimate_ratio.labels(job.family.label).observe(usage.input_tokens / job.local_tokens)
        tools.ratios.observe(job.family, local_tokens=job.local_tokens, upstream_tokens=usage.input_tokens)
    if job.admission.local:
        tools.limiter.correct_local(
            job.running.external_id,
            input_tokens=usage.input_tokens - job.input_tokens,
            output_tokens=usage.output_tokens - max(0, granted),
        )


async def _charge_counted(tools: Toolbox, job: _Job, produced: SseRelay | _Whole) -> None:
    """The upstream told nothing: count both sides here."""
    input_tokens = job.input_tokens
    if not job.counted:
        counting = tools.counter.input_tokens(
            job.asked.endpoint.kind, job.asked.request, job.asked.request.model, body_bytes=len(job.asked.raw)
        )
        input_tokens = counting if isinstance(counting, int) else await counting
    output_tokens = 0
    if job.asked.endpoint.generates:
        output_tokens = await tools.counter.count_output(
            job.asked.endpoint.kind,
            produced.events(),
            job.asked.request.model,
            events_bytes=produced.read_bytes - produced.unread_bytes,
        )
        if produced.unread_bytes:
            # Too long to be remembered whole: an event is a token, more or less, and none beyond what was allowed.
            seen_tokens = min(job.running.output_tokens_seen, _most_output_tokens(tools, job))
            output_tokens = max(output_tokens, seen_tokens)
    tools.meter.charge(job.running, input_tokens=input_tokens, output_tokens=output_tokens, counted_here=True)


def _most_output_tokens(tools: Toolbox, job: _Job) -> int:
    """However long an answer looks, the upstream cannot have generated more than it was allowed."""
    granted = job.admission.granted_output_tokens
    if granted >= 0 and tools.settings.quota_mode is QuotaMode.STRICT:
        return granted
    request = job.asked.request
    return (request.cap_tokens or tools.models.max_output_tokens(request.model)) * request.choices


class _Whole:
    """A JSON answer in the place of a stream of one event."""

    unread_bytes = 0

    def __init__(self, body: bytes) -> None:
        self._relay = SseRelay(hides_usage=False, memo_max_bytes=len(body) + 16)
        self._relay.feed(b"data:" + body.replace(b"\r", b" ").replace(b"\n", b" ") + b"\n\n")
        self.read_bytes = len(body)

    def events(self) -> Any:
        return self._relay.events()


def _give_back(tools: Toolbox, job: _Job, *, reached: bool) -> None:
    if tools.meter.holds(job.running):
        tools.meter.refund(job.running, reached=reached)
        if job.admission.local:
            tools.limiter.correct_local(
                job.running.external_id,
                input_tokens=-job.input_tokens,
                output_tokens=-max(0, job.admission.granted_output_tokens),
            )


# --- what goes where ---


def _prepared(tools: Toolbox, job: _Job) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """The body for the upstream, and the headers that Sentinel adds to its answer."""
    cap_tokens = _cap_tokens(tools, job)
    headers = list(job.admission.headers)
    if cap_tokens is not None:
        headers.append((b"x-sentinel-max-output-tokens", b"%d" % cap_tokens))
    return job.asked.request.for_upstream(job.asked.raw, cap_tokens=cap_tokens), headers


def _path(job: _Job, exchange: Exchange) -> str:
    return (
        f"{job.asked.endpoint.path}?{exchange.query.decode('latin-1')}" if exchange.query else job.asked.endpoint.path
    )


def _is_event_stream(stream: Stream) -> bool:
    return any(name == b"content-type" and b"event-stream" in value for name, value in stream.headers)

"""What a collector is told of requests, and what it costs them when there is none."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import httpx
import pytest

from tests.support.collector import Collector
from tests.support.redis_server import free_port
from tests.support.system import GATEWAY_KEY, Server, System, User, chat_body, eventually

pytestmark = pytest.mark.xdist_group("e2e-system")

CANARY = "canary-7c02ab"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CONTEXT = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=opaque"}
HOURS = str(10_000_000)


def traced(system: System, url: str, **environ: str) -> Server:
    told = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "100", **environ}
    (proxy,) = system.start_all("proxy", **told)
    return proxy


def ask(system: System, proxy: Server, user: User, body: object, path="chat/completions", **headers: str):
    url = f"{proxy.url}/v1/{path}"
    return system.http.post(url, json=body, headers=user.headers | {"x-request-id": CANARY[::-1]} | headers)


def seen_by_the_gateway(system: System, user: User) -> list[dict[str, str]]:
    """The headers of this user's requests, in order; none of them came twice."""
    requests = system.gateway.get("/admin/requests?last=200").json()["requests"]
    found = [request["headers"] for request in requests if user.external_id in json.dumps(request)]
    assert [len(dict(headers)) for headers in found] == [len(headers) for headers in found]
    return [dict(headers) for headers in found]


@pytest.fixture(scope="module")
def collector():
    with Collector() as running:
        yield running


@pytest.fixture(scope="module")
def proxy(system, collector):
    running = traced(system, collector.url, OTEL_EXPORTER_OTLP_HEADERS="x-key=a%20key,x-other=b")
    yield running
    running.kill()


def one(collector: Collector, kind: str, **attributes):
    """The one span that is like this."""
    found = eventually(lambda: collector.spans(kind, **attributes), within_s=10)
    assert len(found) == 1, found
    return found[0]


def test_a_request_is_one_span_in_the_clients_trace_and_its_call_to_the_gateway_one_below(system, collector, proxy):
    user = system.add_user()
    answer = ask(system, proxy, user, chat_body(user), **CONTEXT)
    assert answer.status_code == 200
    span = one(collector, "server", enduser_id=user.external_id)
    assert (span.trace_id, span.parent_id, span.state) == (TRACE, PARENT, "vendor=opaque")
    assert span.name == "POST /v1/chat/completions"
    usage = answer.json()["usage"]
    assert span.attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/chat/completions",
        "url.path": "/v1/chat/completions",
        "url.scheme": "http",
        "enduser.id": user.external_id,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "openai/gpt-4o",
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "sentinel.decision": "allow",
        "sentinel.request_id": CANARY[::-1],
    }
    assert span.resource["service.name"] == "sentinel-proxy"
    below = [one for one in collector.spans("client") if one.parent_id == span.span_id]
    assert [(call.trace_id, call.name, call.attributes["http.response.status_code"]) for call in below] == [
        (TRACE, "POST /chat/completions", 200)
    ]
    (sent,) = seen_by_the_gateway(system, user)
    assert sent["traceparent"] == f"00-{TRACE}-{below[0].span_id}-01"
    assert sent["tracestate"] == "vendor=opaque"
    assert collector.headers[0]["x-key"] == "a key"
    assert collector.headers[0]["x-other"] == "b"
    line = eventually(lambda: [line for line in proxy.said.splitlines() if user.external_id in line], within_s=5)[0]
    assert (json.loads(line)["trace_id"], json.loads(line)["decision"]) == (TRACE, "allow")


def test_a_stream_is_one_span_from_its_first_byte_to_its_last(system, collector, proxy):
    user = system.add_user()
    assert ask(system, proxy, user, chat_body(user, "sim/slow-20ms+tokens-10", stream=True)).status_code == 200
    span = one(collector, "server", enduser_id=user.external_id)
    (call,) = [one for one in collector.spans("client") if one.parent_id == span.span_id]
    assert span.parent_id == ""
    assert span.attributes["gen_ai.usage.output_tokens"] == 10
    assert not span.failed
    assert min(span.took_ms, call.took_ms) >= 10 * 20 * 0.5


def test_a_refused_request_names_the_reason_and_has_no_call_below(system, collector, proxy):
    user = system.add_user({"ai_requests": 0})
    assert ask(system, proxy, user, chat_body(user)).status_code == 429
    span = one(collector, "server", enduser_id=user.external_id)
    assert span.attributes["http.response.status_code"] == 429
    assert span.attributes["error.type"] == "insufficient_quota"
    assert span.attributes["sentinel.decision"] == "deny"
    assert not span.failed
    line = eventually(lambda: [line for line in proxy.said.splitlines() if user.external_id in line], within_s=5)[0]
    assert (json.loads(line)["decision"], json.loads(line)["error"]) == ("deny", "insufficient_quota")
    assert not [one for one in collector.spans("client") if one.trace_id == span.trace_id]


@pytest.mark.parametrize(
    ("model", "streamed", "status", "errors"),
    [
        ("sim/status-500", False, 500, ("500", "500")),
        ("sim/status-401", False, 502, ("upstream_rejected", "401")),
        ("sim/cut", False, 502, ("upstream_unreachable", "unreachable")),
        ("sim/cut", True, 200, ("unreachable", "unreachable")),
    ],
)
def test_a_failure_of_the_gateway_shows_on_both_spans(  # noqa: PLR0917 - what a case consists of
    system, collector, proxy, model, streamed, status, errors
):
    user = system.add_user()
    assert ask(system, proxy, user, chat_body(user, model, stream=streamed)).status_code == status
    span = one(collector, "server", enduser_id=user.external_id)
    (call,) = [one for one in collector.spans("client") if one.parent_id == span.span_id]
    assert (span.attributes["error.type"], call.attributes["error.type"]) == errors
    assert (span.failed, call.failed) == (True, True)


def test_other_paths_are_traced_under_a_name_that_no_client_chooses(system, collector, proxy):
    user = system.add_user()
    assert ask(system, proxy, user, {"input": user.external_id}, f"made-up/{CANARY[::-1]}").status_code in {200, 404}
    span = one(collector, "server", enduser_id=user.external_id)
    assert span.name == "POST /v1/{path}"
    assert "gen_ai.operation.name" not in span.attributes


def test_neither_prompts_nor_answers_nor_keys_are_in_any_span(system, collector, proxy):
    user = system.add_user()
    prompt = {"messages": [{"role": "user", "content": f"my secret is {CANARY}"}]}
    for body in (chat_body(user) | prompt, chat_body(user, stream=True) | prompt, chat_body(user, "sim/cut") | prompt):
        ask(system, proxy, user, body)
    ask(system, proxy, user, {"model": "m", "messages": CANARY}, **CONTEXT | {"tracestate": CANARY})
    ask(system, proxy, User("x", f"{CANARY}.{CANARY}.{CANARY}"), chat_body(user))
    ask(system, proxy, user, {"input": CANARY}, f"moderations?secret={CANARY}")
    eventually(lambda: collector.spans("server", enduser_id=user.external_id), within_s=10, until=lambda s: len(s) == 5)
    answer = ask(system, proxy, user, chat_body(user) | prompt).json()["choices"][0]["message"]["content"]
    told = b"".join(collector.bodies)
    for secret in (CANARY, user.token, user.token.rpartition(".")[2], GATEWAY_KEY, answer):
        assert secret.encode() not in told
        assert secret not in proxy.said


def test_without_an_endpoint_the_clients_context_goes_upstream_as_it_came(system):
    user = system.add_user()
    assert ask(system, system.proxies[0], user, chat_body(user), **CONTEXT).status_code == 200
    (sent,) = seen_by_the_gateway(system, user)
    assert {name: sent[name] for name in CONTEXT} == CONTEXT
    script = "import sentinel_proxy.app, sys; sys.exit('opentelemetry.sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=30, check=False).returncode == 0


def test_what_no_sampler_takes_is_not_sent_and_its_context_goes_on(system, collector):
    proxy = traced(system, collector.url, OTEL_TRACES_SAMPLER="parentbased_traceidratio", OTEL_TRACES_SAMPLER_ARG="0")
    user = system.add_user()
    ask(system, proxy, user, chat_body(user))
    ask(system, proxy, user, chat_body(user, stream=True), **CONTEXT)
    assert proxy.stop() == 0
    (span,) = collector.spans("server", enduser_id=user.external_id)
    assert span.trace_id == TRACE
    unsampled, sampled = (headers["traceparent"] for headers in seen_by_the_gateway(system, user))
    assert (int(unsampled[-2:], 16) & 1, int(sampled[-2:], 16) & 1) == (0, 1)


def test_sigterm_hands_over_what_waits_in_every_process(system, collector):
    proxy = traced(system, collector.url, OTEL_BSP_SCHEDULE_DELAY=HOURS, SENTINEL_WORKERS="2")
    user = system.add_user()

    def processes() -> set[str]:
        with httpx.Client() as client:  # a connection of its own: which process takes it is the kernel's choice
            url = f"{proxy.url}/v1/chat/completions"
            assert client.post(url, json=chat_body(user), headers=user.headers).status_code == 200
        lines = [json.loads(line) for line in proxy.said.splitlines() if user.external_id in line]
        return {line["trace_id"] for line in lines}

    traces = eventually(processes, within_s=20, until=lambda ids: len(ids) >= 10)
    assert not collector.spans("server", enduser_id=user.external_id)
    assert proxy.stop() == 0
    spans = collector.spans("server", enduser_id=user.external_id)
    assert traces <= {span.trace_id for span in spans}
    assert len({span.resource["service.instance.id"] for span in spans}) == len(
        {span.resource["process.pid"] for span in spans}
    )


def test_a_collector_that_is_away_or_never_answers_holds_up_neither_requests_nor_the_end(system):
    with Collector(deaf=True) as collector:
        small = {"OTEL_BSP_MAX_QUEUE_SIZE": "16", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "8"}
        proxies = [traced(system, url, **small) for url in (collector.url, f"http://127.0.0.1:{free_port()}")]
        user = system.add_user()
        for proxy in proxies:
            for _ in range(50):
                assert ask(system, proxy, user, chat_body(user)).status_code == 200
        eventually(lambda: complaints(proxies[1]), within_s=10)
        for proxy in proxies:
            proxy.signal(signal.SIGTERM)
        assert [proxy.wait(within_s=10) for proxy in proxies] == [0, 0]
    for proxy in proxies:
        seconds = [line["timestamp"][:19] for line in complaints(proxy)]
        assert len(seconds) <= len(set(seconds)) + 1
        assert "Traceback" not in proxy.said


def complaints(proxy: Server) -> list[dict[str, str]]:
    """The lines about traces in its log."""
    return [json.loads(line) for line in proxy.said.splitlines() if '"message":"traces: ' in line]

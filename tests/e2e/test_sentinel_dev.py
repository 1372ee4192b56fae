"""`sentinel-dev`, as a person meets it: one command starts all, one signal ends all, and nothing is left behind."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
from typing import Any

import httpx
import openai
import pytest

from tests.support.dev_run import DevRun
from tests.support.system import eventually

# Each of them starts all the processes: one after the other, beside other tests.
pytestmark = pytest.mark.xdist_group("e2e-dev")

MODEL = "openai/gpt-4o"
HELLO = [{"role": "user", "content": "say 7 tokens"}]
PARTS = [
    "valkey-server",
    "simulate zion",
    "simulate gateway",
    "sentinel-proxy",
    "sentinel-usage-worker",
    "sentinel-limits-sync",
]


@pytest.fixture
def http():
    with httpx.Client(timeout=20) as client:
        yield client


def sdk(dev: DevRun, user: str, http: httpx.Client) -> openai.OpenAI:
    """With the SDK's own retries."""
    return openai.OpenAI(base_url=f"{dev.proxy_url}/v1", api_key=dev.token(user), http_client=http)


def test_the_console_has_a_line_per_part_and_what_to_paste(dev):
    for part in ("redis", "zion", "gateway", "limits-sync", "usage-worker", "proxy"):
        assert re.search(rf"^  {part} +ready ", dev.said, re.MULTILINE), dev.said
    for line in dev.said.splitlines():
        if line.startswith("curl "):
            pasted = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=20, check=True)
            assert '"chat.completion"' in pasted.stdout
        if " -c " in line:
            pasted = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=20, check=True)
            assert "ChatCompletion(" in pasted.stdout
    eventually(lambda: len(re.findall(r"^  proxy +200  POST  .* demo .*", dev.said, re.MULTILINE)) == 2, within_s=3)


def test_the_official_sdk_does_all_that_it_can_do(dev, http):
    client = sdk(dev, "demo", http)
    answer = client.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7
    chunks: list[Any] = list(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True))
    assert sum(bool(chunk.choices[0].delta.content) for chunk in chunks) == 7
    assert MODEL in {model.id for model in client.models.list()}
    assert client.models.retrieve(MODEL).id == MODEL
    assert client.embeddings.create(model="openai/text-embedding-3-small", input="hello").data[0].embedding
    response = client.responses.create(model=MODEL, input="say 7 tokens")
    assert response.output_text
    events = list(client.responses.create(model=MODEL, input="say 7 tokens", stream=True))
    assert events[-1].type == "response.completed"


def test_a_small_user_is_cut_off_at_exactly_the_limit_and_asks_once(dev, http):
    client = sdk(dev, "small", http)
    for _ in range(5):
        client.chat.completions.create(model=MODEL, messages=HELLO)
    with pytest.raises(openai.RateLimitError) as raised:
        client.chat.completions.create(model=MODEL, messages=HELLO)
    assert raised.value.code == "insufficient_quota"
    assert raised.value.response.headers["x-should-retry"] == "false"
    metrics = http.get(f"{dev.proxy_url}/metrics").text
    refused = re.findall(r'^sentinel_requests_total\{.*status="429".*\} (\S+)$', metrics, re.MULTILINE)
    assert [float(count) for count in refused] == [1.0]


def test_zions_books_equal_the_gateways_within_5_s(dev, http):
    client = sdk(dev, "demo", http)
    for number in range(5):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": f"say {number + 1} tokens"}])
    charged = dev.books("GATEWAY")["total"]
    assert charged["requests"] >= 5
    wanted = {
        "ai_requests": charged["requests"],
        "ai_input_tokens": charged["input_tokens"],
        "ai_output_tokens": charged["output_tokens"],
    }
    eventually(lambda: dev.books("ZION")["applied"], within_s=5, until=lambda applied: applied == wanted)


def test_sigterm_ends_all_with_exit_0_and_a_second_start_goes_on_with_the_data(tmp_path, http):
    with DevRun(tmp_path) as first:
        first.until_ready()
        token = first.token("small")
        running = " ".join(first.descendants().values())
        assert [part for part in PARTS if part not in running] == []
        client = sdk(first, "small", http)
        for _ in range(5):
            client.chat.completions.create(model=MODEL, messages=HELLO)
        with DevRun(tmp_path / "other", SENTINEL_DEV_DATA=str(tmp_path / ".sentinel-dev")) as second:
            assert second.process.wait(within_s=20) == 1
            assert (
                second.said
                == f"sentinel-dev: The data folder {tmp_path}/.sentinel-dev is in use by another sentinel-dev.\n"
            )
        # What is not yet booked when it stops goes, rightly, to the Zion of the second run.
        eventually(lambda: first.books("ZION")["applied"].get("ai_requests") == 5, within_s=5)
        assert first.process.stop() == 0
        assert first.left_over() == []
        assert "Traceback" not in first.said
    with DevRun(tmp_path) as again:
        again.until_ready()
        client = openai.OpenAI(base_url=f"{again.proxy_url}/v1", api_key=token, http_client=http, max_retries=0)

        def used() -> int:
            told: dict[str, Any] = http.get(
                f"{again.proxy_url}/v1/usage", headers={"authorization": f"Bearer {token}"}
            ).json()
            return max(int(limit["used"]) for limit in told["limits"])

        # This Zion is a new one and knows nothing of the first run: it tells the proxy so.
        eventually(used, within_s=10, until=lambda units: units == 0)
        for _ in range(5):
            client.chat.completions.create(model=MODEL, messages=HELLO)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model=MODEL, messages=HELLO)
        again.process.signal(signal.SIGINT)
        assert again.process.wait(within_s=20) == 0
        assert again.left_over() == []


def test_sigkill_of_sentinel_dev_leaves_no_process(tmp_path):
    with DevRun(tmp_path) as dev:
        dev.until_ready()
        assert len(dev.descendants()) >= len(PARTS)
        dev.process.kill()
        eventually(lambda: dev.left_over() == [], within_s=5)


@pytest.mark.parametrize(("words", "name"), [("sentinel-usage-worker", "usage-worker"), ("valkey-server", "redis")])
def test_a_part_that_dies_is_named_and_ends_all(tmp_path, words, name):
    with DevRun(tmp_path) as dev:
        dev.until_ready()
        subprocess.run(["kill", "-9", str(dev.pid_of(words))], check=True)
        assert dev.process.wait(within_s=20) == 1
        assert f"sentinel-dev: {name} was killed by SIGKILL, so everything is stopped." in dev.said
        assert "Traceback" not in dev.said
        assert dev.left_over() == []


def test_a_second_ctrl_c_does_not_wait_for_streams(tmp_path, http):
    with DevRun(tmp_path) as dev:
        dev.until_ready()
        headers = {"authorization": f"Bearer {dev.token('demo')}"}
        body = {"model": "sim/slow-100ms+tokens-500", "messages": HELLO, "stream": True}
        url = f"{dev.proxy_url}/v1/chat/completions"
        with http.stream("POST", url, json=body, headers=headers) as answer:
            next(answer.iter_bytes())
            dev.descendants()
            dev.interrupt()
            eventually(lambda: "Stopping" in dev.said, within_s=5)
            assert dev.process.code is None
            dev.interrupt()
            assert dev.process.wait(within_s=5) == 130
        assert dev.left_over() == []


def test_a_taken_port_is_one_line_before_anything_starts(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        with DevRun(tmp_path, SENTINEL_DEV_WORKER_PORT=port) as dev:
            assert dev.process.wait(within_s=20) == 1
            assert len(dev.said.splitlines()) == 1
            assert f"Port {port}, for the usage worker's health and metrics, cannot be had" in dev.said
            assert "SENTINEL_DEV_WORKER_PORT" in dev.said


@pytest.mark.parametrize(
    ("variable", "value", "code"),
    [
        ("REDIS_URL", "http://:s3cret@redis", 2),
        ("REDIS_URL", "redis://:s3cret@127.0.0.1:1", 1),
        ("SENTINEL_DEV_PROXY_PORT", "eighty", 2),
        ("VERCEL_AI_GATEWAY_URL", "http://127.0.0.1:1/v1", 2),
        ("ZION_API_KEY", "s3cret", 2),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_one_line(tmp_path, variable, value, code):
    with DevRun(tmp_path, **{variable: value}) as dev:
        assert dev.process.wait(within_s=20) == code
        assert len(dev.said.splitlines()) == 1, dev.said
        assert dev.said.startswith(f"sentinel-dev: {variable} ")
        assert "s3cret" not in dev.said


def test_a_wrong_setting_of_a_service_ends_all_and_says_which(tmp_path):
    with DevRun(tmp_path, QUOTA_MODE="loose") as dev:
        assert dev.process.wait(within_s=20) == 1
        assert "sentinel-dev: proxy ended with exit code 2, so everything is stopped. It said:" in dev.said
        assert "QUOTA_MODE must be one of strict, soft, not 'loose'" in dev.said
        assert "Traceback" not in dev.said

"""How the upstream is reached: addresses, time-outs, certificates, proxies; what a call is told that got nowhere."""

from __future__ import annotations

import asyncio
import base64
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import aiohappyeyeballs
import pytest

from sentinel_proxy.upstream import Upstream, UpstreamTimeout, UpstreamUnreachable, dialer
from sentinel_shared.errors import SettingsError
from tests.unit.proxy.upstream.servers import answer, answer_head, asked, name_of, post, server_that, upstream_at

Certify = Callable[..., tuple[Path, ssl.SSLContext]]


async def answers(reader, writer):
    while True:
        writer.write(answer(name_of(await asked(reader)).encode()))


@contextmanager
def nobody_answers(host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """The port of a server whose queue is full: whoever connects waits."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
        server.listen(0)
        queue = [socket.socket() for _ in range(4)]
        try:
            for sock in queue:
                sock.setblocking(False)
                sock.connect_ex(server.getsockname())
            yield server.getsockname()[1]
        finally:
            for sock in queue:
                sock.close()


@pytest.fixture
def certified(tmp_path: Path) -> Certify:
    """Makes a certificate of its own authority: its file, and what a server needs of it."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")

    def certify(name: str = "IP:127.0.0.1,DNS:localhost", *, days: int = 2) -> tuple[Path, ssl.SSLContext]:
        stem = tmp_path / f"certificate-{len(list(tmp_path.iterdir()))}"
        key, asking, pem = (f"{stem}.{ending}" for ending in ("key", "csr", "pem"))
        made = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={stem.name}"]
        own = ["-addext", f"subjectAltName={name}", "-keyout", key, "-out", asking]
        signed = ["-in", asking, "-key", key, "-days", str(days), "-copy_extensions", "copy", "-out", pem]
        subprocess.run(["openssl", "req", "-new", *made, *own], check=True, capture_output=True)
        subprocess.run(["openssl", "x509", "-req", *signed], check=True, capture_output=True)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(pem, key)
        return Path(pem), context

    return certify


@asynccontextmanager
async def upstream_from(url: str, **options) -> AsyncIterator[Upstream]:
    upstream = upstream_at(url, **options)
    try:
        yield upstream
    finally:
        upstream.close()


async def fails(upstream: Upstream, kind: type[Exception] = UpstreamUnreachable, match: str = ".") -> None:
    """Twice, for the first must have given its place back; and never did the request leave."""
    for _ in range(2):
        with pytest.raises(kind, match=match) as caught:
            await post(upstream)
        assert isinstance(caught.value, UpstreamTimeout | UpstreamUnreachable)
        assert not caught.value.reached
    assert upstream._pool._places == 1


# --- addresses ---


async def test_where_nobody_listens_the_call_was_not_sent():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with upstream_from(f"http://127.0.0.1:{unused.getsockname()[1]}/v1") as upstream:
            await fails(upstream)


async def test_where_nobody_answers_the_connection_times_out():
    with nobody_answers() as port:
        async with upstream_from(f"http://127.0.0.1:{port}/v1", connect_timeout_s=0.1) as upstream:
            await fails(upstream, UpstreamTimeout)


async def test_a_name_that_cannot_be_looked_up_is_an_upstream_that_cannot_be_reached():
    async with upstream_from("http://a..b/v1") as upstream:
        await fails(upstream)


@pytest.fixture
def resolved_to(monkeypatch):
    """Whatever name is looked up, has these addresses."""

    def resolve(*addresses: tuple[str, int], delay_s: float = 0.02) -> None:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]

        async def start_connection(_, **options):
            return await aiohappyeyeballs.start_connection(found, **options)

        monkeypatch.setattr(dialer, "start_connection", start_connection)
        monkeypatch.setattr(dialer, "_NEXT_ADDRESS_AFTER_S", delay_s)

    return resolve


async def test_the_next_address_is_tried_while_the_first_does_not_answer(resolved_to):
    async with server_that(answers, host="127.0.0.2") as port:
        with nobody_answers("127.0.0.3", port):
            resolved_to(("127.0.0.3", port), ("127.0.0.4", port), ("127.0.0.2", port))
            async with upstream_from("http://localhost/v1") as upstream:
                assert (await post(upstream, "a")).body == b"a"


async def test_a_cancellation_is_not_lost_while_addresses_are_raced(resolved_to):
    async with server_that(answers, host="127.0.0.2") as port:
        with nobody_answers("127.0.0.3", port):
            resolved_to(("127.0.0.3", port), ("127.0.0.2", port), delay_s=0.002)
            done = turns = 0
            while done < 3:
                async with upstream_from("http://localhost/v1") as upstream:
                    call = asyncio.create_task(post(upstream))
                    await asyncio.sleep(0.001)
                    while len(asyncio.all_tasks()) < 4:  # until both are raced
                        await asyncio.sleep(0)
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    turns += 1
                    done += call.done()
                    unfinished = call.cancel()
                    await asyncio.wait([call])
                    assert call.cancelled() is unfinished
                    assert upstream._pool._places + len(upstream._pool._held) == 1


# --- certificates ---


async def test_a_certificate_is_trusted_by_the_systems_authorities_and_by_the_one_in_the_file(certified, monkeypatch):
    systems, systems_context = certified("IP:127.0.0.1,DNS:system")
    own, own_context = certified("IP:127.0.0.1,DNS:own")
    monkeypatch.setenv("SSL_CERT_FILE", str(systems))
    async with server_that(answers, tls=systems_context) as one, server_that(answers, tls=own_context) as other:
        for port in (one, other):
            async with upstream_from(f"https://127.0.0.1:{port}/v1", ca_file=own) as upstream:
                for name in ("a", "b"):
                    assert (await post(upstream, name)).body == name.encode()
                assert len(upstream._pool._held) == 1
        async with upstream_from(f"https://127.0.0.1:{other}/v1") as upstream:
            await fails(upstream, match="CERTIFICATE_VERIFY_FAILED")


@pytest.mark.parametrize(
    ("name", "days", "why"),
    [("DNS:example.com", 2, "IP address mismatch"), ("IP:127.0.0.1", -1, "expired"), ("IP:127.0.0.2", 2, "mismatch")],
)
async def test_a_certificate_of_another_or_of_yesterday_is_not_trusted(certified, name, days, why):
    ca_file, context = certified(name, days=days)
    async with (
        server_that(answers, tls=context) as port,
        upstream_from(f"https://127.0.0.1:{port}/v1", ca_file=ca_file) as upstream,
    ):
        await fails(upstream, match=why)


async def test_the_name_is_checked_that_was_asked_for(certified):
    ca_file, context = certified("DNS:localhost")
    async with server_that(answers, tls=context) as port:
        async with upstream_from(f"https://localhost:{port}/v1", ca_file=ca_file) as upstream:
            assert (await post(upstream, "a")).body == b"a"
        async with upstream_from(f"https://127.0.0.1:{port}/v1", ca_file=ca_file) as upstream:
            await fails(upstream, match="mismatch")


def test_a_file_without_certificates_is_refused_at_start(tmp_path):
    for content in ("", "no certificate"):
        (tmp_path / "ca.pem").write_text(content)
        with pytest.raises(SettingsError, match="UPSTREAM_CA_FILE"):
            upstream_at("https://127.0.0.1/v1", ca_file=tmp_path / "ca.pem")


async def test_a_server_that_speaks_no_tls_cannot_be_reached():
    async def speaks_http(reader, writer):
        writer.write(answer())
        await reader.read()

    async with server_that(speaks_http) as port, upstream_from(f"https://127.0.0.1:{port}/v1") as upstream:
        await fails(upstream)


async def test_a_server_that_hangs_up_instead_of_tls_cannot_be_reached():
    async def hangs_up(reader, writer):
        await reader.read(1)

    async with server_that(hangs_up) as port, upstream_from(f"https://127.0.0.1:{port}/v1") as upstream:
        await fails(upstream)


async def test_tls_that_is_not_agreed_upon_in_time_times_out():
    async def says_nothing(reader, writer):
        await reader.read()

    async with (
        server_that(says_nothing) as port,
        upstream_from(f"https://127.0.0.1:{port}/v1", connect_timeout_s=0.1) as upstream,
    ):
        await fails(upstream, UpstreamTimeout)


@pytest.mark.asyncio(loop_factories=["uvloop"])  # asyncio's own tells no difference
@pytest.mark.parametrize("properly", [True, False])
async def test_by_tls_an_answer_that_lasts_until_the_end_is_whole_only_if_the_end_is_the_servers(certified, properly):
    ca_file, context = certified()

    async def lasts(reader, writer):
        await asked(reader)
        writer.write(answer_head() + b"all of it")
        await writer.drain()
        if not properly:
            await asyncio.sleep(0.05)
            writer.transport.abort()

    async with (
        server_that(lasts, tls=context) as port,
        upstream_from(f"https://127.0.0.1:{port}/v1", ca_file=ca_file) as upstream,
    ):
        if properly:
            assert (await post(upstream)).body == b"all of it"
        else:
            with pytest.raises(UpstreamUnreachable):
                await post(upstream)


async def test_large_bodies_both_ways_and_a_slow_client_by_tls(certified):
    ca_file, context = certified()
    body = bytes(range(256)) * 20_000

    async def echoes(reader, writer):
        while request := await asked(reader):
            writer.write(answer(request.partition(b"\r\n\r\n")[2]))
            await writer.drain()

    async with (
        server_that(echoes, tls=context) as port,
        upstream_from(f"https://127.0.0.1:{port}/v1", ca_file=ca_file, idle_timeout_s=10) as upstream,
    ):
        for _ in range(2):
            assert (await upstream.send("POST", "/x", [], body, request_id="r")).body == body
            async with upstream.stream("POST", "/x", [], body, request_id="r") as stream:
                await asyncio.sleep(0.1)
                assert stream._connection._unread_bytes < 1_500_000
                came = []
                while (piece := await asyncio.wait_for(stream.read(), 5)) is not None:
                    came.append(piece)
            assert b"".join(came) == body
        assert len(upstream._pool._held) == 1


async def test_a_server_that_hangs_up_between_two_calls_by_tls_is_noticed(certified):
    ca_file, context = certified()

    async def answers_once(reader, writer):
        await asked(reader)
        writer.write(answer())

    async with (
        server_that(answers_once, tls=context) as port,
        upstream_from(f"https://127.0.0.1:{port}/v1", ca_file=ca_file) as upstream,
    ):
        for _ in range(3):
            await post(upstream)
            async with asyncio.timeout(5):
                while upstream._pool._held:
                    await asyncio.sleep(0.001)


async def test_a_call_by_tls_cancelled_at_any_turn_of_the_loop_leaves_no_trace(certified):
    ca_file, context = certified()
    async with server_that(answers, tls=context) as port:
        done = turns = 0
        while done < 3:
            turns += 1
            async with upstream_from(f"https://127.0.0.1:{port}/v1", ca_file=ca_file) as upstream:
                call = asyncio.create_task(post(upstream))
                for _ in range(turns):
                    await asyncio.sleep(0)
                done += call.done()
                unfinished = call.cancel()
                await asyncio.wait([call])
                assert call.cancelled() is unfinished
                assert (await post(upstream, "after")).body == b"after"


# --- proxies ---


@asynccontextmanager
async def proxy(answer_with: bytes = b"HTTP/1.1 200 Connection established\r\nvia: 1.1 p\r\n\r\n"):
    """One that connects through: its port, and the heads it was sent."""
    heads: list[bytes] = []

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def connects(reader, writer):
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        host, _, port = heads[-1].split()[1].rpartition(b":")
        if b" 2" in answer_with.partition(b"\r\n")[0]:
            there, onward = await asyncio.open_connection(host.decode(), int(port))
            try:
                writer.write(answer_with)
                async with asyncio.TaskGroup() as copying:
                    copying.create_task(copy(there, writer))
                    copying.create_task(copy(reader, onward))
            except* (OSError, RuntimeError):
                pass
            finally:
                onward.close()
        else:
            writer.write(answer_with)

    async with server_that(connects) as port:
        yield port, heads


@pytest.mark.parametrize("status", ["200 Connection established", "200", "299 Fine"])
async def test_tls_goes_through_the_environments_proxy(certified, monkeypatch, status):
    ca_file, context = certified()
    async with server_that(answers, tls=context) as port, proxy(f"HTTP/1.1 {status}\r\n\r\n".encode()) as (via, heads):
        monkeypatch.setenv("HTTPS_PROXY", f"http://ann:p%40ss@127.0.0.1:{via}")
        async with upstream_from(f"https://localhost:{port}/v1", ca_file=ca_file) as upstream:
            for name in ("a", "b"):
                assert (await post(upstream, name)).body == name.encode()
    who = base64.b64encode(b"ann:p@ss").decode()
    told = f"CONNECT localhost:{port} HTTP/1.1\r\nHost: localhost:{port}\r\nProxy-Authorization: Basic {who}\r\n\r\n"
    assert heads == [told.encode()]


@pytest.mark.parametrize(
    "answered",
    [
        pytest.param(b"HTTP/1.1 407 No\r\nproxy-authenticate: Basic\r\n\r\n", id="407"),
        pytest.param(b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1/\r\n\r\n", id="302"),
        pytest.param(b"HTTP/1.1 \xff\n\x1b[31m\r\n\r\n", id="bytes"),
        pytest.param(b"no HTTP\r\n\r\n", id="no HTTP"),
        pytest.param(b"HTTP/1.1 4200 Connected\r\n\r\n", id="4200"),
        pytest.param(b"HTTP/1.1 403 Forbid", id="cut"),
        pytest.param(b"", id="nothing"),
    ],
)
async def test_a_proxy_that_refuses_or_hangs_up_is_an_upstream_that_cannot_be_reached(monkeypatch, answered):
    async with proxy(answered) as (via, _):
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{via}")
        async with upstream_from("https://127.0.0.1:1/v1") as upstream:
            await fails(upstream, match=r"^[ -~]*$")


async def test_what_a_proxy_answers_is_not_read_for_ever(monkeypatch):
    async def never_ends(reader, writer):
        while True:
            writer.write(b"x: y\r\n" * 1_000)
            await writer.drain()

    async with server_that(never_ends) as via:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{via}")
        async with upstream_from("https://127.0.0.1:1/v1", connect_timeout_s=60) as upstream:
            with pytest.raises(UpstreamUnreachable):
                await post(upstream)


async def test_a_proxy_that_says_nothing_times_out(monkeypatch):
    async def says_nothing(reader, writer):
        await reader.read()

    async with server_that(says_nothing) as via:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{via}")
        async with upstream_from("https://127.0.0.1:1/v1", connect_timeout_s=0.1) as upstream:
            await fails(upstream, UpstreamTimeout)


async def test_a_proxy_of_plain_http_is_told_the_whole_address(monkeypatch):
    requests = []

    async def is_proxy(reader, writer):
        while True:
            requests.append(await asked(reader))
            writer.write(answer())

    async with server_that(is_proxy) as via:
        monkeypatch.setenv("http_proxy", f"http://ann:pw@127.0.0.1:{via}")
        async with upstream_from("http://gateway.example/v1") as upstream:
            await post(upstream)
    assert requests[0].startswith(b"POST http://gateway.example/v1/x HTTP/1.1\r\nhost: gateway.example\r\n")
    assert b"\r\nproxy-authorization: Basic %b\r\n" % base64.b64encode(b"ann:pw") in requests[0]


@pytest.mark.parametrize("but", ["127.0.0.1", "*", "example.com,127.0.0.1"])
async def test_what_no_proxy_names_is_reached_directly(monkeypatch, but):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", but)
    async with server_that(answers) as port, upstream_from(f"http://127.0.0.1:{port}/v1") as upstream:
        assert (await post(upstream, "a")).body == b"a"


@pytest.mark.parametrize("url", ["https://proxy:3128", "socks5://proxy:1080", "http://", "http://proxy:port"])
def test_a_proxy_that_is_of_no_use_is_refused_at_start(monkeypatch, url):
    monkeypatch.setenv("ALL_PROXY", url)
    with pytest.raises(SettingsError, match="ALL_PROXY") as caught:
        upstream_at("https://gateway.example/v1")
    assert "\n" not in str(caught.value)

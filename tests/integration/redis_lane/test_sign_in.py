from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess

import pytest

from sentinel_shared.errors import RedisRefused, RedisUnavailable, SettingsError
from sentinel_shared.redis_lane import RedisLane, Script
from tests.support.redis_server import RedisServer

PASSWORD = "s3cret-canary"


async def test_a_password_alone_and_a_user_with_one(tmp_path, connected):
    with RedisServer(tmp_path, requirepass=PASSWORD) as server:
        async with connected(f"redis://:{PASSWORD}@127.0.0.1:{server.port}") as lane:
            assert await lane.execute("k", "ACL", "WHOAMI") == b"default"
            await lane.execute("k", "ACL", "SETUSER", "ann", "on", ">p@ss/word", "~*", "+@all")
        async with connected(f"redis://ann:p%40ss%2Fword@127.0.0.1:{server.port}") as lane:
            assert await lane.execute("k", "ACL", "WHOAMI") == b"ann"


async def test_a_wrong_or_missing_password_fails_at_start_and_is_not_repeated(tmp_path):
    with RedisServer(tmp_path, requirepass="another") as server:
        for userinfo in (f":{PASSWORD}@", f"ann:{PASSWORD}@", ""):
            with pytest.raises(RedisRefused) as caught:
                await RedisLane.connect(f"redis://{userinfo}127.0.0.1:{server.port}", client_name="test")
            assert PASSWORD not in str(caught.value)
            assert "\n" not in str(caught.value)


async def test_without_the_right_to_run_scripts_the_start_fails_loudly(server):
    server.ask("ACL", "SETUSER", "limited", "on", ">pw", "~*", "+@all", "-@scripting")
    with pytest.raises(RedisRefused, match=r"does not let this user run scripts.*NOPERM"):
        await RedisLane.connect(f"redis://limited:pw@127.0.0.1:{server.port}", client_name="test")


async def test_a_user_with_scripts_and_little_else_is_enough(server, connected):
    script = Script.of("store", b"return redis.call('SET', KEYS[1], ARGV[1])")
    rights = ["~sentinel:*", "+eval", "+evalsha", "+script|load", "+set", "+ping"]
    server.ask("ACL", "SETUSER", "lean", "on", ">pw", *rights)
    async with connected(f"redis://lean:pw@127.0.0.1:{server.port}", scripts=[script]) as lane:
        assert await lane.call(script, ["sentinel:a"], ["v"]) == b"OK"
        with pytest.raises(RedisRefused, match="NOPERM"):
            await lane.call(script, ["other:a"], ["v"])


async def test_a_script_that_does_not_compile_is_named(server):
    with pytest.raises(RedisRefused, match="the script broken"):
        await RedisLane.connect(server.url, client_name="test", scripts=[Script.of("broken", b"return (")])


async def test_nobody_there_is_one_clear_line(tmp_path):
    with pytest.raises(RedisUnavailable, match="cannot connect to Redis at") as caught:
        await RedisLane.connect(f"unix://{tmp_path}/absent.sock", client_name="test")
    assert "\n" not in str(caught.value)


@pytest.fixture
def certificate(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    key, pem = tmp_path / "key.pem", tmp_path / "ca.pem"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    request += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-keyout", str(key), "-out", str(pem)]
    subprocess.run(request, check=True, capture_output=True)
    return key, pem


@pytest.fixture
async def tls_port(server, certificate):
    """Ends TLS before the server, which may have been built without it."""
    key, pem = certificate
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem, key)
    relays: set[asyncio.Task[None] | None] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        relays.add(asyncio.current_task())
        plain_reader, plain_writer = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(copy(reader, plain_writer), copy(plain_reader, writer))

    listener = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
    yield listener.sockets[0].getsockname()[1]
    listener.close()
    if relays:
        await asyncio.wait([task for task in relays if task], timeout=5)


async def test_tls_with_an_authority_of_our_own(tls_port, certificate, connected):
    async with connected(f"rediss://127.0.0.1:{tls_port}", tls_ca_file=str(certificate[1])) as lane:
        values = [b"x" * 100_000, b"y"]
        for value in values:
            await lane.execute("k", "SET", "k", value)
            assert await lane.execute("k", "GET", "k") == value


async def test_tls_from_an_unknown_authority_is_refused(tls_port):
    with pytest.raises(RedisUnavailable, match="certificate verify failed"):
        await RedisLane.connect(f"rediss://127.0.0.1:{tls_port}", client_name="test")


async def test_a_file_of_authorities_that_is_none_is_told_by_its_variable(tmp_path):
    with pytest.raises(SettingsError, match="REDIS_CA_FILE"):
        await RedisLane.connect("rediss://127.0.0.1", client_name="test", tls_ca_file=str(tmp_path / "absent.pem"))
